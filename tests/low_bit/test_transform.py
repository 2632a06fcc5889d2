from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_pdecay.low_bit.grid import WIDTHS, Grid, check_width, grid_of
from hf_pdecay.low_bit.transform import Layout, round_blocks

from ..helpers.reference.rounding import round_block


GRIDS = [(width, sparse) for width in WIDTHS for sparse in (False, True)]


def _matrix(*shape: int, seed: int = 0, sparsity: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return values.masked_fill_(torch.rand(*shape, generator=generator) < sparsity, 0.0)


def _step_and_offset(block: Tensor, grid: Grid) -> tuple[float, float]:
    """The rule of docs/few_bits.md."""
    if grid.affine and grid.step is None:
        step = float(block.max() - block.min()) / (grid.high - grid.low)
        return step, float(block.min()) - grid.low * step
    if grid.affine:
        step = grid.step * float(block.std(unbiased=False))
        return step, float(block.mean()) - (grid.low + grid.high) / 2 * step
    if grid.step is None:
        return float(block.abs().max()) / grid.high, 0.0
    return grid.step * float(block[block != 0].square().mean().sqrt()), 0.0


def _by_blocks(x: Tensor, grid: Grid) -> Tensor:
    rows = []
    for row in x:
        blocks = [row[start : start + 128] for start in range(0, len(row), 128)]
        rows.append(
            torch.cat(
                [
                    round_block(
                        block,
                        grid.low,
                        grid.high,
                        *_step_and_offset(block.detach(), grid),
                        affine=grid.affine,
                        odd=grid.odd,
                        nonzero=grid.nonzero,
                    )
                    for block in blocks
                ]
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize(("width", "sparse"), GRIDS)
@pytest.mark.parametrize("inputs", [64, 128, 300])
def test_value_and_gradient_are_those_of_the_formula(width: float, sparse: bool, inputs: int) -> None:
    grid = grid_of(width, sparse=sparse, exact=sparse)
    x = _matrix(3, inputs, sparsity=0.0 if grid.affine else 0.6).requires_grad_()
    above = _matrix(3, inputs, seed=1)
    ours, theirs = round_blocks(x, Layout(3, inputs, 1), grid), _by_blocks(x, grid)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((rounded * above).sum(), x)[0] for rounded in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("width", "sparse"), GRIDS)
def test_inputs_may_lie_in_any_dimension(width: float, sparse: bool) -> None:
    grid, x = grid_of(width, sparse=sparse, exact=sparse), _matrix(2, 200, 5)
    turned = x.transpose(1, 2).contiguous()
    first, last = (each.clone().requires_grad_() for each in (x, turned))
    rounded = round_blocks(first, Layout(2, 200, 5), grid)
    expected = round_blocks(last, Layout(10, 200, 1), grid)
    assert torch.allclose(rounded.transpose(1, 2), expected, rtol=1e-12, atol=1e-12)
    above = _matrix(2, 200, 5, seed=1)
    rounded.backward(above)
    expected.backward(above.transpose(1, 2).contiguous())
    assert torch.allclose(first.grad.transpose(1, 2), last.grad, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    width=st.sampled_from(WIDTHS),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    inputs=st.sampled_from([1, 100, 128, 257]),
    seed=st.integers(0, 1000),
)
def test_zeros_stay_and_nothing_overflows(
    width: float, sparsity: float, scale: float, dtype: torch.dtype, inputs: int, seed: int
) -> None:
    limit = torch.finfo(dtype).max / 3  # the gradient below is twice a weight
    x = (_matrix(4, inputs, seed=seed, sparsity=sparsity) * scale).clamp(-limit, limit).to(dtype).requires_grad_()
    grid = grid_of(width, sparse=True, exact=True)
    rounded = round_blocks(x, Layout(4, inputs, 1), grid)
    assert rounded.dtype == dtype and rounded.isfinite().all()
    assert not rounded[x == 0].any()
    if width != 1.58 and scale == 1.0 and dtype == torch.float32:
        assert rounded[x != 0].all()  # no further zeros
    for row in rounded.detach().float():
        for block in row.split(128):
            assert len(block.unique()) <= (2**width if width < 2 else 2 ** int(width)) + 1
    rounded.float().pow(2).sum().clamp(max=1e30).backward()
    assert x.grad is not None and not x.grad.isnan().any()


@pytest.mark.parametrize(("width", "sparse"), GRIDS)
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_block_of_equal_weights_keeps_them_and_their_gradient(width: float, sparse: bool, value: float) -> None:
    grid = grid_of(width, sparse=sparse, exact=sparse)
    if value and not grid.affine:
        pytest.skip("without an offset equal weights have a scale")
    x = torch.full((2, 256), value)
    x[1] = torch.randn(256)
    x.requires_grad_()
    rounded = round_blocks(x, Layout(2, 256, 1), grid)
    assert torch.equal(rounded[0], x[0])
    above = torch.randn(2, 256)
    rounded.backward(above)
    assert torch.equal(x.grad[0], above[0]) and x.grad[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "sparse"), GRIDS)
def test_no_zero_is_negative(width: float, sparse: bool, dtype: torch.dtype) -> None:
    x = _matrix(100, 300, sparsity=0.6).to(dtype)
    x.masked_fill_(x.signbit() & (x.abs() < 0.01), -0.0)
    rounded = round_blocks(x, Layout(100, 300, 1), grid_of(width, sparse=sparse, exact=sparse))
    assert not (rounded.signbit() & (rounded == 0)).any()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("sparse", [False, True])
def test_more_bits_are_nearer(width: float, sparse: bool) -> None:
    x = _matrix(64, 256)
    error = (round_blocks(x, Layout(64, 256, 1), grid_of(width, sparse=sparse, exact=sparse)) - x).square().mean()
    # Without code 0 for small weights, 4 bits lose more on a dense matrix.
    bound = {8: 0.0001, 4: 0.03 if sparse else 0.012, 2: 0.14, 1.58: 0.23, 1: 0.38}[width]
    assert error < bound


@pytest.mark.parametrize("width", [3, 0, -1, 16, 1.5, True, "four", float("nan"), None])
def test_widths_that_are_not_offered(width: object) -> None:
    with pytest.raises(ValueError, match=r"Invalid weight_bits: weight_bits=.*must be one of 8, 4, 2, 1.58, 1"):
        check_width(width, "weight_bits")


def test_under_autocast() -> None:
    x = torch.randn(64, 256, requires_grad=True)
    grid, layout = grid_of(4, sparse=True), Layout(64, 256, 1)
    plain = round_blocks(x, layout, grid)
    with torch.autocast("cpu", torch.bfloat16):
        under = round_blocks(x, layout, grid)
    assert under.dtype == torch.float32 and torch.equal(plain, under)
