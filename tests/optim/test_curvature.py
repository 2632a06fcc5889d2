"""Second moments to rank 1, of whole tensors and of parts of flattened ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_pdecay.optim.curvature import SCALE, curvature, curvature_of_part, matrix_shape


SHAPES = [(), (7,), (1, 1), (5, 9), (30, 70), (4, 6, 5), (8, 3, 3, 3), (0, 4), (4, 0)]


def _moments(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (torch.rand(shape, generator=generator) * 6 - 14)


def _reference(second: Tensor) -> Tensor:
    """Of each matrix, in float64: the mean of the row times that of the column, divided by that of all."""
    v = second.double().reshape(matrix_shape(second.shape))
    rank_1 = v.mean(2, keepdim=True) * v.mean(1, keepdim=True) / v.mean((1, 2), keepdim=True)
    return rank_1.sqrt().reshape(-1) * SCALE


@given(st.sampled_from(SHAPES), st.integers(0, 99), st.integers(0, 40), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_of_any_weights_of_a_tensor(shape: tuple[int, ...], seed: int, start: int, step: int) -> None:
    second = _moments(shape, seed)
    found, expected = curvature(second), _reference(second)
    count = len(range(start, second.numel(), step))
    torch.testing.assert_close(found.factors(second.numel(), torch.float64), expected, rtol=1e-5, atol=0)
    chosen = found.part(start, step).factors(count, torch.float64)
    torch.testing.assert_close(chosen, expected[start::step], rtol=1e-5, atol=0)
    half = count // 2
    torch.testing.assert_close(
        found.part(start, step).part(half).factors(count - half, torch.float64), chosen[half:], rtol=0, atol=0
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_part_that_is_all_is_the_whole(shape: tuple[int, ...]) -> None:
    second = _moments(shape, 0)
    part = curvature_of_part(second.reshape(-1), 0, shape, ())
    torch.testing.assert_close(part.factors(second.numel(), torch.float64), _reference(second), rtol=1e-5, atol=0)


def test_moments_of_rank_1_are_kept() -> None:
    rows, columns = _moments((6, 1), 1), _moments((1, 5), 2)
    exact = (rows.double() * columns.double()).sqrt().reshape(-1) * SCALE
    torch.testing.assert_close(
        curvature(rows * columns * 1e8).factors(30, torch.float64), exact * 1e4, rtol=1e-4, atol=0
    )


def test_it_is_nearer_to_the_expectation_than_what_it_is_made_of() -> None:
    """Of few squared gradients with random errors and inputs, as those of a linear layer."""
    generator = torch.Generator().manual_seed(0)
    errors, inputs = (torch.rand(size, generator=generator) + 0.1 for size in (40, 60))
    tokens = 16
    gradients = [
        (errors * torch.randn(tokens, 40, generator=generator)).T
        @ (inputs * torch.randn(tokens, 60, generator=generator))
        for _ in range(8)
    ]
    second = torch.stack(gradients).square().mean(0) / tokens
    expected = torch.outer(errors, inputs)
    distance = (second.sqrt() - expected).norm()
    assert (curvature(second).factors(2400, torch.float32).view(40, 60) / SCALE - expected).norm() < 0.6 * distance
