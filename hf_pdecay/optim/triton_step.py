"""The step on a GPU, by one Triton kernel for all tensors of a kind: one pass over memory, and the host never waits.

The arithmetic is that of adamw_lp.cpp. The kernel finds its tensors by a table of addresses on the device, so that many
small tensors cost one launch. A kernel of one thread a tensor goes before it, which counts the step and computes in
float64 what all weights of a tensor share. No hyperparameter is a constant of a kernel: when one changes, nothing is
compiled again.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from array import array
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compiled import is_flat
from .moments import is_quantized
from .tensor_step import TensorStep


_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_PAIRS = {
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
}

_BLOCK = 1024  # elements that a program works on at a time: eight a thread, so that half precision loads 16 bytes
_CHUNK = 4 * _BLOCK  # elements of a program, over which finding their tensor is spread
_ROWS = 128  # tensors that a program of the first kernel prepares
_WARPS = 4

_ALIGNMENT = 16  # bytes that a thread loads at once, if the addresses allow it

# A row of the table of tensors, in int64: the place of its first chunk among those of all rows; the addresses of weights,
# gradient, first and second moment, step counter, and flag whether it is awake, or 0; the number of weights; the place
# of the tensor in the optimizer; whether all addresses are multiples of _ALIGNMENT.
_COLUMNS = tl.constexpr(10)
# A row of what the tensors' weights share, in float32 or float64; see _prepare.
_SHARED = tl.constexpr(16)


# --- kernels


@triton.jit(
    do_not_specialize=[
        "finite",
        "rate",
        "rows",
        "lr",
        "beta1",
        "beta2",
        "eps",
        "weight_decay",
        "p_norm",
        "lambda_p",
        "keep_zeros",
        "sign",
        "least",
        "tiny",
    ]
)
def _prepare(
    table,
    shared,
    finite,
    rate,
    rows: tl.int32,
    lr: tl.int64,
    beta1: tl.int64,
    beta2: tl.int64,
    eps: tl.int64,
    weight_decay: tl.int64,
    p_norm: tl.int64,
    lambda_p: tl.int64,
    keep_zeros: tl.int64,
    sign: tl.int64,
    least: tl.int64,
    tiny: tl.int64,
    ROWS: tl.constexpr,
):
    """Count the step of each tensor and write the row of ``shared`` that its weights need."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    words = table + row * _COLUMNS
    step = tl.load(words + 5, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    flag = tl.load(words + 6, mask=mask, other=0)
    awake = tl.load(flag.to(tl.pointer_type(tl.int8)), mask=mask & (flag != 0), other=1) != 0

    going = mask
    if finite is not None:
        going = mask & (tl.load(finite) != 0)
    count = tl.load(step, mask=mask, other=0.0) + 1.0
    tl.store(step, count, mask=going)

    if rate is not None:
        alpha = tl.load(rate).to(tl.float64)
    else:
        alpha = _float64(lr)
    first_decay, second_decay = _float64(beta1), _float64(beta2)
    times = count.to(tl.float64)
    correction1 = 1.0 - tl.exp2(times * tl.log2(first_decay))
    correction2 = tl.sqrt(1.0 - tl.exp2(times * tl.log2(second_decay)))

    alpha_lambda = alpha * _float64(lambda_p)
    decays = awake & (alpha_lambda >= _float64(tiny))
    x = 2.0 - _float64(p_norm)
    # α λ_p of 0, whose logarithm this is, makes every factor 1.
    log2_alpha_lambda = tl.where(decays, tl.log2(tl.where(decays, alpha_lambda, 1.0)), float("-inf"))
    at_zero = tl.where(x > 0, 0.0, tl.where(x == 0, 1.0 / (1.0 + alpha_lambda), 1.0))

    out = shared + row * _SHARED
    tl.store(out + 0, going.to(tl.float64), mask=mask)
    tl.store(out + 1, count.to(tl.float64), mask=mask)
    tl.store(out + 2, _float64(sign), mask=mask)
    tl.store(out + 3, 1.0 - first_decay, mask=mask)
    tl.store(out + 4, second_decay, mask=mask)
    tl.store(out + 5, 1.0 - second_decay, mask=mask)
    tl.store(out + 6, 1.0 / correction2, mask=mask)
    tl.store(out + 7, _float64(eps), mask=mask)
    tl.store(out + 8, _float64(least), mask=mask)
    tl.store(out + 9, -alpha / correction1, mask=mask)
    tl.store(out + 10, 1.0 - alpha * _float64(weight_decay), mask=mask)
    tl.store(out + 11, -x, mask=mask)
    tl.store(out + 12, log2_alpha_lambda, mask=mask)
    tl.store(out + 13, tl.where(decays, at_zero, 1.0), mask=mask)
    tl.store(out + 14, _float64(keep_zeros), mask=mask)


@triton.jit
def _float64(bits):
    # Triton passes a Python float as float32, in which 1 - β₂ would have lost half of its digits.
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["rows"])
def _update(
    table,
    shared,
    rows: tl.int32,
    PARAM: tl.constexpr,
    MOMENT: tl.constexpr,
    REAL: tl.constexpr,
    DECAY: tl.constexpr,
    NEAREST: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Do the step of one chunk of one tensor."""
    program = tl.program_id(0)
    # The last row whose first chunk is not beyond this one. Rows without weights have the first chunk of the next.
    low = tl.program_id(1)
    high = rows
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * _COLUMNS) <= program
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    words = table + low * _COLUMNS
    scalars = shared + low * _SHARED
    if tl.load(scalars) != 0:
        numel = tl.load(words + 7)
        aligned = tl.load(words + 9)
        begin = (program - tl.load(words)) * CHUNK
        end = tl.minimum(begin + CHUNK, numel)
        # Two copies of the same code: a mask, or an address that may not be a multiple of 16, keeps the compiler from
        # loading 16 bytes at once.
        for at in range(begin, end, BLOCK):
            if (at + BLOCK <= numel) & (aligned != 0):
                _block(words, scalars, at, BLOCK, PARAM, MOMENT, REAL, DECAY, NEAREST, BLOCK, True)
            else:
                left = tl.minimum(numel - at, BLOCK).to(tl.int32)
                _block(words, scalars, at, left, PARAM, MOMENT, REAL, DECAY, NEAREST, BLOCK, False)


@triton.jit
def _block(
    words,
    scalars,
    at,
    left,
    PARAM: tl.constexpr,
    MOMENT: tl.constexpr,
    REAL: tl.constexpr,
    DECAY: tl.constexpr,
    NEAREST: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Do the step of the elements ``at`` and ``left - 1`` following ones."""
    lane = tl.arange(0, BLOCK)
    param, exp_avg, exp_avg_sq = tl.load(words + 1), tl.load(words + 3), tl.load(words + 4)
    w = _load(param, at, lane, left, PARAM, REAL, WHOLE)
    g = _load(tl.load(words + 2), at, lane, left, PARAM, REAL, WHOLE)
    m = _load(exp_avg, at, lane, left, MOMENT, REAL, WHOLE)
    v = _load(exp_avg_sq, at, lane, left, MOMENT, REAL, WHOLE)

    g = g * tl.load(scalars + 2)
    weight1 = tl.load(scalars + 3)
    # torch's lerp works from the nearer end.
    gap = g - m
    m = tl.where(weight1 < 0.5, tl.fma(gap, weight1, m), tl.fma(gap, weight1 - 1.0, g))
    v = tl.fma(g * tl.load(scalars + 5), g, v * tl.load(scalars + 4))
    if MOMENT == tl.float16:
        # The square of a finite gradient may be beyond float16; that of an infinite one is.
        v = tl.where((tl.abs(g) <= 65504.0) & (v > 65504.0), 65504.0, v)
    denominator = tl.fma(_sqrt(v, REAL), tl.load(scalars + 6), tl.load(scalars + 7))
    if MOMENT == tl.float16:
        least = tl.load(scalars + 8)
        denominator = tl.where(denominator < least, least, denominator)
    result = tl.fma(w, tl.load(scalars + 10), m * tl.load(scalars + 9) / denominator)

    if DECAY:
        result = result * _factor(tl.abs(w), scalars, REAL)
        # One bit pattern for all zeros.
        result = tl.where(result == 0, 0.0, result)
    result = tl.where((w == 0) & (tl.load(scalars + 14) != 0), 0.0, result)

    noise = tl.zeros([BLOCK], tl.uint32)
    if not NEAREST:
        noise = _noise(at.to(tl.uint32) + lane.to(tl.uint32), tl.load(words + 8), tl.load(scalars + 1))
    # Each rounding gets bits of its own: the low half, the high half, and both together.
    _store(param, at, lane, left, result, noise, PARAM, NEAREST, WHOLE)
    _store(exp_avg, at, lane, left, m, noise ^ (noise >> 16), MOMENT, NEAREST, WHOLE)
    _store(exp_avg_sq, at, lane, left, v, noise >> 16, MOMENT, NEAREST, WHOLE)


@triton.jit
def _factor(magnitude, scalars, REAL: tl.constexpr):
    """Return the shrink factor s / (s + α λ_p) with s = |w|^x, which is 1 / (1 + α λ_p |w|^-x) for every p."""
    minus_x = tl.load(scalars + 11)
    y = tl.load(scalars + 12)
    if REAL == tl.float64:
        y = tl.fma(tl.log2(tl.where(magnitude == 0, 1.0, magnitude)), minus_x, y)
        factor = 1.0 / (1.0 + tl.exp2(y))
    else:
        # GPUs take denormal numbers for 0 in a logarithm. So the exponent is read from the bits, of 2^24 times the
        # magnitude, and the logarithm of the mantissa is the polynomial of adamw_lp.cpp.
        bits = (magnitude * 16777216.0).to(tl.int32, bitcast=True)
        exponent = ((bits - (151 << 23)) >> 23).to(tl.float32)
        mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        log2 = tl.fma(mantissa, 0.0151253382, -0.1839394578)
        log2 = tl.fma(log2, mantissa, 0.9780940427)
        log2 = tl.fma(log2, mantissa, -2.9850191145)
        log2 = tl.fma(log2, mantissa, 5.7814362270)
        log2 = tl.fma(log2, mantissa, -7.4941276938)
        log2 = tl.fma(log2, mantissa, 7.1339685832)
        log2 = tl.fma(log2, mantissa, -3.2455376464)
        y = tl.fma(exponent, minus_x, tl.fma(log2, minus_x, y))
        # Rounded to nearest, as the weights that do not decay must get a factor of exactly 1.
        factor = tl.div_rn(1.0, 1.0 + tl.exp2(y))
    return tl.where(magnitude == 0, tl.load(scalars + 13), factor)


@triton.jit
def _sqrt(x, REAL: tl.constexpr):
    # The fast root takes denormal numbers for 0.
    if REAL == tl.float64:
        root = tl.sqrt(x)
    else:
        root = tl.sqrt_rn(x)
    return root


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = tl.mul(x, 0x21F0AAAD, sanitize_overflow=False)
    x = x ^ (x >> 15)
    x = tl.mul(x, 0xD35A2D97, sanitize_overflow=False)
    return x ^ (x >> 15)


@triton.jit
def _noise(element, place, count):
    """Return 32 random bits for each element, see rounding.py."""
    a = tl.mul(place.to(tl.uint32), 0x9E3779B9, sanitize_overflow=False)
    a = _mix(tl.add(a, count.to(tl.int64).to(tl.uint32), sanitize_overflow=False))
    b = _mix(a ^ 0x68E31DA4)
    x = tl.add(element, a, sanitize_overflow=False)
    x = x ^ (x >> 16)
    x = tl.mul(x, 0x21F0AAAD, sanitize_overflow=False)
    x = x ^ (x >> 15)
    x = tl.mul(tl.add(x, b, sanitize_overflow=False), 0xD35A2D97, sanitize_overflow=False)
    return x ^ (x >> 15)


@triton.jit
def _load(address, at, lane, left, TYPE: tl.constexpr, REAL: tl.constexpr, WHOLE: tl.constexpr):
    """Load a block as ``REAL``."""
    LOW: tl.constexpr = TYPE == tl.bfloat16 or TYPE == tl.float16
    STORED: tl.constexpr = tl.uint16 if LOW else TYPE
    pointer = address.to(tl.pointer_type(STORED))
    if WHOLE:
        bits = tl.load(tl.multiple_of(pointer, 16) + at + lane)
    else:
        bits = tl.load(pointer + at + lane, mask=lane < left, other=0)
    if TYPE == tl.bfloat16:
        value = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif TYPE == tl.float16:
        value = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = bits
    return value


@triton.jit
def _store(address, at, lane, left, value, noise, TYPE: tl.constexpr, NEAREST: tl.constexpr, WHOLE: tl.constexpr):
    """Store a block, with stochastic rounding to bfloat16 and float16 unless ``NEAREST``; see rounding.py."""
    LOW: tl.constexpr = TYPE == tl.bfloat16 or TYPE == tl.float16
    STORED: tl.constexpr = tl.uint16 if LOW else TYPE
    if LOW:
        bits = value.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        if TYPE == tl.bfloat16:
            if NEAREST:
                kept = (magnitude + (0x7FFF + ((bits >> 16) & 1))) >> 16
            else:
                # A finite number stays one.
                kept = tl.minimum(magnitude + (noise & 0xFFFF), 0x7F7FFFFF) >> 16
            kept = tl.where(magnitude > 0x7F800000, 0x7FC0, kept)
        else:
            if NEAREST:
                kept = tl.abs(value).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
            else:
                dropped = noise & 0x1FFF
                # Below the smallest normal number float16 has a fixed step, 2^-24.
                small = tl.minimum(magnitude, 0x38800000).to(tl.float32, bitcast=True) * 16777216.0
                subnormal = (small + dropped.to(tl.float32) * (1.0 / 8192.0)).to(tl.int32).to(tl.uint32)
                normal = (tl.maximum(magnitude, 0x38800000) - 0x38000000 + dropped) >> 13
                kept = tl.where(magnitude < 0x38800000, subnormal, tl.minimum(normal, 0x7BFF))
            kept = tl.where(magnitude > 0x7F800000, 0x7E00, kept)
        stored = (kept | ((bits >> 16) & 0x8000)).to(tl.uint16)
    else:
        stored = value
    pointer = address.to(tl.pointer_type(STORED))
    if WHOLE:
        tl.store(tl.multiple_of(pointer, 16) + at + lane, stored)
    else:
        tl.store(pointer + at + lane, stored, mask=lane < left)


# --- what the host does

# Whether the kernels run in Python, on tensors of a CPU: TRITON_INTERPRET was set when they were defined.
_INTERPRETED = not isinstance(_update, triton.JITFunction)
_DEVICES = ("cuda", "xpu", "cpu") if _INTERPRETED else ("cuda", "xpu")


def refusal(each: TensorStep) -> str | None:
    """Return why the kernel cannot do the step of this tensor, or None."""
    param, moment = each.param, each.exp_avg
    tensors = param, each.grad, moment, each.exp_avg_sq
    if param.device.type not in _DEVICES:
        return f"it works on a GPU, not on {param.device.type}"
    if is_quantized(moment):
        return "it does not know 8-bit moments"
    if (param.dtype, moment.dtype) not in _PAIRS:
        return f"it does not know weights of {param.dtype} with moments of {moment.dtype}"
    if each.grad.dtype != param.dtype or each.exp_avg_sq.dtype != moment.dtype:
        return "the gradient must have the dtype of the weights, and both moments must have one dtype"
    if not is_flat(*tensors):
        return "weights, gradient and moments must lie in memory alike and without gaps"
    if each.step.dtype != torch.float32 or any(tensor.device != param.device for tensor in (*tensors, each.step)):
        return "the step counter must be float32, and all tensors on one device"
    return None


def step(steps: Sequence[TensorStep], finite: bool | Tensor = True) -> None:
    """Do one step on each tensor, in place; see :func:`hf_pdecay.optim.foreach.step`."""
    if finite is False:
        return
    launches: dict[tuple[Any, ...], list[TensorStep]] = {}
    for each in steps:
        decays = each.hyper.lambda_p != 0 and each.awake is not False
        kind = each.param.device, each.param.dtype, each.exp_avg.dtype, id(each.hyper), decays
        launches.setdefault(kind, []).append(each)
    for (device, *_, decays), some in launches.items():
        with _device_guard(device):
            _launch(some, finite, decays)
    torch.autograd.graph.increment_version([each.param for each in steps])


def _launch(some: Sequence[TensorStep], finite: bool | Tensor, decays: bool) -> None:
    """Do the step of tensors that share their device, dtypes and hyperparameters."""
    first, hyper = some[0], some[0].hyper
    device, param, moment = first.param.device, first.param.dtype, first.exp_avg.dtype
    real = torch.float64 if param == torch.float64 else torch.float32
    words, chunks = _words(some)
    table = _table(device, words)
    shared = torch.empty(len(some), _SHARED.value, dtype=real, device=device)
    rate, lr = _rate(hyper.lr, device)
    # A second moment below float16's smallest number is stored as 0, and m / (0 + eps) is no step that anyone wants.
    least = 2.0**-12 if moment == torch.float16 and hyper.eps < 2.0**-25 else 0.0
    _prepare[(triton.cdiv(len(some), _ROWS),)](
        table,
        shared,
        finite.to(device, non_blocking=True) if isinstance(finite, Tensor) else None,
        rate,
        len(some),
        _bits(lr),
        _bits(hyper.beta1),
        _bits(hyper.beta2),
        _bits(hyper.eps),
        _bits(hyper.weight_decay),
        _bits(hyper.p_norm),
        _bits(hyper.lambda_p),
        _bits(hyper.keep_zeros),
        _bits(-1.0 if hyper.maximize else 1.0),
        _bits(least),
        _bits(torch.finfo(real).tiny),
        ROWS=_ROWS,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    if chunks:
        _update[(chunks,)](
            table,
            shared,
            len(some),
            PARAM=_TYPES[param],
            MOMENT=_TYPES[moment],
            REAL=_TYPES[real],
            DECAY=decays,
            # What neither decays nor changes its dtype is rounded as torch does.
            NEAREST=(hyper.lambda_p == 0 and param == moment) or {param, moment} <= {torch.float32, torch.float64},
            CHUNK=_CHUNK,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            # Where a product and a sum are fused is said in the kernel, so that all compilers agree.
            enable_fp_fusion=False,
        )


def _words(some: Sequence[TensorStep]) -> tuple[array[int], int]:
    """Return the words of the table, a row for each tensor, and the number of chunks."""
    words = array("q")
    chunks = 0
    for each in some:
        numel = each.param.numel()
        addresses = each.param.data_ptr(), each.grad.data_ptr(), each.exp_avg.data_ptr(), each.exp_avg_sq.data_ptr()
        awake = each.awake.data_ptr() if isinstance(each.awake, Tensor) else 0
        aligned = all(address % _ALIGNMENT == 0 for address in addresses)
        words.extend((chunks, *addresses, each.step.data_ptr(), awake, numel, each.place, aligned))
        chunks += triton.cdiv(numel, _CHUNK)
    return words, chunks


def _table(device: torch.device, words: array[int]) -> Tensor:
    if _is_capturing(device):
        return _filled_table(device, words)
    # Memory is given back to the stream that it was taken on, so each stream has tables of its own.
    stream = None if device.type == "cpu" else torch.get_device_module(device).current_stream()
    return _copied_table(device, stream, words.tobytes())


@functools.lru_cache(maxsize=128)
def _copied_table(device: torch.device, stream: object, words: bytes) -> Tensor:
    """Return a table, kept by its content: it changes when a gradient moves, and most often none does."""
    table = torch.frombuffer(bytearray(words), dtype=torch.int64)
    # From pinned memory the copy waits for nothing, nor does the host for the copy.
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _filled_table(device: torch.device, words: array[int]) -> Tensor:
    """Return a table that kernels fill, as a CUDA graph that is being captured may not copy from the host.

    The graph fills it again at each replay, out of its own memory. So it is neither kept, since outside the graph it is
    never filled, nor taken from those that are kept, which may be gone when the graph is replayed.
    """
    table = torch.zeros(len(words), dtype=torch.int64, device=device)
    # A launch of this operation carries about a hundred numbers.
    torch._foreach_add_(table.unbind(), words.tolist())
    return table


def _is_capturing(device: torch.device) -> bool:
    capturing = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return capturing is not None and bool(capturing())


def _device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cpu":
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return guard


def _rate(lr: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """Return the learning rate as a tensor on the device, or as a number: None and it."""
    if not isinstance(lr, Tensor):
        return None, lr
    if lr.device.type == "cpu" and device.type != "cpu":
        return None, lr.item()  # a look into the host's own memory, for which no device is waited for
    return lr.to(device, non_blocking=True), 0.0


def _bits(number: float) -> int:
    """Return the bits of a float64 as an integer, which Triton passes whole."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
