"""Formats of transformers that keep codes in safetensors: compressed-tensors' `pack-quantized`, and torchao's tensors.

The weights are saved as they are first. Then, file by file, each matrix is replaced by its codes and scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..layers.saved_names import NamesInModel
from ..names import clean_name
from ..storage.codes import find_codes
from ..storage.folder import INDEX, read_json, read_weights, write_json
from ..storage.source import ModelFolder


if TYPE_CHECKING:
    from .formats import Coded


Pair = tuple[Tensor, Tensor]
"""The codes of a matrix in int8, of shape (outputs, inputs), and its scales in the model's dtype, (outputs, blocks)."""


class Packing(Protocol):
    """How matrices are stored, and what the config says of them."""

    def __init__(self, bits: int, block: int, others: list[str]) -> None:
        """Take the names of the linear layers that stay plain."""

    def pack(self, coded: Mapping[str, Pair], plain: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors of a file, and its metadata, from matrices and plain tensors by name."""

    def config(self) -> dict[str, Any]:
        """Return the ``quantization_config``."""


class PackQuantized:
    """Compressed-tensors' format: codes, made positive, side by side in int32; from the lowest bits on."""

    def __init__(self, bits: int, block: int, others: list[str]) -> None:
        self._bits, self._block, self._others = bits, block, others

    def pack(self, coded: Mapping[str, Pair], plain: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the packed codes, the scales and the shapes beside the plain tensors."""
        per_word, tensors = 32 // self._bits, dict(plain)
        for name, (codes, scales) in coded.items():
            raised = codes.to(torch.int64) + (1 << (self._bits - 1))
            words = nn.functional.pad(raised, (0, -codes.shape[1] % per_word)).unflatten(1, (-1, per_word))
            packed = (words << (torch.arange(per_word) * self._bits)).sum(-1)
            tensors[f"{name}_packed"] = packed.to(torch.int32)
            tensors[f"{name}_scale"], tensors[f"{name}_shape"] = scales, torch.tensor(codes.shape)
        return tensors, {}

    def config(self) -> dict[str, Any]:
        """Return the config that transformers and vLLM read."""
        weights = {
            "num_bits": self._bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self._block,
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": self._others,
        }


class TorchAo:
    """torchao's ``IntxUnpackedToInt8Tensor``: codes of any width in int8."""

    def __init__(self, bits: int, block: int, others: list[str]) -> None:
        self._dtype: torch.dtype = getattr(torch, f"int{bits}")
        self._block, self._others = block, others

    def pack(self, coded: Mapping[str, Pair], plain: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the parts of all tensors as torchao names them."""
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
        from torchao.quantization import IntxUnpackedToInt8Tensor

        options = {"target_dtype": self._dtype, "block_size": (1, self._block), "activation_quantization": None}
        whole = dict(plain)
        for name, (codes, scales) in coded.items():
            zeros = torch.zeros_like(scales, dtype=torch.int8)
            whole[name] = IntxUnpackedToInt8Tensor(codes, scales, zeros, dtype=scales.dtype, **options)
        tensors, metadata = flatten_tensor_state_dict(whole)
        return tensors, metadata

    def config(self) -> dict[str, Any]:
        """Return the config that transformers reads."""
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup
        from transformers import TorchAoConfig

        kind = IntxWeightOnlyConfig(weight_dtype=self._dtype, granularity=PerGroup(self._block))
        settings: dict[str, Any] = TorchAoConfig(kind, modules_to_not_convert=self._others).to_dict()
        return settings


def linear_weights(model: nn.Module, coded: Coded) -> dict[str, Tensor]:
    """Return the coded weights that plain ``nn.Linear`` layers hold, by name: both runtimes know no other layer."""
    modules = ((clean_name(name), module) for name, module in model.named_modules() if type(module) is nn.Linear)
    return {weight: module.weight for name, module in modules if (weight := f"{name}.weight") in coded.names}


def check_linear(model: nn.Module, coded: Coded) -> None:
    """Raise ValueError if a model has no linear layers to store as codes, or blocks do not divide their inputs."""
    held = linear_weights(model, coded)
    if not held:
        raise ValueError(
            f"Invalid format: {type(model).__name__} has no matrices in nn.Linear layers, the only ones that this "
            "format stores as codes; take format='plain' (--format plain) and `hf-pdecay compress`."
        )
    for name, weight in held.items():
        if weight.shape[1] % coded.block:
            divisors = [block for block in (128, 64, 32, 16, 8) if weight.shape[1] % block == 0]
            help_ = f"give a block that does, such as {divisors[0]}" if divisors else "take format='plain'"
            raise ValueError(
                f"Invalid block: block={coded.block} does not divide the {weight.shape[1]} inputs of {name}, as this "
                f"format needs; {help_}."
            )


def write_packed(
    kind: type[Packing], out: Path, model: Any, coded: Coded, source: ModelFolder
) -> tuple[list[str], dict[str, Any]]:
    """Save a model, and put codes in the place of its linear weights.

    Args:
        kind: How they are stored.
        out: The folder.
        model: The model, whose weights are products of codes and scales.
        coded: The codes.
        source: The folder from which it was loaded.

    Returns:
        What is left to say, and what the config gets.
    """
    model.save_pretrained(str(out))
    in_model, held = NamesInModel(model), set(linear_weights(model, coded))
    linear = [clean_name(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    packing = kind(coded.bits, coded.block, [name for name in linear if f"{name}.weight" not in held])
    placed: dict[str, str] = {}
    total = 0
    left: list[str] = [name for name in coded.names if name not in held]
    for file in read_weights(out):
        tensors, metadata = _packed(out / file, packing, held, in_model, coded)
        save_file(tensors, out / file, metadata=metadata)
        placed |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if (out / INDEX).is_file():
        metadata = read_json(out / INDEX).get("metadata", {})
        write_json(out / INDEX, {"metadata": {**metadata, "total_size": total}, "weight_map": placed})
    said = "Stored as plain numbers, as the format has no codes for their layers"
    return [f"{said}: {', '.join(left[:3])}."] * bool(left), {"quantization_config": packing.config()}


def _packed(
    file: Path, packing: Packing, held: set[str], in_model: NamesInModel, coded: Coded
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file with codes."""
    pairs: dict[str, Pair] = {}
    plain: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as handle:
        metadata: dict[str, str] = dict(handle.metadata() or {})
        for name in handle.keys():  # noqa: SIM118
            tensor = handle.get_tensor(name)
            if in_model(name) in held:
                codes, scales = find_codes(tensor, coded.bits, coded.block)
                pairs[name] = codes, scales.to(tensor.dtype)
            else:
                plain[name] = tensor
    tensors, said = packing.pack(pairs, plain)
    return tensors, metadata | said
