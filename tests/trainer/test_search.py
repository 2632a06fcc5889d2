"""Hyperparameter search: real searches with optuna, and the spaces, trials and fronts around them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from hf_pdecay import PDecayTrainer
from hf_pdecay.trainer.pareto import Trial, pareto_front, plot_pareto, read_trials
from hf_pdecay.trainer.search import DIRECTIONS, loss_and_sparsity, optuna_space, ray_space

from ..helpers.models import tiny_gpt2


pytestmark = pytest.mark.usefixtures("undrawn")


optuna = pytest.importorskip("optuna")


@pytest.fixture
def searcher(make_args: Callable[..., Any], tokens: Any) -> Callable[..., PDecayTrainer]:
    def make(**overrides: Any) -> PDecayTrainer:
        args = make_args(max_steps=20, **overrides)
        return PDecayTrainer(model_init=lambda: tiny_gpt2(), args=args, train_dataset=tokens, eval_dataset=tokens)

    return make


class Grid:
    """A space that gives each trial the values that it was given for it."""

    def __init__(self, *values: dict[str, Any]) -> None:
        self.values = values

    def __call__(self, trial: Any) -> dict[str, Any]:
        for name in self.values[0]:
            trial.suggest_categorical(name, [values[name] for values in self.values])
        return self.values[trial.number]


@pytest.mark.slow
def test_two_objectives_with_a_folder_of_its_own_for_each_trial(
    searcher: Callable[..., PDecayTrainer], tmp_path: Path
) -> None:
    trainer = searcher(save_strategy="steps", save_steps=20)
    folder = trainer.args.output_dir
    space = Grid(*({"target_sparsity": target, "p_norm": 0.5} for target in (0.3, 0.6, 0.9)))
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    best = trainer.hyperparameter_search(
        space, loss_and_sparsity, n_trials=3, direction=DIRECTIONS, backend="optuna", storage=storage, study_name="s"
    )
    assert trainer.args.output_dir == folder
    trials = read_trials(folder)
    assert [trial.name for trial in trials] == ["run-0", "run-1", "run-2"]
    assert [trial.sparsity for trial in trials] == pytest.approx([0.3, 0.6, 0.9], abs=1e-3)
    for trial in trials:
        report = json.loads((Path(folder) / trial.name / "sparsity.json").read_text())
        assert report["sparsity"] == trial.sparsity
        lines = (Path(folder) / trial.name / "sparsity.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(2, 21, 2))
        assert (Path(folder) / trial.name / "checkpoint-20" / "model.safetensors").is_file()
        assert f"target_sparsity: {report['sparsity']:.1f}" in (Path(folder) / trial.name / "README.md").read_text()
    assert not (Path(folder) / "sparsity.jsonl").exists() and not list(Path(folder).glob("*/run-*"))
    front = {trial.name: [trial.loss, trial.sparsity] for trial in pareto_front(trials)}
    assert front == {f"run-{run.run_id}": run.objective for run in best}
    assert {trial.name: (trial.loss, trial.sparsity) for trial in read_trials(storage)} == {
        trial.name: (trial.loss, trial.sparsity) for trial in trials
    }


@pytest.mark.slow
def test_a_search_by_flag_uses_what_it_tries(registered: None, tokens: Any, tmp_path: Path) -> None:
    """Stock arguments have no fields for our settings: a trial's go into optim_args, beside what was there."""
    args = TrainingArguments(
        str(tmp_path),
        optim="adamw_lp",
        optim_args="sparsity_schedule=linear,target_sparsity=0.1",
        max_steps=20,
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model_init=lambda: tiny_gpt2(), args=args, train_dataset=tokens, eval_dataset=tokens)
    trainer.hyperparameter_search(
        optuna_space(learning_rate=(1e-4, 1e-3), target_sparsity=(0.3, 0.9)),
        loss_and_sparsity,
        n_trials=2,
        backend="optuna",
        direction=["minimize", "maximize"],
    )
    lines = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["sparsity"] == pytest.approx(line["params"]["target_sparsity"], abs=1e-3)
    assert trainer.args.optim_args.startswith("sparsity_schedule=linear,target_sparsity=0.")


def test_one_objective_by_default_and_a_fresh_state_for_each_trial(searcher: Callable[..., PDecayTrainer]) -> None:
    trainer = searcher(eval_strategy="steps", eval_steps=10)
    space = Grid(*({"lambda_p": strength} for strength in (0.5, 1e-6, 0.5)))
    best = trainer.hyperparameter_search(space, n_trials=3, backend="optuna")
    first, weak, again = read_trials(trainer.args.output_dir)
    assert first.sparsity > 0.2 > weak.sparsity
    assert (first.loss, first.sparsity) == (again.loss, again.sparsity)  # bit-identical: nothing of a trial is left
    assert best.objective == min(first.loss, weak.loss)
    lines = (Path(trainer.args.output_dir) / "search.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20] * 3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"p_norm": -1.0}, "p_norm=-1"),
        ({"lambda_p": -0.5}, "lambda_p=-0.5"),
        ({"target_sparsity": 1.5}, "target_sparsity=1.5"),
        ({"sparsity_begin": 0.9}, "sparsity_begin=0.9"),
    ],
)
def test_what_a_trial_sets_is_checked_before_it_trains(
    searcher: Callable[..., PDecayTrainer], values: dict[str, Any], said: str
) -> None:
    trainer = searcher()
    with pytest.raises(ValueError, match=said):
        trainer.hyperparameter_search(Grid(values), n_trials=1, backend="optuna")
    assert trainer.state.global_step == 0
    assert Path(trainer.args.output_dir).name == "out"


