"""`hf-pdecay shrink` of a LoRA adapter: its files alone, loaded by plain PEFT onto the base."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


peft = pytest.importorskip("peft")

from hf_pdecay import measure_sparsity, rank_sparsity, shrink_ranks  # noqa: E402
from hf_pdecay.cli.folder_report import FolderReport  # noqa: E402
from hf_pdecay.cli.main import main  # noqa: E402
from hf_pdecay.cli.report import report  # noqa: E402
from hf_pdecay.shrinking.folder import shrink_folder  # noqa: E402
from hf_pdecay.sparsity.report import SparsityReport  # noqa: E402

from ..helpers.adapter_models import fill, kill, logits, lora  # noqa: E402
from ..helpers.models import build, tiny_gpt2  # noqa: E402


pytestmark = pytest.mark.usefixtures("lora_beside_torchao")


def saved(folder: Path, **settings: Any) -> tuple[Any, dict[str, int]]:
    """An adapter of a tiny Llama with dead ranks, saved; it, and the ranks that are alive by layer."""
    model = fill(lora(build("llama"), **settings))
    left = kill(model)
    model.save_pretrained(folder)
    return model, left


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_alpha": 12},
        {"use_dora": True},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 3}, "exclude_modules": ["up_proj"]},
        {"rank_pattern": {".*q_proj": 6, "(k|v)_proj": 3}, "alpha_pattern": {"v_proj": 3}},
        {"init_lora_weights": "orthogonal"},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "rslora", "dora", "biases", "patterns", "expressions", "even", "embedding", "head"],
)
def test_plain_peft_loads_it_and_it_computes_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    model, left = saved(tmp_path / "adapter", **settings)
    found = shrink_folder(tmp_path / "adapter", tmp_path / "small")
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "small")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    keeps_one = bool(settings.get("use_dora") or settings.get("lora_bias"))
    expected = {name: max(rank, int(keeps_one)) for name, rank in left.items() if rank or keeps_one}
    assert {each.name: each.ranks for each in rank_sparsity(loaded).layers} == expected
    # As the loaded adapter is cut.
    shrink_ranks(model).save_pretrained(tmp_path / "cut")
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "cut")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    by_files, in_memory = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("small", "cut"))
    assert by_files.keys() == in_memory.keys()
    assert all(torch.equal(tensor, in_memory[name]) for name, tensor in by_files.items())
    assert {each.name: each.kept for each in found.layers} == {n: expected.get(n, 0) for n in left}
    assert {each.name: each.units - each.dead for each in found.layers} == left
    assert found.parameters[1] == sum(tensor.numel() for tensor in by_files.values()) < found.parameters[0]


@pytest.mark.parametrize("by", ["files", "memory"])
def test_an_adapter_may_be_cut_again(by: str, tmp_path: Path) -> None:
    """The config of a cut adapter names its layers already."""
    saved(tmp_path / "adapter", rank_pattern={".*q_proj": 6})
    shrink_folder(tmp_path / "adapter", tmp_path / "small")
    model = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "small")
    left = kill(model)
    before = logits(model)
    if by == "files":
        model.save_pretrained(tmp_path / "trained")
        shrink_folder(tmp_path / "trained", tmp_path / "smaller")
    else:
        shrink_ranks(model).save_pretrained(tmp_path / "smaller")
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "smaller")
    torch.testing.assert_close(logits(loaded), before, rtol=1e-5, atol=1e-6)
    assert {each.name: each.ranks for each in rank_sparsity(loaded).layers} == {n: r for n, r in left.items() if r}


def test_layers_that_are_not_cut_keep_their_pattern(tmp_path: Path) -> None:
    """As the layer of a lone factor, beside which an earlier cut has named others."""
    adapter, name = tmp_path / "adapter", "model.layers.0.self_attn.q_proj"
    saved(adapter, target_modules=["q_proj", "v_proj"], rank_pattern={f"^{name}".replace(".", r"\."): 4, "v_proj": 4})
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    found = {each.name: each.kept for each in shrink_folder(adapter, tmp_path / "small").layers}
    patterns = json.loads((tmp_path / "small" / "adapter_config.json").read_text())["rank_pattern"]
    assert patterns[f"^{name}".replace(".", r"\.")] == found[name] < 4
    assert list(patterns)[-1] == "v_proj" and patterns["v_proj"] == 4


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_began_with_a_part_of_the_base(start: str, tmp_path: Path) -> None:
    """PEFT subtracts from the base what so many ranks began with, each time it loads the adapter."""
    model, _ = saved(tmp_path / "adapter", init_lora_weights=start)
    before = logits(model)
    with pytest.raises(ValueError, match=f"adapter': the adapter has init_lora_weights='{start}'. When PEFT loads"):
        shrink_folder(tmp_path / "adapter", tmp_path / "small")
    with pytest.raises(ValueError, match=f"shrink_ranks: the adapter has init_lora_weights='{start}'. When PEFT loads"):
        shrink_ranks(model)
    # What the sentence says to do.
    model.peft_config["default"].init_lora_weights = True
    shrink_ranks(model).save_pretrained(tmp_path / "cut")
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    base = model.unload()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "cut")
    torch.testing.assert_close(logits(loaded), before, rtol=1e-5, atol=1e-6)


def test_what_else_is_there_comes_along(tmp_path: Path) -> None:
    adapter, small = tmp_path / "adapter", tmp_path / "small"
    saved(adapter, lora_dropout=0.25)
    (adapter / "tokenizer_config.json").write_text("{}")
    (adapter / "adapter_model.bin").write_bytes(b"")
    found = shrink_folder(adapter, small)
    before, after = (json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, small))
    changed = {key for key in before if before[key] != after[key]}
    assert before.keys() == after.keys()
    assert changed <= {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "exclude_modules"}
    assert (small / "tokenizer_config.json").read_text() == "{}"
    assert found.left_out == ["adapter_model.bin"]
    assert not (small / "adapter_model.bin").exists()
    with safe_open(small / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    shrunk = report(small)
    assert isinstance(shrunk, FolderReport)
    assert sum(dead for _, dead in shrunk.ranks.values()) == 0
    with pytest.raises(ValueError, match="Nothing of .*small' can be removed: none of its .* ranks is dead"):
        shrink_folder(small, tmp_path / "again")
    with pytest.raises(ValueError, match="is there and not empty"):
        shrink_folder(adapter, small)
    shrink_folder(adapter, small, overwrite=True)


def test_what_a_run_has_left_is_counted_anew(tmp_path: Path) -> None:
    """The report of a run has the base model's tensors too, and names of weights with the adapter's in them."""
    adapter, small = tmp_path / "adapter", tmp_path / "small"
    model, _ = saved(adapter)
    decayed = [name for name, _ in model.named_parameters() if "lora_" in name]
    measure_sparsity(model, decayed=decayed).save(adapter / "sparsity.json")
    (adapter / "README.md").write_text("# An adapter\n\n## Sparsity\n\nSo many zeros.\n")
    shrink_folder(adapter, small)
    counted = SparsityReport.load(small / "sparsity.json")
    tensors = load_file(small / "adapter_model.safetensors")
    assert {each.name: (each.zeros, each.parameters) for each in counted.tensors} == {
        name: (int((tensor == 0).sum()), tensor.numel()) for name, tensor in tensors.items()
    }
    assert all(each.decayed for each in counted.tensors)
    card = (small / "README.md").read_text()
    assert "`hf-pdecay shrink` has removed dead ranks from the adapter" in card and "So many zeros." in card


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    _, left = saved(tmp_path / "adapter")
    assert main(["report", str(tmp_path / "adapter")]) == 0
    assert f"hf-pdecay shrink {tmp_path / 'adapter'} OUT removes them." in capsys.readouterr().out.replace("\n", "")
    assert main(["shrink", str(tmp_path / "adapter"), str(tmp_path / "small")]) == 0
    printed = capsys.readouterr().out
    assert "Ranks" in printed
    rows = [line.replace("│", " ").split() for line in printed.splitlines() if "│ ranks" in line]
    assert {row[0]: int(row[-1]) for row in rows} == left
    assert "1 layers without ranks have no adapter any more." in printed
    assert main(["shrink", str(tmp_path / "adapter"), str(tmp_path / "more"), "--multiple-of", "2"]) == 2
    assert "multiple_of=2 for an adapter; it is about neurons" in capsys.readouterr().err


def test_what_cannot_be_cut_is_said_in_a_sentence(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    saved(adapter)
    weights, settings = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    whole, config = weights.read_bytes(), json.loads(settings.read_text())

    def refused(sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            shrink_folder(adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    for change, sentence in (
        ({"peft_type": "IA3"}, "of the type 'IA3'; only ranks of LoRA"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "'LORA' on fused parameters"),
        ({"lora_alpha": "16"}, "a lora_alpha of '16', not a number"),
        ({"lora_alpha": 10**400}, "a lora_alpha of 1000.*, not a number"),
        ({"lora_alpha": float("nan")}, "a lora_alpha of nan, not a number"),
        ({"exclude_modules": 5}, "has exclude_modules=.*; it must be a list of names or a regular expression"),
        (
            {"exclude_modules": ["lm_head", 5]},
            "has exclude_modules=.*; it must be a list of names or a regular expression",
        ),
        ({"exclude_modules": "("}, "has exclude_modules=.*; it must be a list of names or a regular expression"),
        ({"alpha_pattern": {"(": 4}}, "has alpha_pattern=.*; it must be an object of numbers"),
        ({"rank_pattern": [4]}, "has rank_pattern=.*; it must be an object of numbers"),
        ({"rank_pattern": {"q_proj": "4"}}, "has rank_pattern=.*; it must be an object of numbers"),
    ):
        settings.write_text(json.dumps(config | change))
        refused(sentence)
    settings.write_text("[]")
    refused("does not hold a JSON object")
    settings.write_text(json.dumps(config))
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}, weights)
    refused("can be removed: its adapter_model.safetensors has no layer with both A and B")
    weights.write_bytes(whole[:-100])
    refused("adapter_model.safetensors")
    weights.write_bytes(struct.pack("<Q", 2**62) + whole[8:])
    refused("adapter_model.safetensors")
    weights.unlink()
    refused("has no adapter_model.safetensors; save the adapter as safetensors")
    (tmp_path / "elsewhere").write_bytes(whole)
    weights.symlink_to(tmp_path / "elsewhere")
    refused("a link that leads out of the folder")
    weights.unlink()
    lora(tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True).save_pretrained(adapter)
    refused("would be left: all of its 8 ranks are dead, as they are before training")


def test_a_rank_that_is_not_finite_or_tiny_is_alive(tmp_path: Path) -> None:
    """Squares of 1e-30 are 0 in float32."""
    adapter = tmp_path / "adapter"
    model, _ = saved(adapter, target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    a = next(tensor for name, tensor in tensors.items() if "layers.1" in name and "lora_A" in name)
    b = next(tensor for name, tensor in tensors.items() if "layers.1" in name and "lora_B" in name)
    a[:], b[:] = 0, 0
    a[1], b[:, 1] = 1e-30, 1e-30
    a[2], b[:, 2] = float("nan"), 1
    save_file(tensors, adapter / "adapter_model.safetensors")
    found = {each.name: each.dead for each in shrink_folder(adapter, tmp_path / "small").layers}
    assert found["model.layers.1.self_attn.q_proj"] == 2
    loaded = peft.PeftModel.from_pretrained(build("llama"), adapter)
    counted = {each.name: each.dead for each in rank_sparsity(loaded).layers}
    assert counted == found
