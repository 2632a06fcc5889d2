"""Weights that are codes times scales: found from the weights alone, stored as codes, and given back bit-identical."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_pdecay import gptq, round_to_nearest
from hf_pdecay.low_bit.grid import WIDTHS, grid_of
from hf_pdecay.low_bit.transform import Layout, round_blocks
from hf_pdecay.storage import encoding as blocks
from hf_pdecay.storage.encoding import decode, encode, parse
from hf_pdecay.storage.packed import PackedBlock

from ..helpers.reference.compressed_reader import read_block


NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
LIMIT = 1 << 30
pytestmark = pytest.mark.usefixtures("way")


def weights(*shape: int, zeros: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(*shape, generator=generator) * 0.02
    return found.masked_fill_(torch.rand(*shape, generator=generator) < zeros, 0)


def bytes_of(weight: Tensor) -> Any:
    return weight.contiguous().view(torch.uint8).numpy().reshape(-1)


def there_and_back(weight: Tensor, zstd: bool = False, block: int | None = None) -> tuple[blocks.Blob | None, float]:
    """The head of the block, and its bits for each weight; it is read by two readers."""
    data, name, shape = bytes_of(weight), NAMES[weight.dtype], tuple(weight.shape)
    _, blob = encode(data, name, shape, zstd, block)
    if blob is None:
        return None, 8.0 * weight.element_size()
    found, head = decode(blob, LIMIT, "it")
    assert found.tobytes() == data.tobytes()
    assert read_block(blob.tobytes()) == (name, shape, data.tobytes())
    return head, 8 * blob.nbytes / weight.numel()


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("dtype", list(NAMES))
@pytest.mark.parametrize("zeros", [0.0, 0.9])
@pytest.mark.parametrize("width", WIDTHS)
def test_rounded_weights_of_a_run(width: float, zeros: float, dtype: torch.dtype, zstd: bool) -> None:
    """With scales of 16 bits; the last block of a row is shorter."""
    if dtype == torch.bfloat16 and width == 8:
        pytest.skip("numbers of 8 digits do not always tell their codes of 8 bits")
    latent = weights(24, 300, zeros=zeros).to(dtype)
    weight = round_blocks(latent, Layout(24, 300, 1), grid_of(width, sparse=zeros > 0))
    head, size = there_and_back(weight, zstd)
    assert head is not None and head.codes is not None
    assert (head.codes.inputs, head.codes.inner, head.codes.block, head.codes.scale_bytes) == (300, 1, 128, 2)
    assert head.codes.offset_bytes == (2 if grid_of(width, sparse=zeros > 0).affine else 0)
    if not zeros:
        expected = {8: 8.2, 4: 4.4, 2: 2.4, 1.58: 2.2, 1: 1.4}[width]
        assert size < expected + 8 * 80 / weight.numel() * (4 if width == 8 else 1)


@pytest.mark.parametrize("dtype", list(NAMES))
@pytest.mark.parametrize("bits_", [8, 6, 4, 3, 2, 1.58])
@pytest.mark.parametrize("block", [32, 128, 96])
def test_rounding_to_nearest(block: int, bits_: float, dtype: torch.dtype) -> None:
    """Blocks of a power of two need no hint."""
    weight = round_to_nearest(weights(16, 512, zeros=0.5).to(dtype), bits=bits_, block=block)
    head, _ = there_and_back(weight, block=96 if block == 96 else None)
    assert head is not None and head.codes is not None and head.codes.block == block
    assert len(head.codes.levels) <= 2**bits_


def test_gptq() -> None:
    weight = gptq(weights(32, 256, zeros=0.5), torch.randn(400, 256), bits=4, block=64)
    head, size = there_and_back(weight)
    assert head is not None and head.codes is not None and head.codes.block == 64 and size < 3.8


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((256, 48), (1, 256, 48)),  # HF's Conv1D
        ((4, 24, 128), (4 * 24, 128, 1)),  # experts
        ((4, 128, 24), (4, 128, 24)),  # the same, transposed
        ((20, 32, 3, 3), (20, 288, 1)),  # a convolution
        ((160, 6, 3, 3), (1, 160, 54)),  # a transposed one
    ],
)
@pytest.mark.parametrize("zeros", [0.0, 0.8])
def test_other_layouts(shape: tuple[int, ...], layout: tuple[int, int, int], zeros: float) -> None:
    weight = round_blocks(weights(*shape, zeros=zeros), Layout(*layout), grid_of(4, sparse=zeros > 0))
    head, _ = there_and_back(weight)
    assert head is not None and head.codes is not None
    assert (head.codes.inputs, head.codes.inner) == layout[1:]


def test_two_of_four() -> None:
    latent = weights(32, 256)
    small = latent.abs().unflatten(1, (-1, 4)).topk(2, dim=2, largest=False).indices
    latent = latent.unflatten(1, (-1, 4)).scatter(2, small, 0).flatten(1)
    head, size = there_and_back(round_blocks(latent, Layout(32, 256, 1), grid_of(4, sparse=True)), zstd=True)
    assert head is not None and head.codes is not None and size < 3.0


def test_other_tools_scales_of_32_bits() -> None:
    """Rounding to nearest with the scale max / 127 of a row, whose products are not exact."""
    weight = weights(40, 192)
    scales = weight.abs().amax(1, keepdim=True) / 127
    for dtype in (torch.float32, torch.float16):
        head, _ = there_and_back(((weight / scales).round().int() * scales).to(dtype))
        assert head is not None and head.codes is not None and head.codes.block == 192


def test_blocks_of_zeros_outliers_and_tiny_numbers() -> None:
    latent = weights(16, 512, zeros=0.5)
    latent[3] = 0
    latent[4, 128:256] = 0
    latent[5, 7] = 1e4
    latent[6] *= 1e-30
    weight = round_blocks(latent, Layout(16, 512, 1), grid_of(4, sparse=True))
    head, _ = there_and_back(weight)
    assert head is not None and head.codes is not None


@pytest.mark.parametrize("change", ["a weight", "-0.0", "nan", "not quantised"])
def test_what_has_no_codes_is_stored_as_ever(change: str) -> None:
    weight = round_blocks(weights(16, 512, zeros=0.5), Layout(16, 512, 1), grid_of(4, sparse=True))
    if change == "a weight":
        weight[9, 300] *= 1.01
    elif change == "not quantised":
        weight = weights(16, 512, zeros=0.5)
    else:
        weight[9, weight[9].eq(0).nonzero()[0]] = float(change)
    head, _ = there_and_back(weight)
    assert head is not None and head.codes is None


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 8),
    inputs=st.integers(2, 300),
    inner=st.sampled_from([1, 1, 3]),
    block=st.sampled_from([8, 32, 128]),
    largest=st.sampled_from([1, 2, 7, 127]),
    dtype=st.sampled_from(list(NAMES)),
    zeros=st.sampled_from([0.0, 0.5, 0.95]),
    zstd=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_whatever_is_stored_comes_back(
    rows: int,
    inputs: int,
    inner: int,
    block: int,
    largest: int,
    dtype: torch.dtype,
    zeros: float,
    zstd: bool,
    seed: int,
) -> None:
    chance = np.random.default_rng(seed)
    codes = chance.integers(-largest, largest + 1, (rows, inputs, inner)) * (
        chance.random((rows, inputs, inner)) >= zeros
    )
    scales = np.exp2(chance.integers(-9, 0, (rows, -(-inputs // block), inner))) * chance.integers(128, 256)
    whole = torch.from_numpy((codes * np.repeat(scales, block, 1)[:, :inputs]).astype(np.float32)).to(dtype)
    there_and_back(whole[..., 0].contiguous() if inner == 1 else whole, zstd)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("zeros", [0.5, 0.95])
def test_packed_values(zeros: float, transposed: bool) -> None:
    weight = round_blocks(weights(64, 256, zeros=zeros), Layout(64, 256, 1), grid_of(4, sparse=True))
    _, blob = encode(bytes_of(weight), "F32", (64, 256))
    assert blob is not None and parse(blob, blob.nbytes, "it").codes is not None
    packed = PackedBlock(blob, blob.nbytes, "it", transposed)
    dense = (weight.T if transposed else weight).contiguous().numpy()
    found = packed.packed(64)
    assert packed.number == np.count_nonzero(dense)
    assert np.array_equal(found.values.view("<f4")[: packed.number], dense[dense != 0])
    assert np.array_equal(np.unpackbits(found.masks, axis=1, count=dense.shape[1], bitorder="little"), dense != 0)
    assert np.array_equal(packed.rows().values.view("<f4"), dense[dense != 0])


def forged(change: dict[int, int], zeros: float = 0.5) -> Any:
    weight = round_blocks(weights(16, 256, zeros=zeros), Layout(16, 256, 1), grid_of(4, sparse=zeros > 0))
    _, blob = encode(bytes_of(weight), "F32", (16, 256))
    assert blob is not None
    result = blob.copy()
    for place, value in change.items():
        result[place] = value
    return result


@pytest.mark.parametrize(
    ("change", "zeros", "match"),
    [
        ({10: 6}, 0.5, "signs of zeros"),
        ({10: 16}, 0.5, "flags 16"),
        ({64: 0, 65: 0}, 0.5, "blocks of 128 among 0 inputs"),
        ({71: 255}, 0.5, "do not fit"),
        ({72: 0}, 0.5, "do not fit"),
        ({80: 0}, 0.5, "blocks of 0 among"),
        ({82: 1}, 0.5, "do not fit"),
        ({84: 200}, 0.5, "in order"),
        ({85: 3}, 0.5, "scales have 3 bytes"),
        ({85: 4}, 0.0, "scales have 4 bytes and its offsets 2"),
        ({86: 2}, 0.5, "offsets do not match its encoding bitmask"),
        ({87: 1}, 0.5, "reserved"),
        ({88: 100}, 0.5, "in order"),
        ({16: 70, 17: 54, 18: 52}, 0.5, "codes do not match its dtype F64"),
    ],
)
def test_forged_heads(change: dict[int, int], zeros: float, match: str) -> None:
    decode(forged({}, zeros), LIMIT, "it")
    with pytest.raises(blocks.FormatError, match=match):
        decode(forged(change, zeros), LIMIT, "it")


@settings(max_examples=300, deadline=None)
@given(
    zeros=st.sampled_from([0.0, 0.5, 0.99]),
    changes=st.lists(st.tuples(st.integers(0, 1 << 14), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_changed_bytes_are_refused_or_give_a_tensor_of_the_size_told(
    zeros: float, changes: list[tuple[int, int]]
) -> None:
    block = forged({}, zeros)
    for place, value in changes:
        block[place % (120 if value % 2 else len(block))] = value
    try:
        found, head = decode(block, 1 << 20, "it")
    except blocks.FormatError:
        return
    assert found.nbytes == head.dense <= 1 << 20