def test_another_optimizer_searches_as_ever(searcher: Callable[..., PDecayTrainer]) -> None:
    trainer = searcher(optim="adamw_torch")
    seen: list[dict[str, float]] = []

    def objective(metrics: dict[str, float]) -> float:
        seen.append(metrics)
        return metrics["eval_loss"]

    trainer.hyperparameter_search(Grid({"learning_rate": 1e-3}), objective, n_trials=1, backend="optuna")
    assert "eval_sparsity" not in seen[0] and not (Path(trainer.args.output_dir) / "search.jsonl").exists()
    with pytest.raises(ValueError, match="not eval_loss"):
        loss_and_sparsity({"eval_loss": 1.0})


def test_what_another_optimizer_does_not_read_is_not_searched(searcher: Callable[..., PDecayTrainer]) -> None:
    trainer = searcher(optim="adamw_torch")
    message = r"optim='adamw_torch' does not read p_norm, lambda_p; give optim='adamw_lp', or .* p_norm=None, lambda_p"
    with pytest.raises(ValueError, match=message):
        trainer.hyperparameter_search(optuna_space(), n_trials=1, backend="optuna")
    for space in (Grid({"p_norm": 0.6}), optuna_space(optim=["adamw_torch"], p_norm=[0.6], lambda_p=None)):
        trainer = searcher(optim="adamw_torch" if isinstance(space, Grid) else "adamw_lp")
        with pytest.raises(ValueError, match=r"optim='adamw_torch' does not read p_norm=0\.6"):
            trainer.hyperparameter_search(space, n_trials=1, backend="optuna")
        assert trainer.state.global_step == 0
    space = optuna_space(p_norm=None, lambda_p=None)
    assert searcher(optim="adamw_torch").hyperparameter_search(space, n_trials=1, backend="optuna") is not None


def test_p_of_two_and_more_where_there_is_no_target() -> None:
    assert optuna_space(p_norm=(1, 2.5), target_sparsity=[None, 0])
    assert optuna_space(p_norm=(1.0, 2.5))


def both(metrics: dict[str, float]) -> list[float]:
    return [metrics["eval_loss"], metrics["eval_sparsity"]]


@pytest.mark.parametrize(
    ("objective", "words", "trains"),
    [
        (loss_and_sparsity, {}, False),
        (loss_and_sparsity, {"direction": "minimize"}, False),
        (None, {"direction": DIRECTIONS}, False),
        (both, {}, True),
        (lambda metrics: metrics["eval_loss"], {"direction": DIRECTIONS}, True),
    ],
)
def test_as_many_directions_as_objectives(
    searcher: Callable[..., PDecayTrainer], objective: Any, words: dict[str, Any], trains: bool
) -> None:
    trainer = searcher()
    with pytest.raises(ValueError, match="Invalid direction: direction="):
        trainer.hyperparameter_search(optuna_space(), objective, n_trials=2, backend="optuna", **words)
    assert (trainer.state.global_step > 0) == trains


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"target_sparsity": 0.5}, {"learning_rate", "p_norm"}),
        (
            {"target_sparsity": 0.5, "lp_rules": {"mlp": {"target_sparsity": 0}}},
            {"learning_rate", "p_norm", "lambda_p"},
        ),
        ({}, {"learning_rate", "p_norm", "lambda_p"}),
    ],
)
def test_a_target_in_the_arguments_sets_lambda_p(
    searcher: Callable[..., PDecayTrainer],
    settings: dict[str, Any],
    names: set[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = searcher(**settings)
    best = trainer.hyperparameter_search(optuna_space(), n_trials=1, backend="optuna")
    assert set(best.hyperparameters) == names
    assert ("lambda_p is not searched, as target_sparsity=0.5" in caplog.text) == ("lambda_p" not in names)


def test_space() -> None:
    space = optuna_space(
        learning_rate=(1e-4, 1e-2), target_sparsity=(0.5, 0.95), max_steps=(10, 20), sparsity_schedule=["cubic"]
    )
    trial = optuna.create_study().ask()
    values = space(trial)
    assert list(values) == ["learning_rate", "p_norm", "target_sparsity", "max_steps", "sparsity_schedule"]
    assert 0.5 <= values["target_sparsity"] <= 0.95 and isinstance(values["max_steps"], int)
    distributions = trial.distributions
    assert distributions["learning_rate"].log and not distributions["p_norm"].log
    assert list(optuna_space()(optuna.create_study().ask())) == ["learning_rate", "p_norm", "lambda_p"]
    assert list(optuna_space(p_norm=None)(optuna.create_study().ask())) == ["learning_rate", "lambda_p"]


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ({"p": (0.5, 1)}, "'p' is not a field"),
        ({"p_norm": (0, 1)}, "p_norm=0"),
        ({"target_sparsity": (0.5, 1.0)}, "target_sparsity=1.0"),
        ({"lambda_p": (0.0, 1.0)}, "low above 0"),
        ({"learning_rate": (1e-3, 1e-4)}, "below high"),
        ({"learning_rate": (1e-4, math.nan)}, "learning_rate="),
        ({"lambda_p": (0.1, 1), "target_sparsity": [0.5]}, "leave one of the two out"),
        ({"sparsity_schedule": "cubic"}, "sparsity_schedule='cubic'"),
        ({"sparsity_schedule": []}, "a list of choices"),
        ({"p_norm": (1, 2.5), "target_sparsity": (0.3, 0.9)}, "p_norm=.1, 2.5. with a target_sparsity"),
        ({"p_norm_begin": [None, 2], "target_sparsity": [None, 0.9]}, "p_norm_begin below 2"),
    ],
)
def test_spaces_that_cannot_be(ranges: dict[str, Any], said: str) -> None:
    for make in (optuna_space, ray_space):
        with pytest.raises(ValueError, match=said):
            make(**ranges)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray Tune is not installed")
