"""Compressing in a narrower dtype: rounded weights, zeros that stay, and a count of values that vanish."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

from hf_pdecay import compress, decompress
from hf_pdecay.cli.main import main
from hf_pdecay.cli.report import report

from ..helpers.storage_models import bits, same_state, saved, weights, write_folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shards", [None, "8KB"])
def test_it_loads_as_the_rounded_model(tmp_path: Path, dtype: str, shards: str | None) -> None:
    model = saved("gpt2", tmp_path / "plain")
    found = compress(tmp_path / "plain", tmp_path / "small", dtype=dtype, max_shard_size=shards)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert same_state(loaded, model.to(getattr(torch, dtype)))
    assert found.vanished == 0 and found.after < compress(tmp_path / "plain", tmp_path / "wide").after
    decompress(tmp_path / "small", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == dtype


def test_values_that_vanish_are_counted_and_too_large_ones_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensor = torch.zeros(64, 8)
    tensor[0, :4] = torch.tensor([1e-9, -1e-9, 1.0, -0.0])
    ids = torch.zeros(64, dtype=torch.int64)
    write_folder(tmp_path / "plain", {"a": tensor, "ids": ids}, text_config={"dtype": "float32", "more": {"x": 1}})
    small, back = str(tmp_path / "small"), tmp_path / "back"
    assert main(["compress", str(tmp_path / "plain"), small, "--dtype", "float16"]) == 0
    assert "2 values were too small for the dtype and have become zero" in " ".join(capsys.readouterr().out.split())
    decompress(small, back)
    assert {name: bits(each) for name, each in weights(back).items()} == {"a": bits(tensor.half()), "ids": bits(ids)}
    config = json.loads((back / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "float16"
    assert compress(tmp_path / "plain", tmp_path / "other", dtype="bfloat16").vanished == 0
    write_folder(tmp_path / "large", {"a": torch.full((8, 8), 1e6)})
    with pytest.raises(ValueError, match="'a' has 64 values that are too large for float16; take bfloat16"):
        compress(tmp_path / "large", tmp_path / "out", dtype="float16")
    with pytest.raises(ValueError, match="dtype='int8'; it must be one of bfloat16, float16"):
        compress(tmp_path / "large", tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


def test_the_report_says_what_each_dtype_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(256, 256, generator=generator)
    tensor[torch.rand(256, 256, generator=generator) < 0.5] = 0
    tensor[0, tensor[0] == 0] = -0.0
    write_folder(tmp_path / "plain", {"a": tensor})
    found = report(tmp_path / "plain").to_dict()
    values = int(tensor.count_nonzero())
    assert found["bytes_by_dtype"] == {
        "float32": 4 * 256**2,
        "bfloat16": 2 * 256**2,
        "compressed_float32": 256**2 // 8 + 4 * values,
        "compressed_bfloat16": 256**2 // 8 + 2 * values,
    }
    assert found["negative_zeros"] == int((tensor[0] == 0).sum())
    assert found["negative_zero_bytes"] == -(-(256**2 - values) // 8)
    assert main(["report", str(tmp_path / "plain")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "With --dtype bfloat16, which rounds the weights, about 28.4%; dense bfloat16 has 50.0%" in said
    assert "zeros are -0.0, whose signs cost about" in said
