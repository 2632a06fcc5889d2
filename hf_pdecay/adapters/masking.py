"""Training an adapter for a merge that keeps the zeros of the base."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from .factors import check_model, is_plain, lora_layers, named_factors, warn_of_changed_base


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
        if not is_plain(layer.get_base_layer().weight):
            raise ValueError(f"mask_adapters takes weights in floating point, and those of {name!r} are quantised.")
    warn_of_changed_base(peft_model)
    for _, layer in layers:
        layer.lora_variant[adapter_name] = MaskedLora()
    return peft_model