def test_ray_space() -> None:
    values = ray_space(target_sparsity=(0.5, 0.9), sparsity_schedule=["cubic"])(None)
    assert list(values) == ["learning_rate", "p_norm", "target_sparsity", "sparsity_schedule"]


NUMBERS = st.one_of(st.integers(0, 6).map(float), st.just(math.nan))


@given(st.lists(st.tuples(NUMBERS, NUMBERS)))
def test_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    trials = [Trial(str(number), *point) for number, point in enumerate(points)]
    front = pareto_front(trials)
    finite = [trial for trial in trials if not math.isnan(trial.loss + trial.sparsity)]

    def beaten(one: Trial) -> bool:
        return any(
            other.loss <= one.loss
            and other.sparsity >= one.sparsity
            and (other.loss, other.sparsity) != (one.loss, one.sparsity)
            for other in finite
        )

    expected = {(trial.loss, trial.sparsity) for trial in finite if not beaten(trial)}
    assert {(trial.loss, trial.sparsity) for trial in front} == expected and len(front) == len(expected)
    assert [trial.sparsity for trial in front] == sorted(trial.sparsity for trial in front)


def test_reading_what_is_no_search(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a search"):
        read_trials(tmp_path)
    (tmp_path / "search.jsonl").write_text('{"trial": "run-0"}\n')
    with pytest.raises(ValueError, match="is not a search"):
        read_trials(tmp_path)
    line = {"trial": "run-0", "loss": 1.0, "sparsity": 0.5, "params": {}}
    (tmp_path / "search.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line)[:20])
    assert read_trials(tmp_path / "search.jsonl") == [Trial("run-0", 1.0, 0.5)]
    with pytest.raises(ValueError, match="trials is empty"):
        plot_pareto([], tmp_path / "pareto.png")
    (tmp_path / "other.db").write_text("no database" * 99)
    for name, said in (
        ("none.db", "The file .*none.db' of 'sqlite:"),
        ("empty.db", "has no study"),
        ("other.db", "is not a readable storage of optuna .*not a database"),
    ):
        (tmp_path / "empty.db").touch()
        with pytest.raises(ValueError, match=said):
            read_trials(f"sqlite:///{tmp_path / name}")
    assert not (tmp_path / "none.db").exists()
    storage = f"sqlite:///{tmp_path / 'one.db'}"
    optuna.create_study(storage=storage, study_name="one")
    with pytest.raises(ValueError, match="directions minimize"):
        read_trials(storage)
    optuna.create_study(storage=storage, study_name="two")
    with pytest.raises(ValueError, match="studies one, two"):
        read_trials(storage)


@pytest.mark.slow
def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    example = importlib.import_module("hyperparameter_search")
    (tmp_path / "text.txt").write_text(
        "".join(f"{number} bottles of beer on the wall.\n" for number in range(99, 0, -1))
    )
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 256}
    (tmp_path / "config.json").write_text(json.dumps({**config, "bos_token_id": None, "eos_token_id": None}))
    words = {
        "output_dir": tmp_path / "out",
        "train_file": tmp_path / "text.txt",
        "config_name": tmp_path / "config.json",
    }
    words |= {"max_steps": 20, "n_trials": 3, "use_cpu": "true", "disable_tqdm": "true"}
    result = example.main([f"--{name}={value}" for name, value in words.items()])
    assert len(result.trials) == 3 and 1 <= len(result.front) <= 3
    for trial in result.trials:
        assert trial.sparsity == pytest.approx(trial.params["target_sparsity"], abs=2e-3)
    assert (tmp_path / "out" / "pareto.png").is_file()
