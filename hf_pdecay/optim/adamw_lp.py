"""AdamW with weight decay for any p norm: the optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .backends import MIN_COMPILED, Backend, all_finite
from .distributed import agreed_finite, is_dtensor, local, local_grad, shard_place
from .dormancy import Awakening, dormant_entry, is_awake, is_awake_for_good, placed
from .gradients import check_dense, count_skipped, finite_by_norm, skipped_steps
from .moments import as_stored, clone, is_quantized, zero_moment
from .param_groups import steps_decay
from .step_cache import StepCache, hyper_of
from .tensor_step import Hyperparameters, Structure, TensorStep, alpha_lambda_p
from .unit_decay import UnitDecay
from .units import ELEMENT, check_units, kind_of
from .validation import FOREIGN_KEYS, check_hyperparameters, check_real, check_state_dict


class AdamWLp(Optimizer):
    r"""AdamW with decoupled weight decay for any p norm.

    Each step is AdamW's, followed by a shrink of every weight whose factor comes from the weight before the step:

        w_{n+1} = w' · s / (s + α λ_p),   s = |w_n|^(2-p)

    with w' the result of ``torch.optim.AdamW`` (https://huggingface.co/papers/2404.10824, algorithm 1). For p < 2 small
    weights reach exact zero in a few steps. ``lambda_p=0`` is ``torch.optim.AdamW`` to the bit; ``weight_decay`` keeps
    its meaning, and both together are the elastic net.

    - Zero absorbs: a weight of exact zero stays zero while α λ_p > 0. A tensor that is wholly zero at its first step
      (LoRA's B, a zero-initialised head) is left undecayed until it has become non-zero.
    - bfloat16 and float16 weights that decay are computed in float32 and rounded stochastically, as are such moments.
      The random bits depend on the step and the place of the weight only, so runs resume exactly and replicas agree.
    - A step with a NaN or infinite gradient is skipped and counted, see :attr:`skipped_steps`.
    - A param group may say in ``group`` what decays as one: ``"element"`` (the default), ``"row"``, ``"column"``,
      ``"neuron"``, ``"head"``, ``"rank"``, or N:M such as ``"2:4"``, where the weakest of each M weights decay. Where
      the groups lie is in ``units``, see :func:`~hf_pdecay.optim.units.units_of`; without them a row is an
      index of dimension 0 and a column one of dimension 1, as in ``nn.Linear`` and convolutions.

    Every hyperparameter lives in ``param_groups``, so a group may have its own and a scheduler may move them.

    Args:
        params: Parameters, or dicts of param groups.
        lr: Learning rate α, a float or a one-element tensor, at least 0.
        betas: Decay of the first and the second moment, each in [0, 1).
        eps: Added to the denominator, at least 0.
        weight_decay: λ₂, the decoupled L2 decay of AdamW, at least 0.
        p_norm: p, above 0. Below 2 weights become exactly zero, and the smaller p, the sharper the choice.
        lambda_p: λ_p, at least 0. The penalty minimised is (λ_p / p) ‖w‖_p^p.
        keep_zeros: Whether weights that are zero stay zero, also where λ_p or the learning rate is 0.
        maximize: Whether to maximise the objective.
        skip_nonfinite: Whether a NaN or infinite gradient in any group with this set skips the step of all of them.
        moments: What both moments are stored as: ``"float32"``, ``"bfloat16"`` (rounded stochastically) or ``"8bit"``
            (torchao's blocks of 256, for tensors of at least 4096 weights and whole blocks, float32 for others); the
            dtype of the weights by default.
        backend: How the step is computed. ``"compiled"`` is one C++ function, for CPUs; ``"triton"`` one kernel, for
            GPUs; ``"foreach"`` plain torch operations on bounded chunks, for any device; ``"reference"`` plain formulas
            in float64, for comparison. ``"auto"`` takes the fastest that this machine has, tensor by tensor, and logs
            what it took and why. It is not part of a checkpoint.

    Raises:
        ValueError: If a hyperparameter is out of its range or a parameter is complex.
        ImportError: If ``moments="8bit"`` and torchao is not installed.

    Example:
        >>> optimizer = AdamWLp(model.parameters(), lr=1e-3, p_norm=0.8, lambda_p=0.01)
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        p_norm: float = 0.8,
        lambda_p: float = 0.01,
        keep_zeros: bool = False,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        moments: str | None = None,
        backend: str = "auto",
    ) -> None:
        self._backend = Backend(backend)
        # Whoever has taken the norm of all gradients, to clip them, may leave it here before a step: a finite norm
        # saves the look at the gradients, which is an eighth of a step.
        self.grad_norm: Tensor | float | None = None
        # What the last step did, for the next one to do again.
        self._plan: StepCache | None = None
        self._awakening = Awakening()
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "p_norm": p_norm,
            "lambda_p": lambda_p,
            "keep_zeros": keep_zeros,
            "maximize": maximize,
            "skip_nonfinite": skip_nonfinite,
            "moments": moments,
            # A counter, kept here so that a checkpoint carries it.
            "skipped_steps": 0,
        }
        check_hyperparameters(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, whose missing hyperparameters are the optimizer's defaults.

        Raises:
            ValueError: If a hyperparameter is out of its range, a parameter is complex, or ``units`` do not fit.
        """
        check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            check_real(self.param_groups[-1]["params"], "AdamWLp")
            check_units(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @property
    def backends(self) -> dict[str, tuple[str, str]]:
        """For each type of device that holds weights, the backend of the step and why it was chosen.

        Chooses, and compiles if need be, what the first step would otherwise.
        """
        numel: dict[str, int] = {}
        for group in self.param_groups:
            for param in group["params"]:
                numel[param.device.type] = numel.get(param.device.type, 0) + local(param).numel()
                if is_dtensor(param) and kind_of(group) != ELEMENT:
                    # However few weights there are: groups of which are sharded take more than plain operations.
                    numel[param.device.type] = max(numel[param.device.type], MIN_COMPILED)
        decays = any(steps_decay(group) or group["keep_zeros"] for group in self.param_groups)
        return {device: self._backend.choice(device, count, decays) for device, count in numel.items()}

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped for NaN or infinite gradients. Reading it synchronises with the device."""
        return skipped_steps(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy holds: the backend too, which a checkpoint does not."""
        fresh = {"_backend": Backend(self._backend.name), "grad_norm": None, "_plan": None, "_awakening": Awakening()}
        return {**super().__getstate__(), **fresh}

    def __deepcopy__(self, memo: dict[int, Any]) -> AdamWLp:
        """Return a copy of the optimizer and of its parameters."""
        for state in self.state.values():
            for moment in (state.get("exp_avg"), state.get("exp_avg_sq")):
                if moment is not None and is_quantized(moment):
                    memo[id(moment)] = clone(moment)
        copied: AdamWLp = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a checkpoint, also one of an older version."""
        super().__setstate__(state)
        self.__dict__.setdefault("_backend", Backend())
        self.__dict__.setdefault("grad_norm", None)
        self._plan, self._awakening = None, Awakening()
        for values in self.state.values():
            if values:
                values.setdefault("dormant", torch.zeros((), dtype=torch.bool))
        self.defaults.setdefault("moments", None)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of ``torch.optim.AdamW``.

        What the checkpoint does not name, such as ``p_norm`` in one of AdamW, stays as it is in each group.

        Args:
            state_dict: What ``state_dict()`` of either optimizer returned.

        Raises:
            ValueError: If the groups, the shapes or the units are those of another model, or it is an AMSGrad
                checkpoint.
        """
        check_state_dict(state_dict, self.param_groups)
        before = self.param_groups
        groups = [{**ours, **theirs} for ours, theirs in zip(before, state_dict["param_groups"], strict=True)]
        for group, ours in zip(groups, before, strict=True):
            for key in FOREIGN_KEYS:
                group.pop(key, None)
            check_hyperparameters(group)
            check_units({**group, "params": ours["params"]})
        super().load_state_dict({**state_dict, "param_groups": groups})
        for group, theirs in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, key in zip(group["params"], theirs["params"], strict=True):
                state = self.state.get(param)
                if not state:
                    continue
                # Versions of torch have counted in numbers and in other dtypes; in bfloat16 a counter would stall.
                state["step"] = torch.as_tensor(state["step"]).to(torch.float32)
                # torch casts all state but the step to the dtype of the parameter: back to what it was saved as.
                saved = state_dict["state"][key]
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = as_stored(saved[name], param, group["moments"], signed=name == "exp_avg")
                if "dormant" in state:
                    state["dormant"] = placed(state["dormant"].bool())
                elif "lambda_p" not in theirs:
                    # AdamW does not say which tensors have been zero from the start: those that still are.
                    state["dormant"] = dormant_entry(param)
                else:
                    state["dormant"] = torch.zeros((), dtype=torch.bool)
        self._plan, self._awakening = None, Awakening()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step.

        Args:
            closure: Recomputes the loss and returns it, with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: If a gradient is sparse, or the backend that was asked for cannot do a tensor.
        """
        loss = None
        norm, self.grad_norm = self.grad_norm, None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan, self._plan = self._plan, None
        shrinkages: dict[int, UnitDecay] = {}
        if plan is None or not plan.follow(self.param_groups, self.state):
            shrinkages = self._shrinkages()
            plan = self._planned(shrinkages)
        finite = self._finite(norm, plan)
        for index, shrinkage in shrinkages.items():
            shrinkage.remember(plan.done[index])
        for part in plan.parts:
            part.run(finite if part.careful else True)
        self._plan = plan if plan.lasts else None  # others hold gradients
        for index, shrinkage in shrinkages.items():
            self._shrink(index, shrinkage, finite, plan.done[index])
        if finite is not True:
            self._count_skipped(finite)
        return loss

    def _shrinkages(self) -> dict[int, UnitDecay]:
        """What decays by groups, by the index of its param group."""
        structured = {
            index: group
            for index, group in enumerate(self.param_groups)
            if kind_of(group) != ELEMENT and steps_decay(group)
        }
        if structured and not self._backend.chosen:
            _ = self.backends  # chosen from all weights, whether or not they have gradients in this step
        chosen = {device: name for device, (name, _) in self._backend.chosen.items()}
        return {
            index: UnitDecay(group, chosen.get(group["params"][0].device.type, "") if group["params"] else "")
            for index, group in structured.items()
        }

    def _shrink(self, group_index: int, shrinkage: UnitDecay, finite: bool | Tensor, done: set[int]) -> None:
        group = self.param_groups[group_index]

        def step_of(index: int) -> int | Tensor:
            step = self.state.get(group["params"][index], {}).get("step", 0)
            return int(step.item()) if isinstance(step, Tensor) and step.is_cpu else step

        careful = group["skip_nonfinite"]
        alpha_lambda_p = partial(_alpha_lambda, group)
        shrinkage.apply(alpha_lambda_p, step_of, group_index << 20, finite if careful else True, done=done)

    def _planned(self, shrinkages: Mapping[int, UnitDecay]) -> StepCache:
        """Find out who does what, and make the state of tensors that have none yet."""
        for group in self.param_groups:
            check_dense(group["params"], "AdamWLp")
        self._awakening.hear()
        hypers = [hyper_of(group) for group in self.param_groups]
        steps: list[TensorStep] = []
        owners: list[tuple[int, int]] = []  # of each step: indices of the param group and of the parameter in it
        for index, (group, hyper) in enumerate(zip(self.param_groups, hypers, strict=True)):
            steps += self._tensor_steps(index, group, hyper, shrinkages.get(index))
            owners += [(index, number) for number, param in enumerate(group["params"]) if param.grad is not None]
        parts = self._backend.assign(steps)
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        states = [self.state[param] for param in params]
        self._awakening.ask(dict(zip(params, states, strict=True)))
        shrunk = [owners[step] for part in parts for step in part.shrunk]
        done = {index: {number for owner, number in shrunk if owner == index} for index in shrinkages}
        for index, shrinkage in shrinkages.items():
            shrinkage.check(done[index])
        lasts = all(is_awake_for_good(state["dormant"]) for state in states) and all(
            shrinkage.lasts(done[index]) for index, shrinkage in shrinkages.items()
        )
        tables = [(each.tables, hypers[index]) for index, each in shrinkages.items() if each.tables is not None]
        return StepCache(self.param_groups, self.state, hypers, parts, lasts, tables, done)

    def _tensor_steps(
        self, group_index: int, group: dict[str, Any], hyper: Hyperparameters, shrinkage: UnitDecay | None
    ) -> list[TensorStep]:
        structures: dict[int, Structure] = {}
        if shrinkage is not None:
            structures = shrinkage.structures(hyper, partial(_alpha_lambda, group))
            # What decays by groups is not felt in the step itself.
            hyper = replace(hyper, lambda_p=0.0, rounds=True)
        steps = []
        for index, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            place = (group_index << 20) + index
            state = self.state[param]
            if not state:
                self._init_state(param, group)
            elif not param.is_cpu and state["step"].device != param.device:
                state["step"] = state["step"].to(param.device)
            awake = is_awake(param, state["dormant"])
            exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
            if is_dtensor(param):
                # Autograd looks at the DTensor; the step below changes the shard that it holds.
                torch.autograd.graph.increment_version(param)
                grad, place = local_grad(param, grad), shard_place(param, place)
                param, exp_avg, exp_avg_sq = map(local, (param, exp_avg, exp_avg_sq))
            structure = structures.get(index)
            steps.append(TensorStep(param, grad, exp_avg, exp_avg_sq, state["step"], awake, hyper, place, structure))
        return steps

    def _finite(self, norm: Tensor | float | None, plan: StepCache) -> bool | Tensor:
        """Whether all gradients of careful parts are finite: known by the norm of all, or looked at here."""
        parts = [part for part in plan.parts if part.careful]
        if not parts:
            return True
        known = finite_by_norm(norm)
        return agreed_finite(all_finite(parts), plan.owners) if known is None else known

    def _count_skipped(self, finite: bool | Tensor) -> None:
        count_skipped(self.param_groups, finite)

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        state["exp_avg"] = zero_moment(param, group["moments"], signed=True)
        state["exp_avg_sq"] = zero_moment(param, group["moments"], signed=False)
        whole = kind_of(group) == ELEMENT  # else groups are dormant, not tensors
        state["dormant"] = dormant_entry(param) if whole else torch.zeros((), dtype=torch.bool)


def _alpha_lambda(group: dict[str, Any], device: torch.device) -> float | Tensor:
    return alpha_lambda_p(group["lr"], group["lambda_p"], device)
