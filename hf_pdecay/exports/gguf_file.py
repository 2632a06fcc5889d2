"""GGUF files in Q8_0 and Q4_0, as llama.cpp reads them: blocks of 32 codes with a scale in float16.

Known are families whose layers llama.cpp computes as transformers does. The names of tensors are those of the package
``gguf``; what differs beside them stands in :data:`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layers.matrices import is_transposed
from ..names import clean_name
from ..storage.codes import find_codes
from ..storage.source import ModelFolder
from .gguf_tokenizer import add_tokenizer, check_tokenizer


if TYPE_CHECKING:
    from .formats import Coded


BLOCK = 32
_KINDS = {8: "Q8_0", 4: "Q4_0"}
_UNUSED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers that releases before have saved
_ROPE = "rope_type"


@dataclass(frozen=True)
class Family:
    """What is particular to a family of models.

    Args:
        name: Its name in GGUF.
        activations: What llama.cpp computes in its feed-forward layers, by the names of transformers.
        pairs: Whether rows of queries and keys that are rotated together stand side by side in GGUF.
        layer_norm: Whether its norms subtract the mean.
    """

    name: str
    activations: tuple[str, ...] = ("silu",)
    pairs: bool = False
    layer_norm: bool = False


_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
FAMILIES = {
    "llama": Family("llama", pairs=True),
    "mistral": Family("llama", pairs=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gpt2": Family("gpt2", _GELU, layer_norm=True),
    "starcoder2": Family("starcoder2", _GELU, layer_norm=True),
}
"""By ``model_type``."""


def check_gguf(source: ModelFolder) -> None:
    """Raise ValueError if a model cannot be written as GGUF, as far as its files say."""
    kind = source.config.get("model_type")
    names = source.config.get("architectures") or [""]
    if kind not in FAMILIES or not str(names[0]).endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(
            f"Invalid format: format='gguf' knows causal language models of the kinds {', '.join(FAMILIES)}, and "
            f"{str(source.folder)!r} is a {names[0]} of the kind {kind!r}. Write plain weights, which llama.cpp's "
            "convert_hf_to_gguf.py reads."
        )
    config, family = source.config, FAMILIES[kind]
    activation = config.get("hidden_act") or config.get("activation_function") or family.activations[0]
    if activation not in family.activations or config.get("scale_attn_by_inverse_layer_idx"):
        raise ValueError(
            f"Invalid format: llama.cpp computes a {family.name} with {family.activations[0]} and plain attention, and "
            f"{str(source.folder)!r} has {activation!r} or scales its attention by layer; take another format."
        )
    _rope(config)
    check_tokenizer(source.folder)


def check_matrices(model: nn.Module, coded: Coded) -> None:
    """Raise ValueError if blocks do not divide the inputs of a matrix."""
    for name, weight, transposed in _tensors(model):
        inputs = weight.shape[0 if transposed else -1]
        if name in coded.names and inputs % BLOCK:
            raise ValueError(
                f"Invalid format: format='gguf' has blocks of {BLOCK}, which do not divide the {inputs} inputs of "
                f"{name}; take another format."
            )


def write_gguf(out: Path, model: Any, coded: Coded, source: ModelFolder) -> tuple[list[str], dict[str, Any]]:
    """Write a model as a GGUF file into a folder.

    Args:
        out: The folder.
        model: The model, in float32 or narrower, whose matrices are products of codes and scales in float16.
        coded: The codes.
        source: The folder from which it was loaded, with its tokenizer.

    Returns:
        What is left to say, and nothing for the config.
    """
    import gguf

    config, family, kind = model.config, FAMILIES[model.config.model_type], _KINDS[coded.bits]
    writer = gguf.GGUFWriter(out / f"model-{kind}.gguf", family.name)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, config, family)
    notes = add_tokenizer(writer, source.folder, config.vocab_size)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name), config.num_hidden_layers
    )
    for name, tensor, transposed in _tensors(model):
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise ValueError(f"gguf {_version()} has no name for {name} of {family.name}; take another format.")
        values = tensor.T if transposed else tensor
        order = _order(name, values, config) if family.pairs else None
        values = values if order is None else values[order]
        if name in coded.names:
            codes, scales = find_codes(values, coded.bits, BLOCK)
            data = blocks_of(codes, scales, coded.bits)
            writer.add_tensor(own, data.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
        elif values.dim() == 1 or "position_embd" in own:  # llama.cpp adds these in float32
            writer.add_tensor(own, values.float().contiguous().numpy())
        else:
            data, name_of_dtype = _narrowed(values)
            writer.add_tensor(own, data.numpy(), raw_dtype=gguf.GGMLQuantizationType[name_of_dtype])
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return notes, {}


def blocks_of(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return rows of bytes in Q8_0 or Q4_0: for each block the scale in float16, then its codes.

    Args:
        codes: In int8, of shape (rows, inputs).
        scales: Of shape (rows, inputs / 32).
        bits: 8; or 4, where a byte holds the codes of inputs i (its lower half) and i + 16, with 8 added.
    """
    blocks = codes.unflatten(-1, (-1, BLOCK))
    if bits == 4:
        raised = (blocks + 8).to(torch.uint8)
        stored = raised[..., : BLOCK // 2] | raised[..., BLOCK // 2 :] << 4
    else:
        stored = blocks.contiguous().view(torch.uint8)
    heads = scales.to(torch.float16).contiguous().view(torch.uint8).unflatten(-1, (-1, 2))
    return torch.cat([heads, stored], -1).flatten(-2).contiguous()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """The parameters and saved buffers of a model, shared ones once, and whether each is a transposed matrix."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        state = {key: value for key, value in module.state_dict(keep_vars=True).items() if "." not in key}
        for key, tensor in state.items():
            name = clean_name(f"{prefix}.{key}" if prefix else key)
            if id(tensor) not in seen and not name.endswith(_UNUSED):
                seen.add(id(tensor))
                yield name, tensor.detach().cpu(), is_transposed(module) and tensor.dim() == 2


def _add_sizes(writer: Any, config: Any, family: Family) -> None:
    """Write what the config says."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    names = ("rms_norm_eps", "norm_epsilon", "layer_norm_epsilon", "layer_norm_eps")
    epsilon = next(getattr(config, name) for name in names if hasattr(config, name))
    (writer.add_layer_norm_eps if family.layer_norm else writer.add_layer_norm_rms_eps)(epsilon)
    rope = _rope(config.to_dict())
    if rope is not None:
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope[_ROPE] == "linear":
            from gguf import RopeScalingType

            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])


