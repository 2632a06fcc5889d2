from __future__ import annotations

import pytest
import torch

from hf_pdecay.low_bit.compiled import is_able
from hf_pdecay.low_bit.grid import WIDTHS, grid_of
from hf_pdecay.low_bit.transform import Layout, round_blocks


SHAPES = [(64, 512, 1), (64, 300, 1), (90, 100, 1), (1, 300, 70), (3, 256, 33)]


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    if not is_able(torch.zeros(100, 100)):
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_plain_torch_operations_in_float64(shape: tuple[int, int, int], width: float, sparse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, above = (torch.randn(shape, generator=generator) for _ in range(2))
    x.masked_fill_(torch.rand(shape, generator=generator) < 0.6 * sparse, 0)
    x[0, :128, 0] = 0
    grid = grid_of(width, sparse=sparse, exact=sparse)
    results = []
    for each in (x.clone().requires_grad_(), x.double().requires_grad_()):
        assert is_able(each) == (each.dtype == torch.float32)
        rounded = round_blocks(each, Layout(*shape), grid)
        rounded.backward(above.to(each.dtype))
        results.append((rounded.detach().double(), each.grad.double()))
    (rounded, grad), (expected, expected_grad) = results
    # A scale or an offset between two numbers of bfloat16 may become either; at most one block in a hundred has one.
    assert torch.allclose(rounded, expected, rtol=2**-7, atol=2**-7)
    assert torch.isclose(rounded, expected, rtol=1e-5, atol=1e-6).float().mean() > 0.99
    assert torch.allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)
    assert grid.affine or not rounded[x == 0].any()
    assert torch.equal(grad[0, :128, 0].float(), above[0, :128, 0])


def test_the_number_of_threads_changes_nothing() -> None:
    x = torch.randn(256, 512)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(round_blocks(x, Layout(256, 512, 1), grid_of(4)))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_what_is_left_to_torch() -> None:
    weight = torch.zeros(128, 128)
    assert is_able(weight) and is_able(torch.nn.Parameter(weight))
    for other in (weight.T[:, :64], weight.bfloat16(), weight.double(), weight.to("meta"), torch.zeros(64, 64)):
        assert not is_able(other)
