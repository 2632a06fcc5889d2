"""The step on a CPU: one call of a C++ function, which is compiled on first use, does the step of all tensors.

The function takes addresses and numbers, so nothing is compiled again for another shape, learning rate, p or λ_p.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..moments import is_quantized, refusal_of_encoded
from ..tensor_step import Decay, Hyperparameters, Stepped, TensorStep, fuses, is_flat, spacing
from .native import load


_PARTS = ("weights", "lanes", "divisors", "update", "to_base", "units", "eight_bit", "adamw_lp")
SOURCES = tuple(Path(__file__).with_name(f"{name}.cpp") for name in _PARTS)

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MOMENTS = {  # by the dtype of the weights
    torch.float32: (torch.float32, torch.bfloat16),
    torch.float64: (torch.float64,),
    torch.bfloat16: (torch.float32, torch.bfloat16),
    torch.float16: (torch.float32, torch.float16),
}
_COLUMNS = 20  # numbers in a row
_EIGHT_BIT = 4


def unavailable() -> str | None:
    """Return why the function is not available on this machine, or None. Compiles it if necessary."""
    return _load()[1]


def _moments(step: TensorStep) -> tuple[list[int], int, tuple[int, ...]]:
    """Addresses of the moments, their code, and for 8-bit moments the addresses of scales and maps."""
    states: tuple[Any, Any] = step.exp_avg, step.exp_avg_sq
    if not is_quantized(step.exp_avg):
        return [state.data_ptr() for state in states], CODES[states[0].dtype], (0, 0, 0, 0)
    codes, scales, maps = ([getattr(state, name).data_ptr() for state in states] for name in ("codes", "scale", "qmap"))
    return codes, _EIGHT_BIT, (*scales, *maps)


class Batch:
    """Steps that :meth:`refusal` does not refuse, as the C++ function reads them. It holds no gradient."""

    repeats = True

    def __init__(self, steps: Sequence[TensorStep]) -> None:
        self._library = library()
        self._params = [step.param for step in steps]
        self.shrunk: Sequence[int] = [index for index, step in enumerate(steps) if fuses(step)]
        # The rows hold their addresses.
        self._tables = [step.structure.table for step in steps if step.structure is not None]
        self._rows = array("q")
        self._hypers: list[Hyperparameters] = []
        places: dict[int, int] = {}
        append = self._rows.extend
        for step in steps:
            param, grad, _, _, count, awake, hyper, place, structure, base = step
            moments, moment_dtype, encoding = _moments(step)
            divisors, extents, by_four = None, (1, 1), False
            if structure is not None and fuses(step):
                hyper, divisors = structure.hyper, structure.table
                extents, by_four = (spacing(param, structure.dim), param.shape[structure.dim]), divisors is None
            group = places.get(id(hyper))
            if group is None:
                group = places[id(hyper)] = len(places)
                self._hypers.append(hyper)
            addresses = param.data_ptr(), grad.data_ptr(), *moments, count.data_ptr()
            codes = CODES[param.dtype], moment_dtype, not awake
            units = 0 if divisors is None else divisors.data_ptr(), *extents, by_four
            to = 0 if base is None else base.data_ptr()
            append((*addresses, param.numel(), group, place, *codes, *units, *encoding, to))

    @staticmethod
    def refusal(step: TensorStep) -> str | None:
        """Return why the function cannot do the step of this tensor, or None."""
        param, grad, moment, second = step.param, step.grad, step.exp_avg, step.exp_avg_sq
        # The function gets addresses and believes them: everything must be checked here.
        shape = param.shape
        if not (param.is_cpu and grad.is_cpu and moment.is_cpu and second.is_cpu and step.step.is_cpu):
            return f"it works on a CPU, not on {param.device.type}"
        if is_quantized(moment) or is_quantized(second):
            if not (param.is_contiguous() and grad.is_contiguous()):
                return "weights and gradient with 8-bit moments must lie in memory in their order"
            refused = refusal_of_encoded(param, moment, second)
            if refused is not None:
                return refused
        elif grad.shape != shape or moment.shape != shape or second.shape != shape:
            shapes = f"{tuple(grad.shape)}, {tuple(moment.shape)} and {tuple(second.shape)}"
            return f"gradient and moments are of shapes {shapes}, not of that of the weights"
        elif moment.dtype not in _MOMENTS.get(param.dtype, ()) or second.dtype != moment.dtype:
            return f"it does not know weights of {param.dtype} with moments of {moment.dtype} and {second.dtype}"
        elif not is_flat(param, grad, moment, second):
            return "weights, gradient and moments must lie in memory alike and without gaps"
        if step.base is not None and (step.base.dtype != param.dtype or not is_flat(param, step.base)):
            return "weights and their base must be of one dtype and lie in memory alike and without gaps"
        if grad.dtype != param.dtype:
            return f"it takes gradients of the weights' dtype {param.dtype}, not of {grad.dtype}"
        if grad.is_neg():
            return "the gradient is a view that negates what lies in memory"
        if step.step.dtype != torch.float32 or step.step.numel() != 1:
            return f"it takes a step counter of torch.float32, not {step.step.dtype}"
        return None

    def point(self, addresses: Sequence[int]) -> None:
        """Take the gradients at these addresses; nothing else has changed."""
        self._rows[1::_COLUMNS] = array("q", addresses)

    def all_finite(self) -> bool:
        """Whether all gradients are finite."""
        return bool(self._library.hf_pdecay_all_finite(address(self._rows), len(self._params), torch.get_num_threads()))

    def step(self, finite: bool | Tensor = True) -> None:
        """Do the step on each tensor, in place; where ``finite`` is false nothing is written."""
        if not finite:
            return
        hypers = array("d")
        for hyper in self._hypers:
            betas = hyper.beta1, hyper.beta2
            numbers = float(hyper.lr), *betas, hyper.eps, hyper.weight_decay, hyper.p_norm, hyper.lambda_p
            hypers.extend((*numbers, hyper.keep_zeros, hyper.maximize, hyper.decays))
        rows = address(self._rows)
        if self._library.hf_pdecay_step(rows, len(self._params), address(hypers), torch.get_num_threads()):
            raise RuntimeError("The compiled step met an unknown dtype; take backend='foreach'.")
        torch.autograd.graph.increment_version(self._params)


def decay_weights(tensors: Sequence[Stepped], decay: Decay) -> None:
    """Decay weights on a CPU that another optimizer has stepped, in place.

    Weights, their copies and bases must lie in memory alike and without gaps. All dtypes must be in :data:`CODES`, and
    α λ_p must be a float that is not 0 in any.
    """
    functions = library()
    rows, count = array("q"), array("f", [decay.step])
    alpha_lambda = float(decay.alpha_lambda)
    hyper = array("d", (alpha_lambda, 0.5, 0.5, 0.0, 0.0, decay.p_norm, 1.0, decay.keep_zeros, False, True))
    step = count.buffer_info()[0]
    for tensor in tensors:
        weight, code = tensor.weight, CODES[tensor.weight.dtype]
        first = weight.data_ptr(), tensor.before.data_ptr(), 0, 0, step, weight.numel(), 0, tensor.place, code, code
        rows.extend((*first, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0 if tensor.base is None else tensor.base.data_ptr()))
    if functions.hf_pdecay_decay(address(rows), len(tensors), address(hyper), torch.get_num_threads()):
        raise RuntimeError("The compiled decay met an unknown dtype.")
    torch.autograd.graph.increment_version([tensor.weight for tensor in tensors])


def address(numbers: array[Any]) -> ctypes.c_void_p:
    """Return the address of numbers, for a C++ function."""
    return ctypes.c_void_p(numbers.buffer_info()[0])


def library() -> ctypes.CDLL:
    """Return the C++ functions; a RuntimeError if they are not available, see :func:`unavailable`."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(f"backend='compiled' cannot be had here: {reason}; take backend='foreach'.")
    return loaded


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The functions and None, or None and the reason why they are not available."""
    loaded, reason = load(SOURCES, "AdamWLp", "step")
    if loaded is not None:
        pointer, count, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
        loaded.hf_pdecay_unit_norms.restype = loaded.hf_pdecay_unit_divisors.restype = None  # int by default
        loaded.hf_pdecay_step.argtypes = loaded.hf_pdecay_decay.argtypes = (pointer, count, pointer, threads)
        loaded.hf_pdecay_all_finite.argtypes = loaded.hf_pdecay_square_sums.argtypes = (pointer, count, threads)
        loaded.hf_pdecay_unit_norms.argtypes = (pointer, count, pointer, pointer, threads)
        loaded.hf_pdecay_unit_divisors.argtypes = (pointer, count, *(pointer,) * 4, number, number, threads)
    return loaded, reason
