"""The measured sizes of models, and the optimizers that run on each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_pdecay import AdamWLp, LpDecay
from hf_pdecay.optim.cpu import step as compiled
from hf_pdecay.optim.moments import BLOCK
from rivals import InductorAdamWLp, authors_adamw, checked_adamw, missing, optimi_adamw, prune_optimizer, torch_adamw


P_NORMS = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
USUAL_P = 0.8
LAMBDA_P = 0.01
# So low that thousands of steps on fixed gradients hardly change the weights: no zeros, no denormals.
LR = 1e-6

BASELINE = "torch AdamW, fused"
CHECKED = "torch AdamW, fused, gradients checked"
AUTHORS = f"authors' algorithm, p = {USUAL_P:g}"
AUTHORS_FUSED = f"authors' algorithm on fused AdamW, p = {USUAL_P:g}"

TO_BASE = "to the base"

# On a CPU, from this many weights on only the most important rows run: a step takes a second.
_MANY = 100_000_000

# Largest number of tensors for torch.compile, which takes a second for each.
_COMPILED = 24

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Size:
    """A set of tensors shaped like those of a model."""

    name: str
    shapes: Shapes
    dtype: torch.dtype = torch.float32

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def _gpt2(layers: int, width: int) -> Shapes:
    block: Shapes = ((width, 3 * width), (3 * width,), (width, width), (width,), (width, 4 * width), (4 * width,))
    block += ((4 * width, width), (width,), (width,), (width,), (width,), (width,))
    return ((50257, width), (1024, width), *(block * layers), (width,), (width,))


def _llama(layers: int, width: int, inner: int, heads: int, vocabulary: int) -> Shapes:
    block: Shapes = ((width, width), (heads, width), (heads, width), (width, width))
    block += ((inner, width), (inner, width), (width, inner), (width,), (width,))
    return ((vocabulary, width), *(block * layers), (width,))


_1B = _llama(16, 2048, 8192, 512, 128256)
SIZES = {
    size.name: size
    for size in (
        Size("1M", ((50, 100),) * 200),
        Size("25M", ((1024, 1024),) * 24),
        Size("250M", _gpt2(16, 1024)),
        Size("1B", _1B),
        Size("1B-bf16", _1B, torch.bfloat16),
        Size("7B-bf16", (*_llama(32, 4096, 11008, 4096, 32000), (32000, 4096)), torch.bfloat16),
    )
}
DEFAULT_SIZES = {"cpu": ("1M", "25M", "250M"), "cuda": ("1M", "25M", "1B", "7B-bf16")}
QUICK_SIZES = {"cpu": ("1M", "25M"), "cuda": ("25M",)}


@dataclass(frozen=True)
class Contender:
    """An optimizer to measure.

    Attributes:
        name: Row of the table.
        make: Makes it of a list of parameters.
        p_norm: Its p, if it has one.
        backend: AdamWLp's backend; None for the others.
        plain_state: Whether its state is AdamW's: two moments of the weights' dtype, and a counter.
        missing: Why it cannot be had here.
    """

    name: str
    make: Callable[[list[Tensor]], Any]
    p_norm: float | None = None
    backend: str | None = None
    plain_state: bool = True
    missing: str | None = None


def ours(p_norm: float, backend: str = "auto", note: str = "", absent: str | None = None, **options: Any) -> Contender:
    """Return AdamWLp with a p, a backend and other options."""
    make = partial(AdamWLp, lr=LR, p_norm=p_norm, lambda_p=LAMBDA_P, backend=backend, **options)
    plain = options.get("moments") is None and options.get("decay_to") is None
    return Contender(our_name(p_norm, backend, note), make, p_norm, backend, plain, absent)


def our_name(p_norm: float, backend: str = "auto", note: str = "") -> str:
    """Return the name of a row of AdamWLp."""
    return f"AdamWLp {backend}, p = {p_norm:g}" + (f", {note}" if note else "")


def by_groups(params: list[Tensor], kind: str) -> AdamWLp:
    """Return AdamWLp whose matrices decay as units.

    Args:
        params: Tensors of any shapes; what has no groups of the kind decays weight by weight.
        kind: ``"row"``, ``"2:4"``, or ``"neuron"``: of three matrices in a row a neuron is a row of the first two and a
            column of the third, or a row of it too where that does not fit.
    """
    matrices = [param for param in params if param.dim() == 2 and (kind != "2:4" or param.shape[1] % 4 == 0)]
    chosen = {id(param) for param in matrices}
    group: dict[str, Any] = {"params": matrices, "group": kind}
    if kind == "neuron":
        group["units"] = [_neurons(matrices, first) for first in range(0, len(matrices), 3)]
    rest = [{"params": others}] if (others := [param for param in params if id(param) not in chosen]) else []
    return AdamWLp([group, *rest], lr=LR, p_norm=USUAL_P, lambda_p=LAMBDA_P)


def _neurons(matrices: list[Tensor], first: int) -> dict[str, Any]:
    indices = range(first, min(first + 3, len(matrices)))
    count = min(matrices[index].shape[0] for index in indices)
    columns = len(indices) == 3 and matrices[indices[2]].shape[1] >= count
    members = [{"param": index, "dim": int(columns and index == indices[-1])} for index in indices]
    return {"kind": "neuron", "count": count, "name": f"layer {first // 3}", "members": members}


def wrapped_adamw(params: list[Tensor]) -> LpDecay:
    """Return the decay around torch's fused AdamW."""
    return LpDecay(torch_adamw(params, lr=LR, fused=True), p_norm=USUAL_P, lambda_p=LAMBDA_P)


