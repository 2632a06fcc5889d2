"""Hyperparameter search with ``Trainer.hyperparameter_search``: spaces, objectives and the files of a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments
from transformers.trainer_utils import default_compute_objective

from ..checks import is_number
from ..files import append_line
from ..rules.spec import parse_rules
from ..terminal import get_logger
from .arguments import PDecayTrainingArguments, ours_for, settings_of
from .optimizer import name_of
from .pareto import SEARCH_FILE
from .settings import DecaySettings, split_optim_args
from .training_flags import SETTINGS, check_alone


if TYPE_CHECKING:
    from transformers import Trainer

    from ..sparsity.report import SparsityReport

logger = get_logger(__name__)

DIRECTIONS = ["minimize", "maximize"]
"""Directions of :func:`loss_and_sparsity`, for ``hyperparameter_search(direction=DIRECTIONS)``."""

Space = tuple[float, float] | Sequence[Any]

_RANGES: dict[str, Space | None] = {"learning_rate": (1e-5, 1e-3), "p_norm": (0.5, 1.0), "lambda_p": (1e-3, 1e-1)}
_LOGARITHMIC = ("learning_rate", "lambda_p", "weight_decay")  # their order of magnitude matters


@dataclass(frozen=True)
class _HpSpace:
    """An ``hp_space`` with checked ranges by name; ``draw`` takes the trial, the name and the range."""

    ranges: dict[str, Space]
    draw: Callable[[Any, str, Space], Any]

    def __call__(self, trial: Any) -> dict[str, Any]:
        return {name: self.draw(trial, name, given) for name, given in self.ranges.items()}

    def fitting(self, settings: DecaySettings) -> _HpSpace:
        """Return the space without λ_p if the run's target sets it for all weights."""
        target, rules = settings.target_sparsity, settings.lp_rules
        parsed = parse_rules(rules) if isinstance(rules, dict) else []
        left = any(rule.target_sparsity == 0 and rule.lambda_p is None for rule in parsed)
        if "lambda_p" not in self.ranges or target is None or left:
            return self
        logger.warning("lambda_p is not searched, as target_sparsity=%g of the arguments sets it.", target)
        return _HpSpace({name: given for name, given in self.ranges.items() if name != "lambda_p"}, self.draw)


def optuna_space(**ranges: Space | None) -> Callable[[Any], dict[str, Any]]:
    """Return an ``hp_space`` for optuna.

    By default: ``learning_rate`` from 1e-5 to 1e-3, ``p_norm`` from 0.5 to 1, and ``lambda_p`` from 1e-3 to 1e-1 unless
    a ``target_sparsity``, here or in the arguments of the run, sets it.

        >>> space = optuna_space(learning_rate=(1e-4, 1e-2), target_sparsity=(0.5, 0.95), sparsity_decay=[0, 0.3, 1])
        >>> best = trainer.hyperparameter_search(space, loss_and_sparsity, direction=DIRECTIONS, backend="optuna")

    Args:
        **ranges: Fields of ``PDecayTrainingArguments``: a tuple ``(low, high)`` is a range, of integers if both are,
            logarithmic for learning rate, λ_p and weight decay; a list holds the choices; None leaves a default out.

    Raises:
        ValueError: If a name is not a field, a range or a value is invalid, or both λ_p and a target are given.
    """
    return _HpSpace(_checked(ranges), _by_optuna)


def ray_space(**ranges: Space | None) -> Callable[[Any], dict[str, Any]]:
    """Return an ``hp_space`` for Ray Tune; the ranges and the errors are those of :func:`optuna_space`."""
    return _HpSpace(_checked(ranges), _by_ray)


def _by_optuna(trial: Any, name: str, given: Space) -> Any:
    if not isinstance(given, tuple):
        return trial.suggest_categorical(name, list(given))
    if all(isinstance(bound, int) for bound in given):
        return trial.suggest_int(name, *given)
    return trial.suggest_float(name, *given, log=name in _LOGARITHMIC)


