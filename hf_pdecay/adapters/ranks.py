"""Dead ranks of LoRA: counting and removing them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..tables import NameTable
from .factors import alive_ranks, check_model, lora_layers, named_factors, takes_from_base
from .masking import MaskedLora


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class LayerRanks:
    """Ranks of an adapter on one layer.

    Args:
        name: Name of the layer in the base model.
        ranks: Number of ranks.
        dead: Number of dead ones, whose row of A or column of B is wholly zero.
    """

    name: str
    ranks: int
    dead: int


@dataclass(frozen=True)
class RankSparsity:
    """Dead ranks of a LoRA adapter, layer by layer and in total; prints as a table.

    Args:
        layers: One entry for each layer, in the model's order.
    """

    layers: list[LayerRanks] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        """Number of ranks of all layers."""
        return sum(layer.ranks for layer in self.layers)

    @property
    def dead(self) -> int:
        """Number of dead ranks."""
        return sum(layer.dead for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of dead ranks, in [0, 1]."""
        return self.dead / self.ranks if self.ranks else 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table."""
        table = NameTable("Ranks", ("layer", "ranks", "dead", "left"))
        for layer in self.layers:
            table.add_row(layer.name, str(layer.ranks), str(layer.dead), str(layer.ranks - layer.dead))
        table.add_total("all layers", str(self.ranks), str(self.dead), str(self.ranks - self.dead))
        yield table


def rank_sparsity(model: nn.Module, adapter_name: str = "default") -> RankSparsity:
    """Count the dead ranks of a LoRA adapter: those whose row of A or column of B is wholly zero.

    Before training all ranks of an adapter are dead, because B is zero.

    Args:
        model: A PEFT model, or any module that holds LoRA layers.
        adapter_name: Which adapter.

    Raises:
        ValueError: If the model has no LoRA adapter of this name.
    """
    layers = []
    for factors in named_factors(model, adapter_name):
        alive = alive_ranks(factors.a, factors.b)
        layers.append(LayerRanks(factors.name, len(alive), int((~alive).sum())))
    return RankSparsity(layers)


class Pair(NamedTuple):
    """The factors A (rank, …) and B (outputs, rank, …) of LoRA on one layer; ``scaling`` is the factor of B A.

    If the adapter ``does_more`` there than add B A, as DoRA and trained biases do, one rank stays even if all are dead.
    """

    layer: str
    a: Tensor
    b: Tensor
    scaling: float
    does_more: bool


class Remaining(NamedTuple):
    """What remains of a :class:`Pair`: contiguous factors, without ranks if the layer leaves the adapter.

    ``alpha`` is the ``lora_alpha`` that keeps the scaling, ``dead`` the number of dead ranks.
    """

    a: Tensor
    b: Tensor
    alpha: float
    dead: int


def remove_dead_ranks(
    pairs: Sequence[Pair], config: Mapping[str, Any], is_whole_adapter: bool
) -> tuple[list[Remaining], dict[str, Any]]:
    """Return what remains of each layer without dead ranks, and the entries of the adapter's config that change.

    ``is_whole_adapter`` says whether these are all layers of the adapter.
    """
    use_rslora = bool(config.get("use_rslora"))
    remaining: list[Remaining] = []
    for pair in pairs:
        alive = alive_ranks(pair.a, pair.b)
        keep = alive.nonzero().flatten()
        if not len(keep) and pair.does_more:
            keep = keep.new_zeros(1)
        alpha = pair.scaling * (math.sqrt(len(keep)) if use_rslora else len(keep))
        alpha = int(alpha) if float(alpha).is_integer() else alpha
        a, b = pair.a[keep].contiguous(), pair.b[:, keep].contiguous()
        remaining.append(Remaining(a, b, alpha, int((~alive).sum())))
    sizes = {pair.layer: (len(rest.a), rest.alpha) for pair, rest in zip(pairs, remaining, strict=True) if len(rest.a)}
    left = [pair.layer for pair in pairs if pair.layer not in sizes]
    return remaining, _changed_entries(config, sizes, left, is_whole_adapter) if sizes else {}


@torch.no_grad()
def shrink_ranks(peft_model: PeftModel, adapter_name: str = "default") -> PeftModel:
    """Remove the dead ranks from a LoRA adapter, in place.

    The smaller adapter computes the same. Its layers have different ranks, recorded in ``rank_pattern`` and
    ``alpha_pattern``, so plain PEFT loads what ``save_pretrained`` writes. A layer without a live rank leaves the
    adapter (``exclude_modules``), or keeps one rank if it does more than add B A, as DoRA and trained biases do. An
    optimizer made before this call holds the old weights.

    Args:
        peft_model: A PEFT model whose adapter is not merged.
        adapter_name: Which adapter.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has no LoRA adapter of that name, the adapter is merged, all of its ranks are dead, or
            its ``init_lora_weights`` depends on the number of ranks, see :func:`check_start`.
    """
    check_model(peft_model, "shrink_ranks")
    factors = named_factors(peft_model, adapter_name)
    config: Any = peft_model.peft_config[adapter_name]
    pairs = [
        Pair(name, a.detach(), b.detach(), layer.scaling[adapter_name], _does_more(layer, config, adapter_name))
        for name, layer, a, b in factors
    ]
    if not any(alive_ranks(pair.a, pair.b).any() for pair in pairs):
        raise ValueError("shrink_ranks: all ranks of the adapter are dead, as before training; none would be left.")
    check_start(config.init_lora_weights, "shrink_ranks")
    layers = {name for name, layer in lora_layers(peft_model) if adapter_name in layer.r}
    remaining, changed = remove_dead_ranks(pairs, vars(config), layers == {pair.layer for pair in pairs})
    for (_, layer, _, _), rest in zip(factors, remaining, strict=True):
        if len(rest.a):
            _replace(layer, adapter_name, rest, config.use_rslora)
        else:
            layer.delete_adapter(adapter_name)
    for key, value in changed.items():
        setattr(config, key, value)
    return peft_model


def check_start(start: object, name: str) -> None:
    """Raise ValueError, which names a function or folder, if ``init_lora_weights`` takes initial values from the base.

    PEFT subtracts those from the base whenever it loads the adapter, and they depend on the number of ranks.
    """
    if takes_from_base(start):
        raise ValueError(
            f"{name}: the adapter has init_lora_weights={start!r}. When PEFT loads it, PEFT subtracts the adapter's "
            "initial values from the base, and with fewer ranks these would be others. Save the base as it is under "
            "the adapter, set init_lora_weights to True in the adapter's config, and use them together."
        )


def _changed_entries(
    config: Mapping[str, Any], sizes: Mapping[str, tuple[int, float]], left: Sequence[str], is_whole_adapter: bool
) -> dict[str, Any]:
    """The entries of an adapter's config that change; ``sizes``: ranks and ``lora_alpha`` of the layers that stay."""
    usual = Counter(sizes.values()).most_common(1)[0][0] if is_whole_adapter else None
    changed: dict[str, Any] = {} if usual is None else {"r": usual[0], "lora_alpha": usual[1]}
    special = {f"^{re.escape(name)}": size for name, size in sizes.items() if size != usual}
    for place, key in enumerate(("rank_pattern", "alpha_pattern")):
        # For the whole adapter the old patterns go: PEFT takes the first that matches, and sorts them when it saves.
        old = {} if is_whole_adapter else config.get(key) or {}
        # An earlier removal may have written an entry for the same layer.
        kept = {name: value for name, value in old.items() if name not in special}
        changed[key] = {name: size[place] for name, size in special.items()} | kept
    if config.get("init_lora_weights") == "orthogonal":
        changed["init_lora_weights"] = True  # "orthogonal" needs an even rank; the loaded weights replace it anyway
    if left:
        changed["exclude_modules"] = _excluding(config.get("exclude_modules"), left)
    return changed


