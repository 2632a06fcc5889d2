"""Swaps the linear layers of a model for sparse ones if these are faster, by a measurement on this machine.

On a CPU a sparse layer multiplies its non-zero weights, on a GPU those of a 2:4 pattern.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..checks import asked_percent, is_number
from ..layers.matrices import Linear, is_plain_linear, is_transposed, make_linear
from ..terminal import get_logger
from .base import InferenceLinear
from .result import MOST_SPARSITY, Choice, Choices
from .semi_structured import SemiStructuredLinear
from .sparse_linear import SparseLinear


logger = get_logger(__name__)

# With fewer zeros, values and indices take more bytes than the dense float32 weight.
LEAST_SPARSITY = 0.5
_TRIED = (LEAST_SPARSITY, 0.6, 0.7, 0.8, 0.9, 0.95, MOST_SPARSITY)  # for layers of a model that stays dense
_SECONDS, _ROUNDS = 0.03, 3  # the least time and number of rounds to measure a layer
_CACHE = 64 << 20  # bytes that push a layer's weights out of the processor's caches


@torch.no_grad()
def to_sparse_inference(model: nn.Module, *, rows: int = 16, min_sparsity: float | None = None) -> Choices:
    """Swap the linear layers of a model, in place, for sparse ones if these are faster on this machine.

    On a CPU any zeros count. On an NVIDIA GPU only 2:4 weights in float16 or bfloat16 do (see ``group`` in
    ``lp_rules``). ``nn.Linear`` and HF's ``Conv1D`` are swapped; layers with shared weights or hooks stay dense.
    ``generate``, ``pipeline`` and ``save_pretrained`` keep working, and the last saves an ordinary dense model; call
    :func:`to_dense_inference` before training.

    Args:
        model: A model on a CPU or on one GPU.
        rows: Typical number of rows that a layer gets at a time, for the measurement: batch size × tokens.
        min_sparsity: Swap every layer with at least this fraction of zeros without measuring; None measures.

    Returns:
        A list with an entry for each linear layer; it prints as a table. If nothing was swapped, it says from which
        sparsity layers of each shape would be, and a warning does.

    Raises:
        ValueError: If an argument is out of its range, the model is itself a linear layer, or it is on several devices
            or on another one.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("out").eval()
        >>> print(to_sparse_inference(model))
        >>> model.generate(**inputs)
    """
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"Invalid rows: rows={rows!r}; it must be a whole number of at least 1.")
    if min_sparsity is not None and not (is_number(min_sparsity) and 0 <= min_sparsity <= 1):
        raise ValueError(
            f"Invalid min_sparsity: min_sparsity={min_sparsity!r}; it must be in [0, 1]." + asked_percent(min_sparsity)
        )
    if is_plain_linear(model):
        raise ValueError(
            f"Invalid model: it is a {type(model).__name__}, and layers are swapped in the module around them; give "
            "that module, such as nn.Sequential(layer)."
        )
    devices = sorted({str(param.device) for param in model.parameters()})
    if len(devices) > 1 or not (devices or ["cpu"])[0].startswith(("cpu", "cuda")):
        raise ValueError(
            f"Invalid model: it is on {' and '.join(devices)}; sparse inference works on a CPU or on one GPU. Call "
            "model.cpu() or model.cuda() first."
        )
    # In a large model, the other layers push a layer's weights out of the caches between two calls.
    linear = sum(module.weight.nbytes for *_, module in _linears(model))
    others = torch.zeros(_CACHE // 4) if linear > _CACHE and devices[:1] == ["cpu"] else None
    owners = Counter(id(param) for _, param in model.named_parameters(remove_duplicate=False))
    measured: dict[tuple[object, ...], float] = {}
    choices = Choices(rows=rows, min_sparsity=min_sparsity)
    dense: dict[tuple[int, int], tuple[Linear, float]] = {}  # of each shape a layer that more zeros might swap
    for parent, key, name, module in list(_linears(model)):
        kept = _kept(parent, module, owners[id(module.weight)] > 1)
        choice, sparse = _choose(name, module, rows, min_sparsity, measured, kept, others)
        choices.append(choice)
        if sparse is not None:
            setattr(parent, key, sparse.train(module.training))
        elif kept is None and not module.weight.is_cuda and SparseLinear.refusal(module.weight) is None:
            dense[choice.shape] = module, max(choice.sparsity, dense.get(choice.shape, (module, 0.0))[1])
    if not choices.swapped:
        for shape, (module, sparsity) in dense.items():
            choices.swapped_from[shape] = (
                _break_even(module, rows, sparsity, others) if min_sparsity is None else min_sparsity
            )
    logger.log(logging.INFO if choices.swapped else logging.WARNING, "%s", " ".join(choices.sentences()))
    return choices


@torch.no_grad()
def to_dense_inference(model: nn.Module) -> nn.Module:
    """Swap the sparse layers of a model back, in place, and return it; it can be trained again."""
    for parent in model.modules():
        for key, module in list(parent.named_children()):
            if isinstance(module, InferenceLinear):
                setattr(parent, key, _dense(module))
    return model


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Linear]]:
    """The layers that are linear and nothing more: parent module, key in the parent, name and layer."""
    for path, parent in model.named_modules():
        for key, module in parent.named_children():
            if is_plain_linear(module):
                yield parent, key, f"{path}.{key}" if path else key, module


def _kept(parent: nn.Module, module: Linear, shared: bool) -> str | None:
    """Why a layer stays dense whatever its weights are, or None."""
    if shared:
        return "its weight is shared with another module"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it carries hooks"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight itself"  # and hands it to one operation for the whole layer
    return None


def _choose(
    name: str,
    module: Linear,
    rows: int,
    min_sparsity: float | None,
    measured: dict[tuple[object, ...], float],
    kept: str | None,
    others: Tensor | None,
) -> tuple[Choice, InferenceLinear | None]:
    made: type[InferenceLinear] = SemiStructuredLinear if module.weight.is_cuda else SparseLinear
    transposed = is_transposed(module)
    weight = module.weight.t() if transposed else module.weight
    reason = kept or made.refusal(weight)
    out, size = weight.shape[0], weight.shape[-1]
    if reason is not None:
        return Choice(name, (out, size), 0.0, None, False, reason), None
    sparsity = 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
    least = LEAST_SPARSITY if min_sparsity is None else min_sparsity
    if sparsity < least:
        return Choice(name, (out, size), sparsity, None, False, f"fewer than {least:.0%} of its weights are zero"), None
    sparse = made(weight, module.bias, transposed=transposed)
    sparse.trained = module.weight.requires_grad, module.bias is not None and module.bias.requires_grad
    if min_sparsity is not None:
        return Choice(name, (out, size), sparsity, None, True), sparse
    kind = out, size, weight.dtype, module.bias is None, transposed, round(sparsity, 2)
    if kind not in measured:
        x = torch.randn(rows, size, device=weight.device).to(weight.dtype)
        measured[kind] = _speedup(module, sparse, x, others)
    speedup = measured[kind]
    if speedup <= 1:
        return Choice(name, (out, size), sparsity, speedup, False, "the dense layer is faster"), None
    return Choice(name, (out, size), sparsity, speedup, True), sparse


def _break_even(dense: Linear, rows: int, sparsity: float, others: Tensor | None) -> float | None:
    """The lowest sparsity tried, above the layer's own, at which random zeros make it faster; None if there is none."""
    weight = dense.weight.t() if is_transposed(dense) else dense.weight
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(weight.shape, generator=generator)
    x = torch.randn(rows, weight.shape[1], generator=generator).to(weight.dtype)

    def faster(tried: float) -> bool:
        return _speedup(dense, SparseLinear((drawn * (drawn >= tried)).to(weight.dtype), dense.bias), x, others) > 1

    higher = [tried for tried in _TRIED if tried > round(sparsity, 2)]
    first = bisect_left(higher, True, key=faster)
    return higher[first] if first < len(higher) else None


