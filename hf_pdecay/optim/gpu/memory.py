"""How the Triton kernels find, load and store their data: rows of tables, chunks and blocks."""

from __future__ import annotations

import triton
import triton.language as tl


# A row of the table of tensors, in int64: the place of its first chunk among the chunks of all rows; the addresses of
# weights, gradient, first and second moment, step counter, and the flag whether it is awake, or 0; the number of
# weights; the place of the tensor in the optimizer; whether all addresses are multiples of 16; the address of the base,
# or 0.
COLUMNS = tl.constexpr(11)


@triton.jit
def row_of(table: tl.tensor, rows: tl.tensor) -> tl.tensor:
    """Return the row of the tensor that the chunk of this program belongs to."""
    # The last row whose first chunk is not beyond this one. Rows without weights have the first chunk of the next.
    low = tl.program_id(1)  # 0
    high = rows
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * COLUMNS) <= tl.program_id(0)
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def chunk_of(words: tl.tensor, CHUNK: tl.constexpr, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return where this program's chunk of a tensor begins, where its part of whole blocks ends, and where it ends.

    The caller runs its code on both parts: only without a mask does the compiler load several elements at a time.
    """
    begin = (tl.program_id(0) - tl.load(words)) * CHUNK
    end = tl.minimum(begin + CHUNK, tl.load(words + 7))
    return begin, begin + (end - begin) // BLOCK * BLOCK * tl.load(words + 9), end


@triton.jit
def load_block(
    address: tl.tensor, at: tl.tensor, lane: tl.tensor, mask: tl.tensor, TYPE: tl.constexpr, WHOLE: tl.constexpr
) -> tl.tensor:
    """Load a block; bfloat16 and float16 become float32."""
    return number_of(load_stored(address, at, lane, mask, TYPE, WHOLE), TYPE)


@triton.jit
def load_stored(
    address: tl.tensor, at: tl.tensor, lane: tl.tensor, mask: tl.tensor, TYPE: tl.constexpr, WHOLE: tl.constexpr
) -> tl.tensor:
    """Load a block as it is stored: bfloat16 and float16 as their bits."""
    STORED: tl.constexpr = tl.uint16 if TYPE == tl.bfloat16 or TYPE == tl.float16 else TYPE
    pointer = address.to(tl.pointer_type(STORED))
    if WHOLE:
        value = tl.load(tl.multiple_of(pointer, 16) + at + lane)
    else:
        value = tl.load(pointer + at + lane, mask=mask, other=0)
    return value


@triton.jit
def number_of(value: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """Return the numbers of values as they are stored: of bfloat16 and float16 in float32."""
    if TYPE == tl.bfloat16:
        value = (value.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    if TYPE == tl.float16:
        value = value.to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def store_block(
    address: tl.tensor,
    at: tl.tensor,
    lane: tl.tensor,
    mask: tl.tensor,
    value: tl.tensor,
    noise: tl.tensor,
    TYPE: tl.constexpr,
    NEAREST: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Round a block and store it."""
    store_rounded(address, at, lane, mask, rounded(value, noise, TYPE, NEAREST), TYPE, WHOLE)


@triton.jit
def rounded(value: tl.tensor, noise: tl.tensor, TYPE: tl.constexpr, NEAREST: tl.constexpr) -> tl.tensor:
    """Return numbers as they are stored: bfloat16 and float16 rounded stochastically, or to the nearest."""
    if TYPE == tl.bfloat16 or TYPE == tl.float16:  # see rounding.py
        bits = value.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        if TYPE == tl.bfloat16:
            if NEAREST:
                kept = (magnitude + (0x7FFF + ((bits >> 16) & 1))) >> 16
            else:
                kept = tl.minimum(magnitude + (noise & 0xFFFF), 0x7F7FFFFF) >> 16
            kept = tl.where(magnitude > 0x7F800000, 0x7FC0, kept)  # a NaN stays one
        else:
            if NEAREST:
                kept = tl.abs(value).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
            else:
                dropped = noise & 0x1FFF
                # Below its smallest normal number float16 has a fixed step, 2^-24.
                small = tl.minimum(magnitude, 0x38800000).to(tl.float32, bitcast=True) * 16777216.0
                subnormal = (small + dropped.to(tl.float32) * (1.0 / 8192.0)).to(tl.int32).to(tl.uint32)
                normal = (tl.maximum(magnitude, 0x38800000) - 0x38000000 + dropped) >> 13
                kept = tl.where(magnitude < 0x38800000, subnormal, tl.minimum(normal, 0x7BFF))
            kept = tl.where(magnitude > 0x7F800000, 0x7E00, kept)
        sign = (bits >> 16) & 0x8000
        if not NEAREST:
            sign = tl.where(kept == 0, 0, sign)  # no -0
        value = (kept | sign).to(tl.uint16)
    return value


@triton.jit
def store_rounded(
    address: tl.tensor,
    at: tl.tensor,
    lane: tl.tensor,
    mask: tl.tensor,
    value: tl.tensor,
    TYPE: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Store a block of :func:`rounded` values."""
    STORED: tl.constexpr = tl.uint16 if TYPE == tl.bfloat16 or TYPE == tl.float16 else TYPE
    pointer = address.to(tl.pointer_type(STORED))
    if WHOLE:
        tl.store(tl.multiple_of(pointer, 16) + at + lane, value)
    else:
        tl.store(pointer + at + lane, value, mask=mask)
