"""Optimizers with moments in 8 and 4 bits, in which a zero may not be zero, lose no zero under our decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_pdecay import make_optimizer


BITSANDBYTES, TORCHAO = ("lion_8bit_lp", "adamw_bnb_8bit_lp"), ("adamw_torch_8bit_lp", "adamw_torch_4bit_lp")

pytestmark = pytest.mark.usefixtures("eager")


def stepped(name: str, **decay: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight before and after 20 steps, where it never had a gradient, and one that is wholly zero and has none."""
    pytest.importorskip("bitsandbytes" if name in BITSANDBYTES else "torchao")
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(128, 128, generator=generator))
    with torch.no_grad():
        weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    without = torch.rand(weight.shape, generator=generator) < 0.3
    dormant = torch.nn.Parameter(torch.zeros(128, 128))
    options = {"min_8bit_size": "256"} if name in BITSANDBYTES else {}
    optimizer = make_optimizer(name, [weight, dormant], lr=1e-3, options=options, **decay)
    before = weight.detach().clone()
    for _ in range(20):
        weight.grad = torch.randn(weight.shape, generator=generator).masked_fill_(without, 0)
        dormant.grad = torch.zeros_like(dormant)
        optimizer.step()
    return before, weight.detach(), without, dormant.detach()


@pytest.mark.parametrize(("lambda_p", "keep_zeros"), [(0.01, False), (0.0, True), (0.01, True)])
@pytest.mark.parametrize("name", [*BITSANDBYTES, *TORCHAO])
def test_zeros_stay_with_and_without_gradients(name: str, lambda_p: float, keep_zeros: bool) -> None:
    before, after, without, dormant = stepped(name, lambda_p=lambda_p, keep_zeros=keep_zeros)
    assert bool((after[before == 0] == 0).all()) and not bool(dormant.any())
    assert bool((after != before)[(before != 0) & ~without].any())


@pytest.mark.parametrize("name", TORCHAO)
def test_moments_of_torchao_that_are_zero_stay_zero(name: str) -> None:
    before, after, without, dormant = stepped(name, lambda_p=0.0)
    assert bool((after == before)[(before == 0) & without].all()) and not bool(dormant.any())
    assert bool((after != before)[(before == 0) & ~without].all())
