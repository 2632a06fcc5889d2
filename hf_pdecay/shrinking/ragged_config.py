"""``quantization_config`` in ``config.json`` of a model with ragged layers: the size of each layer.

It has ``method`` in place of ``quant_method``. Without hf_pdecay transformers raises an error where that is missing; an
unknown ``quant_method`` it passes over, and with ``ignore_mismatched_sizes`` it would make all ragged layers anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..storage.source import RAGGED as METHOD
from ..storage.source import is_ragged


FORMAT_VERSION = 1
_KINDS = ("neuron", "head")
# A config with more layers is forged.
_LAYERS_LIMIT = 100_000


def make_settings(sizes: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Return the value of ``quantization_config``: the number of units left, by the layer's module name and kind."""
    return {
        "method": METHOD,
        "format_version": FORMAT_VERSION,
        "layers": {name: dict(kinds) for name, kinds in sizes.items()},
    }


def check_settings(settings: object) -> dict[str, dict[str, int]]:
    """Check ``quantization_config``, and return the numbers of units; raise ValueError if it is invalid."""
    where = "quantization_config in config.json"
    if not isinstance(settings, Mapping) or not is_ragged(settings):
        raise ValueError(f"{where} is not that of a model shrunk by hf_pdecay.")
    if settings.keys() != {"method", "format_version", "layers"}:
        raise ValueError(f"{where} does not have exactly method, format_version and layers.")
    version = settings["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"{where} has format_version {version!r}; this hf_pdecay reads {FORMAT_VERSION}.")
    layers = settings["layers"]
    if not isinstance(layers, Mapping) or not layers or len(layers) > _LAYERS_LIMIT:
        raise ValueError(f"{where} has invalid layers; they must be an object with an entry for each layer.")
    for name, sizes in layers.items():
        if not isinstance(sizes, Mapping) or not sizes or not set(sizes) <= set(_KINDS):
            raise ValueError(f"{where} has {sizes!r} for {name!r}; it must be a number of neurons or heads.")
        for kind, count in sizes.items():
            if type(count) is not int or count < 1:
                raise ValueError(
                    f"{where} has {count!r} {kind}s for {name!r}; it must be a whole number of at least 1."
                )
    return {name: dict(sizes) for name, sizes in layers.items()}
