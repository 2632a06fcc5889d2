"""`hf-pdecay prune`: the folder that it writes, what it prints and refuses, and training that goes on from it."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import hf_pdecay
from hf_pdecay import calibration_rows, prune_folder
from hf_pdecay.cli.main import main
from hf_pdecay.one_shot.calibration import read_texts

from ..helpers.local_files import bert, llama, sentences, tokenizer
from ..helpers.storage_models import files_of, weights
from ..helpers.warm import python


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(400)))
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


def zeros_in(folder: Path) -> int:
    return sum(int((tensor == 0).sum()) for name, tensor in weights(folder).items() if ".layers." in name)


WEIGHTS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)


@pytest.mark.slow
def test_the_command_as_a_process(model: Path, data: Path) -> None:
    out = model.parent / "pruned"
    given = ["--sparsity", "0.5", "--data", data, "--rows", "32"]
    done = python("-m", "hf_pdecay", "prune", model, out, *given, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert f"{WEIGHTS:,}" in done.stdout and f"{WEIGHTS // 2:,}" in done.stdout and "50.00%" in done.stdout
    assert "model.layers.0" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    assert zeros_in(out) == WEIGHTS // 2
    plain = "import transformers as tf, sys; tf.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    assert python("-c", plain, out).returncode == 0
    # Training that keeps the zeros.
    code = """
