"""The optimizers that LpDecay does not go around, and a sentence for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_pdecay import AdamWLp, LpDecay
from tests.optim.test_lp_decay import give_grads, parameters, sgd


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


class Lomo(torch.optim.SGD):
    """Known by its name."""


class ScheduleFreeSGD(torch.optim.SGD):
    """Another package's, which has the two modes."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


class Prodigy(torch.optim.SGD):
    """Known by its name."""


def _with(key: str, value: Any) -> torch.optim.Optimizer:
    optimizer = sgd(parameters((3,)))
    optimizer.defaults[key] = optimizer.param_groups[0][key] = value
    return optimizer


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS: it calls the closure many times"),
        (lambda p: torch.optim.SparseAdam(p), "SparseAdam: it takes sparse gradients alone"),
        (lambda p: AdamWLp(p), "AdamWLp: it decays by p norm already"),
        (lambda p: LpDecay(sgd(p)), "LpDecay: it decays by p norm already"),
        (lambda p: NeedsClosure(p, lr=0.1), "its step needs a closure"),
        (lambda p: Lomo(p, lr=0.1), "Lomo: it steps within backward"),
        (lambda p: Prodigy(p, lr=1.0), "Prodigy: its step size is not the group's lr"),
        (lambda p: ScheduleFreeSGD(p, lr=0.1), "Take AdamWScheduleFree of the package schedulefree"),
        (lambda p: _with("gradient_release", True), "it steps within backward"),
        (lambda p: _with("differentiable", True), "differentiates through the step"),
        (lambda p: _with("lr", None), "its step size is not the group's lr"),
        (lambda p: _with("p_norm", -1.0), "Invalid p_norm: p_norm=-1.0"),
        (lambda p: sgd([p[0].detach().to(torch.complex64)]), "cannot decay a parameter of torch.complex64"),
    ],
)
def test_a_base_that_cannot_work_is_refused(make: Callable[[Any], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LpDecay(make(parameters((3,))))


def test_stand_ins_of_transformers_and_accelerate_are_refused() -> None:
    from accelerate import Accelerator
    from transformers import Adafactor
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    params = parameters((3, 4))
    for made, sentence in (
        (LayerWiseDummyOptimizer(lr=0.1), "it steps within backward"),
        (Accelerator(cpu=True).prepare(sgd(params)), "it is prepared already"),
        (Adafactor(params), "Give it an lr"),
    ):
        with pytest.raises(ValueError, match=sentence):
            LpDecay(made)
    fixed = LpDecay(Adafactor(params, lr=0.1, relative_step=False, scale_parameter=False), p_norm=0.3, lambda_p=3.0)
    for seed in range(10):
        give_grads(params, seed)
        fixed.step()
    assert bool((params[0] == 0).any())


def test_a_fused_backward_is_refused() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    params = parameters((3,))
    _apply_optimizer_in_backward(torch.optim.SGD, params, {"lr": 0.1})
    with pytest.raises(ValueError, match="it steps within backward"):
        LpDecay(sgd(params))


@pytest.mark.parametrize("made", [torch.optim.SGD, nn.Linear(2, 2)])
def test_what_is_no_optimizer_is_refused(made: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, not (the class SGD|a torch.nn)"):
        LpDecay(made)


@pytest.mark.parametrize("bad", [{"p_norm": 0}, {"lambda_p": math.nan}, {"keep_zeros": 1}, {"skip_nonfinite": None}])
def test_bad_settings_are_refused_and_leave_the_base_alone(bad: dict[str, Any]) -> None:
    base = sgd(parameters((3,)))
    with pytest.raises(ValueError, match=f"Invalid {next(iter(bad))}"):
        LpDecay(base, **bad)
    assert "p_norm" not in base.defaults and "p_norm" not in base.param_groups[0]


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = LpDecay(torch.optim.SGD(embedding.parameters(), lr=0.1))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="LpDecay does not take sparse gradients"):
        optimizer.step()
