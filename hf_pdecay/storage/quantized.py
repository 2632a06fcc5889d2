"""Quantized models as dense tensors: loading them as transformers does, and dequantizing one weight at a time."""

from __future__ import annotations

import inspect
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .container import FormatError
from .source import RAGGED, quantization_method
from .untrusted import explained


# Options of quantization configs of transformers by which it loads plain weights, by their names in 5 and 4.
_DENSE = {"dequantize": True, "run_compressed": False}


def nested_method(config: Mapping[str, Any]) -> str | None:
    """Return the method of quantization in a config or in one of its parts, such as ``text_config``; else None.

    Models with ragged layers, whose weights are plain, have none.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return next((method for part in parts if (method := quantization_method(part)) not in (None, RAGGED)), None)


def dense_config(cls: Any, folder: str) -> Any:
    """Return the config of a quantized model, so that its weights are loaded dequantized where transformers can."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    config = cls.config_class.from_pretrained(folder)
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, dict):
        kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(settings.get("quant_method")))
        known = inspect.signature(kind).parameters if kind is not None else {}
        option = next((name for name in _DENSE if name in known), None)
        if option is not None:
            settings[option] = _DENSE[option]
    return config


def load_gguf(file: Path, cls: Any, config: Any = None) -> Any:
    """Load a model from a GGUF file, dequantized to float32.

    Args:
        file: The file.
        cls: A class or an auto class of transformers.
        config: That of the model; None for what transformers reads in the file, which may lack sizes.

    Raises:
        ValueError: If the file cannot be loaded so, or is not a whole model.
    """
    import transformers

    kind = getattr(transformers, "GgufConfig", None)  # in transformers 4 a file is always dequantized
    options: dict[str, Any] = {} if kind is None else {"quantization_config": kind(dequantize=True)}
    if config is not None:
        options["config"] = config
    what = f"{str(file)!r} cannot be loaded as a {cls.__name__}"
    try:
        with explained(what):
            model, info = cls.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except struct.error as error:
        raise ValueError(f"{what}: it is cut short ({error})") from error
    if info["missing_keys"]:
        raise FormatError(f"{str(file)!r} is not a whole {cls.__name__}: {min(info['missing_keys'])} is missing.")
    return model


def dense_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give the parameters and buffers of floating-point numbers of a model by name, dequantized one at a time.

    Known are the weights of bitsandbytes, tensors with a method ``dequantize`` (torchao, quanto), and layers with one
    (HQQ). Packed weights of others are left out.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        begin = f"{prefix}." if prefix else ""
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        whole = getattr(module, "dequantize", None)
        if callable(whole) and "weight" not in own and own:
            yield f"{begin}weight", whole()
        for name, tensor in own.items():
            dense = None if id(tensor) in seen else _dense(module, tensor)
            seen.add(id(tensor))
            if dense is not None:
                yield begin + name, dense


def _dense(module: Any, tensor: Any) -> Tensor | None:
    """A tensor in floating-point numbers; None if it is none, or packed in a way that is not known."""
    dense: Tensor
    if type(tensor).__name__ in ("Params4bit", "Int8Params"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        dense = dequantize_bnb_weight(tensor, getattr(module, "state", None))
        return dense
    if tensor.is_quantized or type(tensor.data).dequantize is not Tensor.dequantize:
        dense = tensor.dequantize()
        return dense
    return tensor if tensor.is_floating_point() and tensor.element_size() > 1 else None
