"""Adapters of PEFT: merging that keeps a sparse base's zeros, and counting and cutting the ranks of LoRA that died.

LoRA adds ΔW = scaling · B A to a frozen weight W (https://huggingface.co/papers/2106.09685). ΔW is dense, whatever
zeros A and B have, so merging fills a sparse W in; and row r of A with column r of B is a term of its own, which is
nothing once either of the two is wholly zero.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn


try:
    from peft import PeftModel
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import LoraVariant, MultiheadAttention
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper
except ImportError as error:
    raise ImportError("Adapters take PEFT, which is not installed: pip install 'hf-pdecay[peft]'.") from error

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

logger = logging.getLogger(__name__)


class LoraFactors(NamedTuple):
    """The two factors of an adapter on one layer.

    Attributes:
        name: Name of the layer in the base model.
        layer: PEFT's layer.
        a: A, of shape (rank, …).
        b: B, of shape (outputs, rank, …).
    """

    name: str
    layer: Any
    a: Tensor
    b: Tensor

    @property
    def norms(self) -> tuple[Tensor, Tensor]:
        """Euclidean norms of the rows of A and of the columns of B, in float32 at least, each of shape (rank,)."""
        a, b = self.a.detach().flatten(1), self.b.detach().movedim(1, 0).flatten(1)
        dtype = torch.promote_types(a.dtype, torch.float32)
        return torch.linalg.vector_norm(a, dim=1, dtype=dtype), torch.linalg.vector_norm(b, dim=1, dtype=dtype)

    @property
    def size(self) -> int:
        """Number of weights of one rank, in A and B together."""
        return (self.a.numel() + self.b.numel()) // self.a.shape[0]


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


def lora_names(model: nn.Module) -> list[str]:
    """Return the names of the LoRA adapters of a model, in the order in which they come."""
    return list(dict.fromkeys(name for _, layer in _lora_layers(model) for name in layer.r))


def lora_factors(model: nn.Module, adapter_name: str = "default") -> Iterator[LoraFactors]:
    """Yield the factors of a LoRA adapter, layer by layer.

    Layers whose factors are no pair of A (rank, …) and B (outputs, rank, …), as on fused experts or of AdaLoRA, are
    left out.

    Args:
        model: A PEFT model, or any module that holds LoRA layers.
        adapter_name: Which adapter.
    """
    for name, layer in _lora_layers(model):
        if adapter_name in layer.lora_A and isinstance(layer.lora_A[adapter_name], nn.Module):
            a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        elif adapter_name in layer.lora_embedding_A:
            a, b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        else:
            continue
        if a.shape[0] == layer.r[adapter_name] == b.shape[1]:
            yield LoraFactors(name, layer, a, b)


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
        [LayerRanks(each.name, len(alive(each)), int((~alive(each)).sum())) for each in _factors(model, adapter_name)]
    )


def alive(factors: LoraFactors) -> Tensor:
    """Return which ranks add something, as booleans of shape (rank,)."""
    a, b = factors.norms
    return (a > 0) & (b > 0)


def _factors(model: nn.Module, adapter_name: str) -> list[LoraFactors]:
    found = list(lora_factors(model, adapter_name))
    if not found:
        there = sorted({name for _, layer in _lora_layers(model) for name in layer.r if any(lora_factors(model, name))})
        raise ValueError(
            f"Invalid adapter_name: adapter_name={adapter_name!r}; the model has "
            f"{'the LoRA adapters ' + ', '.join(there) if there else 'no LoRA adapter of pairs A and B'}."
        )
    return found


@torch.no_grad()
def cut_ranks(peft_model: PeftModel, adapter_name: str = "default") -> PeftModel:
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
        ValueError: If it has no LoRA adapter of that name, the adapter is merged, or all of its ranks are dead.
    """
    _check_model(peft_model, "cut_ranks")
    found = _factors(peft_model, adapter_name)
    kept = [alive(each).nonzero().flatten() for each in found]
    if not any(len(each) for each in kept):
        raise ValueError(
            "cut_ranks: all ranks of the adapter are dead, as they are before training; none would be left."
        )
    config: Any = peft_model.peft_config[adapter_name]
    whole = {name for name, layer in _lora_layers(peft_model) if adapter_name in layer.r} == {x.name for x in found}
    sizes: dict[str, tuple[int, float]] = {}
    gone = []
    for factors, keep in zip(found, kept, strict=True):
        name, layer = factors.name, factors.layer
        if not len(keep):
            variant = layer.lora_variant.get(adapter_name)
            more = layer.lora_bias.get(adapter_name) or config.bias != "none"
            if (variant is None or isinstance(variant, _MaskedLora)) and not more:
                layer.delete_adapter(adapter_name)
                gone.append(name)
                continue
            keep = torch.zeros(1, dtype=torch.long, device=factors.a.device)
        rank = len(keep)
        scale = layer.scaling[adapter_name] * (math.sqrt(rank) if config.use_rslora else rank)
        sizes[name] = rank, int(scale) if float(scale).is_integer() else scale
        _keep_ranks(factors, keep, adapter_name)
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = sizes[name]
        layer.scaling[adapter_name] = sizes[name][1] / (math.sqrt(rank) if config.use_rslora else rank)
    usual = Counter(sizes.values()).most_common(1)[0][0]
    if whole and not config.rank_pattern and not config.alpha_pattern:
        config.r, config.lora_alpha = usual
    else:  # what was not cut goes by the old settings
        usual = (0, 0.0)
    special = {f"^{re.escape(name)}": size for name, size in sizes.items() if size != usual}
    config.rank_pattern = {key: size[0] for key, size in special.items()} | (config.rank_pattern or {})
    config.alpha_pattern = {key: size[1] for key, size in special.items()} | (config.alpha_pattern or {})
    if gone:
        config.exclude_modules = _excluding(config.exclude_modules, gone)
    return peft_model


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


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in (model.get_base_model() if isinstance(model, PeftModel) else model).named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer


def _check_model(peft_model: Any, what: str) -> None:
    if not isinstance(peft_model, PeftModel) or not hasattr(peft_model.base_model, "merge_and_unload"):
        raise ValueError(
            f"{what} takes a PeftModel with an adapter on layers, such as LoRA, not {type(peft_model).__name__}"
            f"{' with prompts, which cannot be merged' if isinstance(peft_model, PeftModel) else ''}."
        )
    merged = next(
        (name for name, each in peft_model.named_modules() if isinstance(each, BaseTunerLayer) and each.merged), None
    )
    if merged is not None:
        raise ValueError(f"{what}: the adapter on {merged!r} is merged already; call unmerge_adapter() first.")


@torch.no_grad()
def merge_keep_zeros(
    peft_model: PeftModel,
    adapter_names: Sequence[str] | None = None,
    *,
    dropped: dict[str, float] | None = None,
) -> nn.Module:
    """Merge adapters into their base model so that weights that are exactly zero stay so: W' = W + (W ≠ 0) · ΔW.

    Works for whatever PEFT merges into floating-point matrices: LoRA and its variants such as DoRA (whose norms are
    those before zeros are kept), on linear layers, HF's ``Conv1D``, convolutions and embeddings, and other methods;
    modules that were trained whole (``modules_to_save``) keep the zeros of the originals too. Biases are merged as they
    are. What is lost is logged; :func:`mask_adapters` trains so that nothing is.

    Args:
        peft_model: A PEFT model, whose adapters are not merged. It is used up.
        adapter_names: The adapters to merge; the active ones if None.
        dropped: A dict that is filled, weight by weight, with the part of ΔW that was left out: ‖(W = 0) · ΔW‖ / ‖ΔW‖.

    Returns:
        The plain base model.

    Raises:
        ValueError: If there is no such adapter, nothing to merge, one is merged already, or the base is quantised.
    """
    _check_model(peft_model, "merge_keep_zeros")
    unknown = sorted(set(adapter_names or ()) - set(peft_model.peft_config))
    if unknown:
        raise ValueError(
            f"Invalid adapter_names: there is no adapter {unknown[0]!r}; there are {', '.join(peft_model.peft_config)}."
        )
    layers = {
        name: each for name, each in peft_model.get_base_model().named_modules() if isinstance(each, BaseTunerLayer)
    }
    weights = {name: _weights(name, layer) for name, layer in layers.items()}
    names = None if adapter_names is None else list(adapter_names)
    lost: dict[str, tuple[float, float]] = {}
    for name, layer in layers.items():
        before = {key: weight.detach().clone() for key, weight in weights[name].items()}
        layer.merge(safe_merge=True, adapter_names=names)
        lost |= {f"{name}.{key}": _keep_zeros(weight, before[key]) for key, weight in weights[name].items()}
    for name, wrapper in peft_model.get_base_model().named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            saved = next((wrapper.modules_to_save[each] for each in wrapper.active_adapters), None)
            for key, weight in () if saved is None else saved.named_parameters():
                if weight.ndim > 1:
                    lost[f"{name}.{key}"] = _keep_zeros(weight, wrapper.original_module.get_parameter(key))
    found = {name: math.sqrt(out / whole) if whole else 0.0 for name, (out, whole) in lost.items() if whole}
    if dropped is not None:
        dropped.update(found)
    total = sum(whole for _, whole in lost.values())
    if found and max(found.values()) > 0:
        worst = max(found, key=lambda name: found[name])
        logger.warning(
            "Keeping zeros left %.1f%% of the norm of what the adapters add out, most of it in %s (%.1f%%). "
            "mask_adapters() before training leaves nothing to lose.",
            100 * math.sqrt(sum(out for out, _ in lost.values()) / total),
            worst,
            100 * found[worst],
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Aa]lready.*merged.*")
        plain: nn.Module = peft_model.merge_and_unload(adapter_names=names)
    return plain