def _speedup(dense: nn.Module, sparse: nn.Module, x: Tensor, others: Tensor | None) -> float:
    """The least time of the dense layer over that of the sparse one, called in turn for ``x``.

    ``others`` is read before each call, like other layers' weights; None for a model that fits into the caches.
    """
    least = [float("inf"), float("inf")]
    calls = 1 if x.is_cpu else 10  # on a GPU enough to hide the host's cost of a launch
    for layer in (dense, sparse):
        layer(x)
    end, rounds = time.perf_counter() + _SECONDS, 0
    while time.perf_counter() < end or rounds < _ROUNDS:
        rounds += 1
        for side, layer in enumerate((dense, sparse)):
            if others is not None:
                others.sum()
            _wait(x)
            began = time.perf_counter()
            for _ in range(calls):
                layer(x)
            _wait(x)
            least[side] = min(least[side], time.perf_counter() - began)
    return least[0] / least[1]


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _dense(sparse: InferenceLinear) -> nn.Module:
    weight = sparse.dense_weight()
    module = make_linear(
        sparse.in_features, sparse.out_features, bias=sparse.bias is not None, transposed=sparse.transposed
    )
    of_weight, of_bias = sparse.trained
    module.weight = nn.Parameter(weight, requires_grad=of_weight)
    if sparse.bias is not None:
        module.bias = nn.Parameter(sparse.bias.detach(), requires_grad=of_bias)
    return module.train(sparse.training)
