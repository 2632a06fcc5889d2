"""Loads models with ragged layers in transformers, by its extension point for quantized models.

Before weights are read, the layers are resized to the sizes in ``quantization_config``, which the config keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..storage.source import is_ragged
from .ragged_config import METHOD, check_settings, make_settings


class ShrunkConfig(QuantizationConfigMixin):
    """``quantization_config`` of a model with ragged layers, see `docs/shrinking.md`; checks its settings."""

    # Tells transformers that a loaded model is not quantized.
    dequantize = True

    def __init__(self, quant_method: str = METHOD, **settings: Any) -> None:
        check_settings(settings)
        self.quant_method: Any = quant_method
        self.layers = settings["layers"]

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` has."""
        return make_settings(self.layers)


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
            theirs: Any = auto.AutoHfQuantizer
            theirs.supports_quant_method = staticmethod(_naming_ours(theirs.supports_quant_method))

    @classmethod
    def unregister(cls, module: ModuleType = auto) -> None:
        """Remove both from the tables."""
        if METHOD in auto.AUTO_QUANTIZER_MAPPING:
            del auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], auto.AUTO_QUANTIZER_MAPPING[METHOD]
            theirs: Any = auto.AutoHfQuantizer
            theirs.supports_quant_method = staticmethod(theirs.supports_quant_method.__wrapped__)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from .resize import resize, shapes_after

        # transformers calls this under the meta device; the model's tensors stay where they are.
        with torch.device("cpu"):
            self._removals = removals_to(model, check_settings(self.quantization_config.to_dict()))
            self._shapes = shapes_after(model, self._removals)
            resize(model, self._removals)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from .model import note_sizes

        # Some releases take tensors of wrong shapes if there is a quantizer.
        for name, param in model.named_parameters():
            if tuple(param.shape) != self._shapes[name]:
                raise ValueError(
                    f"{name} has the shape {list(param.shape)} in the weights, and {list(self._shapes[name])} by "
                    "config.json."
                )
        self.remove_quantization_config(model)
        note_sizes(model, self._removals)  # a part has fewer layers than the config named, and other names
        return model


def _naming_ours(supports: Callable[[dict[str, Any]], bool]) -> Callable[[dict[str, Any]], bool]:
    """Return transformers' question for a config's method, which now sees ours; see :mod:`.ragged_config`."""

    @wraps(supports)
    def supports_quant_method(settings: dict[str, Any]) -> bool:
        if is_ragged(settings):
            settings["quant_method"] = METHOD  # until the model is loaded
        return supports(settings)

    return supports_quant_method


def resize_as_noted(model: Any) -> None:
    """Resize a model built from a config with ragged layers, as loading does; other models stay."""
    settings = getattr(model.config, "quantization_config", None)
    if is_ragged(settings):
        from .resize import resize

        with torch.device("cpu"):
            resize(model, removals_to(model, check_settings(settings)))


def removals_to(model: Any, sizes: Mapping[str, Mapping[str, int]]) -> list[Any]:
    """Return the removals that bring a model's layers to given numbers of units, by module name and kind.

    A name may be the one in a larger model that contains this one, or in a part of this one. Layers that a part lacks
    do not count. Raises ValueError if the model has none of the layers, if the class that the config names lacks one,
    or if one has fewer units.
    """
    from .model import layers_of
    from .resize import Removal

    left = {(name, kind): count for name, kinds in sizes.items() for kind, count in kinds.items()}
    known = len(left)
    removals = []
    for layer in layers_of(model):
        name, kind, units = layer.units.name, layer.units.kind, layer.units.count
        count = left.pop(_noted(name, kind, left), units)
        if count > units:
            raise ValueError(
                f"quantization_config in config.json has {count} {kind}s for {name!r}, which the rest of the config "
                f"says has {units}."
            )
        removals.append(Removal(layer, torch.arange(units) < count))
    named = getattr(model.config, "architectures", None) or ()
    if left and (len(left) == known or type(model).__name__ in named):
        name, kind = next(iter(left))
        raise ValueError(
            f"quantization_config in config.json has {kind}s for {name!r}, which {type(model).__name__} does not have."
        )
    return removals


def _noted(name: str, kind: str, sizes: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """The name and kind under which a layer's size is noted: its own, or the only one that ends or continues it."""
    if (name, kind) in sizes:
        return name, kind
    alike = [
        (other, same)
        for other, same in sizes
        if same == kind and (f".{other}".endswith(f".{name}") or name.endswith(f".{other}"))
    ]
    return alike[0] if len(alike) == 1 else (name, kind)