def _by_ray(trial: Any, name: str, given: Space) -> Any:
    from ray import tune

    if not isinstance(given, tuple):
        return tune.choice(list(given))
    if all(isinstance(bound, int) for bound in given):
        return tune.randint(given[0], given[1] + 1)
    return (tune.loguniform if name in _LOGARITHMIC else tune.uniform)(*given)


def _checked(ranges: dict[str, Space | None]) -> dict[str, Space]:
    known = {field.name for field in fields(PDecayTrainingArguments)}
    unknown = next((name for name in ranges if name not in known), None)
    if unknown is not None:
        raise ValueError(f"Invalid space: {unknown!r} is not a field of PDecayTrainingArguments.")
    if ranges.get("lambda_p") is not None and ranges.get("target_sparsity") is not None:
        raise ValueError("Invalid space: target_sparsity sets lambda_p itself; leave one of the two out.")
    chosen = {name: given for name, given in {**_RANGES, **ranges}.items() if given is not None}
    if "target_sparsity" in chosen:
        chosen.pop("lambda_p", None)
    for name, given in chosen.items():
        if isinstance(given, tuple):
            lowest = "above 0" if name in _LOGARITHMIC else "a number"
            numbers = len(given) == 2 and all(
                isinstance(bound, (int, float)) and is_number(bound) and math.isfinite(bound) for bound in given
            )
            if not numbers or not given[0] < given[1] or (name in _LOGARITHMIC and given[0] <= 0):
                raise ValueError(
                    f"Invalid space: {name}={given!r}; a range must be (low, high) with low {lowest} and below high; "
                    "choices go into a list."
                )
        elif isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise ValueError(f"Invalid space: {name}={given!r}; it must be a tuple (low, high) or a list of choices.")
        values: Sequence[Any] = given
        for value in values:
            if name in SETTINGS and value is not None:
                try:
                    check_alone(name, value)
                except ValueError as error:
                    raise ValueError(f"Invalid space: {error}") from error
    if any(chosen.get("target_sparsity", ())):
        for name in ("p_norm", "p_norm_begin"):
            highest = max((value for value in chosen.get(name, ()) if value is not None), default=0)
            if highest >= 2:
                raise ValueError(
                    f"Invalid space: {name}={chosen[name]!r} with a target_sparsity; for p >= 2 decay brings no weight "
                    f"to 0. Keep {name} below 2, or search no target."
                )
    return chosen


def loss_and_sparsity(metrics: dict[str, float]) -> list[float]:
    """Return the evaluation loss and the fraction of exact zeros, the two objectives of a search for their front.

    Args:
        metrics: The metrics that ``hyperparameter_search`` of a ``PDecayTrainer`` gives to ``compute_objective``.

    Raises:
        ValueError: If one of the two is missing, as in the search of another Trainer.
    """
    if "eval_loss" not in metrics or "eval_sparsity" not in metrics:
        raise ValueError(
            f"loss_and_sparsity takes metrics with eval_loss and eval_sparsity, not {', '.join(metrics)}: search with "
            "a PDecayTrainer with optim='adamw_lp' and one eval_dataset."
        )
    return [metrics["eval_loss"], metrics["eval_sparsity"]]


def check_read(args: TrainingArguments, hp_space: Any) -> None:
    """Raise ValueError if a space of ours has settings of the decay that the optimizer of ``args`` does not read."""
    unread = [name for name in hp_space.ranges if name in SETTINGS] if isinstance(hp_space, _HpSpace) else []
    if unread:
        raise ValueError(
            f"Invalid space: optim={name_of(args)!r} does not read {', '.join(unread)}; give "
            f"optim={ours_for(name_of(args))!r}, or leave them out: {', '.join(f'{name}=None' for name in unread)}."
        )