import sys, torch, hf_pdecay, transformers as tf
folder, out = sys.argv[1:]
model = tf.AutoModelForCausalLM.from_pretrained(folder)
rows = [{"input_ids": row, "labels": row} for row in torch.randint(1, 20, (64, 16))]
options = {"max_steps": 5, "keep_zeros": True, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True}
args = hf_pdecay.PDecayTrainingArguments(out, **options)
hf_pdecay.PDecayTrainer(model=model, args=args, train_dataset=rows).train()
model.save_pretrained(out)
"""
    trained = model.parent / "trained"
    done = python("-c", code, out, trained)
    assert done.returncode == 0, done.stderr
    before, after = weights(out), weights(trained)
    for name, tensor in before.items():
        if ".layers." in name and tensor.dim() == 2:
            assert bool((after[name][tensor == 0] == 0).all()) and not torch.equal(after[name], tensor)


def test_the_folder_has_what_lay_beside_the_weights(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "README.md").write_text("---\ntags: []\n---\n# A model\n")
    (model / "pytorch_model.bin").write_bytes(b"")
    config = json.loads((model / "config.json").read_text()) | {"my_key": 1}
    (model / "config.json").write_text(json.dumps(config))
    out = model.parent / "pruned"
    words = ["prune", str(model), str(out), "--sparsity", "0.6", "--data", str(data), "--json", "--rows", "32"]
    words += ["--method", "wanda"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["zeros"], result["weights"], result["rows"]) == (round(0.6 * WEIGHTS), WEIGHTS, [32, 64])
    assert result["left_out"] == ["pytorch_model.bin"] and len(result["blocks"]) == 2
    old, new = files_of(model), files_of(out)
    assert new.keys() == (old.keys() - {"pytorch_model.bin"}) | {"sparsity.json"}
    changed = {"model.safetensors", "README.md", "config.json"}
    assert {name for name in old.keys() & new.keys() if old[name] != new[name]} <= changed
    assert json.loads(new["config.json"]) == config
    assert hf_pdecay.SparsityReport.load(out / "sparsity.json").decayed.zeros == result["zeros"]
    assert "set 60.00% of" in new["README.md"].decode() and "## Sparsity" in new["README.md"].decode()
    assert zeros_in(out) == result["zeros"]
    again = model.parent / "again"
    assert main([*words[:2], str(again), *words[3:]]) == 0
    other = model.parent / "other"
    assert main([*words[:2], str(other), *words[3:], "--seed", "1"]) == 0
    same, seeded = weights(again), weights(other)
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights(out).items())
    assert not all(torch.equal(tensor, seeded[name]) for name, tensor in weights(out).items())


def test_other_folders(model: Path, data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"sparsity": 0.5, "rows": 8}
    hf_pdecay.compress(model, tmp_path / "compressed")
    prune_folder(model, tmp_path / "a", data, **options)
    prune_folder(tmp_path / "compressed", tmp_path / "b", data, **options)
    mine, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    prune_folder(model, tmp_path / "half", data, **options, dtype="bfloat16")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert loaded.dtype == torch.bfloat16 and zeros_in(tmp_path / "half") == WEIGHTS // 2
    report = prune_folder(bert(tmp_path / "bert"), tmp_path / "c", data, pattern="2:4", rows=8)
    assert report.sparsity == 0.5 and list(report.dense) == ["pooler.dense.weight"]
    # Layers of different sizes, as `hf-pdecay shrink --layers ragged` writes them.
    dead: Any = tf.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        dead.model.layers[0].mlp.down_proj.weight[:, 20:] = 0
    dead.save_pretrained(tmp_path / "dead")
    tokenizer().save_pretrained(tmp_path / "dead")
    hf_pdecay.shrink_folder(tmp_path / "dead", tmp_path / "ragged", layers="ragged")
    report = prune_folder(tmp_path / "ragged", tmp_path / "d", data, **options)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    assert loaded.model.layers[0].mlp.down_proj.weight.shape == (32, 20)
    assert report.zeros == round(report.weights / 2) == zeros_in(tmp_path / "d")


def test_what_is_wrong_is_said_in_a_sentence(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model.parent
    (folder / "empty.txt").write_text("\n")
    (folder / "bad.jsonl").write_text('{"text": "a"}\nno\n')
    (folder / "numbers.jsonl").write_text('{"a": 1}\n')
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"a small boat" * 99)[:-12])
    (folder / "data.csv").write_text("a")
    for name, changed in (("quantized", {"quantization_config": {"quant_method": "gptq"}}), ("bare", {})):
        shutil.copytree(model, folder / name)
        config = json.loads((model / "config.json").read_text()) | changed
        (folder / name / "config.json").write_text(json.dumps(config))
    for file in (folder / "bare").glob("tokenizer*"):
        file.unlink()
    tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32, decoder_start_token_id=0)
    ).save_pretrained(folder / "t5")
    good = {"model": str(model), "--sparsity": "0.5", "--data": str(data)}
    cases: list[tuple[dict[str, str], str]] = [
        ({"--sparsity": "90"}, "sparsity=90.0; it must be above 0 and below 1. Was 0.9 meant?"),
        ({"--method": "obs"}, "method='obs'; it must be one of fisher, sparsegpt, wanda, magnitude"),
        ({"--dtype": "int8"}, "dtype='int8'"),
        ({"--device": "cuda:99"}, "device='cuda:99'"),
        ({"--rows": "100000"}, "--rows 56"),
        ({"--rows": "0"}, "rows=0"),
        ({"--row_length": "65"}, "at most 64 tokens"),
        ({"--row_length": "1"}, "row_length=1"),
        ({"--data": str(folder / "none.txt")}, "is not a file"),
        ({"--data": str(folder / "data.csv")}, ".jsonl"),
        ({"--data": str(folder / "empty.txt")}, "is empty"),
        ({"--data": str(folder / "bad.jsonl")}, "row 2 of"),
        ({"--data": str(folder / "numbers.jsonl")}, "none of its columns holds text: a"),
        ({"--data": str(folder / "cut.txt.gz")}, "cannot be read"),
        ({"model": str(folder / "quantized")}, "method 'gptq'"),
        ({"model": str(folder / "bare")}, "has no tokenizer"),
        ({"model": str(folder / "t5")}, "T5ForConditionalGeneration is an encoder-decoder"),
        ({"model": str(folder / "nowhere")}, "is not a folder here"),
    ]
    capsys.readouterr()
    for changed, said in cases:
        words = {**good, **changed}
        out = folder / "out"
        assert main(["prune", words.pop("model"), str(out), *(word for pair in words.items() for word in pair)]) == 2
        printed = capsys.readouterr()
        assert said in printed.err, printed.err
        assert printed.err.startswith("hf-pdecay prune: ") and printed.err.count("\n") == 1 and not printed.out
        assert not out.exists() and not list(folder.glob(".out*"))
    assert main(["prune", str(model), str(folder), "--pattern", "2:4", "--data", str(data)]) == 2
    assert "is there and not empty" in capsys.readouterr().err


def test_rows_are_whole_and_follow_the_seed() -> None:
    texts, words = sentences(300), tokenizer()
    rows = calibration_rows(texts, words, rows=20, row_length=16, seed=3)
    assert rows.shape == (20, 16) and rows.dtype == torch.int64
    assert torch.equal(rows, calibration_rows(texts, words, rows=20, row_length=16, seed=3))
    assert not torch.equal(rows, calibration_rows(texts, words, rows=20, row_length=16, seed=4))
    assert words.eos_token_id in rows
    # A tokenizer that begins and ends its texts does so in each row.
    from tokenizers.processors import TemplateProcessing

    ends = [("<s>", 3), ("</s>", 1)]
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    words.add_special_tokens({"cls_token": "user", "sep_token": "</s>"})
    edged = calibration_rows(texts, words, rows=20, row_length=16)
    assert edged.shape == (20, 16) and set(edged[:, 0].tolist()) == {3} and set(edged[:, -1].tolist()) == {1}


def test_what_a_file_holds(tmp_path: Path) -> None:
    (tmp_path / "a.b.txt").write_text("one\ntwo")
    assert read_texts(tmp_path / "a.b.txt") == ["one\ntwo"]
    lines = '{"question": "q", "id": 3, "answer": "a"}\n\n{"text": "t", "url": "u"}\n'
    with gzip.open(tmp_path / "a.JSONL.gz", "wt") as file:
        file.write(lines)
    assert read_texts(tmp_path / "a.JSONL.gz") == ["q\na", "t"]
    (tmp_path / "a.json").write_text('[{"text": "t"}]')
    assert read_texts(tmp_path / "a.json") == ["t"]
