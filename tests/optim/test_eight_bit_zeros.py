"""bitsandbytes' 8-bit optimizers, whose moments of zero are not zero on a CPU, lose no zero under our decay."""

from __future__ import annotations

import pytest
import torch

from hf_pdecay import make_optimizer


@pytest.mark.parametrize(("lambda_p", "keep_zeros"), [(0.01, False), (0.0, True), (0.01, True)])
@pytest.mark.parametrize("name", ["lion_8bit_lp", "adamw_bnb_8bit_lp"])
def test_zeros_stay_with_and_without_gradients(name: str, lambda_p: float, keep_zeros: bool) -> None:
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(128, 128, generator=generator))
    with torch.no_grad():
        weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    zero, without = weight.detach() == 0, torch.rand(weight.shape, generator=generator) < 0.3
    dormant = torch.nn.Parameter(torch.zeros(128, 128))  # wholly zero, and without gradients
    options = {"min_8bit_size": "256"}
    decay = {"lambda_p": lambda_p, "keep_zeros": keep_zeros}
    optimizer = make_optimizer(name, [weight, dormant], lr=1e-3, options=options, **decay)
    before = weight.detach().clone()
    for _ in range(20):
        weight.grad = torch.randn(weight.shape, generator=generator).masked_fill_(without, 0)
        dormant.grad = torch.zeros_like(dormant)
        optimizer.step()
    assert bool((weight[zero] == 0).all()) and not bool(dormant.any())
    assert bool((weight != before)[~zero & ~without].any())
