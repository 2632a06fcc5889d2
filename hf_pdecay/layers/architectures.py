"""The table of where FFN neurons and attention heads lie in each architecture; it imports no model file.

A part of a layer is the path of a linear layer from the module, ``"mlp.up_proj"``; of a fused one ``"Wqkv:1/3"``
is the second of three equal parts, counted from 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Neurons:
    """A feed-forward layer: ``down(act(up[0](x)) * up[1](x))``, or without the second factor.

    Args:
        up: Parts whose rows are the neurons; the activation acts on the first.
        down: The part whose columns are the neurons.
        activation: Path of the activation, a module or function of one tensor.
        config: Keys of the model's config with the number of neurons, in all layers alike.
        ancestor: Class of the module whose layers share their neurons; None if each layer has its own.
    """

    up: tuple[str, ...]
    down: str
    activation: str
    config: tuple[str, ...] = ("intermediate_size",)
    ancestor: str | None = None
    kind: str = field(default="neuron", init=False)


@dataclass(frozen=True)
class Heads:
    """An attention layer; a unit is a head of keys and values with all the heads of queries that share it.

    Args:
        query: Part with the rows of the queries.
        key: Part with the rows of the keys.
        value: Part with the rows of the values.
        output: Part with the columns of the output projection.
        dim: Path of the attribute that holds the size of a head.
        config: Keys of the model's config by what they hold: ``"heads"``, ``"key_heads"`` and ``"dim"``. Empty if the
            config cannot express fewer heads than hidden size / head size.
        attributes: Attributes of the module that state its number of heads, by path: ``"heads"``, or ``"width"`` for
            heads times their size. A release of transformers may lack some of them.
        bias: Path of an ``nn.Embedding`` with a column for each head, which only some layers have; None without one.
        ancestor: Class of the module whose layers share their heads; None if each layer has its own.
        alike: Whether all layers must have the same number of heads, as when a layer passes on a value for each head.
    """

    query: str
    key: str
    value: str
    output: str
    dim: str
    config: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)
    bias: str | None = None
    ancestor: str | None = None
    alike: bool = False
    kind: str = field(default="head", init=False)


Row = Neurons | Heads


def add_architecture(module: type[nn.Module], *rows: Row) -> None:
    """Declare in which weights of a class of modules its neurons or heads lie; this holds for subclasses too.

    Args:
        module: The class.
        *rows: The entries. For each kind the first one whose parts a module has counts; new entries come before old.

    Raises:
        ValueError: If no row is given.
    """
    if not rows or not all(isinstance(row, (Neurons, Heads)) for row in rows):
        raise ValueError(f"Invalid rows: rows={rows!r}; give at least one Neurons or Heads.")
    key = f"{module.__module__}.{module.__qualname__}"
    _ROWS[key] = (*rows, *_ROWS.get(key, ()))


def rows_of(module: nn.Module, kind: str) -> tuple[Row, ...]:
    """Return the rows of a module's class, or of the nearest base class that has any."""
    for cls in type(module).__mro__:
        rows = tuple(row for row in _ROWS.get(f"{cls.__module__}.{cls.__qualname__}", ()) if row.kind == kind)
        if rows:
            return rows
    return ()


def _hf(name: str, module: str, *rows: Row) -> dict[str, tuple[Row, ...]]:
    return {f"transformers.models.{name}.modeling_{name}.{module}": rows}


def _bert_heads(path: str) -> Heads:
    sizes = {f"{path}.num_attention_heads": "heads", f"{path}.all_head_size": "width"}
    projections = f"{path}.query", f"{path}.key", f"{path}.value", "output.dense"
    return Heads(*projections, f"{path}.attention_head_size", attributes=sizes)


_GATED = Neurons(("gate_proj", "up_proj"), "down_proj", "act_fn")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_GROUPED = Heads(
    *_PROJECTIONS, "head_dim", {"heads": "num_attention_heads", "key_heads": "num_key_value_heads", "dim": "head_dim"}
)
_LLAMA_LIKE = ("Gemma", "Gemma2", "Llama", "Mistral", "Qwen2", "Qwen3")
_BERT_HEADS = _bert_heads("self")
_BERT_NEURONS = Neurons(("intermediate.dense",), "output.dense", "intermediate.intermediate_act_fn")
_DISTILBERT = Heads(
    "q_lin", "k_lin", "v_lin", "out_lin", "attention_head_size", attributes={"n_heads": "heads", "dim": "width"}
)
_FUSED = ("Wqkv:0/3", "Wqkv:1/3", "Wqkv:2/3", "Wo")
_MODERNBERT = Heads(*_FUSED, "head_dim", attributes={"num_heads": "heads", "all_head_size": "width"})
_GPT2 = {"num_heads": "heads", "split_size": "width"}

