"""Runs whose weights decay to their base: what is unchanged is counted from the files, by nothing of hf_pdecay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments, SparsityReport, decompress, write_delta
from hf_pdecay.cli.main import main
from hf_pdecay.deltas.report import is_delta
from hf_pdecay.deltas.writing import write_delta_within
from hf_pdecay.trainer import base_model

from ..helpers.models import build


ROWS = torch.randint(1, 60, (64, 16), generator=torch.Generator().manual_seed(0))
TEXT = [{"input_ids": row, "labels": row} for row in ROWS]
CLASSES = [{"input_ids": row, "labels": int(row[0]) % 3} for row in ROWS]


def _trainer(model: Any, out: Path, data: Any = TEXT, **options: Any) -> PDecayTrainer:
    settings = {"max_steps": 40, "learning_rate": 1e-3, "decay_to": "base", "target_sparsity": 0.95, **options}
    settings = {"save_strategy": "no", "logging_steps": 10, **settings}
    args = PDecayTrainingArguments(str(out), report_to="none", use_cpu=True, disable_tqdm=True, **settings)
    return PDecayTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)


def _run(model: Any, out: Path, data: Any = TEXT, **options: Any) -> PDecayTrainer:
    trainer = _trainer(model, out, data, **options)
    trainer.train()
    trainer.save_model()
    return trainer


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def _unchanged(base: Path, tuned: Path, part: str = "") -> tuple[int, int]:
    """Number of equal weights, of how many, in the tensors that both files have."""
    old, new = _tensors(base), _tensors(tuned)
    both = [name for name in new if part in name and name in old and old[name].shape == new[name].shape]
    return sum(int((old[name] == new[name]).sum()) for name in both), sum(new[name].numel() for name in both)


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    build("qwen3").save_pretrained(folder / "base")
    build("qwen3").to(torch.bfloat16).save_pretrained(folder / "bfloat16")
    build("bert").save_pretrained(folder / "bert")
    build("gpt2").transformer.save_pretrained(folder / "body")
    return folder


@pytest.fixture
def load(root: Path) -> Callable[..., Any]:
    return lambda name="base", **options: tf.AutoModelForCausalLM.from_pretrained(
        root / name, **{"dtype": "auto", **options}
    )


@pytest.mark.parametrize("name", ["base", "bfloat16", "body"])
def test_exactly_the_target_is_unchanged(root: Path, load: Any, tmp_path: Path, name: str) -> None:
    model = load(name)
    trainer = _run(model, tmp_path / "out", sparsity_logging="layer")
    old = _tensors(root / name)
    if name == "body":  # transformers saves the whole model under longer names
        old = {f"transformer.{key}": tensor for key, tensor in old.items()}
    new = _tensors(tmp_path / "out")
    assert old.keys() == new.keys() and all(old[key].dtype == new[key].dtype for key in new)
    total = sum(tensor.numel() for tensor in new.values())
    unchanged = {key: int((old[key] == new[key]).sum()) for key in new}
    assert sum(unchanged.values()) == round(0.95 * total)

    decompress(tmp_path / "out" / "delta", tmp_path / "plain")
    assert _same(_tensors(tmp_path / "plain"), new)
    report = SparsityReport.load(tmp_path / "out" / "sparsity.json")
    assert report.delta is not None and report.delta.of_changes and not report.decayed.tensors
    assert {tensor.name: tensor.zeros for tensor in report.delta.tensors} == unchanged
    assert all(tensor.decayed for tensor in report.delta.tensors)

    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["delta/overall"] == last["delta/model"] == sum(unchanged.values()) / total
    assert last[f"delta/layer/{key}"] == unchanged[key] / new[key].numel() if (key := min(new)) else False
    assert not any(key.startswith("sparsity/") for key in last)
    line = json.loads((tmp_path / "out" / "sparsity.jsonl").read_text().splitlines()[-1])
    assert line["delta"]["unchanged"] == last["delta/overall"] and line["delta"]["layers"].keys() == new.keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "95.00% of the weights that decay to the base" in card and "decay_to: base" in card
    assert "exactly zero" not in card and "- sparse\n" not in card and "value: 0.95" in card
    assert "Unchanged weights" in str(report) and "Exact zeros" not in str(report)
    assert json.loads((tmp_path / "out" / "delta" / "config.json").read_text())["model_type"] == model.config.model_type


def test_a_new_head_decays_to_zero_and_is_whole_in_the_delta(root: Path, tmp_path: Path) -> None:
    model = tf.AutoModelForSequenceClassification.from_pretrained(root / "bert", num_labels=3)
    new = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    trainer = _run(model, tmp_path / "out", CLASSES)
    same, total = _unchanged(root / "bert", tmp_path / "out")
    assert same == round(0.95 * total)
    report = SparsityReport.load(tmp_path / "out" / "sparsity.json")
    assert report.delta is not None
    assert {tensor.name for tensor in report.delta.tensors if not tensor.decayed} == new
    # Their matrices decay to zero; the logs have both.
    assert {tensor.name for tensor in report.tensors if tensor.decayed} == {key for key in new if "weight" in key}
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert {"delta/overall", "sparsity/overall"} <= last.keys() and last["delta/overall"] == same / total
    groups = {group["rule"]: group for group in trainer.optimizer.param_groups if group["decayed"]}
    assert groups["not in the base"]["decay_to"] == "zero" and groups["not in the base"]["target_sparsity"] == 0
    assert groups["default"]["decay_to"] == "base"
    decompress(tmp_path / "out" / "delta", tmp_path / "plain")
    assert _same(_tensors(tmp_path / "plain"), _tensors(tmp_path / "out"))
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


def test_rules_of_a_run(root: Path, load: Any, tmp_path: Path) -> None:
    rules = {
        "embed": "off",
        "layers.1.mlp": {"target_sparsity": 0.5},
        "layers.0.mlp": {"decay_to": "zero", "target_sparsity": 0.8},
    }
    _run(load(), tmp_path / "out", target_sparsity=None, lambda_p=0.0, lp_rules=rules)
    assert _unchanged(root / "base", tmp_path / "out", "embed")[0] < 100
    same, total = _unchanged(root / "base", tmp_path / "out", "layers.1.mlp")
    assert same == round(0.5 * total)
    zeros = [tensor for name, tensor in _tensors(tmp_path / "out").items() if "layers.0.mlp" in name]
    assert sum(int((tensor == 0).sum()) for tensor in zeros) == round(0.8 * sum(tensor.numel() for tensor in zeros))


def test_one_rule_decays_to_base_in_an_ordinary_run(root: Path, load: Any, tmp_path: Path) -> None:
    rules = {"layers.1": {"decay_to": "base", "target_sparsity": 0.9}}
    _run(load(), tmp_path / "out", target_sparsity=None, decay_to="zero", lp_rules=rules)
    same, total = _unchanged(root / "base", tmp_path / "out", "layers.1")
    assert same == round(0.9 * total)
    assert is_delta(tmp_path / "out" / "delta")


def test_neurons_that_stay_as_they_were(root: Path, load: Any, tmp_path: Path) -> None:
    rules = {"mlp": {"group": "neuron", "target_sparsity": 0.5}}
    trainer = _run(load(), tmp_path / "out", target_sparsity=None, lp_rules=rules)
    old, new = _tensors(root / "base"), _tensors(tmp_path / "out")
    count = 0
    for layer in ("model.layers.0.mlp.", "model.layers.1.mlp."):
        same = [old[f"{layer}{name}_proj.weight"] == new[f"{layer}{name}_proj.weight"] for name in ("gate", "up")]
        count += int(
            (torch.cat([*same, (old[f"{layer}down_proj.weight"] == new[f"{layer}down_proj.weight"]).T], 1)).all(1).sum()
        )
    assert count == 48  # half of two layers of 48
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["delta/neurons"] == 0.5 and "sparsity/neurons" not in last
    assert "neurons: 50.0% of 96 unchanged" in (tmp_path / "out" / "README.md").read_text()


def test_keep_zeros_holds_beside_it(root: Path, load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "proj" in name:
                param[torch.rand(param.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    model.save_pretrained(tmp_path / "sparse")
    sparse = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    trainer = _run(sparse, tmp_path / "out", keep_zeros=True)
    same, total = _unchanged(tmp_path / "sparse", tmp_path / "out")
    assert same == round(0.95 * total)
    old, new = _tensors(tmp_path / "sparse"), _tensors(tmp_path / "out")
    assert all(bool((new[name][old[name] == 0] == 0).all()) for name in new)
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["delta/overall"] == same / total and last["sparsity/overall"] > 0.2
    assert "beyond target_sparsity" not in caplog.text


def test_a_resumed_run_is_bit_identical(root: Path, load: Any, tmp_path: Path) -> None:
    # At the end of an epoch of 8 steps: within later ones transformers 4 takes other rows.
    saving = {"save_strategy": "steps", "save_steps": 8, "logging_steps": 4}
    _run(load(), tmp_path / "one", **saving)
    assert not any((tmp_path / "one").glob("checkpoint-*/delta"))
    for step in (8, 32):
        shutil.copytree(tmp_path / "one" / f"checkpoint-{step}", tmp_path / f"{step}" / f"checkpoint-{step}")
        trainer = _trainer(load(), tmp_path / f"{step}", **saving)
        trainer.train(resume_from_checkpoint=True)
        trainer.save_model()
        assert _same(_tensors(tmp_path / f"{step}"), _tensors(tmp_path / "one"))
        files = [tmp_path / run / "delta" / "model.safetensors" for run in (f"{step}", "one")]
        assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ValueError, match="of a run in which weights decay to their base, and here they decay to zero"):
        _trainer(load(), tmp_path / "two", decay_to="zero").train(
            resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-8")
        )
    _run(load(), tmp_path / "zero", decay_to="zero", **saving)
    with pytest.raises(ValueError, match="give decay_to='zero'"):
        _trainer(load(), tmp_path / "two").train(resume_from_checkpoint=str(tmp_path / "zero" / "checkpoint-8"))


def test_the_best_checkpoint_has_the_target(root: Path, load: Any, tmp_path: Path) -> None:
    evaluating = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}
    trainer = _run(load(), tmp_path / "out", save_strategy="steps", save_steps=5, **evaluating)
    assert trainer.state.best_global_step >= 30
    same, total = _unchanged(root / "base", tmp_path / "out")
    assert same == round(0.95 * total)


def test_a_second_train_goes_on_from_the_same_base(
    root: Path, load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = _run(load(), tmp_path / "out")
    first = _tensors(tmp_path / "out")
    assert "the base that they had" not in caplog.text
    trainer.train()
    trainer.save_model()
    assert "the base that they had in the train() before this one" in caplog.text
    same, total = _unchanged(root / "base", tmp_path / "out")
    assert same == round(0.95 * total) and not _same(first, _tensors(tmp_path / "out"))


def test_base_from_another_folder(root: Path, load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load()
    with torch.no_grad():
        for param in model.parameters():
            param += 0.02 * torch.randn(param.shape, generator=torch.Generator().manual_seed(2))
    model.save_pretrained(tmp_path / "start")
    saving = {"save_strategy": "steps", "save_steps": 16}
    options = {"base_from": str(root / "base"), **saving}
    _run(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "start"), tmp_path / "out", **options)
    same, total = _unchanged(root / "base", tmp_path / "out")
    assert same == round(0.95 * total)
    decompress(tmp_path / "out" / "delta", tmp_path / "plain", base=root / "base")
    assert _same(_tensors(tmp_path / "plain"), _tensors(tmp_path / "out"))
    trainer = _trainer(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "start"), tmp_path / "again", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-16"))
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert _same(_tensors(tmp_path / "elsewhere"), _tensors(tmp_path / "out"))
    assert is_delta(tmp_path / "elsewhere" / "delta") and "did not start from" not in caplog.text


def test_tied_and_renamed_weights_of_base_from(root: Path, tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(root / "body")
    with torch.no_grad():
        for param in model.parameters():
            param += 0.02
    _run(model, tmp_path / "out", base_from=str(root / "body"))
    old, new = _tensors(root / "body"), _tensors(tmp_path / "out")
    same = sum(int((old[name.removeprefix("transformer.")] == tensor).sum()) for name, tensor in new.items())
    assert same == round(0.95 * sum(tensor.numel() for tensor in new.values()))


def test_a_base_that_does_not_fit_is_refused(root: Path, load: Any, tmp_path: Path) -> None:
    config = load().config
    config.hidden_size, config.head_dim = 64, 16
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    (tmp_path / "quantised").mkdir()
    shutil.copytree(root / "base", tmp_path / "quantised", dirs_exist_ok=True)
    (tmp_path / "quantised" / "config.json").write_text(
        json.dumps(config.to_dict() | {"quantization_config": {"quant_method": "gptq"}})
    )
    for folder, message in (
        (root / "bfloat16", r"in bfloat16, and the model in float32; load the model with dtype=torch.bfloat16"),
        (tmp_path / "wide", r"is the base of another model: it has no model.embed_tokens.weight of shape \[64, 32\]"),
        (root / "bert", "is the base of another model"),
        (tmp_path / "quantised", "quantised by 'gptq'"),
        (tmp_path / "nowhere", "cannot be read as a model in safetensors"),
    ):
        with pytest.raises(ValueError, match=f"(?s)Invalid base_from: base_from='{folder}'.*{message}"):
            _trainer(load(), tmp_path / "out", base_from=str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 4}, "Invalid weight_bits: weight_bits=4 with decay_to='base'"),
        ({"lp_rules": {"mlp": {"activation_bits": 8}}}, "Invalid activation_bits: activation_bits=8 with decay_to"),
        ({"one_shot": "wanda"}, "Invalid one_shot: one_shot='wanda' with decay_to='base'"),
        ({"optim": "schedule_free_adamw_lp"}, "Invalid optim: optim='schedule_free_adamw_lp' with decay_to='base'"),
        ({"decay_to": "zero", "base_from": "x"}, "Invalid base_from: base_from='x' without decay_to='base'"),
        ({"decay_to": "nothing"}, "Invalid decay_to: decay_to='nothing'; it must be one of zero, base"),
        ({"base_from": ""}, "Invalid base_from: base_from=''"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PDecayTrainingArguments(str(tmp_path), use_cpu=True, **{"decay_to": "base", **options})


def test_adapters_and_quantised_models_are_refused(load: Any, tmp_path: Path) -> None:
    """Their marks by PEFT and transformers, whose own checks come first where they can."""
    for mark, message in (("peft_config", "with an adapter"), ("hf_quantizer", "with a quantised Qwen3ForCausalLM")):
        trainer = _trainer(load(), tmp_path)
        setattr(trainer.model, mark, {"default": None})
        with pytest.raises(ValueError, match=f"Invalid decay_to: decay_to='base' {message}"):
            trainer._find_base()


def test_nothing_is_pruned_at_once(load: Any, tmp_path: Path) -> None:
    trainer = _trainer(load(), tmp_path)
    assert trainer._control_callback is not None and trainer._control_callback.one_shot == "off"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("config", "the model was made from a config"),
        ("dtype", "it is trained in float32, and its base"),
        ("overwritten", "the model was saved into the folder of its base"),
        ("gone", "is not on this machine"),
        ("pickle", "the base cannot be read"),
    ],
)
def test_why_there_is_no_delta(
    root: Path, load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, said: str
) -> None:
    shutil.copytree(root / ("bfloat16" if how == "dtype" else "base"), tmp_path / "base")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    if how == "config":
        model = build("qwen3")
    if how == "gone":
        shutil.rmtree(tmp_path / "base")
    if how == "pickle":
        (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    build("qwen3").save_pretrained(tmp_path / "start")
    out = tmp_path / ("base" if how == "overwritten" else "out")
    # A delta of a run before this one.
    shutil.copytree(root / "base", out, dirs_exist_ok=True)
    write_delta(root / "base", root / "base", out / "delta")
    _run(model, out)
    assert said in caplog.text and "No delta was written" in caplog.text and not (out / "delta").exists()
    if how in ("config", "gone"):  # all weights decay to the base
        same, total = _unchanged(tmp_path / "start", out)
        assert same == round(0.95 * total)


def test_a_run_from_other_weights_than_those_of_its_folder(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.from_pretrained(root / "base"))
    _run(model, tmp_path / "out")
    assert "it did not start from the weights in" in caplog.text
    decompress(tmp_path / "out" / "delta", tmp_path / "plain")
    assert _same(_tensors(tmp_path / "plain"), _tensors(tmp_path / "out"))


def test_a_base_in_the_cache_of_the_hub(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub

    revision = "a" * 40
    cached = tmp_path / "models--me--base"
    shutil.copytree(root / "base", cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = tf.AutoModelForCausalLM.from_pretrained("me/base", cache_dir=str(tmp_path), local_files_only=True)
    _run(model, tmp_path / "out")
    assert f"me/base (revision {revision})" in caplog.text
    header = (tmp_path / "out" / "delta" / "model.safetensors").read_bytes()[:20000]
    assert f'\\"name\\":\\"me/base\\",\\"revision\\":\\"{revision}\\"'.encode() in header


def test_push_to_hub_takes_the_delta_along(
    root: Path, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.trainer as module

    uploads: list[set[str]] = []

    def upload_folder(folder_path: str, **kwargs: Any) -> None:
        files = [file for file in Path(folder_path).rglob("*") if file.is_file()]
        uploads.append({str(file.relative_to(folder_path)) for file in files})

    def create_repo(*args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id="me/tuned")

    if hasattr(module, "hf_api"):
        api = SimpleNamespace(upload_folder=upload_folder, create_repo=create_repo)
        monkeypatch.setattr(module, "hf_api", lambda: api)
    else:  # transformers 4
        monkeypatch.setattr(module, "upload_folder", upload_folder)
        monkeypatch.setattr(module, "create_repo", create_repo)
    trainer = _trainer(load(), tmp_path / "out", push_to_hub=True, hub_strategy="end", hub_token="hf_of_a_test")
    trainer.train()
    written: list[Any] = []
    monkeypatch.setattr(base_model, "write_delta_within", _counting(write_delta_within, written))
    trainer.save_model()
    assert {"delta/model.safetensors", "delta/config.json", "README.md"} <= uploads[-1]
    assert len(written) == 1 and not any(name.startswith("delta/checkpoint") for name in uploads[-1])
    assert "delta/training_args.bin" not in uploads[-1]


def _counting(function: Any, calls: list[Any]) -> Any:
    def counted(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    return counted


def test_a_search_counts_unchanged_weights(root: Path, load: Any, tmp_path: Path) -> None:
    trainer = _trainer(load(), tmp_path)
    trainer.train()
    assert trainer.measure_sparsity().main.sparsity == pytest.approx(0.95, abs=1e-4)


def test_preview(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["preview", str(root / "base"), "--decay_to", "base", "--target_sparsity", "0.95"]
    assert main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    total = shown["parameters"]
    assert shown["unchanged"] == {"element": {"unchanged": round(0.95 * total), "of": total}} and shown["zeros"] == {}
    assert shown["one_shot"]["method"] == "off"
    assert main(words) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Unchanged in the end" in text and "for 0.95 unchanged" in text
    (tmp_path / "config.json").write_text((root / "base" / "config.json").read_text())
    assert main(["preview", str(tmp_path), *words[2:]]) == 0
    assert "no delta is written" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("optim", ["sgd_lp", "muon_lp", "adafactor_lp"])
def test_other_optimizers(root: Path, load: Any, tmp_path: Path, optim: str) -> None:
    rate = {"sgd_lp": 0.1}.get(optim, 1e-3)
    _run(load(), tmp_path / "out", optim=optim, learning_rate=rate)
    same, total = _unchanged(root / "base", tmp_path / "out")
    assert same == round(0.95 * total)
