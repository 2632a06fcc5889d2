"""A step with a NaN or an infinity in any gradient, however it came there, is as if it had not been made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_pdecay import AdamWLp, LpDecay
from tests.helpers.steps import BACKENDS, bits, normal


Optimizer = AdamWLp | LpDecay
MAKES: dict[str, Callable[[Any], Optimizer]] = {
    **{name: lambda params, name=name: AdamWLp(params, lr=0.01, lambda_p=0.1, backend=name) for name in BACKENDS},
    "auto": lambda params: AdamWLp(params, lr=0.01, lambda_p=0.1),
    "bfloat16 moments": lambda params: AdamWLp(params, lr=0.01, lambda_p=0.1, moments="bfloat16"),
    "around AdamW": lambda params: LpDecay(torch.optim.AdamW(params, lr=0.01), lambda_p=0.1),
}
# The second is of several chunks, the last of several threads' shares.
SHAPES = {
    "first": ((3,), torch.float32),
    "large": ((300, 1000), torch.float32),
    "bfloat16": ((70, 5), torch.bfloat16),
    "float16": ((70, 5), torch.float16),
    "wide": ((33,), torch.float64),
    "last": ((129, 9), torch.float32),
}
Params = dict[str, nn.Parameter]


def parameters() -> Params:
    return {
        name: nn.Parameter(normal(*shape, seed=seed, dtype=dtype))
        for seed, (name, (shape, dtype)) in enumerate(SHAPES.items())
    }


def backward(params: Params, seed: int, bad: str = "", value: float = math.nan) -> None:
    """Add random gradients, in which one element in the tensor ``bad`` has a value."""
    total = torch.zeros(())
    for k, (name, param) in enumerate(params.items()):
        factors = normal(*param.shape, seed=100 * seed + k, dtype=param.dtype)
        if name == bad:
            factors.view(-1)[-2] = value
        total = total + (param * factors).sum().float()
    total.backward()


def at_once(params: Params, bad: str, value: float) -> None:
    backward(params, 7, bad, value)


def in_the_second_backward(params: Params, bad: str, value: float) -> None:
    backward(params, 7)
    backward(params, 8, bad, value)


def before_the_second_backward(params: Params, bad: str, value: float) -> None:
    backward(params, 7, bad, value)
    backward(params, 8)


def in_place(params: Params, bad: str, value: float) -> None:
    backward(params, 7)
    params[bad].grad.view(-1)[0] = value  # type: ignore[union-attr]


def through_data(params: Params, bad: str, value: float) -> None:
    backward(params, 7)
    params[bad].grad.data.view(-1)[1] = value  # type: ignore[union-attr]


def through_numpy(params: Params, bad: str, value: float) -> None:
    backward(params, 7)
    bytes_of = params[bad].grad.view(-1)[:1].view(torch.uint8).numpy()  # type: ignore[union-attr]
    bytes_of[:] = torch.tensor([value], dtype=params[bad].dtype).view(torch.uint8).numpy()


def replaced(params: Params, bad: str, value: float) -> None:
    backward(params, 7)
    params[bad].grad = torch.full_like(params[bad], value)


def by_a_sum_of_finite_ones(params: Params, bad: str, value: float) -> None:
    large = math.copysign(torch.finfo(params[bad].dtype).max, value)
    backward(params, 7, bad, large)
    backward(params, 8, bad, large)


WAYS = [
    at_once,
    in_the_second_backward,
    before_the_second_backward,
    in_place,
    through_data,
    through_numpy,
    replaced,
    by_a_sum_of_finite_ones,
]


def state_of(optimizer: Optimizer) -> list[Tensor]:
    """The bits of all weights and of all tensors of the state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    entries = [optimizer.state[param][name] for param in params for name in sorted(optimizer.state[param])]
    return [bits(tensor) for tensor in (*params, *entries) if tensor.dtype != torch.bool]


def run(make: Callable[[Any], Optimizer], way: Callable[..., None], bad: str, value: float, keeps: bool) -> None:
    """Make three steps, with a bad one after each of them; then the same three without."""
    ends = []
    for spoilt in (True, False):
        params = parameters()
        optimizer = make(params.values())
        for step in range(3):
            optimizer.zero_grad(set_to_none=not keeps)
            backward(params, step)
            optimizer.step()
            if spoilt:
                before = state_of(optimizer)
                optimizer.zero_grad(set_to_none=not keeps)
                way(params, bad, value)
                optimizer.step()
                assert all(map(torch.equal, before, state_of(optimizer)))
        assert optimizer.skipped_steps == 3 * spoilt
        ends.append(state_of(optimizer))
    assert len(ends[0]) == len(ends[1]) and all(map(torch.equal, *ends)), "a run without bad steps is the same"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKES)
def test_a_bad_step_changes_nothing(name: str, way: Callable[..., None]) -> None:
    run(MAKES[name], way, "large", math.nan, keeps=False)


@pytest.mark.parametrize("bad", SHAPES)
@pytest.mark.parametrize(("value", "keeps"), [(math.nan, False), (-math.inf, True)])
@pytest.mark.parametrize("way", [in_the_second_backward, by_a_sum_of_finite_ones, through_data])
def test_a_bad_value_in_any_tensor_is_found(way: Callable[..., None], bad: str, value: float, keeps: bool) -> None:
    run(MAKES["compiled"], way, bad, value, keeps)
