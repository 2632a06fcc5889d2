"""The warning before transformers quantises a model with zeros in a way that loses them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

import hf_pdecay  # noqa: F401, which completes transformers
from hf_pdecay import compress, measure_sparsity, quantize_folder
from hf_pdecay.cli.main import main
from hf_pdecay.storage.lossy_quantizers import register, share_of_zeros, unregister, what_is_lost

from ..helpers.models import build
from ..helpers.storage_models import sparsified


def saved(folder: Path, sparse: bool) -> Path:
    model: Any = build("llama")
    (sparsified(model) if sparse else model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "hqq"}, "HQQ fills zeros in"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ fills zeros in"),
        (tf.GPTQConfig(bits=4), "`hf-pdecay quantize --data` is GPTQ that keeps them"),
        ({"quant_method": "awq", "bits": 4, "zero_point": True}, None),
        ({"quant_method": "quanto", "weights": "int4"}, "quanto's int4 fills zeros in"),
        ({"quant_method": "quanto", "weights": "float8"}, "into NaN"),
        ({"quant_method": "quanto", "weights": "int8"}, None),
        (tf.QuantoConfig(weights="int2"), "quanto's int2"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}}, "into NaN"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, None),
        ({"quant_method": "something new"}, None),
        (None, None),
    ],
)
def test_what_is_known_of_quantisers(settings: Any, said: str | None) -> None:
    lost = what_is_lost(settings)
    assert lost is None if said is None else said in str(lost)


def warnings_of(caplog: pytest.LogCaptureFixture, folder: Path, config: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    return [record.getMessage() for record in caplog.records if "hf-pdecay check" in record.getMessage()]


def test_from_pretrained_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ao = pytest.importorskip("torchao.quantization")
    sparse, dense = saved(tmp_path / "sparse", True), saved(tmp_path / "dense", False)
    compress(sparse, tmp_path / "packed")
    float8, int8 = tf.TorchAoConfig(ao.Float8WeightOnlyConfig()), tf.TorchAoConfig(ao.Int8WeightOnlyConfig())
    for folder in (sparse, tmp_path / "packed"):
        (said,) = warnings_of(caplog, folder, float8)
        assert str(folder) in said and "turns rows of zeros" in said and "%" in said
    assert not warnings_of(caplog, sparse, int8) and not warnings_of(caplog, dense, float8)
    from transformers.quantizers import base

    unregister(base)
    try:
        assert not warnings_of(caplog, sparse, float8)
    finally:
        register(base)
        register(base)  # which changes nothing
    assert len(warnings_of(caplog, sparse, float8)) == 1


def test_the_share_of_zeros_of_a_run_and_without_one(tmp_path: Path) -> None:
    sparse = saved(tmp_path / "sparse", True)
    looked_at = share_of_zeros(sparse)
    assert looked_at is not None and looked_at > 0.5
    measure_sparsity(build("llama")).save(sparse / "sparsity.json")
    assert share_of_zeros(sparse) == 0
    (sparse / "sparsity.json").write_text("{")
    assert share_of_zeros(sparse) is None
    assert share_of_zeros(tmp_path) is None


def test_report_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse, dense = saved(tmp_path / "sparse", True), saved(tmp_path / "dense", False)
    assert main(["report", str(sparse)]) == 0
    assert "Many quantisers fill zeros in" in " ".join(capsys.readouterr().out.split())
    assert main(["report", str(dense)]) == 0
    assert "quantisers" not in capsys.readouterr().out
    config = json.loads((sparse / "config.json").read_text()) | {"quantization_config": {"quant_method": "hqq"}}
    (sparse / "config.json").write_text(json.dumps(config))
    assert main(["report", str(sparse)]) == 0
    assert "HQQ fills zeros in" in " ".join(capsys.readouterr().out.split())
    quantize_folder(dense, tmp_path / "packed", block=16, format="pack-quantized")
    assert main(["report", str(tmp_path / "packed")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "quantised by compressed-tensors. Packed weights are not counted above" in said
