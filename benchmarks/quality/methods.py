"""The methods that the quality benchmark compares, all with the same Trainer and the same AdamW.

Methods of other authors are written here from their descriptions, or come from their own packages.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments, decayable_parameter_names

from .tasks import Task


@dataclass(frozen=True)
class Setting:
    """Settings of one run: the knob of its method, and the settings that all methods share.

    Args:
        target: Fraction of zeros to reach; None for methods that cannot be given one.
        knob: Value of the method's one knob.
        begin: Fraction of the steps after which pruning begins.
        end: Fraction of the steps after which pruning has ended and healing begins.
        arguments: Arguments of the Trainer.
        teacher: Folder of the fine-tuned dense model that methods with a teacher prune and learn from.
        lesson: Further settings of the Trainer of such a method; empty for a run without a teacher.
    """

    target: float | None
    knob: Any
    begin: float
    end: float
    arguments: dict[str, Any]
    teacher: str | None = None
    lesson: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return int(self.arguments["max_steps"])


def matrices(model: nn.Module) -> list[Tensor]:
    """Return the weights that every method prunes: the weights that hf_pdecay decays by default."""
    names = set(decayable_parameter_names(model))
    return [param for name, param in model.named_parameters() if name in names]


def smallest(weights: Sequence[Tensor], fraction: float) -> list[Tensor]:
    """Return masks that keep all weights but this fraction, the smallest of all tensors together."""
    magnitudes = torch.cat([weight.detach().abs().reshape(-1) for weight in weights])
    count = round(fraction * len(magnitudes))
    if count == 0:
        return [torch.ones_like(weight) for weight in weights]
    threshold = magnitudes.kthvalue(count).values
    return [(weight.detach().abs() > threshold).to(weight.dtype) for weight in weights]


class MagnitudePruning(TrainerCallback):
    """Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878): the smallest weights of all, on a cubic schedule.

    Args:
        weights: Weights to prune.
        fraction: Step → fraction of zeros after it; a step prunes if its fraction is higher than before.
        uniform: Prune the same fraction of each tensor, instead of the smallest weights of all tensors.
    """

    def __init__(self, weights: Sequence[Tensor], fraction: Callable[[int], float], uniform: bool = False) -> None:
        self.weights = weights
        self.fraction = fraction
        self.uniform = uniform
        self.now = 0.0
        self.masks: list[Tensor] = []

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Prune, and keep pruned weights at zero."""
        wanted = self.fraction(state.global_step)
        for weight, mask in zip(self.weights, self.masks, strict=False):
            weight.mul_(mask)
        if wanted > self.now:
            budgets = [[weight] for weight in self.weights] if self.uniform else [self.weights]
            self.now, self.masks = wanted, [mask for budget in budgets for mask in smallest(budget, wanted)]
            for weight, mask in zip(self.weights, self.masks, strict=True):
                weight.mul_(mask)


def cubic(setting: Setting, every: int = 10) -> Callable[[int], float]:
    """Return the cubic schedule, with a pruning step every few steps; the last one reaches the target."""
    begin, end = round(setting.begin * setting.steps), round(setting.end * setting.steps)
    target = setting.target or 0.0

    def fraction(step: int) -> float:
        pruning_step = end - math.ceil((end - min(step, end)) / every) * every  # the last one up to this step
        t = min(max((pruning_step - begin) / (end - begin), 0.0), 1.0)
        return target * (1 - (1 - t) ** 3)

    return fraction


