"""The benchmark and the fuzzer of compressed checkpoints run and say what they ought to."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import transformers as tf

from ..helpers.storage_models import saved
from .test_benchmarks import BENCHMARKS


@pytest.fixture
def scripts() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in ("fuzz_storage", "storage")}
        for name in ("fuzz_storage", "storage", "tables", "timing", "contenders", "memory"):
            sys.modules.pop(name, None)


def test_fuzzing(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    assert scripts["fuzz_storage"].main(["--inputs", "300", "--output", str(tmp_path)]) == 0
    targets = json.loads((tmp_path / "fuzz_storage.json").read_text())["targets"]
    assert [target["inputs"] for target in targets] == [300, 300, 300, 300, 60]
    for target in targets:
        assert target["refused"] > target["inputs"] / 3
        assert target["refused"] + target["identical"] + target["other values"] == target["inputs"]
        assert target["crash"] == 0 and target["crashes"] == []
    assert all(targets[place]["other values"] > 0 for place in (0, 2, 3))
    assert targets[1]["other values"] == targets[4]["other values"] == 0


def test_fuzzing_finds_a_reader_that_crashes_and_one_that_does_not_look_at_checksums(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz = scripts["fuzz_storage"]
    real = fuzz.decode

    def crashing(block: object, limit: int, what: str) -> object:
        decoded, head = real(block, limit, what)
        return decoded[head.dense], head

    monkeypatch.setenv("HF_PDECAY_VERIFY_CHECKSUMS", "0")
    assert fuzz.main(["--inputs", "300", "--output", str(tmp_path)]) == 1
    assert "other values in spite of checksums" in (tmp_path / "fuzz_storage.md").read_text()
    chance = fuzz.random.Random(0)
    blocks = fuzz.Blocks(tmp_path)
    monkeypatch.setattr(fuzz, "decode", crashing)
    assert any(blocks.try_one(chance).startswith("crash: IndexError") for _ in range(100))


def test_measuring(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    storage = scripts["storage"]
    saved("gpt2", tmp_path / "plain")
    (tmp_path / "work").mkdir()
    record = storage.measure("tiny", tmp_path / "plain", tmp_path / "work", tf.AutoModelForCausalLM, rounds=3)
    assert record["rows"]["plain"]["bytes"] == (tmp_path / "plain" / "model.safetensors").stat().st_size
    assert record["rows"]["plain"]["load_ratio"]["median"] == 1
    for way in ("compressed", "compressed, zstd"):
        row = record["rows"][way]
        assert row["loaded_to_the_bit"] and row["decompressed_to_the_byte"]
        assert row["share"] == row["bytes"] / record["rows"]["plain"]["bytes"] < 0.25
    record = {"models": [record], "left_out": [], "command": "it", **storage.conditions("cpu", [])}
    assert "| tiny, compressed, zstd |" in storage.report_text(record)
