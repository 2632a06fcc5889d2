"""Targets of changes on one process, under DDP, FSDP2 and ZeRO: as many weights have the bits of their base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.launching import launch

from .test_layouts import Layout


pytestmark = pytest.mark.distributed

ALONE = Layout("one process", "single", 1)
LAYOUTS = [
    Layout("DDP × 2", "ddp", 2),
    Layout("FSDP2 × 2", "fsdp2", 2),
    Layout("FSDP2 × 3", "fsdp2", 3),
    Layout("ZeRO-2 × 2", "zero2", 2),
    Layout("ZeRO-3 × 2", "zero3", 2),
]
CASES: dict[str, dict[str, Any]] = {
    "target": {},
    "resumed": {"resumed_at": 30},
    "resumed in healing": {"resumed_at": 50},
    "nan": {"nan_at": 20},
    "rows": {"rows": True},
    "sgd": {"optim": "sgd"},
    "bf16": {"bf16": True},
}
Found = dict[str, dict[str, Any]]


def _cases(engine: str) -> dict[str, dict[str, Any]]:
    # DeepSpeed's flat tensors have no rows.
    return {name: case for name, case in CASES.items() if not (engine.startswith("zero") and name == "rows")}


def _train(folder: Path, layout: Layout) -> Found:
    cases = _cases(layout.engine)
    words = [json.dumps({"name": name, **case}) for name, case in cases.items()]
    processes = None if layout.engine == "single" else layout.processes
    launch("tests.distributed.base_run", folder, layout.engine, *words, processes=processes, timeout=900)
    return {name: torch.load(folder / f"{name}.pt") for name in cases}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return _train(tmp_path_factory.mktemp("alone"), ALONE)


def _same(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many weights have the same bits."""
    whole = torch.int16 if one.element_size() == 2 else torch.int32
    return int((one.view(whole) == other.view(whole)).sum())


def _check(name: str, found: dict[str, Any], engine: str) -> dict[str, int]:
    """Compare what was measured with the weights, bit by bit, and return the unchanged weights of each tensor."""
    start, weights = found["start"], found["weights"]
    same = {each: _same(start[each], weights[each]) for each in weights}
    of_base = {each for each in weights if not each.startswith("head")}
    assert {each: found["counted"][each] for each in of_base} == {each: same[each] for each in of_base}
    # What the last pruning made is kept.
    low = CASES[name].get("bf16") and engine.startswith("zero")
    if not low:
        assert found["at_end"] in (found["counted"], None)
    assert all(each == found["sums"][0] for each in found["sums"])
    assert same["head.weight"] < 10  # by chance, in bfloat16
    numel = sum(weights[each].numel() for each in of_base)
    if name == "rows":
        rows = sum(weights[each].shape[0] for each in of_base if each.endswith("up.weight"))
        dead = sum(int((start[each] == weights[each]).all(1).sum()) for each in of_base if each.endswith("up.weight"))
        assert dead == rows // 2
        of_base = {each for each in of_base if not each.endswith("up.weight")}
        numel = sum(weights[each].numel() for each in of_base)
    unchanged = sum(same[each] for each in of_base)
    if low:
        # Changes of DeepSpeed's float32 weights that bfloat16 cannot show make some more.
        assert round(0.9 * numel) == found["stepped"] <= unchanged
    else:
        assert unchanged == round(0.9 * numel)
    return same


@pytest.mark.parametrize("layout", [ALONE, *LAYOUTS], ids=lambda each: each.name)
def test_unchanged_weights_are_as_many_as_on_one_process(layout: Layout, alone: Found, tmp_path: Path) -> None:
    if layout.missing:
        pytest.skip("DeepSpeed is not installed")
    found = alone if layout is ALONE else _train(tmp_path, layout)
    for name in _cases(layout.engine):
        same = _check(name, found[name], layout.engine)
        if not layout.engine.startswith("zero"):  # DeepSpeed skips such steps itself
            assert found[name]["skipped"] == (1 if name == "nan" else 0)
        assert abs(found[name]["excess"]) < 0.03
        if name not in ("bf16", "rows"):
            # Sums of gradients come in another order, so a few weights more or less in each tensor.
            expected = _check(name, alone[name], "single")
            for each, count in same.items():
                numel = alone[name]["weights"][each].numel()
                assert abs(count - expected[each]) <= 0.1 * numel + 3, (name, each)
    for name in ("resumed", "resumed in healing"):
        for each, weight in found["target"]["weights"].items():
            assert torch.equal(weight, found[name]["weights"][each]), (name, each)
