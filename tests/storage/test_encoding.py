"""One tensor in its block: bit-identical, in the fewest bytes, and refused if damaged or forged."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_pdecay.storage import encoding as blocks
from hf_pdecay.storage.container import FormatError
from hf_pdecay.storage.encoding import ENCODINGS, check, decode, encode, parse

from ..helpers.reference.compressed_reader import SIZES, read_block, sizes


Bytes = blocks.Bytes
LIMIT = 1 << 30
HEAD = 48


def array(data: bytes) -> Bytes:
    return np.frombuffer(data, dtype=np.uint8)


def sparse_bytes(elements: int, size: int, zeros: float, seed: int, negative: float = 0.0) -> bytes:
    """Random bytes; so many of the elements that are zeros have the first bit, a float's sign."""
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (elements, size), dtype=np.uint8)
    zero = generator.random(elements) < zeros
    data[zero] = 0
    data[zero & (generator.random(elements) < negative), -1] = 0x80
    return data.tobytes()


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, tuple[int, ...], bytes]:
    """Of any dtype, of few elements, with any share of zeros: none, some, all; no dimension, or one of 0, too."""
    dtype = draw(st.sampled_from(sorted(SIZES)))
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    zeros, negative = draw(st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])), draw(st.sampled_from([0.0, 0.5, 1.0]))
    seed = draw(st.integers(0, 2**32 - 1))
    return dtype, shape, sparse_bytes(math.prod(shape), SIZES[dtype], zeros, seed, negative)


@pytest.mark.parametrize("chunk", [16, 1 << 18])
@settings(max_examples=200, deadline=None)
@given(tensor=tensors(), zstd=st.booleans())
@example(tensor=("F32", (), bytes(4)), zstd=False)
@example(tensor=("F32", (0, 3), b""), zstd=True)
def test_round_trip_by_two_readers(chunk: int, tensor: tuple[str, tuple[int, ...], bytes], zstd: bool) -> None:
    dtype, shape, data = tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_CHUNK", chunk)
        encoding, block = encode(array(data), dtype, shape, zstd)
        if block is None:
            assert encoding == blocks.DENSE and dtype != "U8" and len(data) % 8 == 0
            return
        found, head = decode(block, len(data), "it")
    assert found.tobytes() == data
    assert (head.dtype, head.shape, head.dense) == (dtype, shape, len(data))
    assert read_block(block.tobytes()) == (dtype, shape, data)
    assert block.nbytes % 8 == 0
    found[:] = 0  # it is the caller's


