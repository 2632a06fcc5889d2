"""Merging that keeps the zeros of a sparse base, and training for such a merge."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant, MultiheadAttention
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..terminal import get_logger
from .factors import check_model, lora_layers, named_factors, warn_of_changed_base


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

    Args:
        peft_model: A PEFT model whose adapters are not merged. It must not be used afterwards.
        adapter_names: The adapters to merge; the active ones if None.
        dropped: A dict to fill, for each weight, with the fraction of ΔW that is lost: ‖(W = 0) · ΔW‖ / ‖ΔW‖.

    Returns:
        The plain base model.

    Raises:
        ValueError: If an adapter is unknown or merged already, there is nothing to merge, or the base is quantised.
    """
    check_model(peft_model, "merge_keep_zeros")
    unknown = sorted(set(adapter_names or ()) - set(peft_model.peft_config))
    if unknown:
        known = ", ".join(peft_model.peft_config)
        raise ValueError(f"Invalid adapter_names: the model has no adapter {unknown[0]!r}; it has {known}.")
    modules = peft_model.get_base_model().named_modules()
    layers = {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}
    weights = {name: _weights(name, layer) for name, layer in layers.items()}
    names = None if adapter_names is None else list(adapter_names)
    warn_of_changed_base(peft_model)
    lost: dict[str, tuple[float, float]] = {}
    for name, layer in layers.items():
        before = {key: weight.detach().clone() for key, weight in weights[name].items()}
        layer.merge(safe_merge=True, adapter_names=names)
        lost |= {f"{name}.{key}": _keep_zeros(weight, before[key]) for key, weight in weights[name].items()}
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
    if not all(_is_plain(tensor) for tensor in stored if tensor.ndim > 1):
        raise ValueError(
            f"merge_keep_zeros takes weights in floating point, and those of {name!r} are quantised: load the base "
            "model without quantization_config, then the adapter onto it, and merge."
        )
    return {key: param for key, param in base.named_parameters(recurse=False) if param.ndim > 1}


def _is_plain(weight: Any) -> bool:
    """Whether a weight is in floating point and not quantised."""
    return weight.is_floating_point() and weight.element_size() > 1 and type(weight.data) is Tensor


def _keep_zeros(weight: Tensor, before: Tensor) -> tuple[float, float]:
    """Restore the zeros of a merged weight; return the squared norms of what that loses and of the whole change."""
    zero = before == 0
    dtype = torch.promote_types(weight.dtype, torch.float32)
    change = (weight.detach() - before).to(dtype)
    out = change.masked_select(zero)
    weight.data.masked_fill_(zero, 0)
    return float(out.square().sum()), float(change.square().sum())


class MaskedLora(LoraVariant):
    """A variant of LoRA for PEFT's layers: ΔW is zero where the weight of the base is."""

    @staticmethod
    def init(module: Any, adapter_name: str = "default", **kwargs: Any) -> None:
        """Do nothing: this variant has no state."""

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
        """Add the adapter's output to that of the base layer."""
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
    """Make a LoRA adapter compute and train with (W ≠ 0) · ΔW, so that :func:`merge_keep_zeros` loses nothing.

    Every step then forms ΔW of each layer, which costs the memory and time of a dense matrix of its size. The saved
    adapter is an ordinary one: loaded without this function it computes with all of ΔW.

    Args:
        peft_model: A PEFT model with plain LoRA on linear layers or HF's ``Conv1D``.
        adapter_name: Which adapter.

    Returns:
        The same model.

    Raises:
        ValueError: If the adapter is not plain LoRA, is on other layers, or the base is quantised.
    """
    check_model(peft_model, "mask_adapters")
    named_factors(peft_model, adapter_name)
    layers = [(name, layer) for name, layer in lora_layers(peft_model) if adapter_name in layer.r]
    for name, layer in layers:
        if not isinstance(layer, LoraLinear) or adapter_name in layer.lora_variant:
            kind = "a variant of LoRA" if adapter_name in layer.lora_variant else type(layer.get_base_layer()).__name__
            raise ValueError(f"mask_adapters takes plain LoRA on linear layers; {name!r} is {kind}.")
        if not _is_plain(layer.get_base_layer().weight):
            raise ValueError(f"mask_adapters takes weights in floating point, and those of {name!r} are quantised.")
    warn_of_changed_base(peft_model)
    for _, layer in layers:
        layer.lora_variant[adapter_name] = MaskedLora()
    return peft_model
