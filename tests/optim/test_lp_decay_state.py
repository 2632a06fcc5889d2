"""LpDecay's checkpoints, and the runs that it is part of: targets, the Trainer, Accelerate, schedule-free weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import TrainerCallback

from hf_pdecay import AdamWLp, LpDecay, PDecayTrainer, SparsityReport
from hf_pdecay.optim.muon import MuonWithAdamW
from hf_pdecay.rules.assign import build_param_groups
from hf_pdecay.target.control import SparsityControl
from tests.helpers.models import tiny_gpt2
from tests.helpers.reference.sgd_lp64 import ScheduleFreeReference
from tests.helpers.steps import bits, normal, through_a_file


Make = Callable[[Any], torch.optim.Optimizer]
BASES: dict[str, Make] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "plain sgd": lambda params: torch.optim.SGD(params, lr=0.05),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.02),
    "fused adamw": lambda params: torch.optim.AdamW(params, lr=0.02, fused=True),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.05),
    "muon": lambda params: MuonWithAdamW(params, lr=0.02),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.02),
    "bnb adamw 8bit": lambda params: pytest.importorskip("bitsandbytes").optim.AdamW8bit(params, lr=0.02),
    "bnb lion": lambda params: pytest.importorskip("bitsandbytes").optim.Lion(params, lr=0.005),
}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    shapes = [(64, 80), (33,), (5, 7)]
    some = [nn.Parameter((normal(*shape, seed=k) * 0.1).to(dtype)) for k, shape in enumerate(shapes)]
    return [*some, nn.Parameter(torch.zeros(6, 4, dtype=dtype))]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], *seeds: int) -> None:
    for seed in seeds:
        for k, param in enumerate(params):
            param.grad = normal(*param.shape, seed=100 * seed + k).to(param.dtype)
            if k == 3 and seed < 3:
                param.grad.zero_()
        optimizer.step()


def clones(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(set(BASES) - {"nadam"}))  # loading rounds its product to the weights' dtype
def test_a_resumed_run_is_the_run_that_was_not_interrupted(name: str, dtype: torch.dtype) -> None:
    whole = parameters(dtype)
    optimizer = LpDecay(BASES[name](whole), p_norm=0.3, lambda_p=2.0)
    run(optimizer, whole, 1, 2)
    saved, resumed = through_a_file(optimizer.state_dict()), clones(whole)
    run(optimizer, whole, 3, 4, 5)
    again = LpDecay(BASES[name](resumed), p_norm=0.9, lambda_p=0.1)
    again.load_state_dict(saved)
    assert {group["p_norm"] for group in again.param_groups} == {0.3}
    run(again, resumed, 3, 4, 5)
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))
    assert bool((whole[3] != 0).any()), "what began as zeros learns, also after a checkpoint"
    assert bool((whole[0] == 0).any())


@pytest.mark.parametrize("name", BASES)
def test_a_checkpoint_of_the_base_alone_loads(name: str) -> None:
    params = parameters()
    base = BASES[name](params)
    run(base, params, 1, 2)
    resumed = clones(params)
    again = LpDecay(BASES[name](resumed), p_norm=0.6, lambda_p=0.0)
    again.load_state_dict(through_a_file(base.state_dict()))
    assert {(group["p_norm"], group["skipped_steps"]) for group in again.param_groups} == {(0.6, 0)}
    run(base, params, 3, 4)
    run(again, resumed, 3, 4)
    assert all(torch.equal(one, other) for one, other in zip(params, resumed, strict=True))


def test_adamw_lp_and_the_wrapped_adamw_go_on_with_each_others_checkpoints() -> None:
    one, other = parameters(), parameters()
    options: dict[str, Any] = {"p_norm": 0.5, "lambda_p": 0.3}
    fused = AdamWLp(one, lr=0.02, weight_decay=0.01, **options)
    wrapped = LpDecay(torch.optim.AdamW(other, lr=0.02, weight_decay=0.01), **options)
    run(fused, one, 1, 2)
    run(wrapped, other, 1, 2)
    one, other = clones(one), clones(other)
    swapped = LpDecay(torch.optim.AdamW(one, lr=1.0)), AdamWLp(other, lr=1.0)
    swapped[0].load_state_dict(through_a_file(fused.state_dict()))
    swapped[1].load_state_dict(through_a_file(wrapped.state_dict()))
    run(swapped[0], one, 3, 4)
    run(swapped[1], other, 3, 4)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    params = parameters()
    optimizer = LpDecay(BASES["sgd"](params))
    with pytest.raises(ValueError, match=r"param groups of \[4\] tensors, this optimizer has \[3\]"):
        LpDecay(BASES["sgd"](params[:3])).load_state_dict(optimizer.state_dict())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["p_norm"] = 0
    with pytest.raises(ValueError, match="Invalid p_norm"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(("saved", "loading"), [("adamw", "sgd"), ("sgd", "adamw"), ("sgd", "muon"), ("lion", "sgd")])
def test_a_checkpoint_of_another_base_is_refused(saved: str, loading: str) -> None:
    """The param groups fit, and the base would ignore what it does not know in the state."""
    bases = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "muon": torch.optim.Muon, "lion": _Lion}
    matrices = [nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    optimizer, other = (LpDecay(bases[name](clones(matrices), lr=0.1)) for name in (saved, loading))
    with pytest.raises(ValueError, match="which this optimizer has: it is of another optim"):
        other.load_state_dict(optimizer.state_dict())


class _Lion(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.0})


def test_state_dict_helpers_of_distributed_checkpoints() -> None:
    """They make the state by a step with a learning rate of 0, and flatten it by the names of the parameters."""
    model, other = nn.Linear(8, 3), nn.Linear(8, 3)
    optimizer, fresh = (LpDecay(BASES["sgd"](each.parameters()), p_norm=0.5) for each in (model, other))
    fresh.param_groups[0]["p_norm"] = 0.9
    run(optimizer, list(model.parameters()), 1, 2)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, fresh, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    assert fresh.param_groups[0]["p_norm"] == 0.5
    for each, some in ((optimizer, model), (fresh, other)):
        run(each, list(some.parameters()), 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q) and not fresh.state[q]["dormant"]


# --- targets


def train(make: Make, steps: range, model: nn.Module, saved: Any = None, stop: int = 0) -> Any:
    """Regress with a target of 80%; returns the optimizer."""
    groups = build_param_groups(model, p_norm=0.8, lambda_p=0.01)
    optimizer = LpDecay(make(groups))
    optimizer.train()
    if saved is not None:
        optimizer.load_state_dict(saved)
    control = SparsityControl(optimizer, 60, target_sparsity=0.8)
    for step in steps:
        control.before_step(step)
        optimizer.zero_grad()
        model(normal(32, 40, seed=step)).square().mean().backward()
        optimizer.step()
        control.after_step(step)
    return optimizer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 20))


def decayed(model: Any) -> torch.Tensor:
    return torch.cat([model[0].weight.reshape(-1), model[2].weight.reshape(-1)])


TARGET_BASES = BASES | {
    "schedule free": lambda params: pytest.importorskip("schedulefree").AdamWScheduleFree(params, lr=0.02),
}


@pytest.mark.parametrize("name", TARGET_BASES)
def test_a_target_is_met_to_the_weight_and_resumed_to_the_bit(name: str) -> None:
    make, model = TARGET_BASES[name], network()
    train(make, range(1, 61), model)
    assert int((decayed(model) == 0).sum()) == round(0.8 * decayed(model).numel())
    if name == "schedule free":
        return  # whose weights at evaluation are tested below
    cut = network()
    saved = through_a_file(train(make, range(1, 31), cut).state_dict())
    train(make, range(31, 61), cut, saved)
    assert torch.equal(decayed(cut), decayed(model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit"])
def test_torchao_quantised_moments(kind: str, request: pytest.FixtureRequest) -> None:
    torchao = pytest.importorskip("torchao.optim")
    if kind == "AdamW4bit":  # the other is compiled, as torchao has it
        request.getfixturevalue("eager")
    model = nn.Sequential(nn.Linear(40, 128, bias=False), nn.Tanh(), nn.Linear(128, 32, bias=False))
    optimizer = train(lambda groups: getattr(torchao, kind)(groups, lr=0.02), range(1, 61), model)
    assert int((decayed(model) == 0).sum()) == round(0.8 * decayed(model).numel())
    assert type(optimizer.state[model[0].weight]["exp_avg_sq"]).__name__ == f"OptimState{kind[5:]}"


def test_a_trainer_run_counts_cuts_saves_and_resumes(make_args: Any, tokens: Any, tmp_path: Path) -> None:
    def trainer(**overrides: Any) -> PDecayTrainer:
        # 12 steps are two epochs: a shuffled epoch that transformers 4.57 resumes goes on with other batches.
        args = make_args(
            **{"target_sparsity": 0.6, "max_steps": 30, "save_strategy": "steps", "save_steps": 12, **overrides}
        )
        model = tiny_gpt2()
        groups = build_param_groups(model, p_norm=0.8, lambda_p=0.01)
        base = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        return PDecayTrainer(model=model, args=args, train_dataset=tokens, optimizers=(LpDecay(base), None))

    whole = trainer()
    whole.train()
    report = SparsityReport.load(tmp_path / "out" / "sparsity.json")
    assert report.decayed.zeros == round(0.6 * report.decayed.parameters)
    resumed = trainer(output_dir=str(tmp_path / "again"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-12"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_trainer_run_with_schedule_free_weights(make_args: Any, tokens: Any) -> None:
    schedulefree = pytest.importorskip("schedulefree")
    model = tiny_gpt2()
    groups = build_param_groups(model, p_norm=0.8, lambda_p=0.01)
    optimizer = LpDecay(schedulefree.AdamWScheduleFree(groups, lr=0.01))
    args = make_args(target_sparsity=0.6, max_steps=30, lr_scheduler_type="constant", sparsity_end=1.0)
    trainer = PDecayTrainer(
        model=model, args=args, train_dataset=tokens, eval_dataset=tokens, optimizers=(optimizer, None)
    )
    trainer.train()
    assert optimizer.param_groups[0]["train_mode"]
    trainer.evaluate()
    assert not optimizer.param_groups[0]["train_mode"], "what is evaluated are the averaged weights"
    report = trainer.measure_sparsity()
    assert report.decayed.zeros == round(0.6 * report.decayed.parameters)


def test_accelerate_prepares_saves_and_loads_it(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = network()
    optimizer = LpDecay(BASES["adamw"](build_param_groups(model, p_norm=0.5, lambda_p=0.5)))
    model, prepared = accelerator.prepare(model, optimizer)
    SparsityControl(prepared, 60, target_sparsity=0.5).before_step(1)

    def steps(*seeds: int) -> list[torch.Tensor]:
        for seed in seeds:
            prepared.zero_grad()
            accelerator.backward(model(normal(32, 40, seed=seed)).square().mean())
            prepared.step()
        return [param.detach().clone() for param in model.parameters()]

    steps(1, 2)
    accelerator.save_state(str(tmp_path))
    later = steps(3, 4)
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(one, other) for one, other in zip(later, steps(3, 4), strict=True))


# --- schedule-free weights


def test_schedule_free_follows_the_formula() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    start = normal(40, seed=1, dtype=torch.float64) * 0.3
    param = nn.Parameter(start.clone())
    base = schedulefree.SGDScheduleFree([param], lr=0.05, momentum=0.9)
    optimizer = LpDecay(base, p_norm=0.7, lambda_p=0.2)
    reference = ScheduleFreeReference(start.numpy().copy(), lr=0.05, beta=0.9, p_norm=0.7, lambda_p=0.2)
    optimizer.train()
    for seed in range(25):
        param.grad = normal(40, seed=seed, dtype=torch.float64)
        reference.step(param.grad.tolist())
        optimizer.step()
        np.testing.assert_allclose(param.detach().numpy(), reference.y, rtol=1e-8, atol=1e-12)
    optimizer.eval()
    np.testing.assert_allclose(param.detach().numpy(), reference.x, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
@pytest.mark.parametrize("last", [45, 60])
def test_zeros_of_schedule_free_weights_are_zeros_at_evaluation(kind: str, last: int) -> None:
    """Also where the run stops in the step after which weights were cut, and its z have not been stepped since."""
    schedulefree = pytest.importorskip("schedulefree")
    model = network()
    optimizer = train(lambda groups: getattr(schedulefree, kind)(groups, lr=0.02), range(1, last + 1), model)
    trained = decayed(model).clone()
    assert int((trained == 0).sum()) == round(0.8 * trained.numel())
    optimizer.eval()
    evaluated = decayed(model)
    assert torch.equal(evaluated == 0, trained == 0) and not torch.equal(evaluated, trained)
    optimizer.train()
    assert torch.equal(decayed(model) == 0, trained == 0)


@pytest.mark.parametrize("kind", ["AdamWScheduleFreeClosure", "SGDScheduleFreeReference"])
def test_other_forms_of_schedule_free_are_refused(kind: str) -> None:
    made = getattr(pytest.importorskip("schedulefree"), kind)(parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"it keeps the averaged weights .* Take (AdamW|SGD)ScheduleFree"):
        LpDecay(made)


FREE = ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"]


def free(kind: str, params: list[nn.Parameter]) -> Any:
    base = getattr(pytest.importorskip("schedulefree"), kind)(params, lr=0.02)
    return LpDecay(base, p_norm=0.5, lambda_p=0.3, keep_zeros=True)


def switch(optimizer: Any, training: bool) -> None:
    (optimizer.train if training else optimizer.eval)()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FREE)
def test_zeros_live_through_any_change_of_mode_and_the_rest_is_the_base_s_own(kind: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = free(kind, params)
    optimizer.train()
    ever = [torch.zeros_like(param, dtype=torch.bool) for param in params]
    for cycle in range(8):
        run(optimizer, params, *range(3 * cycle, 3 * cycle + cycle % 3))
        for training in (False, True, False, True):
            with torch.no_grad():  # pruned in either mode, to zeros of either sign
                for k, param in enumerate(params[:3]):
                    cut = normal(*param.shape, seed=50 * cycle + k) > 1.5
                    param.masked_fill_(cut, -0.0 if cycle % 2 else 0.0)
            zeros = [param == 0 for param in params]
            twin = copy.deepcopy(optimizer)
            switch(twin.base, training)
            switch(optimizer, training)
            theirs = [param for group in twin.param_groups for param in group["params"]]
            for k, (param, own, zero) in enumerate(zip(params, theirs, zeros, strict=True)):
                assert torch.equal(param == 0, zero)
                if optimizer.state.get(param) and k < 3:
                    assert not bool(bits(param)[zero].any())
                    ever[k] |= zero
                same = ~zero & (own != 0)
                assert torch.equal(param[same], own[same])
        assert all(bool((param[zero] == 0).all()) for param, zero in zip(params, ever, strict=True))
    assert bool(ever[0].any()) and bool((params[0] != 0).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_cancels_with_its_average_goes_on(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.full((8,), 0.5, dtype=dtype))
    optimizer = free("AdamWScheduleFree", [param])
    optimizer.train()
    run(optimizer, [param], 1)
    with torch.no_grad():
        param.fill_(0.5)
        optimizer.state[param]["z"].fill_(5.0)
    for _ in range(3):
        optimizer.eval()
        assert bool((param != 0).all()) and float(param.detach().abs().max()) < 1e-6
        optimizer.train()
        torch.testing.assert_close(param.float(), torch.full((8,), 0.5), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FREE)
def test_a_run_saved_in_evaluation_mode_is_resumed_bit_identical(kind: str, dtype: torch.dtype) -> None:
    whole = parameters(dtype)
    optimizer = free(kind, whole)
    optimizer.train()
    run(optimizer, whole, 1, 2, 3, 4)
    optimizer.eval()
    saved, resumed = through_a_file(optimizer.state_dict()), clones(whole)
    optimizer.train()
    run(optimizer, whole, 5, 6, 7)
    again = free(kind, resumed)
    again.load_state_dict(saved)
    again.train()
    run(again, resumed, 5, 6, 7)
    for each in (optimizer, again):
        each.eval()
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(whole, resumed, strict=True))


class Watch(TrainerCallback):
    """Collects where the zeros are after steps from the end of pruning on."""

    def __init__(self) -> None:
        self.zeros: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step >= 20:
            self.zeros.append({name: p == 0 for name, p in model.named_parameters() if p.ndim > 1})


def test_evaluations_within_a_run_bring_no_zero_back(make_args: Any, tokens: Any, tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    args = make_args(
        optim="schedule_free_adamw_lp",
        target_sparsity=0.5,
        sparsity_end=0.6,
        max_steps=30,
        eval_strategy="steps",
        eval_steps=3,
        lr_scheduler_type="constant",
    )
    watch = Watch()
    trainer = PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=tokens, eval_dataset=tokens, callbacks=[watch])
    trainer.train()
    assert len(watch.zeros) == 11
    for earlier, later in zip(watch.zeros, watch.zeros[1:], strict=False):
        assert all(bool(later[name][zero].all()) for name, zero in earlier.items())
    decayed = SparsityReport.load(tmp_path / "out" / "sparsity.json").decayed
    for mode in ("trained", "evaluated"):
        if mode == "evaluated":
            trainer.evaluate()
        trainer.save_model(str(tmp_path / mode))
        saved = load_file(tmp_path / mode / "model.safetensors")
        zeros = sum(int((weight == 0).sum()) for weight in saved.values() if weight.ndim > 1)
        assert zeros == round(0.5 * decayed.parameters)
