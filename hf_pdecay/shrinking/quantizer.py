"""Loads models with ragged layers in transformers, by its extension point for quantized models.

Before weights are read, the layers are resized to the sizes in ``quantization_config``, which the config keeps.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .ragged_config import METHOD, check_settings, make_settings


class ShrunkConfig(QuantizationConfigMixin):
    """``quantization_config`` of a model with ragged layers, see `docs/shrinking.md`; checks its settings."""

    # Tells transformers that a loaded model is not quantized.
    dequantize = True

    def __init__(self, **settings: Any) -> None:
        check_settings(settings)
        self.__dict__.update(settings)


class ShrunkQuantizer(HfQuantizer):
    """Resizes the layers of a model before its weights are loaded; the model is an ordinary one then."""

    requires_calibration = True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return True."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True."""
        return True

    @classmethod
    def register(cls, module: ModuleType = auto) -> None:
        """Enter the config and the quantizer in transformers' tables."""
        if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
            auto.register_quantization_config(METHOD)(ShrunkConfig)
            auto.register_quantizer(METHOD)(cls)

    @classmethod
    def unregister(cls, module: ModuleType = auto) -> None:
        """Remove both from the tables."""
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
        auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from .resize import resize, shapes_after

        # transformers calls this under the meta device; the model's tensors stay where they are.
        with torch.device("cpu"):
            removals = removals_to(model, check_settings(self.quantization_config.to_dict()))
            self._shapes = shapes_after(model, removals)
            resize(model, removals)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Some releases take tensors of wrong shapes if there is a quantizer.
        for name, param in model.named_parameters():
            if tuple(param.shape) != self._shapes[name]:
                raise ValueError(
                    f"{name} has the shape {list(param.shape)} in the weights, and {list(self._shapes[name])} by "
                    "config.json."
                )
        settings = self.quantization_config.to_dict()
        self.remove_quantization_config(model)
        model.config.quantization_config = make_settings(check_settings(settings))
        return model


def resize_as_noted(model: Any) -> None:
    """Resize a model built from a config with ragged layers, as loading does; other models stay."""
    settings = getattr(model.config, "quantization_config", None)
    if isinstance(settings, dict) and settings.get("quant_method") == METHOD:
        from .resize import resize

        with torch.device("cpu"):
            resize(model, removals_to(model, check_settings(settings)))


def removals_to(model: Any, sizes: dict[str, dict[str, int]]) -> list[Any]:
    """Return the removals that bring a model's layers to given numbers of units, by module name and kind.

    A name may be that in the base model, or in a model with another head. Raises ValueError if the model does not have
    such a layer, or has fewer units in it.
    """
    from .model import layers_of
    from .resize import Removal

    prefix = f"{model.base_model_prefix}."
    left = {(name, kind): count for name, kinds in sizes.items() for kind, count in kinds.items()}
    removals = []
    for layer in layers_of(model):
        name, kind, units = layer.units.name, layer.units.kind, layer.units.count
        names = (name, prefix + name, name.removeprefix(prefix))
        count = next((left.pop((known, kind)) for known in names if (known, kind) in left), units)
        if count > units:
            raise ValueError(
                f"quantization_config in config.json has {count} {kind}s for {name!r}, which the rest of the config "
                f"says has {units}."
            )
        removals.append(Removal(layer, torch.arange(units) < count))
    if left:
        name, kind = next(iter(left))
        raise ValueError(
            f"quantization_config in config.json has {kind}s for {name!r}, which {type(model).__name__} does not have."
        )
    return removals
