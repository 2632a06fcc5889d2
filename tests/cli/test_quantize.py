"""`hf-pdecay quantize`: the folder that it writes, what it prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from hf_pdecay import check_zeros, compress, prune_folder, quantize_folder
from hf_pdecay.cli.main import main
from hf_pdecay.storage.codes import find_codes

from ..helpers.local_files import llama, sentences
from ..helpers.storage_models import weights
from ..helpers.warm import python


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(400)))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("models")
    llama(folder / "dense")
    (folder / "dense" / "README.md").write_text("---\ntags: []\n---\n# A model\n")
    prune_folder(folder / "dense", folder / "pruned", data, sparsity=0.5, rows=16)
    return folder / "pruned"


@pytest.mark.slow
def test_the_command_as_a_process(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = python("-m", "hf_pdecay", "quantize", model, out, "--data", data, "--rows", "16", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert "GPTQ that keeps zeros" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    plain = "import transformers as tf, sys; tf.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    assert python("-c", plain, out).returncode == 0
    done = python("-m", "hf_pdecay", "check", model, out)
    assert done.returncode == 0 and "zeros are kept" in done.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_the_folder(model: Path, data: Path, tmp_path: Path, calibrated: bool, dtype: str) -> None:
    out = tmp_path / "out"
    given = data if calibrated else None
    report = quantize_folder(model, out, given, bits=4, block=16, rows=16, dtype=dtype)
    assert not check_zeros(model, out).is_damaged and report.rows == ((16, 64) if calibrated else None)
    said = json.loads((out / "codes.json").read_text())
    assert (said["bits"], said["block"]) == (4, 16) and len(said["tensors"]) == 14
    tensors = weights(out)
    for name in said["tensors"]:
        assert tensors[name].dtype == getattr(torch, dtype)
        find_codes(tensors[name], 4, 16)
    counted = json.loads((out / "sparsity.json").read_text())
    assert counted["decayed"]["zeros"] == report.zeros + report.new_zeros
    card = (out / "README.md").read_text()
    assert "codes of 4 bits" in card and f"kept all {report.zeros:,} zeros" in card
    compress(out, tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "codes.json").read_text()) == said
    assert not check_zeros(model, tmp_path / "packed").is_damaged
    prune_folder(out, tmp_path / "more", data, sparsity=0.7, rows=16)
    assert not (tmp_path / "more" / "codes.json").exists()


def test_a_format_from_calibration_rows_has_the_same_codes(model: Path, data: Path, tmp_path: Path) -> None:
    for form in ("plain", "pack-quantized"):
        report = quantize_folder(model, tmp_path / form, data, block=16, rows=16, format=form)
        assert report.method == "gptq" and not report.coded
    packed = weights(tmp_path / "pack-quantized")
    for name, weight in weights(tmp_path / "plain").items():
        if f"{name}_scale" in packed:
            codes, scales = find_codes(weight, 4, 16)
            words = packed[f"{name}_packed"]
            fields = torch.stack([words >> 4 * place & 15 for place in range(8)], -1).flatten(1) - 8
            assert torch.equal(packed[f"{name}_scale"], scales) and torch.equal(fields, codes.int())
    assert quantize_folder(model, tmp_path / "plain", data, block=16, rows=16, overwrite=True).coded == []
    again = quantize_folder(tmp_path / "plain", tmp_path / "again", data, block=16, rows=16)
    assert len(again.coded) == 14 and again.new_zeros == 0


def test_without_a_tokenizer_and_from_a_compressed_folder(model: Path, tmp_path: Path, capsys: Any) -> None:
    compress(model, tmp_path / "packed")
    for file in (tmp_path / "packed").glob("tokenizer*"):
        file.unlink()
    assert main(["quantize", str(tmp_path / "packed"), str(tmp_path / "out"), "--bits", "8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["method"] == "rtn" and result["bits"] == 8 and result["blocks"][0]["output_error"] is None
    assert not check_zeros(model, tmp_path / "out").is_damaged
    assert main(["quantize", str(model), str(tmp_path / "ternary"), "--bits", "1.58"]) == 0
    assert "rounding to nearest" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bits", "16"], "bits=16"),
        (["--block", "4"], "block=4"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--device", "nowhere"], "device='nowhere'"),
    ],
)
def test_bad_input(words: list[str], said: str, model: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["quantize", str(model), str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_quantized_model_is_refused(model: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "quantized"
    tf.AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["quantize", str(folder), str(tmp_path / "out")]) == 2
    assert "quantized already" in capsys.readouterr().err
