"""Shrinking: what is left computes the same, loads as an ordinary model, and bad input is refused clearly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_pdecay.layers.finding import Layer, find_layers
from hf_pdecay.shrinking.folder import shrink_folder
from hf_pdecay.shrinking.model import shrink, shrink_model
from hf_pdecay.shrinking.ragged_config import check_settings, make_settings

from ..helpers.models import build, tiny_gpt2
from ..helpers.storage_models import bits, weights
from ..layers.test_finding import KNOWN, OUTGOING, lively, outputs, zero


# What keeps a unit from contributing: the parts in which all of its weights are zero, one choice at a time.
WAYS = {"neuron": ({"down"}, {"up0"}, {"up1"}), "head": ({"output"}, {"value"})}


def kill(model: nn.Module, layer: Layer, group: int, way: int = 0) -> None:
    """Zero what keeps a group from contributing, in each module that it lies in."""
    parts = {place.part for place in layer.sites}
    ways = [each for each in WAYS[layer.units.kind] if each <= parts]
    members = [
        member
        for member, place in zip(layer.units.members, layer.sites, strict=True)
        if place.part in ways[way % len(ways)]
    ]
    zero(model, layer.units, members, group)


def half_dead(name: str) -> tuple[Any, list[tuple[Layer, int]]]:
    """A model with about half of its groups dead, one neuron less in the second layer, and how many are alive."""
    model = lively(name)
    alive = []
    for kind in ("neuron", "head"):
        for index, layer in enumerate(find_layers(model, kind)):
            count = layer.units.count // 2 - (index % 2 if kind == "neuron" else 0)
            for group in range(count):
                kill(model, layer, 2 * group, way=group)
            alive.append((layer, layer.units.count - count))
    return model, alive


def close(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max())))


def loaded(folder: Path, like: Any) -> Any:
    model, info = type(like).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("layers", ["uniform", "ragged"])
@pytest.mark.parametrize("name", KNOWN)
def test_what_is_left_gives_the_same(name: str, layers: str, tmp_path: Path) -> None:
    model, alive = half_dead(name)
    model.save_pretrained(tmp_path / "sparse")
    model = loaded(tmp_path / "sparse", model)
    expected = outputs(model).detach()
    before = json.loads((tmp_path / "sparse/config.json").read_text())
    found = shrink_folder(tmp_path / "sparse", tmp_path / "small", layers=layers)
    small = loaded(tmp_path / "small", model)
    assert outputs(small).dtype == torch.float64 and close(outputs(small), expected)
    assert found.parameters == tuple(sum(each.numel() for each in one.parameters()) for one in (model, small))
    after = json.loads((tmp_path / "small/config.json").read_text())
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    by_name = {(each.name, each.kind): each for each in found.layers}
    fewest = max(count for layer, count in alive if layer.units.kind == "neuron")
    for layer, count in alive:
        each = by_name[layer.units.name, layer.units.kind]
        assert (each.units, each.dead) == (layer.units.count, layer.units.count - count)
        if layers == "ragged":
            assert each.kept == count
        elif each.kind == "neuron":
            assert each.kept == fewest
        else:
            assert each.kept == (each.units if found.notes else count)
    if layers == "uniform":
        assert "quantization_config" not in changed and changed == {
            key for key, value in found.config.items() if before.get(key) != value
        }
    else:
        assert changed - set(found.config) == {"quantization_config"}
        # What is loaded is an ordinary model that is saved and loaded again.
        assert getattr(small, "hf_quantizer", None) is None
        small.save_pretrained(tmp_path / "again")
        assert close(outputs(loaded(tmp_path / "again", small)), expected)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), name=st.sampled_from(["llama", "t5-plain", "modernbert"]))
def test_any_groups_may_be_dead(data: st.DataObject, name: str) -> None:
    model = lively(name)
    alive = {}
    for kind in ("neuron", "head"):
        for layer in find_layers(model, kind):
            groups = layer.units.count
            gone = data.draw(st.sets(st.integers(0, groups - 1)))
            for group in gone:
                kill(model, layer, group, data.draw(st.integers(0, 2)))
            alive[layer.units.name, kind] = groups - len(gone)
    expected = outputs(model).detach()
    layers = data.draw(st.sampled_from(["uniform", "ragged"]))
    found = shrink_model(model, layers=layers)
    assert close(outputs(model), expected)
    for each in found.layers:
        assert max(1, alive[each.name, each.kind]) <= each.kept <= each.units


def test_a_constant_stays() -> None:
    # A neuron without inputs gives act(bias), one without a bias act(0): neither is nothing, unless that is 0.
    for activation, bias, gone in (("gelu", 0.0, 1), ("gelu", 0.5, 0), ("sigmoid", 0.0, 0)):
        model = tiny_gpt2(activation_function=activation).double().eval()
        with torch.no_grad():
            for block in model.transformer.h:
                block.mlp.c_fc.weight[:, 3] = 0
                block.mlp.c_fc.bias[3] = bias
        expected = outputs(model).detach()
        found = shrink_model(model)
        assert found.removed("neuron") == 2 * gone
        assert close(outputs(model), expected)


def test_weights_that_are_left_are_those_that_were(tmp_path: Path) -> None:
    model: Any = build("llama").to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] = 0
    model.save_pretrained(tmp_path / "sparse", max_shard_size="20KB")
    assert len(list((tmp_path / "sparse").glob("*.safetensors"))) > 1
    shrink_folder(tmp_path / "sparse", tmp_path / "small")
    old, new = weights(tmp_path / "sparse"), weights(tmp_path / "small")
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        if "down_proj" in name:
            tensor = tensor[:, 1::2]
        elif "mlp" in name:
            tensor = tensor[1::2]
        assert bits(tensor.contiguous()) == bits(new[name])


def test_a_config_may_ask_for_more_heads_than_are_alive() -> None:
    # With 4 of 6 heads alive, 48 is a multiple of 4 but with 5 it is not, which some releases refuse.
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 64}
    for gone, kept in ((2, {4}), (1, {5, 6})):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, intermediate_size=16, num_hidden_layers=2)).double().eval()
        for layer in find_layers(model, "head"):
            for group in range(gone):
                kill(model, layer, group)
        expected = outputs(model).detach()
        found = shrink_model(model)
        assert {each.kept for each in found.layers if each.kind == "head"} <= kept
        assert close(outputs(model), expected)
        type(model)(type(model.config).from_dict(model.config.to_dict()))


def test_a_shrunk_model_is_shrunk_again(tmp_path: Path) -> None:
    model, _ = half_dead("llama")
    shrink(model, layers="ragged").save_pretrained(tmp_path / "first")
    for layers, kept in (("ragged", 20), ("uniform", 24)):
        again = loaded(tmp_path / "first", model)
        for layer in find_layers(again, "neuron"):
            for group in range(layer.units.count - 20):
                kill(again, layer, group)
        expected = outputs(again).detach()
        found = shrink_model(again, layers=layers)
        again.save_pretrained(tmp_path / layers)
        assert close(outputs(loaded(tmp_path / layers, model)), expected)
        counts = [each.kept for each in found.layers if each.kind == "neuron"]
        # No config describes layers that were ragged before.
        assert counts == ([20, 20] if layers == "ragged" else [24, 25]), kept


def test_neurons_to_a_multiple() -> None:
    for layers in ("uniform", "ragged"):
        model, _ = half_dead("llama")
        found = shrink_model(model, layers=layers, multiple_of=16)
        assert [each.kept for each in found.layers if each.kind == "neuron"] == [32, 32]
        model, _ = half_dead("llama")
        found = shrink_model(model, layers=layers, multiple_of=50)
        assert not found.removed("neuron") and found.removed("head")


def test_ragged_layers_generate_and_learn(tmp_path: Path) -> None:
    model, _ = half_dead("llama")
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([[3, 5, 7]])
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    shrink(model, layers="ragged").save_pretrained(tmp_path / "small")
    small = loaded(tmp_path / "small", model)
    assert torch.equal(small.generate(ids, max_new_tokens=6, do_sample=False), expected)
    small.train()
    small(input_ids=ids, labels=ids).loss.backward()
    assert all(param.grad is not None for param in small.parameters())
    # Without the head the modules have other names.
    base = tf.AutoModel.from_pretrained(tmp_path / "small", dtype="auto").eval()
    assert torch.equal(base(ids).last_hidden_state, small.eval().model(ids).last_hidden_state)


GOOD = {"model.layers.0.mlp": {"neuron": 20}, "model.layers.1.self_attn": {"head": 1}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format_version": 2}, "format_version 2; this hf_pdecay reads 1"),
        ({"format_version": True}, "format_version True"),
        ({"code": "x.py"}, "does not have exactly method, format_version and layers"),
        ({"layers": {}}, "must be an object with an entry for each layer"),
        ({"layers": [1]}, "must be an object with an entry for each layer"),
        ({"layers": {"model.layers.0.mlp": {"neuron": 10**30}}}, "neurons for 'model.layers.0.mlp', which the rest"),
        ({"layers": {"model.layers.0.mlp": {"neuron": 49}}}, "has 49 neurons for 'model.layers.0.mlp'"),
        ({"layers": {"model.layers.0.mlp": {"neuron": 0}}}, "has 0 neurons"),
        ({"layers": {"model.layers.0.mlp": {"neuron": -1}}}, "has -1 neurons"),
        ({"layers": {"model.layers.0.mlp": {"neuron": 2.5}}}, "has 2.5 neurons"),
        ({"layers": {"model.layers.0.mlp": {"neuron": "20"}}}, "has '20' neurons"),
        ({"layers": {"model.layers.0.mlp": {"row": 20}}}, "it must be a number of neurons or heads"),
        ({"layers": {"model.layers.0.mlp": 20}}, "it must be a number of neurons or heads"),
        (
            {"layers": {"model.layers.9.mlp": {"neuron": 20}}},
            "'model.layers.9.mlp', which LlamaForCausalLM does not have",
        ),
        ({"layers": {"../../etc": {"head": 1}}}, "'../../etc', which LlamaForCausalLM does not have"),
        ({"layers": {"model.layers.0.mlp": {"neuron": 7}}}, r"(?i)(shape|size)"),
    ],
)
def test_a_forged_config_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    model, _ = half_dead("llama")
    shrink(model, layers="ragged").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        tf.LlamaForCausalLM.from_pretrained(tmp_path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["neuron", "head"]), inner),
    max_leaves=8,
)


@given(_JSON)
def test_any_settings_are_taken_or_refused_in_a_sentence(layers: Any) -> None:
    try:
        sizes = check_settings(make_settings(GOOD) | {"layers": layers})
    except ValueError as error:
        assert str(error).startswith("quantization_config in config.json")
    else:
        assert all(type(count) is int and count > 0 for kinds in sizes.values() for count in kinds.values())


def test_outgoing_parts_are_those_that_are_tried() -> None:
    assert {part for ways in WAYS.values() for part in ways[0]} == set(OUTGOING)
