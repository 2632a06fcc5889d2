"""Shrinking: what is left computes the same, loads as an ordinary model, and bad input is refused in a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hf_pdecay
from hf_pdecay.cli import main
from hf_pdecay.coupling.finding import Layer, find_layers
from hf_pdecay.report import report
from hf_pdecay.shrink import shrink, shrink_folder
from hf_pdecay.shrink.model import shrink_model
from hf_pdecay.shrink.settings import check_settings, make_settings

from .models import build, tiny_gpt2
from .storage_models import bits, files_of, weights
from .test_coupling import KNOWN, OUTGOING, lively, outputs, zero


# What keeps a group from contributing, a choice at a time: the parts of which all of a group's weights are zero.
WAYS = {"neuron": ({"down"}, {"up0"}, {"up1"}), "head": ({"output"}, {"value"})}


def kill(model: nn.Module, layer: Layer, group: int, way: int = 0) -> None:
    """Zero what keeps a group from contributing, in each module that it lies in."""
    parts = {place.part for place in layer.places}
    ways = [each for each in WAYS[layer.coupling.kind] if each <= parts]
    members = [
        member
        for member, place in zip(layer.coupling.members, layer.places, strict=True)
        if place.part in ways[way % len(ways)]
    ]
    zero(model, layer.coupling, members, group)


def half_dead(name: str) -> tuple[Any, list[tuple[Layer, int]]]:
    """A model with about half of its groups dead, one neuron less in the second layer, and how many are alive."""
    model = lively(name)
    alive = []
    for kind in ("neuron", "head"):
        for index, layer in enumerate(find_layers(model, kind)):
            count = layer.coupling.count // 2 - (index % 2 if kind == "neuron" else 0)
            for group in range(count):
                kill(model, layer, 2 * group, way=group)
            alive.append((layer, layer.coupling.count - count))
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
    fewest = max(count for layer, count in alive if layer.coupling.kind == "neuron")
    for layer, count in alive:
        each = by_name[layer.coupling.name, layer.coupling.kind]
        assert (each.groups, each.dead) == (layer.coupling.count, layer.coupling.count - count)
        if layers == "ragged":
            assert each.kept == count
        elif each.kind == "neuron":
            assert each.kept == fewest
        else:
            assert each.kept == (each.groups if found.notes else count)
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
            groups = layer.coupling.count
            gone = data.draw(st.sets(st.integers(0, groups - 1)))
            for group in gone:
                kill(model, layer, group, data.draw(st.integers(0, 2)))
            alive[layer.coupling.name, kind] = groups - len(gone)
    expected = outputs(model).detach()
    layers = data.draw(st.sampled_from(["uniform", "ragged"]))
    found = shrink_model(model, layers=layers)
    assert close(outputs(model), expected)
    for each in found.layers:
        assert max(1, alive[each.name, each.kind]) <= each.kept <= each.groups


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
            for group in range(layer.coupling.count - 20):
                kill(again, layer, group)
        expected = outputs(again).detach()
        found = shrink_model(again, layers=layers)
        again.save_pretrained(tmp_path / layers)
        assert close(outputs(loaded(tmp_path / layers, model)), expected)
        counts = [each.kept for each in found.layers if each.kind == "neuron"]
        # No config tells of layers that were ragged before.
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


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A folder of a model with dead neurons, and what lies beside its weights."""
    folder = tmp_path / "sparse"
    model, _ = half_dead("gpt2")
    model.config.my_key = "kept"
    model.save_pretrained(folder)
    (folder / "README.md").write_text("a card")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "more").mkdir()
    (folder / "more/notes.txt").write_text("notes")
    (folder / "pytorch_model.bin").write_bytes(b"")
    decayed = ["transformer.h.0.mlp.c_fc.weight"]
    hf_pdecay.measure_sparsity(model, decayed=decayed).save(folder / "sparsity.json")
    return folder


