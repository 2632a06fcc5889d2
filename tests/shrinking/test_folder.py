"""Shrinking folders: `hf-pdecay shrink`, what it writes and where that loads, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

import hf_pdecay
from hf_pdecay.cli.main import main
from hf_pdecay.cli.report import report
from hf_pdecay.shrinking.folder import shrink_folder
from hf_pdecay.shrinking.model import shrink_model

from ..helpers.models import build
from ..helpers.storage_models import files_of, same_state, weights
from ..helpers.warm import python
from .test_model import half_dead, loaded


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
    assert "cannot express fewer heads" in out


def test_a_card_says_that_its_counts_are_of_the_model_before(sparse: Path) -> None:
    template = (Path(hf_pdecay.__file__).parent / "sparsity/model_card.md.jinja").read_text(encoding="utf-8")
    heading = template.partition("\n")[0]
    (sparse / "README.md").write_text(f"---\ntags: []\n---\n# x\n\n{heading}\n\nTrained.\n", encoding="utf-8")
    small = sparse.parent / "small"
    assert main(["shrink", str(sparse), str(small)]) == 0
    card = (small / "README.md").read_text(encoding="utf-8")
    before, after = (sum(each.numel() for each in weights(folder).values()) for folder in (sparse, small))
    said = card.partition(heading)[2].partition("Trained.")[0]
    assert f"{after:,} of {before:,} parameters" in said and "sparsity.json" in said


@pytest.mark.parametrize("counted", [True, False])
def test_the_header_of_a_card_has_the_sparsity_of_the_smaller_model(counted: bool, sparse: Path) -> None:
    old = hf_pdecay.SparsityReport.load(sparse / "sparsity.json").sparsity
    results = [
        EvalResult("other", "unknown", "a set", metric_type=kind, metric_value=value)
        for kind, value in (("loss", 2.5), ("sparsity", old))
    ]
    data = ModelCardData(license="mit", model_name="A model", eval_results=results)
    (sparse / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n# Größe\n\n## Sparsity\n\nx\n", encoding="utf-8")
    if not counted:
        (sparse / "sparsity.json").unlink()
    small = sparse.parent / "small"
    shrink_folder(sparse, small)
    card = ModelCard.load(small / "README.md")
    found = {each.metric_type: each.metric_value for each in card.data.eval_results}
    own = {"sparsity": hf_pdecay.SparsityReport.load(small / "sparsity.json").sparsity} if counted else {}
    assert found == {"loss": 2.5, **own} and own.get("sparsity") != old
    assert card.data.license == "mit" and "# Größe" in card.text and "parameters are left" in card.text


def test_a_folder_appears_whole_or_not_at_all(sparse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("the disk is full")

    small = sparse.parent / "small"
    shrink_folder(sparse, small)
    before = files_of(sparse.parent)
    monkeypatch.setattr("hf_pdecay.shrinking.folder.write_json", fail)
    for out in (small, sparse.parent / "new"):
        with pytest.raises(OSError, match="the disk is full"):
            shrink_folder(sparse, out, overwrite=True)
    assert files_of(sparse.parent) == before


_NOT_LOADED = "cannot be loaded as a LlamaForCausalLM"
# transformers 4 divides by the number of heads when the model is built, before any weight is loaded.
_NO_HEADS = "No model can be built from the config" if transformers.__version__.startswith("4.") else _NOT_LOADED


def _bad_folders(folder: Path) -> Iterator[tuple[str, str]]:
    """Folders that cannot be shrunk, and what is said of them."""

    def save(name: str, model: Any, **config: Any) -> str:
        model.save_pretrained(folder / name)
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return str(folder / name)

    yield save("alive", build("llama")), "0 of its neurons and heads are dead"
    yield save("mixtral", build("mixtral")), "Mixtral.* (cannot be removed|lie.*add_architecture)"
    yield save("own", half_dead("gpt2")[0], architectures=["OwnModel"]), "names .*OwnModel"
    yield save("os", half_dead("gpt2")[0], architectures=["logging"]), "names .*logging"
    yield save("quantized", half_dead("gpt2")[0], quantization_config={"quant_method": "x"}), "quantization_config"
    yield (
        save("larger", half_dead("gpt2")[0], n_layer=3),
        "describes 41,248 weights, and its files have 28,544",
    )
    yield save("forged", half_dead("gpt2")[0], n_inner=10**12), "describes 130,000,000,011,904 weights"
    yield save("deep", half_dead("gpt2")[0], n_layer=10**9), "many more tensors than the 28 that its files have"
    yield (
        save("base", half_dead("gpt2")[0], architectures=["PreTrainedModel"]),
        "names .*PreTrainedModel",
    )
    yield save("headless", half_dead("llama")[0], num_attention_heads=0), _NO_HEADS
    yield save("narrower", half_dead("llama")[0], intermediate_size=40), _NOT_LOADED
    yield save("wrong", half_dead("gpt2")[0], n_head=3), "must be divisible by num_heads"
    yield save("typed", half_dead("llama")[0], hidden_act="none such"), "none such"
    model = half_dead("gpt2")[0]
    model.transformer.h[1].mlp.c_fc.extra = nn.Parameter(torch.zeros(32, 128))
    del model.transformer.h[1].mlp.c_fc.weight
    yield save("renamed", model), "h.1.mlp.c_fc.weight is missing from its weights"
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text("{}")
    yield str(folder / "adapter"), "is an adapter of the type None; only ranks of LoRA on layers can be removed"
    (folder / "pickled").mkdir()
    (folder / "pickled/config.json").write_text("{}")
    (folder / "pickled/pytorch_model.bin").write_bytes(b"")
    yield str(folder / "pickled"), "a pickle, which could run code"


def test_weights_that_the_config_knows_nothing_of_are_named(tmp_path: Path) -> None:
    half_dead("gpt2")[0].save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"n_layer": 1}))
    found = shrink_folder(tmp_path / "model", tmp_path / "small", layers="ragged")
    expected = r"1[12] tensors of the files were left out, as GPT2LMHeadModel .*: transformer\.h\.1\..* and others\."
    assert any(re.fullmatch(expected, note) for note in found.notes)


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
            "neurons": {"units": 96, "dead": 47},
            "heads": {"units": 4, "dead": 2},
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
        python("-m", "hf_pdecay", *words).check_returncode()

    def elsewhere(folder: str) -> subprocess.CompletedProcess[str]:
        return python("-c", _ELSEWHERE, tmp_path / folder, tmp_path / "said.pt", cwd=tmp_path)

    done = elsewhere("uniform")
    assert done.returncode == 0, done.stderr
    count = sum(each.numel() for each in weights(tmp_path / "uniform").values())
    assert int(done.stdout) == count < sum(each.numel() for each in weights(tmp_path / "sparse").values())
    # Ragged layers do not, and nothing else is loaded in their place.
    failed = elsewhere("ragged")
    assert failed.returncode != 0 and "has no `quant_method`" in failed.stderr


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks/shrink.py"
    words = ["--quick", "--rounds", "2", "--output", str(tmp_path)]
    python(script, *words).check_returncode()
    record = json.loads((tmp_path / "shrink_cpu_quick.json").read_text())
    assert len(record["rows"]) == 12 and not record["left_out"]
    assert record["command"] == "python benchmarks/shrink.py --quick --rounds 2"
    text = (tmp_path / "shrink_cpu_quick.md").read_text()
    assert "half of the neurons and heads" in text and str(tmp_path) not in text


def test_a_ragged_model_is_compressed(tmp_path: Path) -> None:
    """Its config stays, and the compressed folder loads as the plain one; neither folder is shrunk once more."""
    model, _ = half_dead("gpt2")
    model.transformer.wpe.weight.data[:, ::2] = 0
    model.save_pretrained(tmp_path / "plain")
    shrink_folder(tmp_path / "plain", tmp_path / "ragged", layers="ragged")
    hf_pdecay.compress(tmp_path / "ragged", tmp_path / "small")
    expected, found = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("ragged", "small")
    )
    assert same_state(found, expected)
    hf_pdecay.decompress(tmp_path / "small", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "ragged")
    for name, reason in (("ragged", "shrunk layer by layer already"), ("small", "are compressed already")):
        with pytest.raises(ValueError, match=reason):
            shrink_folder(tmp_path / name, tmp_path / "out")
    result = report(tmp_path / "ragged")
    assert result.compressed < result.stored
