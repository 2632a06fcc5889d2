"""Merging that keeps the zeros of a sparse base."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapters.factors import check_model, is_plain, warn_of_changed_base
from ..terminal import get_logger
from .requantising import Quantised, codes_of_base, on_codes, quantised_layer


logger = get_logger(__name__)

# Layers whose adapter holds trained values of the weights themselves, and no change to add.
_TRAINED_WHOLE = (LNTuningLayer, TrainableTokensLayer)


@torch.no_grad()
def merge_keep_zeros(
    peft_model: PeftModel, adapter_names: Sequence[str] | None = None, *, dropped: dict[str, float] | None = None
) -> nn.Module:
    """Merge adapters into their base model and keep its exact zeros: W' = W + (W ≠ 0) · ΔW.

    Works for everything that PEFT merges into floating-point matrices: LoRA and variants such as DoRA (with the norms
    from before zeros are kept), on linear layers, HF's ``Conv1D``, convolutions and embeddings, and other methods.
    Everything else is merged as it was trained, zeros of the base or not: biases, vectors, and what was trained whole
    (``modules_to_save``, ``trainable_token_indices``, LN tuning). The loss is logged; :func:`mask_adapters` avoids it.

    LoRA is also merged into weights of bitsandbytes (nf4, fp4, int8) and torchao (Int8, Intx): they are dequantised,
    merged, and quantised again with the scales of the base, which stays quantised. So are the weights of a folder that
    ``hf-pdecay quantize`` has written: each becomes a code times its scale again.

    Args:
        peft_model: A PEFT model whose adapters are not merged. It must not be used afterwards.
        adapter_names: The adapters to merge; the active ones if None.
        dropped: A dict to fill, for each weight, with the fraction of ΔW that is lost: ‖(W = 0) · ΔW‖ / ‖ΔW‖.

    Returns:
        The plain base model.

    Raises:
        ValueError: If an adapter is unknown or merged already, there is nothing to merge, or the base is quantised in
            another way.
    """
    check_model(peft_model, "merge_keep_zeros")
    unknown = sorted(set(adapter_names or ()) - set(peft_model.peft_config))
    if unknown:
        known = ", ".join(peft_model.peft_config)
        raise ValueError(f"Invalid adapter_names: the model has no adapter {unknown[0]!r}; it has {known}.")
    modules = peft_model.get_base_model().named_modules()
    layers = {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}
    quantised = {name: found for name, layer in layers.items() if (found := _quantised(name, layer)) is not None}
    weights = {name: _weights(name, layer) for name, layer in layers.items() if name not in quantised}
    names = None if adapter_names is None else list(adapter_names)
    grids = codes_of_base(peft_model.get_base_model())
    warn_of_changed_base(peft_model)
    lost: dict[str, tuple[float, float]] = {}
    for name, layer in layers.items():
        if name in quantised:
            lost[f"{name}.weight"] = _merge_quantised(layer, quantised[name], names)
            continue
        before = {key: weight.detach().clone() for key, weight in weights[name].items()}
        layer.merge(safe_merge=True, adapter_names=names)
        lost |= {f"{name}.{key}": _keep_zeros(weight, before[key]) for key, weight in weights[name].items()}
        for key, weight in weights[name].items():
            if (grid := grids.get(f"{name}.{key}")) is not None:
                weight.data.copy_(on_codes(weight, before[key], grid, f"{name}.{key}", layer.get_base_layer()))
    fractions = {name: math.sqrt(out / whole) for name, (out, whole) in lost.items() if whole}
    if dropped is not None:
        dropped.update(fractions)
    total = sum(whole for _, whole in lost.values())
    if any(fractions.values()):
        worst = max(fractions, key=fractions.__getitem__)
        logger.warning(
            "Keeping zeros has lost %.1f%% of the norm of what the adapters add, most of it in %s (%.1f%%). "
            "mask_adapters() before training avoids this.",
            100 * math.sqrt(sum(out for out, _ in lost.values()) / total),
            worst,
            100 * fractions[worst],
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Aa]lready.*merged.*")
        # All are merged. Named again, some layers would merge a second time.
        plain: nn.Module = peft_model.merge_and_unload(adapter_names=[])
    return plain


def _weights(name: str, layer: BaseTunerLayer) -> dict[str, Tensor]:
    """The matrices to which the adapter of a layer adds; none if it replaces weights by trained ones."""
    if isinstance(layer, MultiheadAttention):
        raise ValueError(f"merge_keep_zeros cannot merge into {name!r}, an nn.MultiheadAttention; merge it with PEFT.")
    if isinstance(layer, _TRAINED_WHOLE):
        return {}
    base = layer.get_base_layer()
    # Some quantised layers hold their weights in buffers.
    stored = [*base.parameters(recurse=False), *base.buffers(recurse=False)]
    if not all(is_plain(tensor) for tensor in stored if tensor.ndim > 1):
        raise ValueError(
            f"merge_keep_zeros cannot merge into {name!r}, whose weights are quantised as {_kind(base)}. It takes "
            "bitsandbytes' nf4, fp4 and int8, torchao's Int8 and Intx, and weights in floating point: load the base "
            "model without quantization_config, or with one that dequantises, then the adapter onto it, and merge."
        )
    return {key: param for key, param in base.named_parameters(recurse=False) if param.ndim > 1}


def _kind(base: nn.Module) -> str:
    weight = getattr(base, "weight", None)
    return type(base).__name__ if weight is None else f"{type(base).__name__} of {type(weight.data).__name__}"


def _quantised(name: str, layer: BaseTunerLayer) -> Quantised | None:
    """The weights of a layer with LoRA, if they are packed in a way that is known; else None."""
    base = layer.get_base_layer()
    found = quantised_layer(base) if isinstance(layer, LoraLayer) else None
    if found is not None and any(getattr(layer, "lora_bias", {}).values()):
        raise ValueError(f"merge_keep_zeros cannot merge lora_bias into {name!r}, whose weights are quantised.")
    if found is not None and not found.knows_itself():
        raise ValueError(
            f"merge_keep_zeros cannot merge into {name!r}: the weights of a {_kind(base)} do not come back when they "
            "are quantised again with their own scales. Load the base model without quantization_config."
        )
    return found


def _merge_quantised(layer: Any, base: Quantised, names: Sequence[str] | None) -> tuple[float, float]:
    """Merge LoRA into packed weights; return the squared norms of what zeros lose and of the whole change."""
    before = base.dense().float()
    merged = before.clone()
    for adapter in layer.active_adapters if names is None else names:
        if adapter not in layer.lora_A:
            continue
        variant = getattr(layer, "lora_variant", {}).get(adapter)
        if variant is None:
            merged += layer.get_delta_weight(adapter).to(merged.dtype)
        else:
            merged = variant.merge_safe(layer, adapter, merged).to(merged.dtype)
        layer.merged_adapters.append(adapter)
    if not bool(merged.isfinite().all()):
        raise ValueError("An adapter has NaN or infinite weights, so it cannot be merged.")
    counts = _keep_zeros(merged, before)
    base.store(merged)
    return counts


def _keep_zeros(weight: Tensor, before: Tensor) -> tuple[float, float]:
    """Restore the zeros of a merged weight; return the squared norms of what that loses and of the whole change."""
    zero = before == 0
    dtype = torch.promote_types(weight.dtype, torch.float32)
    change = (weight.detach() - before).to(dtype)
    out = change.masked_select(zero)
    weight.data.masked_fill_(zero, 0)
    return float(out.square().sum()), float(change.square().sum())
