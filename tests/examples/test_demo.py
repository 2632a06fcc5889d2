from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_demo_compares_two_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    demo = importlib.import_module("demo")
    argv = [f"--output_dir={tmp_path}", "--max_steps=16", "--max_eval_samples=8"]
    assert demo.main(argv) == 0
    printed = capsys.readouterr().out
    assert "exact zeros in decayed weights" in printed
    record = json.loads((tmp_path / "results.json").read_text())
    dense, sparse = record["runs"]["dense"], record["runs"]["sparse"]
    assert dense["sparsity"] == 0
    assert sparse["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert all((tmp_path / "sparse" / name).is_file() for name in ("sparsity.png", "README.md"))
    assert demo.main([*argv, "--p_norm=0"]) == 2
    assert "p_norm" in capsys.readouterr().err
