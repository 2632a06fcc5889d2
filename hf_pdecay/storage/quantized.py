"""Quantized models as dense tensors: loading them as transformers does, and dequantizing one weight at a time."""

from __future__ import annotations

import copy
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


_REPACKED = "packing_format_for_cpu"  # of a state of bitsandbytes

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
            dense = None if id(tensor) in seen else dense_weight(module, tensor)
            seen.add(id(tensor))
            if dense is not None:
                yield begin + name, dense


def dense_weight(module: Any, tensor: Any) -> Tensor | None:
    """Return a tensor of a module in floating-point numbers; None if it is none, or packed in an unknown way."""
    dense: Tensor
    if type(tensor).__name__ == "Params4bit" and tensor.quant_state.absmax.dim() == 2:  # it was repacked
        from bitsandbytes.functional import dequantize_4bit

        dense = dequantize_4bit(*four_bits(tensor))
        return dense
    if type(tensor).__name__ in ("Params4bit", "Int8Params"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        dense = dequantize_bnb_weight(tensor, getattr(module, "state", None))
        return dense
    if tensor.is_quantized or type(tensor.data).dequantize is not Tensor.dequantize:
        dense = tensor.dequantize()
        return dense
    return tensor if tensor.is_floating_point() and tensor.element_size() > 1 else None


def four_bits(weight: Any) -> tuple[Tensor, Any]:
    """Return a weight of bitsandbytes in 4 bits, with two consecutive codes in a byte, and its state.

    On a CPU with AVX512-BF16 a forward pass repacks a weight: rows in blocks of 32, a byte for two rows, and the scales
    transposed, in bfloat16. What dequantises a weight elsewhere does not know that order. A ``state_dict()`` puts the
    codes back into their order, but in 0.50 not the scales.
    """
    state = weight.quant_state
    if state.absmax.dim() == 1:
        return weight.data, state
    plain = copy.copy(state)
    plain.absmax, plain.dtype = state.absmax.T.reshape(-1).float(), state.original_dtype
    if not getattr(state, _REPACKED, False):
        return weight.data, plain
    rows, columns = state.shape
    packed = weight.data.reshape(-1, 32)
    codes = torch.cat([packed & 15, packed >> 4], -1).view(rows // 32, columns // 2, 32, 2)
    codes = codes.transpose(1, 2).reshape(-1)
    stored = (codes[::2] << 4 | codes[1::2]).reshape(state.original_qshape)
    setattr(plain, _REPACKED, False)
    return stored.view(getattr(state, "original_storage_type", torch.uint8)), plain