_ROWS: dict[str, tuple[Row, ...]] = {
    key: rows
    for prefix in _LLAMA_LIKE
    for layer, row in (("MLP", _GATED), ("Attention", _GROUPED))
    for key, rows in _hf(prefix.lower(), f"{prefix}{layer}", row).items()
}
for _name, _mlp, _attention in (
    ("gemma3", "Gemma3MLP", "Gemma3Attention"),
    ("qwen2_vl", "Qwen2MLP", "Qwen2VLAttention"),
    ("qwen2_5_vl", "Qwen2MLP", "Qwen2_5_VLAttention"),
):
    _ROWS |= _hf(_name, _mlp, _GATED) | _hf(_name, _attention, _GROUPED)
for _name, _prefix in (("clip", "CLIP"), ("siglip", "Siglip")):
    _ROWS |= _hf(_name, f"{_prefix}MLP", Neurons(("fc1",), "fc2", "activation_fn"))
for _name, _prefix in (("bart", "Bart"), ("whisper", "Whisper")):
    for _side in ("encoder", "decoder"):
        _row = Neurons(("fc1",), "fc2", "activation_fn", (f"{_side}_ffn_dim",))
        _ROWS |= _hf(_name, f"{_prefix}{_side.capitalize()}Layer", _row)
_ROWS |= _hf("gpt2", "GPT2MLP", Neurons(("c_fc",), "c_proj", "act", ("n_inner",)))
_ROWS |= _hf(
    "gpt2",
    "GPT2Attention",
    Heads("q_attn", "c_attn:0/2", "c_attn:1/2", "c_proj", "head_dim", attributes=_GPT2),  # to an encoder
    Heads("c_attn:0/3", "c_attn:1/3", "c_attn:2/3", "c_proj", "head_dim", attributes=_GPT2),
)
for _name, _prefix in (("bert", "Bert"), ("roberta", "Roberta")):
    _ROWS |= _hf(_name, f"{_prefix}Layer", _BERT_NEURONS) | _hf(_name, f"{_prefix}Attention", _BERT_HEADS)
_ROWS |= _hf("distilbert", "FFN", Neurons(("lin1",), "lin2", "activation", ("hidden_dim",)))
_ROWS |= _hf("distilbert", "DistilBertSelfAttention", _DISTILBERT)
_ROWS |= _hf("distilbert", "MultiHeadSelfAttention", _DISTILBERT)
_ROWS |= _hf("vit", "ViTMLP", Neurons(("fc1",), "fc2", "activation_fn")) | _hf("vit", "ViTLayer", _BERT_NEURONS)
_ROWS |= _hf(
    "vit",
    "ViTAttention",
    Heads(*_PROJECTIONS, "head_dim", {"heads": "num_attention_heads", "dim": "head_dim"}),
    _bert_heads("attention"),
)
_ROWS |= _hf("modernbert", "ModernBertMLP", Neurons(("Wi:0/2", "Wi:1/2"), "Wo", "act"))
_ROWS |= _hf("modernbert", "ModernBertAttention", _MODERNBERT)
_ROWS |= _hf("t5", "T5DenseGatedActDense", Neurons(("wi_0", "wi_1"), "wo", "act", ("d_ff",)))
_ROWS |= _hf("t5", "T5DenseActDense", Neurons(("wi",), "wo", "act", ("d_ff",)))
for _name, _path, _ancestor in (
    # One bias of positions serves all layers of a stack, so a head is the same one in all of them.
    ("T5LayerSelfAttention", "SelfAttention", "T5Stack"),
    ("T5LayerCrossAttention", "EncDecAttention", None),
):
    _parts = f"{_path}.q", f"{_path}.k", f"{_path}.v", f"{_path}.o", f"{_path}.key_value_proj_dim"
    _sizes = {f"{_path}.n_heads": "heads", f"{_path}.inner_dim": "width"}
    _bias = f"{_path}.relative_attention_bias" if _ancestor else None
    _ROWS |= _hf("t5", _name, Heads(*_parts, {"heads": "num_heads"}, _sizes, _bias, _ancestor, alike=True))