class _WithTeacher(PDecayTrainer):
    """A Trainer with a teacher whose optimizer may be any."""

    theirs: Any = None

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Return the optimizer that the method made."""
        self.optimizer = self.theirs
        return self.optimizer


def _trainer(task: Task, setting: Setting, optimizer: Any, callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
    if setting.lesson:
        args = PDecayTrainingArguments(**setting.arguments, lambda_p=0.0, **setting.lesson)
        trainer = _WithTeacher(model=task.model, args=args, train_dataset=task.train, callbacks=list(callbacks))
        trainer.theirs = optimizer
        return trainer
    return Trainer(
        model=task.model,
        args=TrainingArguments(**setting.arguments),
        train_dataset=task.train,
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )


def _adamw(task: Task, setting: Setting, groups: Any = None) -> torch.optim.AdamW:
    arguments = setting.arguments
    return torch.optim.AdamW(
        list(task.model.parameters()) if groups is None else groups,
        lr=arguments["learning_rate"],
        betas=(0.9, arguments.get("adam_beta2", 0.999)),
        weight_decay=0.0,
        fused=True,
    )


def dense(task: Task, setting: Setting) -> Trainer:
    """AdamW without pruning."""
    return _trainer(task, setting, _adamw(task, setting))


def pdecay(task: Task, setting: Setting) -> Trainer:
    """``--optim adamw_lp --target_sparsity``; the knob is ``sparsity_decay``, other flags keep their defaults."""
    args = PDecayTrainingArguments(
        **setting.arguments,
        target_sparsity=setting.target,
        sparsity_decay=setting.knob,
        sparsity_begin=setting.begin,
        sparsity_end=setting.end,
        **setting.lesson,
    )
    return PDecayTrainer(model=task.model, args=args, train_dataset=task.train)


def pdecay_fixed(task: Task, setting: Setting) -> Trainer:
    """``--optim adamw_lp --lambda_p``, which cannot be given a target; the knob is λ_p, or p and λ_p."""
    p_norm, lambda_p = setting.knob if isinstance(setting.knob, (list, tuple)) else (0.8, setting.knob)
    args = PDecayTrainingArguments(**setting.arguments, p_norm=p_norm, lambda_p=lambda_p)
    return PDecayTrainer(model=task.model, args=args, train_dataset=task.train)


def gmp(task: Task, setting: Setting, uniform: bool = False) -> Trainer:
    """Gradual magnitude pruning; the knob is the fraction of the run at which it ends."""
    later = Setting(setting.target, None, setting.begin, setting.knob, setting.arguments)
    pruning = MagnitudePruning(matrices(task.model), cubic(later), uniform)
    return _trainer(task, setting, _adamw(task, setting), [pruning])


def one_shot(task: Task, setting: Setting) -> Trainer:
    """Prune the smallest weights at once, then heal; the knob is the pruning step, as a fraction of the run."""
    at, target = round(setting.knob * setting.steps), setting.target or 0.0
    pruning = MagnitudePruning(matrices(task.model), lambda step: target if step >= at else 0.0)
    return _trainer(task, setting, _adamw(task, setting), [pruning])


def one_shot_unhealed(task: Task, setting: Setting) -> Trainer:
    """Prune the smallest weights after the last step, without healing; it has no knob."""
    pruning = MagnitudePruning(
        matrices(task.model), lambda step: (setting.target or 0.0) if step >= setting.steps else 0.0
    )
    return _trainer(task, setting, _adamw(task, setting), [pruning])


def _prune_optimizer(task: Task, setting: Setting, **group: Any) -> Any:
    warnings.filterwarnings("ignore", module="torchao")
    from torchao.prototype.pat.optim import PruneOptimizer

    chosen = matrices(task.model)
    ids = {id(param) for param in chosen}
    others = [param for param in task.model.parameters() if id(param) not in ids]
    base = _adamw(task, setting, [{"params": chosen, **group}, {"params": others}])
    begin, end = round(setting.begin * setting.steps), round(setting.end * setting.steps)
    return PruneOptimizer(base, warmup_steps=begin, healing_start_step=end)


def torchao_min_sparsity(task: Task, setting: Setting) -> Trainer:
    """``PruneOptimizer`` of torchao with ``MinSparsityConstraint`` by elements; the knob is ``prox_freq``."""
    optimizer = _prune_optimizer(
        task,
        setting,
        prox_type="MinSparsityConstraint",
        group_type="KElementGrouper",
        k=1,
        min_sparsity=setting.target,
        min_sparsity_schedule=True,
        prox_freq=setting.knob,
    )
    return _trainer(task, setting, optimizer)


def torchao_lasso(task: Task, setting: Setting) -> Trainer:
    """``PruneOptimizer`` of torchao with ``ProxLasso``, which cannot be given a target; the knob is ``reg_lambda``."""
    optimizer = _prune_optimizer(
        task, setting, prox_type="ProxLasso", group_type="ElemGrouper", reg_lambda=setting.knob
    )
    return _trainer(task, setting, optimizer)


class SignedSquare(nn.Module):
    """w = θ |θ|: L2 decay on θ is an L1 penalty on w (the parametrisation of two factors, arXiv 2210.01212)."""

    def forward(self, theta: Tensor) -> Tensor:
        """Return w."""
        return theta * theta.abs()

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return θ."""
        return weight.sign() * weight.abs().sqrt()


def factored(task: Task, setting: Setting) -> Trainer:
    """L2 decay on two factors of each weight, pruned by magnitude when the ramp ends; the knob is the decay."""
    names = decayable_parameter_names(task.model)
    for name in names:
        module, _, attribute = name.rpartition(".")
        parametrize.register_parametrization(task.model.get_submodule(module), attribute, SignedSquare())
    thetas = [param for name, param in task.model.named_parameters() if ".parametrizations." in name]
    ids = {id(param) for param in thetas}
    others = [param for param in task.model.parameters() if id(param) not in ids]
    optimizer = _adamw(task, setting, [{"params": thetas, "weight_decay": setting.knob}, {"params": others}])
    at, target = round(setting.end * setting.steps), setting.target or 0.0
    pruning = MagnitudePruning(thetas, lambda step: target if step >= at else 0.0)
    return _trainer(task, setting, optimizer, [pruning])


def taught(task: Task, setting: Setting, method: Callable[[Task, Setting], Trainer]) -> Trainer:
    """A method that prunes a fine-tuned model, which is also the teacher.

    The knob is a string: the method's own knob, then settings of the Trainer, as in ``0.3, teacher_hidden=10``.
    With its own knob alone it has the same start and no teacher.
    """
    load_model(task.model, Path(str(setting.teacher)) / "model.safetensors")
    knob, *pairs = str(setting.knob).split(", ")
    lesson = {name: yaml.safe_load(value) for name, value in (pair.split("=") for pair in pairs)}
    teacher = {"teacher": "self"} if pairs else {}
    return method(task, replace(setting, knob=float(knob), lesson=teacher | lesson))


METHODS: dict[str, Callable[[Task, Setting], Trainer]] = {
    "dense": dense,
    "pdecay": pdecay,
    "gmp": gmp,
    "gmp_uniform": partial(gmp, uniform=True),
    "one_shot": one_shot,
    "one_shot_unhealed": one_shot_unhealed,
    "torchao_min_sparsity": torchao_min_sparsity,
    "factored": factored,
    "pdecay_fixed": pdecay_fixed,
    "torchao_lasso": torchao_lasso,
    "pdecay_taught": partial(taught, method=pdecay),
    "gmp_uniform_taught": partial(taught, method=partial(gmp, uniform=True)),
    "torchao_min_sparsity_taught": partial(taught, method=torchao_min_sparsity),
}