def _check_objectives(objective: Any, count: int, direction: Any) -> None:
    """Raise ValueError if an objective gives another number of values than there are directions."""
    wanted = len(direction) if isinstance(direction, list) else 1
    if count != wanted:
        raise ValueError(
            f"Invalid direction: direction={direction!r} is for {wanted} objective{'s' * (wanted > 1)}, and "
            f"compute_objective={getattr(objective, '__name__', objective)} gives {count}; loss_and_sparsity goes with "
            "direction=DIRECTIONS, and one objective, as None is, with 'minimize' or 'maximize'."
        )


def folded(args: TrainingArguments, params: dict[str, Any], optim_args: str | None) -> dict[str, Any]:
    """Put a trial's settings of the decay into the user's ``optim_args`` if the arguments have no fields for them."""
    ours = {key: value for key, value in params.items() if key in SETTINGS and not hasattr(args, key)}
    if not ours:
        return params
    pairs = {**split_optim_args(optim_args), **ours}
    others = {key: value for key, value in params.items() if key not in ours}
    return {**others, "optim_args": ",".join(f"{key}={value}" for key, value in pairs.items())}


class Search:
    """One run of ``Trainer.hyperparameter_search``; ValueError if the objectives do not fit the directions.

    Each trial has its own folder below ``output_dir``, with its sparsity, card and checkpoints; each evaluation appends
    a line to ``search.jsonl`` in ``output_dir``. The metrics of the objective include ``eval_sparsity``.
    """

    def __init__(
        self,
        trainer: Trainer,
        measure: Callable[[], SparsityReport],
        hp_space: Callable[[Any], dict[str, Any]] | None,
        objective: Callable[[dict[str, float]], Any] | None,
        direction: str | list[str],
    ) -> None:
        if objective in (None, loss_and_sparsity):  # others are checked at the first evaluation
            _check_objectives(objective, 1 if objective is None else 2, direction)
        if isinstance(hp_space, _HpSpace) and (settings := settings_of(trainer.args)) is not None:
            hp_space = hp_space.fitting(settings)
        self.optim_args = trainer.args.optim_args
        self._trainer, self._measure = trainer, measure
        self._hp_space, self._objective, self._direction = hp_space, objective, direction
        self._folder = str(trainer.args.output_dir)
        self._file = Path(self._folder) / SEARCH_FILE

    def start_anew(self) -> None:
        """Delete the lines of an earlier search."""
        if self._trainer.is_world_process_zero():
            self._file.unlink(missing_ok=True)

    @property
    def space(self) -> Callable[[Any], dict[str, Any]] | None:
        """The space whose values fit the Trainer's arguments; None for Hugging Face's."""
        space = self._hp_space
        return space and (lambda trial: folded(self._trainer.args, space(trial), self.optim_args))

    def enter(self, output_dir_of: Callable[[Any], str], trial: Any) -> None:
        """Give a trial its folder, which ``output_dir_of`` names from the ``output_dir`` of the search."""
        self._trainer.args.output_dir = self._folder
        self._trainer.args.output_dir = output_dir_of(trial)

    def end(self) -> None:
        """Give the Trainer its arguments back."""
        self._trainer.args.output_dir, self._trainer.args.optim_args = self._folder, self.optim_args

    def evaluate(self, metrics: dict[str, float]) -> Any:
        """Return the objective of a trial's metrics, and write its line."""
        trainer = self._trainer
        report = self._measure().main
        if self._objective is None:  # the default adds up all metrics but the loss, if there are any
            objective = default_compute_objective(dict(metrics))
        else:
            objective = self._objective({**metrics, "eval_sparsity": report.sparsity})
            count = len(objective) if isinstance(objective, Sequence) else 1
            _check_objectives(self._objective, count, self._direction)
        if trainer.is_world_process_zero():
            line = {
                "trial": Path(str(trainer.args.output_dir)).name,
                "step": trainer.state.global_step,
                "loss": metrics.get("eval_loss"),
                "sparsity": report.sparsity,
                "model_sparsity": report.model_sparsity,
                "objective": objective,
                "params": trainer.state.trial_params or {},
            }
            append_line(self._file, line)
        return objective
