"""Counting and cutting the ranks of LoRA that died."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .factors import LoraFactors, alive, check_model, lora_layers, named_factors
from .merging import MaskedLora


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

logger = logging.getLogger(__name__)

# Beginnings of `init_lora_weights` that change the base.
_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LayerRanks:
    """Ranks of an adapter on one layer.

    Args:
        name: Name of the layer in the base model.
        ranks: Number of ranks.
        dead: How many of them add nothing, as their row of A or their column of B is wholly zero.
    """

    name: str
    ranks: int
    dead: int


@dataclass(frozen=True)
class RankSparsity:
    """Dead ranks of a LoRA adapter, layer by layer and in total; prints as a table.

    Args:
        layers: One entry a layer, in the model's order.
    """

    layers: list[LayerRanks] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        """Number of ranks of all layers."""
        return sum(each.ranks for each in self.layers)

    @property
    def dead(self) -> int:
        """How many of them are dead."""
        return sum(each.dead for each in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of dead ranks, in [0, 1]."""
        return self.dead / self.ranks if self.ranks else 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table."""
        from rich.table import Table

        table = Table(title="Ranks")
        table.add_column("layer", overflow="fold")
        for heading in ("ranks", "dead", "left"):
            table.add_column(heading, justify="right")
        for each in self.layers:
            table.add_row(each.name, str(each.ranks), str(each.dead), str(each.ranks - each.dead))
        table.add_section()
        table.add_row("all layers", str(self.ranks), str(self.dead), str(self.ranks - self.dead), style="bold")
        yield table


def rank_sparsity(model: nn.Module, adapter_name: str = "default") -> RankSparsity:
    """Count the dead ranks of a LoRA adapter: those whose row of A or column of B is wholly zero.

    An adapter that has not been trained yet has dead ranks only, as its B is zero.

    Args:
        model: A PEFT model, or any module that holds LoRA layers.
        adapter_name: Which adapter.

    Raises:
        ValueError: If the model has no LoRA adapter of that name.
    """
    return RankSparsity(
        [
            LayerRanks(each.name, len(alive(each)), int((~alive(each)).sum()))
            for each in named_factors(model, adapter_name)
        ]
    )


@torch.no_grad()
def shrink_ranks(peft_model: PeftModel, adapter_name: str = "default") -> PeftModel:
    """Cut the dead ranks out of a LoRA adapter, in place.

    What is left computes the same. Layers come to have different ranks, which stand in the adapter's ``rank_pattern``
    and ``alpha_pattern``, so that plain PEFT loads what ``save_pretrained`` writes; a layer with no rank left is taken
    out of the adapter (``exclude_modules``), or keeps one if it does more than add B A, as DoRA and biases that are
    trained do. An optimizer made before holds the old weights.

    Args:
        peft_model: A PEFT model whose adapter is not merged.
        adapter_name: Which adapter.

    Returns:
        The same model.

    Raises:
        ValueError: If it has no LoRA adapter of that name, the adapter is merged, all of its ranks are dead, or it
            began with a part of the base's weights, see :func:`check_start`.
    """
    check_model(peft_model, "shrink_ranks")
    found = named_factors(peft_model, adapter_name)
    kept = [alive(each).nonzero().flatten() for each in found]
    if not any(len(each) for each in kept):
        raise ValueError(
            "shrink_ranks: all ranks of the adapter are dead, as they are before training; none would be left."
        )
    config: Any = peft_model.peft_config[adapter_name]
    check_start(config.init_lora_weights, "shrink_ranks")
    whole = {name for name, layer in lora_layers(peft_model) if adapter_name in layer.r} == {x.name for x in found}
    sizes: dict[str, tuple[int, float]] = {}
    gone = []
    for factors, keep in zip(found, kept, strict=True):
        name, layer = factors.name, factors.layer
        if not len(keep):
            variant = layer.lora_variant.get(adapter_name)
            more = layer.lora_bias.get(adapter_name) or config.bias != "none"
            if (variant is None or isinstance(variant, MaskedLora)) and not more:
                layer.delete_adapter(adapter_name)
                gone.append(name)
                continue
            keep = torch.zeros(1, dtype=torch.long, device=factors.a.device)
        rank = len(keep)
        sizes[name] = rank, alpha_for(layer.scaling[adapter_name], rank, config.use_rslora)
        _keep_ranks(factors, keep, adapter_name)
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = sizes[name]
        layer.scaling[adapter_name] = sizes[name][1] / (math.sqrt(rank) if config.use_rslora else rank)
    for key, value in changed_settings(vars(config), sizes, gone, whole).items():
        setattr(config, key, value)
    return peft_model


def check_start(start: object, what: str) -> None:
    """Raise ValueError, in the name of what is to be cut, if PEFT takes from the base what an adapter began with.

    It does so anew whenever it loads the adapter, and how much depends on the number of ranks.

    Args:
        start: ``init_lora_weights`` of the adapter's config.
        what: What is to be cut.
    """
    if isinstance(start, str) and start.lower().startswith(_FROM_BASE):
        raise ValueError(
            f"{what}: the adapter has init_lora_weights={start!r}, by which PEFT subtracts from the base, when it "
            "loads the adapter, what that many ranks began with; with fewer it would compute something else. Save the "
            "base as it is under the adapter, set init_lora_weights to True in the adapter's config, and use them "
            "together."
        )


def alpha_for(scaling: float, rank: int, use_rslora: bool) -> float:
    """Return the ``lora_alpha`` with which a layer of so many ranks has a scaling."""
    alpha = scaling * (math.sqrt(rank) if use_rslora else rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def changed_settings(
    config: Mapping[str, Any], sizes: Mapping[str, tuple[int, float]], gone: Sequence[str], whole: bool
) -> dict[str, Any]:
    """Return what an adapter's config has to say anew once ranks were cut.

    Args:
        config: The config as it was.
        sizes: For each layer that is left its number of ranks and its ``lora_alpha``.
        gone: Layers that have no adapter any more.
        whole: Whether these are all of the adapter's layers.
    """
    usual = Counter(sizes.values()).most_common(1)[0][0]
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    changed: dict[str, Any] = {}
    if whole:
        # The old patterns go: PEFT takes the first that matches, and sorts them when it saves.
        changed["r"], changed["lora_alpha"] = usual
        ranks, alphas = {}, {}
    else:  # what was not cut goes by the old settings
        usual = (0, 0.0)
    special = {f"^{re.escape(name)}": size for name, size in sizes.items() if size != usual}
    for key, old, place in (("rank_pattern", ranks, 0), ("alpha_pattern", alphas, 1)):
        # An earlier cut may have written an entry for the same layer.
        changed[key] = {name: size[place] for name, size in special.items()} | {
            name: value for name, value in old.items() if name not in special
        }
    if config.get("init_lora_weights") == "orthogonal":
        changed["init_lora_weights"] = True  # that one takes even ranks only, and what is loaded replaces its weights
    if gone:
        changed["exclude_modules"] = _excluding(config.get("exclude_modules"), gone)
    return changed


def _keep_ranks(factors: LoraFactors, keep: Tensor, adapter_name: str) -> None:
    layer = factors.layer
    a, b = (
        nn.Parameter(kept.clone(memory_format=torch.contiguous_format), requires_grad=param.requires_grad)
        for param, kept in ((factors.a, factors.a[keep]), (factors.b, factors.b[:, keep]))
    )
    if adapter_name in layer.lora_embedding_A:
        layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name] = a, b
        return
    first, second = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    first.weight, second.weight = a, b
    outputs, inputs = ("out_features", "in_features") if a.ndim == 2 else ("out_channels", "in_channels")
    setattr(first, outputs, len(keep))
    setattr(second, inputs, len(keep))


def _excluding(before: str | Sequence[str] | None, names: Sequence[str]) -> str:
    """PEFT's ``exclude_modules`` as an expression that these names match wholly, beside what it excluded before."""
    if before is not None and not isinstance(before, str):
        before = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, before))})" if before else None
    return "|".join([*([f"(?:{before})"] if before else []), *map(re.escape, names)])