def _does_more(layer: Any, config: Any, adapter_name: str) -> bool:
    """Whether an adapter does more on a layer than add B A."""
    variant = layer.lora_variant.get(adapter_name)
    is_plain = variant is None or isinstance(variant, MaskedLora)
    return not is_plain or bool(layer.lora_bias.get(adapter_name)) or config.bias != "none"


def _replace(layer: Any, adapter_name: str, rest: Remaining, use_rslora: bool) -> None:
    """Give a layer of PEFT smaller factors."""
    rank = len(rest.a)
    layer.r[adapter_name], layer.lora_alpha[adapter_name] = rank, rest.alpha
    layer.scaling[adapter_name] = rest.alpha / (math.sqrt(rank) if use_rslora else rank)
    if adapter_name in layer.lora_embedding_A:
        for factors, value in ((layer.lora_embedding_A, rest.a), (layer.lora_embedding_B, rest.b)):
            factors[adapter_name] = nn.Parameter(value, requires_grad=factors[adapter_name].requires_grad)
        return
    first, second = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    for module, value in ((first, rest.a), (second, rest.b)):
        module.weight = nn.Parameter(value, requires_grad=module.weight.requires_grad)
    outputs, inputs = ("out_features", "in_features") if rest.a.ndim == 2 else ("out_channels", "in_channels")
    setattr(first, outputs, rank)
    setattr(second, inputs, rank)


def _excluding(before: str | Sequence[str] | None, names: Sequence[str]) -> str:
    """PEFT's ``exclude_modules`` as an expression for these names, besides what it excluded before."""
    if before is not None and not isinstance(before, str):
        before = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, before))})" if before else None
    return "|".join([*([f"(?:{before})"] if before else []), *map(re.escape, names)])