def _rope(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of rotary embeddings, by the names of transformers 5; None if a model has none.

    Raises:
        ValueError: If they are of a kind that is not known.
    """
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = said.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        return None
    kind = said.get(_ROPE) or said.get("type") or "default"
    part = said.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    if kind not in ("default", "linear", "llama3") or part != 1:
        raise ValueError(
            "Invalid format: format='gguf' knows rotary embeddings of whole heads, of the kinds default, linear and "
            f"llama3, and the model has {kind!r} on {part:g} of each "
            "head. Write plain weights, which llama.cpp's convert_hf_to_gguf.py reads."
        )
    return {**said, "rope_theta": theta, _ROPE: kind}


def _rope_factors(config: Any) -> Tensor | None:
    """By what llama.cpp divides the frequencies of a rotary embedding that is stretched as in Llama 3; else None."""
    rope = _rope(config.to_dict())
    if rope is None or rope[_ROPE] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(stretched)
    return (rope["rope_theta"] ** (-torch.arange(0, size, 2).float() / size) / stretched).float()


def _order(name: str, values: Tensor, config: Any) -> Tensor | None:
    """The order of the rows of queries and keys, where the two halves of a head alternate; None for others."""
    part = next((part for part in ("q_proj", "k_proj") if f".{part}." in name), None)
    if part is None:
        return None
    heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
    return torch.arange(len(values)).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _narrowed(values: Tensor) -> tuple[Tensor, str]:
    """Values in the narrowest dtype that holds them exactly, as GGUF stores it, and the dtype's name there."""
    wide = values.float()
    half, brain = wide.to(torch.float16), wide.to(torch.bfloat16)
    if torch.equal(half.float(), wide):
        return half.contiguous(), "F16"
    if torch.equal(brain.float(), wide):
        return brain.contiguous().view(torch.uint8), "BF16"
    return wide.contiguous(), "F32"


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")
