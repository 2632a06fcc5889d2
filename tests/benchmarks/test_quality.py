"""The quality benchmark: the methods do what their descriptions say; its choice of runs and its table are right."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerState


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = (
    "choosing",
    "choosing_figures",
    "quality",
    "quality.methods",
    "quality.runs",
    "quality.table",
    "quality.tasks",
    "quality.training",
    "quality.zeros",
)
CONFIG: dict[str, Any] = {
    "begin": 0.1,
    "end": 0.75,
    "tasks": {
        "shakespeare": {
            "steps": 20,
            "learning_rates": [0.1, 0.2],
            "targets": [0.8, 0.9],
            "seeds": [0, 1],
            "tune": {"target": 0.9, "seed": 7},
        }
    },
    "methods": {
        "gmp": {"knob": "end", "values": [0.6, 0.75]},
        "pdecay": {"knob": "sparsity_decay", "values": [1, 2]},
        "torchao_lasso": {"knob": "reg_lambda", "values": [0.5], "free": True},
    },
}


@pytest.fixture(scope="module")
def quality() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules; they import their neighbours as they do when you run them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in MODULES}
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a generated text instead of Tiny Shakespeare."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "tinyshakespeare").mkdir()
    words = np.random.default_rng(0).choice(["sow ", "reap ", "mow\n", "winnow, ", "thresh. "], 12_000)
    (folder / "tinyshakespeare" / "input.txt").write_text("".join(words), encoding="utf-8")
    return folder


def _run(quality: dict[str, ModuleType], method: str, target: float | None, knob: Any, **overrides: Any) -> Any:
    run = quality["quality.runs"].Run(
        task="shakespeare",
        method=method,
        steps=20,
        target=target,
        learning_rate=0.004,
        knob=knob,
        seed=0,
        begin=0.1,
        end=0.75,
    )
    return replace(run, **overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "knob"),
    [
        ("pdecay", 0.003),
        ("gmp", 0.75),
        ("gmp_uniform", 0.75),
        ("one_shot", 0.5),
        ("one_shot_unhealed", None),
        ("torchao_min_sparsity", 1),
        ("factored", 0.1),
    ],
)
def test_methods_that_are_asked_give_what_is_asked(
    method: str, knob: Any, quality: dict[str, ModuleType], data: Path
) -> None:
    line = quality["quality.training"].execute(_run(quality, method, 0.7, knob), str(data))
    assert line["sparsity"] == pytest.approx(0.7, abs=2e-3)
    assert 0 < line["test_loss"] < 4 and 0 < line["dev_loss"] < 4
    assert line["versions"]["torch"].startswith(torch.__version__.split("+")[0])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "knob"), [("dense", None), ("pdecay_fixed", 1.0), ("torchao_lasso", 1.0)])
def test_methods_that_cannot_be_asked(method: str, knob: Any, quality: dict[str, ModuleType], data: Path) -> None:
    line = quality["quality.training"].execute(_run(quality, method, None, knob), str(data))
    assert (line["sparsity"] == 0) == (method == "dense")


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.77, 1.0])
def test_the_smallest_of_all_tensors_go(fraction: float, quality: dict[str, ModuleType]) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(40, 5, generator=generator), torch.randn(100, generator=generator) * 3]
    masks = quality["quality.methods"].smallest(weights, fraction)
    magnitudes = np.concatenate([weight.abs().flatten().numpy() for weight in weights])
    kept = np.concatenate([mask.flatten().numpy() for mask in masks]) == 1
    assert set(np.flatnonzero(~kept)) == set(np.argsort(magnitudes)[: round(fraction * 300)])


def test_the_cubic_schedule_is_zhus_and_guptas(quality: dict[str, ModuleType]) -> None:
    setting = quality["quality.methods"].Setting(0.9, None, 0.1, 0.75, {"max_steps": 1000})
    fraction = quality["quality.methods"].cubic(setting)
    for step in (110, 300, 500, 740):  # pruning steps, 10 apart and counted from the end
        assert fraction(step) == pytest.approx(0.9 + (0 - 0.9) * (1 - (step - 100) / 650) ** 3)
        assert fraction(step + 9) == fraction(step)
    assert fraction(100) == fraction(1) == 0
    assert fraction(750) == fraction(1000) == 0.9


def test_the_signed_square_is_its_inverses_inverse(quality: dict[str, ModuleType]) -> None:
    square = quality["quality.methods"].SignedSquare()
    weight = torch.tensor([-4.0, -0.25, 0.0, 0.25, 9.0])
    assert torch.equal(square(square.right_inverse(weight)), weight)


def _result(run: Any, dev: float, test: float = 2.0) -> dict[str, Any]:
    sparsity = run.target if run.target is not None else 0.0
    extra = {"versions": {"torch": "0"}, "date": "2026-01-01", "seconds": 60.0}
    return {**json.loads(json.dumps(asdict(run))), "dev_loss": dev, "test_loss": test, "sparsity": sparsity, **extra}


def test_learning_rates_then_knobs_then_what_is_reported(quality: dict[str, ModuleType]) -> None:
    planned = quality["quality.runs"].planned
    choosing, reported = planned(CONFIG, [], "shakespeare")
    assert [(run.method, run.learning_rate, run.seed) for run in choosing] == [("dense", 0.1, 7), ("dense", 0.2, 7)]
    assert reported == []
    results = [_result(choosing[0], 1.5), _result(choosing[1], 1.2)]
    choosing, reported = planned(CONFIG, results, "shakespeare")
    knobs = [run for run in choosing if run.method != "dense"]
    assert [(run.method, run.knob) for run in knobs] == [("gmp", 0.6), ("gmp", 0.75), ("pdecay", 1), ("pdecay", 2)]
    assert {(run.target, run.seed, run.learning_rate) for run in knobs} == {(0.9, 7, 0.2)}
    assert {run.method for run in reported} == {"dense", "torchao_lasso"}
    results += [_result(run, dev) for run, dev in zip(knobs, [1.3, 1.4, 1.6, 1.5], strict=True)]
    choosing, reported = planned(CONFIG, results, "shakespeare")
    assert {(run.method, run.knob) for run in reported if run.target} == {("gmp", 0.6), ("pdecay", 2)}
    assert len(reported) == 2 + 2 + 2 * 2 * 2
    assert [run.seed for run in reported] == sorted(run.seed for run in reported)
    assert {run.seed for run in choosing}.isdisjoint(run.seed for run in reported)


def test_uniform_pruning_takes_as_many_of_each_tensor(quality: dict[str, ModuleType]) -> None:
    weights = [torch.arange(1.0, 11.0), torch.arange(1.0, 21.0) / 1000]
    pruning = quality["quality.methods"].MagnitudePruning(weights, lambda step: 0.4, uniform=True)
    pruning.on_step_end(None, TrainerState(global_step=1), None)
    assert [int((weight == 0).sum()) for weight in weights] == [4, 8]
    assert bool((weights[0][4:] == torch.arange(5.0, 11.0)).all())


def test_a_task_may_let_each_method_choose_its_learning_rate(quality: dict[str, ModuleType], tmp_path: Path) -> None:
    task = {**CONFIG["tasks"]["shakespeare"], "sparse_learning_rates": [0.2, 0.4]}
    config = {**CONFIG, "tasks": {"shakespeare": task}}
    planned = quality["quality.runs"].planned
    choosing, _ = planned(config, [], "shakespeare")
    results = [_result(choosing[0], 1.5), _result(choosing[1], 1.2)]
    choosing, _ = planned(config, results, "shakespeare")
    trials = [run for run in choosing if run.method == "gmp"]
    assert [(run.learning_rate, run.knob) for run in trials] == [(0.2, 0.6), (0.2, 0.75), (0.4, 0.6), (0.4, 0.75)]
    results += [_result(run, dev) for run, dev in zip(trials, [1.5, 1.4, 1.1, 1.3], strict=True)]
    _, reported = planned(config, results, "shakespeare")
    winners = {(run.method, run.learning_rate, run.knob) for run in reported if run.target or run.method == "dense"}
    assert winners == {("dense", 0.2, None), ("gmp", 0.4, 0.6)}
    results += [_result(run, 1.0) for run in reported]
    text = quality["quality.table"].write(results, reported, tmp_path / "table.md")
    assert "20 steps, learning rate 0.2: test loss" in text
    assert "| gradual magnitude pruning | 0.6, learning rate 0.4 |" in text


def test_a_run_that_is_there_is_not_made_again(quality: dict[str, ModuleType], tmp_path: Path) -> None:
    runs = [_run(quality, "dense", None, None, seed=seed) for seed in (0, 1)]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(_result(run, 1.0)) + "\n" for run in runs), encoding="utf-8")
    before = path.read_bytes()
    quality["quality.training"].perform(lambda results: runs, path, "no folder", jobs=1, until=float("inf"))
    assert path.read_bytes() == before
    assert quality["quality.runs"].find(quality["quality.runs"].read(path), replace(runs[0], learning_rate=0.5)) is None


def test_the_table_compares_the_same_seeds(quality: dict[str, ModuleType], tmp_path: Path) -> None:
    scores = {("gmp", 0): 2.0, ("pdecay", 0): 2.1, ("pdecay", 1): 1.0}
    runs = [_run(quality, method, 0.9, 1, seed=seed) for method in ("gmp", "pdecay") for seed in (0, 1)]
    results = [_result(run, 1.0, scores[run.method, run.seed]) for run in runs if (run.method, run.seed) in scores]
    runs.append(replace(runs[0], task="fashion_mnist"))
    results.append(_result(replace(runs[-1], seed=7), 1.0))
    text = quality["quality.table"].write(results, runs, tmp_path / "table.md")
    assert "fashion" not in text  # none of its reported runs has a result
    assert "| **2.0000, 1 seed** |" in text and "| 2.1000, 1 seed |" in text and "1.0000" not in text
    results.append(_result(runs[1], 1.0, 1.5))
    text = quality["quality.table"].write(results, runs, tmp_path / "table.md")
    assert "| **1.5500, 2 seeds: 1.0000 to 2.1000** |" in text and "| 1.7500, 2 seeds: 1.5000 to 2.0000 |" in text
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == text
    quality["quality.table"].draw(results, runs, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_weights_are_sorted_by_magnitude_and_zeros_by_place(quality: dict[str, ModuleType]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 1e-12], [0.0, 50.0, 50.0, 0.02]]))
        model[1].weight.fill_(0.03)
    picture = quality["quality.zeros"].spread(model)
    weights = picture["weights"]
    assert weights["zeros"] == 6
    bins = {round(edge, 2): count for edge, count in zip(weights["edges"], weights["counts"], strict=False) if count}
    assert bins == {-8.0: 1, -1.75: 7, -0.5: 2, 0.75: 2}
    assert picture["layers"]["0.weight"] == pytest.approx({"sparsity": 0.5, "rows": 1 / 3, "columns": 0.25}, abs=1e-5)
    assert picture["layers"]["1.weight"] == {"sparsity": 0.0, "rows": 0.0, "columns": 0.0}
    assert quality["quality.zeros"].fraction(model) == pytest.approx(6 / 18)


@pytest.mark.slow
def test_the_grid_of_p_and_lambda_is_run_written_and_drawn(
    quality: dict[str, ModuleType], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choosing, figures = quality["choosing"], quality["choosing_figures"]
    monkeypatch.setattr(choosing, "GRIDS", {"shakespeare": (24, 0.004)})
    monkeypatch.setattr(choosing, "P_NORMS", (0.8, 1.5))
    monkeypatch.setattr(choosing, "LAMBDAS", (0.03, 3.0))
    runs = choosing.grid("shakespeare")
    assert [run.knob for run in runs] == [None, [0.8, 0.03], [0.8, 3.0], [1.5, 0.03], [1.5, 3.0]]
    path = tmp_path / "choosing.jsonl"
    lines = [quality["quality.training"].execute(run, str(data)) for run in runs[:-1]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    results = quality["quality.runs"].read(path)
    zeros, others = results[2]["weights"]["zeros"], sum(results[2]["weights"]["counts"])
    assert zeros / (zeros + others) == results[2]["sparsity"]
    assert results[2]["sparsity"] > 0.5 and results[3]["sparsity"] < 1e-4  # a weight may be drawn as 0
    text = figures.write(results, {"shakespeare": runs}, tmp_path / "table.md")
    assert "| 1.5 | 0.0%, " in text and "not run yet" in text
    (tmp_path / "images").mkdir()
    figures.draw([*results, {**results[3], "knob": [1.5, 3.0]}], {"shakespeare": runs}, tmp_path / "images")
    names = {file.name for file in (tmp_path / "images").iterdir()}
    assert names == {"choosing_shakespeare.png", "choosing_weights.png", "choosing_layers.png"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "knob"),
    [("pdecay_taught", "0.3"), ("gmp_uniform_taught", "0.6"), ("torchao_min_sparsity_taught", "1")],
)
def test_a_fine_tuned_model_is_pruned_and_teaches(
    method: str,
    knob: str,
    quality: dict[str, ModuleType],
    data: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training, methods = quality["quality.training"], quality["quality.methods"]
    monkeypatch.setattr(training, "TEACHERS", tmp_path_factory.getbasetemp() / "teachers")
    monkeypatch.setattr(training, "TEACHER", {**training.TEACHER, "learning_rate": 0.004})
    trainers = []

    def kept(*args: Any) -> Any:
        trainers.append(methods.METHODS[method](*args))
        return trainers[-1]

    monkeypatch.setattr(training, "METHODS", {"dense": methods.dense, method: kept})
    line = training.execute(_run(quality, method, 0.7, f"{knob}, teacher_hidden=2", learning_rate=1e-3), str(data))
    assert line["sparsity"] == pytest.approx(0.7, abs=2e-3) and line["dead"] == []
    assert trainers[0].args.teacher == "self" and trainers[0].args.teacher_hidden == 2
    taught = [entry for entry in trainers[0].state.log_history if "loss_teacher" in entry]
    assert taught and taught[0]["loss_teacher"] > 0


def test_batches_are_padded_to_their_longest(quality: dict[str, ModuleType]) -> None:
    tasks = quality["quality.tasks"]
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    rows = tasks.Ragged(input_ids=torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]]), attention_mask=mask, labels=mask[:, 0])
    assert [len(rows[index]["input_ids"]) for index in range(2)] == [2, 3]
    batch = tasks.padded([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]] and batch["labels"].tolist() == [1, 1]


def test_weights_that_are_wholly_zero_are_dead(quality: dict[str, ModuleType]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    torch.nn.init.zeros_(model[1].weight)
    assert quality["quality.zeros"].dead(model) == ["1.weight"]


def test_a_task_may_end_earlier_and_a_knob_may_be_words(quality: dict[str, ModuleType], tmp_path: Path) -> None:
    task = {**CONFIG["tasks"]["shakespeare"], "end": 0.6, "learning_rates": [0.1]}
    task |= {"methods": ["dense", "gmp_taught"], "values": {"gmp_taught": ["0.6, teacher_hidden=1"]}}
    tasks = {"shakespeare": task, "nanogpt": {**CONFIG["tasks"]["shakespeare"], "learning_rates": [0.1]}}
    config = {**CONFIG, "tasks": tasks, "methods": {**CONFIG["methods"], "gmp_taught": {"knob": "end"}}}
    choosing, _ = quality["quality.runs"].planned(config, [], "nanogpt")
    assert {run.method for run in choosing} == {"gmp", "pdecay"}  # a method without values is not for all tasks
    _, reported = quality["quality.runs"].planned(config, [], "shakespeare")
    assert {run.end for run in reported} == {0.6}
    reported = [replace(run, method=run.method.removesuffix("_taught")) for run in reported]
    results = [_result(run, 1.0) for run in reported]
    text = quality["quality.table"].write(results, reported, tmp_path / "table.md")
    assert "| gradual magnitude pruning | 0.6, teacher_hidden=1 |" in text
    quality["quality.table"].draw(results, reported, tmp_path / "picture.png")
