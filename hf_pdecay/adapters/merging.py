"""Merging that keeps a sparse base's zeros, and training with a view to it."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant, MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .factors import check_model, lora_layers, named_factors


if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)


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
    check_model(peft_model, "merge_keep_zeros")
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


class MaskedLora(LoraVariant):
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
    check_model(peft_model, "mask_adapters")
    found = [(name, layer) for name, layer in lora_layers(peft_model) if adapter_name in layer.r]
    named_factors(peft_model, adapter_name)
    for name, layer in found:
        if not isinstance(layer, LoraLinear) or adapter_name in layer.lora_variant:
            how = "a variant of LoRA" if adapter_name in layer.lora_variant else type(layer.get_base_layer()).__name__
            raise ValueError(f"mask_adapters takes plain LoRA on linear layers; {name!r} is {how}.")
        weight: Any = layer.get_base_layer().weight
        if not weight.is_floating_point() or type(weight.data) is not Tensor:
            raise ValueError(f"mask_adapters takes weights in floating point, and those of {name!r} are quantised.")
    for _, layer in found:
        layer.lora_variant[adapter_name] = MaskedLora()
    return peft_model