def _weights(name: str, layer: BaseTunerLayer) -> dict[str, Tensor]:
    """The matrices that an adapter's layer is merged into."""
    if isinstance(layer, MultiheadAttention):
        raise ValueError(f"merge_keep_zeros cannot merge into {name!r}, an nn.MultiheadAttention; merge it with PEFT.")
    found: dict[str, Tensor] = {
        key: each for key, each in layer.get_base_layer().named_parameters(recurse=False) if each.ndim > 1
    }
    plain = all(each.is_floating_point() and type(each.data) is Tensor for each in found.values())
    if not found or not plain:
        raise ValueError(
            f"merge_keep_zeros takes weights in floating point, and those of {name!r} are quantised: load the base "
            "model without quantization_config, the adapter onto it, and merge then."
        )
    return found


def _keep_zeros(weight: Tensor, before: Tensor) -> tuple[float, float]:
    """Set a merged weight to zero where it was; return the squared norms of what that takes and of the change."""
    zero = before == 0
    dtype = torch.promote_types(weight.dtype, torch.float32)
    change = (weight.detach() - before).to(dtype)
    out = change.masked_select(zero)
    weight.data.masked_fill_(zero, 0)
    return float(out.square().sum()), float(change.square().sum())


class _MaskedLora(LoraVariant):
    """LoRA whose ΔW is zero where the base's weight is, for PEFT's layers to compute with."""

    @staticmethod
    def init(module: Any, adapter_name: str = "default", **kwargs: Any) -> None:
        """Nothing to prepare."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the merged weight."""
        return orig_weight + _masked_delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge in place."""
        orig_weight.data += _masked_delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight without the adapter."""
        return orig_weight - _masked_delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Add the adapter's part to the result of the base layer."""
        delta = _masked_delta(module, active_adapter)
        delta = delta.T if module.fan_in_fan_out else delta
        bias = module.lora_B[active_adapter].bias
        bias = None if bias is None else bias * module.scaling[active_adapter]
        x = module.lora_dropout[active_adapter](x.to(delta.dtype))
        return result + nn.functional.linear(x, delta, bias)


def _masked_delta(module: Any, adapter_name: str) -> Tensor:
    delta: Tensor = module.get_delta_weight(adapter_name)
    return delta.masked_fill(module.get_base_layer().weight == 0, 0)


def mask_adapters(peft_model: PeftModel, adapter_name: str = "default") -> PeftModel:
    """Have a LoRA adapter compute and train with (W ≠ 0) · ΔW, so that :func:`merge_keep_zeros` loses nothing.

    Every step then forms ΔW of each layer, which costs memory and time like a dense matrix of its size. The adapter is
    saved as an ordinary one, and computes with all of ΔW where it is loaded without this function.

    Args:
        peft_model: A PEFT model with plain LoRA on linear layers or HF's ``Conv1D``.
        adapter_name: Which adapter.

    Returns:
        The same model.

    Raises:
        ValueError: If the adapter is none of plain LoRA, is on other layers, or the base is quantised.
    """
    _check_model(peft_model, "mask_adapters")
    found = [(name, layer) for name, layer in _lora_layers(peft_model) if adapter_name in layer.r]
    _factors(peft_model, adapter_name)
    for name, layer in found:
        if not isinstance(layer, LoraLinear) or adapter_name in layer.lora_variant:
            how = "a variant of LoRA" if adapter_name in layer.lora_variant else type(layer.get_base_layer()).__name__
            raise ValueError(f"mask_adapters takes plain LoRA on linear layers; {name!r} is {how}.")
        weight: Any = layer.get_base_layer().weight
        if not weight.is_floating_point() or type(weight.data) is not Tensor:
            raise ValueError(f"mask_adapters takes weights in floating point, and those of {name!r} are quantised.")
    for _, layer in found:
        layer.lora_variant[adapter_name] = _MaskedLora()
    return peft_model