@pytest.mark.parametrize("zeros", [0.0, 0.2, 0.5, 0.9, 0.97, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("negative", [0.0, 0.001, 0.5])
@pytest.mark.parametrize("dtype", ["I8", "BF16", "F32", "F64"])
def test_the_smallest_encoding_is_taken(dtype: str, negative: float, zeros: float) -> None:
    data = sparse_bytes(4096, SIZES[dtype], zeros, seed=1, negative=negative)
    expected = sizes(data, dtype)
    encoding, block = encode(array(data), dtype, (4096,))
    if block is None:
        assert len(data) <= min(expected.values()) + HEAD + 8 + 7
        return
    assert parse(block, block.nbytes, "it").stored == min(expected.values()) == expected[ENCODINGS[encoding]]


@pytest.mark.parametrize(("gap", "width"), [(255, 1), (256, 2), (65535, 2), (65536, 4)])
def test_gaps_are_as_wide_as_they_must_be(gap: int, width: int) -> None:
    values = np.zeros(2 * gap + 100, dtype="<u4")
    values[[0, gap + 1]] = 7
    _, block = encode(values.view(np.uint8), "U32", values.shape)
    assert block is not None
    assert parse(block, block.nbytes, "it").width == width
    assert decode(block, LIMIT, "it")[0].tobytes() == values.tobytes() == read_block(block.tobytes())[2]


def test_signs_of_zero_and_payloads_of_nan_come_back() -> None:
    bits = [0x80000000, 0x7FC00001, 0xFFC12345, 0x7F800001, 0x7F800000, 0x00000001, 0x80000001]
    values = np.zeros(1000, dtype="<u4")
    values[::150] = bits
    _, block = encode(values.view(np.uint8), "F32", (1000,))
    assert block is not None
    assert decode(block, LIMIT, "it")[0].view("<u4")[::150].tolist() == bits


@pytest.mark.parametrize("zstd", [False, True])
def test_a_product_with_a_mask_is_stored_small(zstd: bool) -> None:
    """It makes zeros of both signs. 90% of them as a bitmask and a bit for each: 1/32 + 0.9/32 + 0.1 of float32."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal(100_000).astype("<f4")
    values *= generator.random(100_000) >= 0.9
    assert np.signbit(values[values == 0]).mean() > 0.4
    _, block = encode(values.view(np.uint8), "F32", values.shape, zstd)
    assert block is not None
    assert block.nbytes / values.nbytes < (0.16 if not zstd else 0.15)
    assert decode(block, LIMIT, "it")[0].tobytes() == values.tobytes()


def test_planes_make_zstd_smaller() -> None:
    import zstandard

    values = np.random.default_rng(0).standard_normal(20_000).astype("<f4")
    values[np.random.default_rng(1).random(20_000) < 0.9] = 0
    plain, packed = (encode(values.view(np.uint8), "F32", (20_000,), zstd)[1] for zstd in (False, True))
    assert plain is not None and packed is not None
    head = parse(plain, plain.nbytes, "it")
    without_planes = zstandard.ZstdCompressor(level=1).compress(plain[head.begin :].tobytes())
    assert parse(packed, packed.nbytes, "it").stored < 0.9 * len(without_planes)


def test_a_dtype_or_a_length_that_does_not_go_with_the_data_is_refused() -> None:
    with pytest.raises(FormatError, match="has the dtype 'F4'"):
        encode(array(bytes(4)), "F4", (8,))
    with pytest.raises(FormatError, match="has 4 bytes where its dtype and shape need 8"):
        encode(array(bytes(4)), "F32", (2,))


def block_of(encoding: int, zstd: bool = False, negative: float = 0.0) -> bytearray:
    """A block of 100 × 10 elements of 4 bytes in an encoding, small enough to be read by eye."""
    zeros = {blocks.DENSE: 0.0, blocks.BITMASK: 0.6, blocks.GAPS: 0.98}[encoding]
    dtype = "U8" if encoding == blocks.DENSE else "F32"
    data = sparse_bytes(1000, SIZES[dtype], zeros, seed=2, negative=negative)
    found, block = encode(array(data), dtype, (100, 10), zstd)
    assert block is not None and (found == encoding or zstd)
    return bytearray(block.tobytes())


def put(block: bytearray, place: int, form: str, *values: int) -> bytearray:
    struct.pack_into(form, block, place, *values)
    return block


def signs_of(dtype: str) -> bytearray:
    block = block_of(1, negative=0.5)
    block[16:32] = dtype.encode().ljust(16, b"\0")
    return block


def last_sign(byte: int) -> bytearray:
    block = block_of(1, negative=0.5)
    head = parse(array(bytes(block)), len(block), "it")
    assert head.signs and (head.numel - head.values) % 8
    block[head.begin + head.stored - 1] = byte
    return block


def zero_value() -> bytearray:
    block = block_of(1, negative=0.5)
    head = parse(array(bytes(block)), len(block), "it")
    return put(block, head.begin + head.places, "<I", 0)


# Payloads begin at 64: two dimensions.
FORGED: dict[str, tuple[Callable[[], bytearray], str]] = {
    "empty": (lambda: bytearray(), "does not begin"),
    "head cut": (lambda: block_of(1)[:40], "does not begin"),
    "dimensions cut": (lambda: block_of(1)[:56], "cut short"),
    "payload cut": (lambda: block_of(1)[:-8], "bytes where its head needs"),
    "payload longer": (lambda: block_of(1) + bytes(8), "bytes where its head needs"),
    "magic": (lambda: put(block_of(1), 0, "<B", 0), "does not begin"),
    "version": (lambda: put(block_of(1), 8, "<B", 2), "version 2; this hf_pdecay reads version 1"),
    "encoding": (lambda: put(block_of(1), 9, "<B", 3), "encoding 3"),
    "other encoding": (lambda: put(block_of(2), 9, "<B", 1), "gaps of 1 bytes"),
    "flags": (lambda: put(block_of(1), 10, "<B", 16), "flags 16"),
    "changes with signs": (lambda: put(block_of(1), 10, "<B", 10), "changes to a base"),
    "signs of none": (
        lambda: put(block_of(1), 10, "<B", 2),
        "has 1797 bytes where 418 values of 1000 elements",
    ),
    "signs of bytes": (lambda: put(block_of(0), 10, "<B", 2), "signs of zeros do not match its encoding dense"),
    "signs of integers": (lambda: signs_of("I32"), "signs of zeros do not match its encoding bitmask and dtype I32"),
    "signs beyond": (lambda: last_sign(0xFF), "signs of more zeros than there are"),
    "zero value": (lambda: zero_value(), "zeros are among its values"),
    "width 0": (lambda: put(block_of(2), 11, "<B", 0), "gaps of 0 bytes"),
    "width 3": (lambda: put(block_of(2), 11, "<B", 3), "gaps of 3 bytes"),
    "width 8": (lambda: put(block_of(2), 11, "<B", 8), "gaps of 8 bytes"),
    "dimensions": (lambda: put(block_of(1), 12, "<B", 200), "200 dimensions"),
    "reserved": (lambda: put(block_of(1), 13, "<B", 1), "reserved"),
    "dtype": (lambda: put(block_of(1), 16, "<B", 0), "dtype"),
    "more values": (lambda: put(block_of(1), 32, "<Q", 1001), "1001 values of 1000"),
    "a value more": (lambda: put(block_of(1), 32, "<Q", 500), "where 500 values of 1000 elements need"),
    "values beyond 64 bits": (lambda: put(block_of(1), 32, "<Q", 2**64 - 1), "values of 1000"),
    "stored": (lambda: put(block_of(1), 40, "<Q", 2**63), "its payload has"),
    "shape overflows": (lambda: put(block_of(1), 48, "<QQ", 2**32, 2**32), "a shape that no tensor can have"),
    "shape overflows beside 0": (lambda: put(block_of(1), 48, "<QQ", 2**63, 0), "a shape that no tensor can have"),
    "shape of other elements": (lambda: put(block_of(1), 48, "<QQ", 100, 11), "values of 1100 elements need"),
    "a bit more": (lambda: put(block_of(1), 64, "<B", 255), "its bitmask marks"),
    "no bits": (lambda: put(block_of(1), 64, "<125B", *bytes(125)), "its bitmask marks 0 elements"),
    "index beyond": (
        lambda: put(block_of(2), 64, "<16B", *[255] * 16),
        "its last index is [0-9]+ and it has 1000 elements",
    ),
    "zstd of something else": (lambda: put(block_of(2), 10, "<B", 1), "not a zstd frame"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_blocks_are_refused_in_a_sentence(case: str) -> None:
    make, match = FORGED[case]
    block = array(bytes(make()))
    with pytest.raises(FormatError, match=match) as caught:
        decode(block, LIMIT, "'w' in model.safetensors")
    assert str(caught.value).startswith("'w' in model.safetensors") and str(caught.value).endswith(".")
    with pytest.raises(FormatError):
        check(block, "it")


def test_bits_beyond_the_last_element_and_bytes_behind_the_payload_are_refused() -> None:
    data = sparse_bytes(1003, 4, 0.6, seed=3)
    _, block = encode(array(data), "F32", (1003,))
    assert block is not None
    last = 48 + 8 + 125
    forged = block.copy()
    forged[last] |= 0x80
    forged[last - 1] &= forged[last - 1] - 1  # one bit less, so that their number is right
    with pytest.raises(FormatError, match="beyond the last"):
        check(forged, "it")
    head = parse(block, block.nbytes, "it")
    behind = head.begin + head.stored
    assert behind < block.nbytes
    forged = block.copy()
    forged[behind] = 1
    with pytest.raises(FormatError, match="after its payload"):
        check(forged, "it")


def huge_block(encoding: int, zstd: bool) -> Bytes:
    """A few bytes, with zstd 4 MB at most, that describe a tensor of 4 TB of zeros, and are otherwise valid."""
    payload = b""
    if zstd:
        # A frame of 0 or 2^37 zeros, in blocks that each repeat a byte 2^17 times (RFC 8878, 3.1.1).
        repeated = (1 << 17 << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
        blocks_of_zeros = repeated * (1 << 20) if encoding == blocks.BITMASK else b""
        size = len(blocks_of_zeros) // 4 << 17
        payload = b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + blocks_of_zeros + b"\1\0\0"
    head = struct.pack(
        "<8sBBBBB3x16sQQQ", b"hfpdblob", 1, encoding, zstd, encoding // 2, 1, b"F32", 0, len(payload), 1 << 40
    )
    return array((head + payload).ljust(-(-(len(head) + len(payload)) // 8) * 8, b"\0"))


@pytest.mark.parametrize(("encoding", "zstd"), [(blocks.GAPS, False), (blocks.GAPS, True), (blocks.BITMASK, True)])
def test_absurd_sizes_are_refused_before_memory_is_taken(encoding: int, zstd: bool) -> None:
    block = huge_block(encoding, zstd)
    tracemalloc.start()
    try:
        check(block, "it")
        with pytest.raises(FormatError, match="is a tensor of [0-9]+ bytes; at most 1000000"):
            decode(block, 1_000_000, "it")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_frame_that_unpacks_to_more_than_is_due_is_refused() -> None:
    import zstandard

    block = bytes(block_of(blocks.GAPS, zstd=True))
    head = parse(block, len(block), "it")
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    unsaid = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(head.raw))
    for payload in (bomb, unsaid):
        start = block[: head.begin]
        forged = bytearray(start + payload + bytes(-(len(start) + len(payload)) % 8))
        struct.pack_into("<Q", forged, 40, len(payload))
        forged[10] = 1
        with pytest.raises(FormatError, match="zstd frame would unpack to"):
            decode(array(bytes(forged)), LIMIT, "it")


@settings(max_examples=500, deadline=None)
@given(
    encoding=st.sampled_from(sorted(ENCODINGS)),
    zstd=st.booleans(),
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_changed_bytes_are_refused_or_give_a_tensor_of_the_size_told(
    encoding: int, zstd: bool, changes: list[tuple[int, int]]
) -> None:
    block = block_of(encoding, zstd)
    for place, value in changes:
        block[place % len(block)] = value
    try:
        found, head = decode(array(bytes(block)), 1 << 20, "it")
    except FormatError:
        return
    assert found.nbytes == head.dense <= 1 << 20


def test_without_zstandard_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    packed = array(bytes(block_of(blocks.GAPS, zstd=True)))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    data = array(sparse_bytes(1000, 4, 0.9, seed=0))
    with pytest.raises(ValueError, match=r"pip install 'hf-pdecay\[zstd\]'"):
        encode(data, "F32", (1000,), zstd=True)
    if parse(packed, packed.nbytes, "it").zstd:
        with pytest.raises(ValueError, match=r"pip install 'hf-pdecay\[zstd\]'"):
            decode(packed, LIMIT, "it")
    encode(data, "F32", (1000,))
