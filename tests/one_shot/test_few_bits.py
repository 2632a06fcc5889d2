from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_pdecay.low_bit.grid import grid_of
from hf_pdecay.low_bit.transform import Layout, round_blocks
from hf_pdecay.one_shot.few_bits import prune_to_codes
from hf_pdecay.one_shot.sparsegpt import prune_by_hessian


def _case(seed: int, outputs: int = 48, inputs: int = 200) -> tuple[Tensor, Tensor]:
    """A matrix, with a large weight and a row of zeros, and inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(600, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    weight = 0.1 * torch.randn(outputs, inputs, generator=generator)
    weight[3, 5], weight[10] = 4.0, 0.0
    return weight, x


def _rounded(weight: Tensor, bits: int) -> Tensor:
    return round_blocks(weight, Layout(*weight.shape, 1), grid_of(bits, sparse=True, exact=True))


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([4, 8]),
    share=st.sampled_from([0.05, 0.3, 0.5, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_zeros_are_counted_and_rounding_leaves_the_codes(
    seed: int, bits: int, share: float, dtype: torch.dtype
) -> None:
    weight, x = _case(seed)
    weight = weight.to(dtype)
    amount = max(int(share * weight.numel()), int((weight == 0).sum()))
    found = prune_to_codes(weight, x.T @ x, amount, None, bits)
    zeros = int((found == 0).sum())
    # The few that are missing are left to the next pruning.
    assert found.dtype == dtype and not found[weight == 0].any() and amount - weight.numel() // 50 <= zeros <= amount
    for block in found.float().split(128, 1):
        step = block.abs().amax(1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
        codes = block / step
        # bfloat16 has 8 bits of its own.
        assert dtype == torch.bfloat16 or (codes - codes.round()).abs().max() < 1e-3
    rounded = _rounded(found, bits)
    assert torch.equal(rounded == 0, found == 0)
    assert (rounded.float() - found.float()).norm() < 0.02 * found.float().norm()


@pytest.mark.parametrize("amount", [4800, 2000, (2, 4)])
def test_the_output_is_nearer_than_after_rounding_to_nearest(amount: int | tuple[int, int]) -> None:
    weight, x = _case(0)
    pruned = prune_by_hessian(weight, x.T @ x, amount)
    together = prune_to_codes(weight, x.T @ x, amount, None, 4)
    errors = [((found - weight) @ x.T).norm() for found in (_rounded(together, 4), _rounded(pruned, 4), pruned)]
    assert errors[0] < 0.97 * errors[1] and errors[0] < 4 * errors[2]


def test_a_pattern_may_have_more_zeros() -> None:
    weight, x = _case(1)
    found = prune_to_codes(weight, x.T @ x, (2, 4), None, 4)
    assert ((found != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()
