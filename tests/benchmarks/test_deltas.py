"""The benchmark of deltas: methods choose learning rates with equal effort, and changes are counted by bits."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn


MODULES = ("deltas", "deltas_runs", "llm")


@pytest.fixture(scope="module")
def deltas() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules; they import their neighbours as they do when you run them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        yield {name: importlib.import_module(name) for name in MODULES}
        for name in MODULES:
            sys.modules.pop(name, None)


def _options(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"task": "sst2", "only": "", "seeds": [0], "learning_rate": None, **values})


def _results(deltas: dict[str, ModuleType], options: argparse.Namespace, loss_at: float) -> list[dict[str, Any]]:
    """The lines of all runs, with the least loss on held-out rows at a learning rate."""
    lines: list[dict[str, Any]] = []
    while (run := deltas["deltas"].next_run(lines, options)) is not None:
        held = abs(torch.tensor(run.learning_rate / loss_at).log().item()) if run.learning_rate else 9.0
        # A run on the reported rows says nothing that is chosen by.
        lines.append({**asdict(run), "held_loss": held, "test_loss": -held})
    return lines


def test_each_method_tries_as_many_rates_and_takes_the_best_of_the_held_out_rows(deltas: dict[str, ModuleType]) -> None:
    """The third rate lies on the better side of the first two."""
    for loss_at, tried, chosen in ((1e-3, [1e-4, 3e-4, 1e-3], 1e-3), (3e-5, [1e-4, 3e-4, 3e-5], 3e-5)):
        lines = _results(deltas, _options(only="^(full|base)$"), loss_at)
        for method in ("full", "base"):
            mine = [line for line in lines if line["method"] == method and line["steps"]]
            assert [line["learning_rate"] for line in mine if line["seed"] == 100] == tried
            assert {line["learning_rate"] for line in mine if line["seed"] == 0} == {chosen}
        assert sorted(line["unchanged"] for line in lines if line["method"] == "base" and line["seed"] == 0) == [
            0.9,
            0.99,
            0.995,
            0.999,
        ]


def test_a_given_rate_is_taken_without_a_choice(deltas: dict[str, ModuleType]) -> None:
    """Then no run has the seed of choosing."""
    lines = _results(deltas, _options(only="lora", learning_rate=0.5), 1e-3)
    assert [(line["seed"], line["learning_rate"]) for line in lines if line["steps"]] == [(0, 0.5)]


def test_unchanged_weights_are_counted_by_bits_and_a_cut_keeps_the_largest_changes(
    deltas: dict[str, ModuleType], tmp_path: Path
) -> None:
    """Of 10 weights 3 changed, one of them from 0 to -0; the largest change alone is left by a cut to 90%."""
    model = nn.Linear(10, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(10.0))
    save_file({"weight": model.weight.detach().clone()}, tmp_path / "model.safetensors")
    task = deltas["deltas_runs"].Task(model, tmp_path, None, None, None)
    with torch.no_grad():
        model.weight[0, 0], model.weight[0, 1], model.weight[0, 2] = -0.0, 1.25, 5.0
    assert deltas["deltas_runs"].unchanged(task, model) == 0.7
    deltas["deltas_runs"].cut(task, model, 0.9)
    assert deltas["deltas_runs"].unchanged(task, model) == 0.9 and model.weight[0, 2] == 5


def test_the_table_compares_with_full_fine_tuning(deltas: dict[str, ModuleType]) -> None:
    """A loss halfway between the base and full fine-tuning keeps 50% of the gain."""
    common = {"task": "sst2", "settings": "", "unchanged": None, "learning_rate": 1e-3, "unchanged_share": 0.0}
    common |= {"versions": {"torch": "2"}, "device": "CPU", "bytes": 1_000_000, "steps": 9, "seed": 0}
    lines = [
        {**common, "method": "full", "test_loss": 2.0, "steps": 0},
        {**common, "method": "full", "test_loss": 1.0},
        {**common, "method": "base", "unchanged": 0.99, "test_loss": 1.5},
        {**common, "method": "lora", "test_loss": 0.0, "seed": 100},
    ]
    rows = deltas["deltas"].table(lines, "sst2").splitlines()
    assert "50.0%" in next(row for row in rows if "99.0%" in row) and not any("LoRA" in row for row in rows)


def test_biases_or_norms_are_what_bitfit_trains(deltas: dict[str, ModuleType]) -> None:
    """A model without biases trains its norms."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.RMSNorm(2))
    deltas["deltas_runs"].keep_biases(model)
    assert [name for name, param in model.named_parameters() if param.requires_grad] == ["1.weight"]
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    deltas["deltas_runs"].keep_biases(model)
    assert [name for name, param in model.named_parameters() if param.requires_grad] == ["0.bias", "1.bias"]
