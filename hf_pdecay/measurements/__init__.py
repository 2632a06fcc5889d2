"""Modules for the `evaluate` library that ship with the package and load without a network.

Three of them: `classification` (accuracy and F1), `sparsity` (exact zeros of saved models) and `token_metrics`
(perplexity and token accuracy of language models). `load_measurement` finds them; `evaluate.load` takes their folders
too, and `hooks` connects them to a `Trainer`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from evaluate import EvaluationModule

__all__ = ["MEASUREMENTS", "load_measurement", "measurement_path"]

MEASUREMENTS = ("classification", "sparsity", "token_metrics")


def measurement_path(name: str) -> Path:
    """Folder of a measurement of this package, for `evaluate.load` and `evaluate.combine`.

    Args:
        name: One of `MEASUREMENTS`.

    Raises:
        ValueError: There is no measurement of that name.
    """
    if name not in MEASUREMENTS:
        raise ValueError(f"Invalid measurement: name={name!r}; the package has {', '.join(MEASUREMENTS)}")
    return Path(__file__).parent / name


def load_measurement(name: str, *, keep_in_memory: bool = True, **kwargs: Any) -> "EvaluationModule":
    """Load a measurement of this package through `evaluate`.

    Args:
        name: One of `MEASUREMENTS`.
        keep_in_memory: Collect inputs in memory instead of in a locked file under `HF_METRICS_CACHE`; set it to False
            where `num_process` processes share one evaluation.
        **kwargs: Passed to `evaluate.load`.

    Returns:
        A module with `add`, `add_batch` and `compute`.

    Raises:
        ValueError: There is no measurement of that name.
    """
    path = measurement_path(name)
    from evaluate import load  # imported late: it takes seconds, and training without it must not pay for them

    module: EvaluationModule = load(str(path), keep_in_memory=keep_in_memory, **kwargs)
    return module