def contenders_for(size: Size, device: str, quick: bool = False) -> list[Contender]:
    """Return the contenders of a size, the baseline first."""
    baseline = Contender(BASELINE, partial(torch_adamw, lr=LR, fused=True))
    checked = Contender(CHECKED, partial(checked_adamw, lr=LR))
    by_authors = partial(authors_adamw, lr=LR, p_norm=USUAL_P, lambda_p=LAMBDA_P)
    authors = [
        Contender(AUTHORS, by_authors, USUAL_P),
        Contender(AUTHORS_FUSED, partial(by_authors, fused=True), USUAL_P),
    ]
    if device == "cpu" and size.weights >= _MANY:
        usual = [ours(p_norm) for p_norm in (0.5, USUAL_P, 1.2)]
        return [baseline, checked, *usual, ours(USUAL_P, note=TO_BASE, decay_to="base"), *authors]
    prune = partial(prune_optimizer, lr=LR)
    rivals = [
        *authors,
        Contender(
            "torchao PruneOptimizer on fused AdamW, p = 1", prune, 1.0, plain_state=False, missing=missing("torchao")
        ),
        Contender("optimi AdamW", partial(optimi_adamw, lr=LR), plain_state=False, missing=missing("optimi")),
    ]
    dense = Contender("torch AdamW, foreach", partial(torch_adamw, lr=LR, fused=False))
    unchecked = ours(USUAL_P, note="gradients not checked", skip_nonfinite=False)
    wrapped = Contender(f"LpDecay on fused AdamW, p = {USUAL_P:g}", wrapped_adamw, USUAL_P, plain_state=False)
    if device == "cuda" and size.name != "25M":
        # The backends of plain operations take a thousand launches, and 25M shows the same.
        low = ours(USUAL_P, note="bfloat16 moments", moments="bfloat16")
        return [baseline, checked, dense, *(ours(p_norm) for p_norm in P_NORMS), unchecked, low, wrapped, *rivals]
    kernel = "compiled" if device == "cpu" else "triton"
    absent = compiled.unavailable() if device == "cpu" else missing("triton")
    quantized = any(torch.Size(shape).numel() % BLOCK == 0 for shape in size.shapes)
    eight = missing("torchao") or (None if quantized else f"no tensor here has whole blocks of {BLOCK} weights")
    some_p = (USUAL_P,) if quick else P_NORMS
    inductor = partial(InductorAdamWLp, lr=LR, p_norm=USUAL_P, lambda_p=LAMBDA_P)
    formulas = Contender(f"AdamWLp's formulas by torch.compile, p = {USUAL_P:g}", inductor, USUAL_P, plain_state=False)
    return [
        baseline,
        checked,
        dense,
        *(ours(p_norm) for p_norm in P_NORMS),
        unchecked,
        *(ours(p_norm, kernel, absent=absent) for p_norm in some_p),
        *(ours(p_norm, "foreach") for p_norm in some_p),
        *(ours(p_norm, "reference") for p_norm in some_p),
        ours(USUAL_P, note=TO_BASE, decay_to="base"),
        ours(USUAL_P, note="bfloat16 moments", moments="bfloat16"),
        ours(USUAL_P, note="8-bit moments", moments="8bit", absent=eight),
        *(
            Contender(our_name(USUAL_P, note=f"by {kind}"), partial(by_groups, kind=kind), USUAL_P)
            for kind in ("row", "neuron", "2:4")
        ),
        *([formulas] if device == "cuda" and len(size.shapes) <= _COMPILED else []),
        wrapped,
        *rivals,
    ]
