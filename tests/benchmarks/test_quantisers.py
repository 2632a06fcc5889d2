"""The tables of quantisers: what they say of results, and that the documentation has the newest."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


ROOT = Path(__file__).parents[2]
MODULES = ("environments", "llm", "quantize", "zeros_survive", "zeros_survive_cases")


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield {name: importlib.import_module(name) for name in MODULES}
        for name in MODULES:
            del sys.modules[name]


def test_what_is_counted_of_a_weight(bench: dict[str, ModuleType]) -> None:
    cases = bench["zeros_survive_cases"]
    weight = cases.sparse(0.5)
    assert not weight[cases.DEAD_ROW].any() and not weight[cases.DEAD_BLOCK].any() and 0.5 < (weight == 0).mean() < 0.52
    assert cases.counted(weight, weight) == {"kept": 1, "new": 0, "dead": "0"}
    filled = np.where(weight == 0, np.float32(1e-5), weight)
    assert cases.counted(weight, filled) == {"kept": 0, "new": 0, "dead": "1e-05"}
    broken = weight.copy()
    broken[cases.DEAD_ROW] = np.nan
    assert cases.counted(weight, broken)["dead"] == "NaN" and cases.counted(weight, broken)["kept"] < 1
    assert cases.counted(weight, np.zeros_like(weight))["new"] == 1


def test_the_table_says_what_to_use_instead(bench: dict[str, ModuleType]) -> None:
    def line(kept: float, kind: str) -> dict[str, Any]:
        counts = {"kept": kept, "new": 0.1, "dead": "0"}
        return {"tool": "llama.cpp (GGUF)", "type": kind, "version": "1", "shares": {"0.5": counts, "0.9": counts}}

    text = bench["zeros_survive"].table([line(1, "Q4_0"), line(0.2, "Q4_K"), {**line(1, "Q9"), "error": "no"}])
    assert "| llama.cpp (GGUF) 1 | Q4_0 | all | all | 10.0% | 0 |  |" in text
    assert "|  | Q4_K | 0.200 | 0.200 | 10.0% | 0 | Q4_0, Q6_K |" in text and "does not run here: no" in text


def test_the_results_are_those_in_the_documentation(bench: dict[str, ModuleType]) -> None:
    module = bench["zeros_survive"]
    results = json.loads((module.RESULTS / "zeros_survive.json").read_text(encoding="utf-8"))
    assert module.table(results["lines"]) in module.DOCS.read_text(encoding="utf-8")
    assert results["packages"] == json.loads(json.dumps(module.GROUPS))
    assert {(line["tool"], line["type"]) for line in results["lines"]} >= set(module.INSTEAD)
    assert not any("error" in line for line in results["lines"])


def test_the_table_of_methods(bench: dict[str, ModuleType]) -> None:
    line = {"kept": 1.0, "test_loss": 1.5, "other_loss": 4.0, "seconds": 3, "versions": {"torch": "2"}}
    text = bench["quantize"].table([{**line, "method": "gptq", "bits": 4}, {**line, "method": "none", "bits": None}])
    assert text.splitlines()[2].startswith("|  | not quantised | 100.00% | 1.5000")
    assert text.splitlines()[3].startswith("| 4 | `hf-pdecay quantize --data`")