def test_what_lies_beside_the_weights_comes_along(
    sparse: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    small = sparse.parent / "small"
    assert main(["shrink", str(sparse), str(small)]) == 0
    out = capsys.readouterr().out
    assert "Left out, weights in other formats: pytorch_model.bin" in out
    old, new = files_of(sparse), files_of(small)
    assert new.keys() == old.keys() - {"pytorch_model.bin"}
    same = {name for name in new if new[name] == old[name]}
    assert same == new.keys() - {"config.json", "model.safetensors", "sparsity.json"}
    assert json.loads(new["config.json"]) == json.loads(old["config.json"]) | {"n_inner": 65}
    counted = hf_pdecay.SparsityReport.load(small / "sparsity.json")
    assert [each.name for each in counted.tensors if each.decayed] == ["transformer.h.0.mlp.c_fc.weight"]
    assert {each.name: each.shape for each in counted.tensors}["transformer.h.0.mlp.c_fc.weight"] == (32, 65)
    before, after = (len(each["model.safetensors"]) for each in (old, new))
    assert f"bytes of weights: {before:,} → {after:,} ({after / before:.1%})" in out
    count = sum(each.numel() for each in weights(small).values())
    assert f"→ {count:,} (" in out and "config: n_inner 65" in out
    assert "cannot say that there are fewer heads" in out


def test_a_folder_appears_whole_or_not_at_all(sparse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("the disk is full")

    small = sparse.parent / "small"
    shrink_folder(sparse, small)
    before = files_of(sparse.parent)
    monkeypatch.setattr("hf_pdecay.shrink.folder.write_json", fail)
    for out in (small, sparse.parent / "new"):
        with pytest.raises(OSError, match="the disk is full"):
            shrink_folder(sparse, out, overwrite=True)
    assert files_of(sparse.parent) == before


def _bad_folders(folder: Path) -> Iterator[tuple[str, str]]:
    """Folders that cannot be shrunk, and what is said of them."""

    def save(name: str, model: Any, **config: Any) -> str:
        model.save_pretrained(folder / name)
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return str(folder / name)

    yield save("alive", build("llama")), "0 of its neurons and heads are dead"
    yield save("mixtral", build("mixtral")), r"MixtralForCausalLM is of an architecture.*coupling\.add"
    yield save("own", half_dead("gpt2")[0], architectures=["OwnModel"]), "names 'OwnModel' in architectures"
    yield save("os", half_dead("gpt2")[0], architectures=["logging"]), "names 'logging' in architectures"
    yield save("quantized", half_dead("gpt2")[0], quantization_config={"quant_method": "x"}), "quantization_config"
    yield (
        save("larger", half_dead("gpt2")[0], n_layer=3),
        "tells of 41,248 weights, and its files have 28,544",
    )
    yield save("forged", half_dead("gpt2")[0], n_inner=10**12), "tells of 130,000,000,011,904 weights"
    yield save("narrower", half_dead("llama")[0], intermediate_size=40), "cannot be loaded as a LlamaForCausalLM"
    yield save("wrong", half_dead("gpt2")[0], n_head=3), "must be divisible by num_heads"
    yield save("typed", half_dead("llama")[0], hidden_act="none such"), "none such"
    model = half_dead("gpt2")[0]
    model.transformer.h[1].mlp.c_fc.extra = nn.Parameter(torch.zeros(32, 128))
    del model.transformer.h[1].mlp.c_fc.weight
    yield save("renamed", model), "h.1.mlp.c_fc.weight is missing from its weights"
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text("{}")
    yield str(folder / "adapter"), "is an adapter; hf_pdecay.cut_ranks"
    (folder / "pickled").mkdir()
    (folder / "pickled/config.json").write_text("{}")
    (folder / "pickled/pytorch_model.bin").write_bytes(b"")
    yield str(folder / "pickled"), "a pickle, which could run code"


def test_what_cannot_be_shrunk_is_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for folder, sentence in _bad_folders(tmp_path):
        with pytest.raises(ValueError, match=sentence):
            shrink_folder(folder, out)
        assert main(["shrink", folder, str(out)]) == 2
        assert "hf-pdecay shrink: " in capsys.readouterr().err
    assert not out.exists()
    for words, sentence in (
        (["--layers", "some"], "layers='some'; it must be one of uniform, ragged"),
        (["--multiple-of", "0"], "multiple_of=0; it must be a whole number"),
    ):
        assert main(["shrink", str(tmp_path / "alive"), str(out), *words]) == 2
        assert sentence in capsys.readouterr().err
    with pytest.raises(ValueError, match="takes a model of transformers, not DataParallel"):
        shrink_model(nn.DataParallel(build("gpt2")))
    model: Any = build("gpt2")
    model.transformer.h[1].mlp.c_fc.weight.ds_tensor = torch.zeros(1)  # as DeepSpeed marks what it has divided
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight is divided among processes; save the model"):
        shrink_model(model)


GOOD = {"model.layers.0.mlp": {"neuron": 20}, "model.layers.1.self_attn": {"head": 1}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format_version": 2}, "format_version 2; this hf_pdecay reads 1"),
        ({"format_version": True}, "format_version True"),
        ({"code": "x.py"}, "has not exactly quant_method, format_version and layers"),
        ({"layers": {}}, "no object with an entry for each layer"),
        ({"layers": [1]}, "no object with an entry for each layer"),
        ({"layers": {"model.layers.0.mlp": {"neuron": 10**30}}}, "neurons for 'model.layers.0.mlp', which the rest"),
        ({"layers": {"model.layers.0.mlp": {"neuron": 49}}}, "has 49 neurons for 'model.layers.0.mlp'"),
        ({"layers": {"model.layers.0.mlp": {"neuron": 0}}}, "has 0 neurons"),
        ({"layers": {"model.layers.0.mlp": {"neuron": -1}}}, "has -1 neurons"),
        ({"layers": {"model.layers.0.mlp": {"neuron": 2.5}}}, "has 2.5 neurons"),
        ({"layers": {"model.layers.0.mlp": {"neuron": "20"}}}, "has '20' neurons"),
        ({"layers": {"model.layers.0.mlp": {"row": 20}}}, "where a number of neurons or heads is due"),
        ({"layers": {"model.layers.0.mlp": 20}}, "where a number of neurons or heads is due"),
        ({"layers": {"model.layers.9.mlp": {"neuron": 20}}}, "'model.layers.9.mlp', which LlamaForCausalLM has not"),
        ({"layers": {"../../etc": {"head": 1}}}, "'../../etc', which LlamaForCausalLM has not"),
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


def test_report_says_what_shrinking_would_give(tmp_path: Path) -> None:
    for name in ("llama", "bert"):
        model, _ = half_dead(name)
        folder = tmp_path / name
        model.save_pretrained(folder)
        found: Any = report(folder)
        left = [
            shrink_folder(folder, tmp_path / f"{name}-{layers}", layers=layers).parameters
            for layers in ("uniform", "ragged")
        ]
        whole = left[0][0]
        assert found.to_dict()["shrink"] == {
            "neurons": {"groups": 96, "dead": 47},
            "heads": {"groups": 4, "dead": 2},
            "parameters": whole,
            "uniform_parameters": left[0][1],
            "ragged_parameters": left[1][1],
        }
        assert str(found.shrunk) == (
            "47 of 96 neurons and 2 of 4 heads are dead: hf-pdecay shrink MODEL OUT leaves "
            f"{left[0][1] / whole:.1%} of the parameters, with --layers ragged {left[1][1] / whole:.1%}."
        )
    build("mixtral").save_pretrained(tmp_path / "mixtral")
    assert report(tmp_path / "mixtral").shrunk is None  # type: ignore[union-attr]
    build("gpt2").save_pretrained(tmp_path / "dense")
    assert str(report(tmp_path / "dense").shrunk) == ""  # type: ignore[union-attr]


# Loads a folder in a process in which hf_pdecay cannot be imported, and compares what it says to a file.
_ELSEWHERE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_pdecay":
            raise ModuleNotFoundError("hf_pdecay is not to be had")
sys.meta_path.insert(0, Blocked())
import torch, transformers
try:
    import hf_pdecay
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hf_pdecay is there")
saved = torch.load(sys.argv[2], weights_only=True)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
with torch.no_grad():
    logits = model(saved["ids"]).logits
assert torch.allclose(logits, saved["logits"], rtol=1e-5, atol=1e-5), (logits - saved["logits"]).abs().max()
assert "hf_pdecay" not in sys.modules
print(sum(param.numel() for param in model.parameters()))
"""


@pytest.mark.slow
def test_a_shrunk_llama_loads_where_hf_pdecay_is_not(tmp_path: Path) -> None:
    model, _ = half_dead("llama")
    model.float().save_pretrained(tmp_path / "sparse")
    model = loaded(tmp_path / "sparse", model)
    ids = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(0))
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "said.pt")
    for layers in ("uniform", "ragged"):
        words = ["shrink", str(tmp_path / "sparse"), str(tmp_path / layers), "--layers", layers]
        subprocess.run([sys.executable, "-m", "hf_pdecay", *words], check=True, capture_output=True)

    def elsewhere(folder: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-c", _ELSEWHERE, str(tmp_path / folder), str(tmp_path / "said.pt")]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    done = elsewhere("uniform")
    assert done.returncode == 0, done.stderr
    count = sum(each.numel() for each in weights(tmp_path / "uniform").values())
    assert int(done.stdout) == count < sum(each.numel() for each in weights(tmp_path / "sparse").values())
    # Ragged layers do not, and nothing else is loaded in their place.
    failed = elsewhere("ragged")
    assert failed.returncode != 0 and "mismatch" in failed.stderr and "hf_pdecay_shrunk" in failed.stderr


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks/shrink.py"
    words = ["--quick", "--rounds", "2", "--output", str(tmp_path)]
    subprocess.run([sys.executable, str(script), *words], check=True, capture_output=True)
    record = json.loads((tmp_path / "shrink_cpu_quick.json").read_text())
    assert len(record["rows"]) == 12 and not record["left_out"]
    assert record["command"] == "python benchmarks/shrink.py --quick --rounds 2"
    text = (tmp_path / "shrink_cpu_quick.md").read_text()
    assert "half of the neurons and heads" in text and str(tmp_path) not in text


def test_outgoing_parts_are_those_that_are_tried() -> None:
    assert {part for ways in WAYS.values() for part in ways[0]} == set(OUTGOING)
