"""Wanda and SparseGPT on one matrix, against the papers' formulas in float64, and what must hold for any matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_pdecay import sparsegpt, wanda
from hf_pdecay.one_shot.selection import share, spread
from hf_pdecay.one_shot.wanda import magnitude_mask

from ..helpers.reference.one_shot64 import sparsegpt64, wanda64, wanda_blocks64


def correlated(rows: int, inputs: int, seed: int = 0) -> Tensor:
    """Inputs of very different sizes that depend on one another, in float64."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(rows, max(inputs // 3, 1), generator=generator, dtype=torch.float64)
    mixed = factors @ torch.randn(max(inputs // 3, 1), inputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(-1, 1, inputs, dtype=torch.float64)[torch.randperm(inputs, generator=generator)]
    return (mixed + 0.3 * noise) * sizes


def matrix(outputs: int, inputs: int, seed: int = 1) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("inputs", [40, 128, 200])
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(inputs: int, sparsity: float) -> None:
    weight, rows = matrix(10, inputs), correlated(400, inputs)
    # Counts that come out even in each block of columns, so that the reference need not share them out.
    wanted = sparsegpt64(weight.numpy(), rows.numpy(), sparsity)
    got = sparsegpt(weight, rows, sparsity=sparsity).numpy()
    assert np.array_equal(got == 0, wanted == 0)
    np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_sparsegpt_with_a_pattern(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    weight, rows = matrix(10, 136), correlated(400, 136)
    wanted = sparsegpt64(weight.numpy(), rows.numpy(), None, (n, m))
    got = sparsegpt(weight, rows, pattern=pattern).numpy()
    assert np.array_equal(got == 0, wanted == 0)
    np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-8)


def test_wanda_is_its_formula() -> None:
    weight, rows = matrix(12, 48), correlated(100, 48)
    assert np.array_equal(wanda(weight, rows, sparsity=0.5).numpy(), wanda64(weight.numpy(), rows.numpy(), 24))
    got = wanda(weight, rows.view(4, 25, 48), pattern="2:4").numpy()
    assert np.array_equal(got, wanda_blocks64(weight.numpy(), rows.numpy(), 2, 4))


def test_the_methods_are_in_their_order_on_inputs_that_depend_on_one_another() -> None:
    weight, rows = matrix(64, 256), correlated(2000, 256)
    small = weight.masked_fill(magnitude_mask(weight, weight.numel() // 2), 0)
    errors = [
        float(((pruned - weight) @ rows.T).norm())
        for pruned in (sparsegpt(weight, rows, sparsity=0.5), wanda(weight, rows, sparsity=0.5), small)
    ]
    assert errors[0] < 0.8 * errors[1] and errors[1] < 0.8 * errors[2], errors


CASES = {
    "outputs": st.integers(1, 9),
    "inputs": st.integers(1, 40),
    "sparsity": st.floats(0.01, 0.99),
    "dead": st.floats(0, 1),
    "zero": st.floats(0, 1),
    "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    "seed": st.integers(0, 10**6),
}


@settings(deadline=None, max_examples=150)
@given(**CASES)
def test_counts_are_exact_and_zeros_stay(
    outputs: int, inputs: int, sparsity: float, dead: float, zero: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = round(sparsity * outputs * inputs)
    # Weights of all sizes: also such that are nothing in float16.
    exponents = torch.randint(-12, 3, (outputs, inputs), generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator) * 10.0**exponents
    given_zeros = torch.randperm(weight.numel(), generator=generator)[: int(zero * total)]
    weight = weight.to(dtype)
    weight.view(-1)[given_zeros] = -0.0
    if int((weight == 0).sum()) > total:
        return
    rows = torch.randn(5, inputs, generator=generator)
    unused = torch.rand(inputs, generator=generator) < dead
    rows[:, unused] = 0
    for pruned in (
        sparsegpt(weight, rows, sparsity=sparsity),
        wanda(weight, rows, sparsity=sparsity),
        weight.masked_fill(magnitude_mask(weight, total), 0.0),
    ):
        zeros = pruned == 0
        assert pruned.dtype == dtype and bool(pruned.isfinite().all())
        assert int(zeros.sum()) == total
        assert bool(zeros[weight == 0].all()) and not bool(pruned[zeros].signbit().any())
    # Weights of dead inputs go first.
    for method, part in ((sparsegpt, slice(None)), (wanda, 0)):
        zeros = method(weight, rows, sparsity=sparsity) == 0
        living, others = (~zeros[:, unused])[part], (zeros & (weight != 0))[:, ~unused][part]
        if method is sparsegpt and bool(living.any()):
            assert not bool(others.any())


@settings(deadline=None, max_examples=60)
@given(blocks=st.sampled_from(["1:2", "2:4", "1:4", "3:8"]), count=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_patterns_fit_and_zeros_stay(blocks: str, count: int, seed: int) -> None:
    n, m = map(int, blocks.split(":"))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, count * m, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.2] = 0
    rows = torch.randn(4, count * m, generator=generator)
    rows[:, 0] = 0
    for method in (sparsegpt, wanda):
        pruned = method(weight, rows, pattern=blocks)
        alive = (pruned != 0).view(-1, m).sum(1)
        assert bool((alive <= n).all()) and bool((pruned[weight == 0] == 0).all())
        full = (weight != 0).view(-1, m).sum(1) >= n
        if method is wanda:
            assert bool((alive[full] == n).all())


@given(total=st.integers(0, 400), sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20), data=st.data())
def test_shares_are_whole_and_add_up(total: int, sizes: list[int], data: st.DataObject) -> None:
    total = min(total, sum(sizes))
    least = [data.draw(st.integers(0, size)) for size in sizes]
    while sum(least) > total:
        least[least.index(max(least))] -= 1
    for parts, lowest in ((spread(total, sizes), [0] * len(sizes)), (share(total, sizes, least), least)):
        assert sum(parts) == total
        assert all(low <= part <= size for low, part, size in zip(lowest, parts, sizes, strict=True))


def test_few_rows_and_equal_inputs_make_no_singular_hessian() -> None:
    weight = matrix(6, 64).float()
    for rows in (torch.ones(1, 64), torch.ones(1000, 64) * 1e4, torch.zeros(3, 64), torch.randn(2, 64) * 1e-12):
        pruned = sparsegpt(weight, rows, sparsity=0.5)
        assert bool(pruned.isfinite().all()) and int((pruned == 0).sum()) == 192


@pytest.mark.parametrize("method", [sparsegpt, wanda])
def test_what_is_wrong_is_named(method: object) -> None:
    weight, rows = matrix(4, 6), correlated(9, 6)
    for given_amount, said in (
        ({"sparsity": 90}, "Was 0.9 meant"),
        ({"sparsity": 0.0}, "sparsity=0.0"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"sparsity": True}, "sparsity=True"),
        ({}, "sparsity=None with pattern=None"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give one of them"),
        ({"pattern": "4:2"}, "pattern='4:2'"),
        ({"pattern": "row"}, "pattern='row'"),
        ({"pattern": "2:4"}, "6 inputs are not divisible by 4"),
    ):
        with pytest.raises(ValueError, match=said):
            method(weight, rows, **given_amount)  # type: ignore[operator]
    weight[:, :4] = 0
    with pytest.raises(ValueError, match="16 zeros in 24 weights"):
        method(weight, rows, sparsity=0.5)  # type: ignore[operator]
