"""Loads models with ragged layers in transformers, by its extension point for quantized models.

The model is built as its config says, on the meta device. Before weights are read, its layers are resized to the sizes
that ``quantization_config`` lists. The loaded model is an ordinary one, whose config keeps the list.
"""

from __future__ import annotations

from typing import Any

import torch

from ..storage.plain_quantizer import PlainConfig, PlainQuantizer
from .sizes import METHOD, check_settings, make_settings


class ShrunkConfig(PlainConfig):
    """``quantization_config`` of a model with ragged layers, see `docs/shrinking.md`."""

    check = staticmethod(check_settings)


class ShrunkQuantizer(PlainQuantizer):
    """Resizes the layers of a model before its weights are loaded."""

    method = METHOD
    config_class = ShrunkConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from .resize import resize, shapes_after

        # transformers calls this under the meta device; the model's tensors stay where they are.
        with torch.device("cpu"):
            cuts = cuts_of(model, check_settings(self.quantization_config.to_dict()))
            self._shapes = shapes_after(model, cuts)
            resize(model, cuts)
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


def cut_as_noted(model: Any) -> None:
    """Cut the layers of a model that was made of the config of one with ragged layers, as loading does; or nothing.

    Raises:
        ValueError: If the config tells of layers that the model has not.
    """
    settings = getattr(model.config, "quantization_config", None)
    if isinstance(settings, dict) and settings.get("quant_method") == METHOD:
        from .resize import resize

        with torch.device("cpu"):
            resize(model, cuts_of(model, check_settings(settings)))


def cuts_of(model: Any, sizes: dict[str, dict[str, int]]) -> list[Any]:
    """Return the cuts that bring a model's layers to sizes.

    Args:
        model: The model as its config says.
        sizes: Number of groups that are left, by kind, by the name of the layer's module, in the model or in one around
            or within it that has another head.

    Raises:
        ValueError: If it has no such layer, or fewer groups in it.
    """
    from .model import layers_of
    from .resize import Cut

    prefix = f"{model.base_model_prefix}."
    left = {(name, kind): count for name, kinds in sizes.items() for kind, count in kinds.items()}
    cuts = []
    for layer in layers_of(model):
        name, kind, groups = layer.units.name, layer.units.kind, layer.units.count
        names = (name, prefix + name, name.removeprefix(prefix))
        count = next((left.pop((each, kind)) for each in names if (each, kind) in left), groups)
        if count > groups:
            raise ValueError(
                f"quantization_config in config.json has {count} {kind}s for {name!r}, which the rest of the config "
                f"says has {groups}."
            )
        cuts.append(Cut(layer, torch.arange(groups) < count))
    if left:
        name, kind = next(iter(left))
        raise ValueError(
            f"quantization_config in config.json tells of {kind}s in {name!r}, which {type(model).__name__} has not."
        )
    return cuts
