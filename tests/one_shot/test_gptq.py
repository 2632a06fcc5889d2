"""Quantising one matrix: what rounding to nearest and GPTQ must hold for any matrix, and GPTQ against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_pdecay import gptq, round_to_nearest
from hf_pdecay.one_shot import gptq as module
from hf_pdecay.one_shot.grid import WIDTHS
from hf_pdecay.storage.codes import code_range, find_codes

from ..helpers.reference.one_shot64 import gptq64
from .test_layers import correlated, matrix


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sparse(outputs: int, inputs: int, zeros: float, seed: int = 1) -> Tensor:
    weight = matrix(outputs, inputs, seed)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < zeros] = 0
    return weight


def check(weight: Tensor, got: Tensor, bits: float, block: int) -> None:
    """Zeros are kept and positive, and every number is exactly a code times its scale."""
    assert got.dtype == weight.dtype and got.shape == weight.shape and bool(got.isfinite().all())
    assert bool((got[weight == 0] == 0).all()) and not bool(got[got == 0].signbit().any())
    codes, scales = find_codes(got, bits, block)
    low, high = code_range(bits)
    assert low <= int(codes.min()) and int(codes.max()) <= high
    wide = scales.repeat_interleave(block, -1)[:, : weight.shape[1]]
    assert torch.equal((codes.double() * wide.double()).to(got.dtype), got)
    assert torch.equal(codes.float() * wide, got.float())  # the product needs no rounding


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_codes_of_every_width(bits: float, dtype: torch.dtype) -> None:
    weight = sparse(24, 200, 0.6).to(dtype)
    weight[3], weight[:, 128:160] = 0, 0  # a dead row and dead columns
    for block in (32, 128, 256):
        rounded = round_to_nearest(weight, bits=bits, block=block)
        check(weight, rounded, bits, block)
        check(weight, gptq(weight, correlated(300, 200).to(dtype), bits=bits, block=block), bits, block)


@given(
    outputs=st.integers(1, 6),
    inputs=st.integers(1, 70),
    zeros=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    size=st.sampled_from([1e-45, 1e-38, 1e-7, 1e-3, 1.0, 1e4, 1e30]),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from(WIDTHS),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_any_matrix(
    outputs: int, inputs: int, zeros: float, size: float, dtype: torch.dtype, bits: float, seed: int
) -> None:
    weight = (sparse(outputs, inputs, zeros, seed) * size).to(dtype)
    weight = torch.where(weight.isfinite(), weight, torch.finfo(dtype).max)
    check(weight, round_to_nearest(weight, bits=bits, block=32), bits, 32)
    check(weight, gptq(weight, correlated(40, inputs, seed).float(), bits=bits, block=32), bits, 32)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.008), (4, 0.12), (3, 0.22), (2, 0.45)])
def test_rounding_is_close(bits: float, most: float) -> None:
    weight = sparse(64, 256, 0.0).float()
    error = (round_to_nearest(weight, bits=bits) - weight).norm() / weight.norm()
    assert most / 3 < float(error) < most


def test_rounding_is_to_the_nearest_code_and_what_is_on_the_grid_stays() -> None:
    weight = sparse(8, 256, 0.5).float()
    once = round_to_nearest(weight)
    codes, scales = find_codes(once, 4, 128)
    wide = scales.repeat_interleave(128, -1)
    low, high = code_range(4)
    step = wide.abs()
    inside = (weight / wide >= low - 0.5) & (weight / wide <= high + 0.5)
    assert bool(((once - weight).abs() <= step * 0.5001)[inside].all())
    full = torch.tensor([[-8.0, 7, 3, 0, -1, 5, 2, 7] * 16]) * 0.125
    assert torch.equal(round_to_nearest(full), full) and torch.equal(round_to_nearest(-full), -full)


@pytest.mark.parametrize("inputs", [40, 128, 200])
@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_gptq_is_its_formula(inputs: int, zeros: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SWEEPS", 0)
    weight, rows = sparse(6, inputs, zeros), correlated(400, inputs)
    # Scales that both use: those of the weights as they are, whatever the order of the columns makes of them.
    scales = weight.abs().amax(1) / 7
    monkeypatch.setattr(module, "find_scales", lambda *given: scales)
    wanted = gptq64(weight.numpy(), rows.numpy(), scales.numpy(), code_range(4))
    np.testing.assert_allclose(gptq(weight, rows).numpy(), wanted, rtol=1e-9, atol=1e-12)


def output_error(weight: Tensor, got: Tensor, rows: Tensor) -> float:
    return float(((got - weight) @ rows.T).norm() / (weight @ rows.T).norm())


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("bits", [4, 2])
def test_the_other_weights_make_up_for_the_error(zeros: float, bits: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = sparse(32, 192, zeros).float(), correlated(500, 192).float()
    nearest = output_error(weight, round_to_nearest(weight, bits=bits), rows)
    errors = []
    for sweeps in (0, 1, 3):
        monkeypatch.setattr(module, "_SWEEPS", sweeps)
        errors.append(output_error(weight, gptq(weight, rows, bits=bits), rows))
    assert errors[0] < 0.9 * nearest and errors[2] <= errors[1] < errors[0]


def test_bad_input() -> None:
    weight, rows = torch.randn(8, 32), torch.randn(64, 32)
    for bits in (0, 1, 9, 1.5, True, "4"):
        with pytest.raises(ValueError, match=r"Invalid bits: bits=.*; it must be one of 8, 7"):
            round_to_nearest(weight, bits=bits)  # type: ignore[arg-type]
    for block in (0, 7, -128, 128.0):
        with pytest.raises(ValueError, match="Invalid block: block="):
            gptq(weight, rows, block=block)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be finite"):
        gptq(weight, torch.full((4, 32), torch.nan))


def test_weights_that_are_on_no_grid() -> None:
    for weight in (torch.randn(4, 64), torch.tensor([[1.0, 9.0]]), torch.tensor([[1.0, torch.inf]])):
        with pytest.raises(ValueError, match="no codes of 4 bits"):
            find_codes(weight, 4, 32)
    codes, scales = find_codes(torch.tensor([[8.0, -4.0, 0.0], [0.0, 0.0, 0.0], [3.0, 6.0, -9.0]]), 4, 8)
    assert codes.tolist() == [[2, -1, 0], [0, 0, 0], [1, 2, -3]] and scales.tolist() == [[4], [1], [3]]
    assert find_codes(torch.tensor([[8.0, -1.0]]), 4, 8)[1].tolist() == [[-1.0]]
