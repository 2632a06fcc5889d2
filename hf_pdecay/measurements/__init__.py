"""Measurements for the `evaluate` library; they load without a network.

`classification` (accuracy and F1), `sparsity` (exact zeros of saved models) and `token_metrics` (perplexity and token
accuracy of language models). `load_measurement` loads them by name, and `hooks` connects them to a `Trainer`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import check_choice


if TYPE_CHECKING:
    from evaluate import EvaluationModule

__all__ = ["MEASUREMENTS", "load_measurement", "measurement_path"]

MEASUREMENTS = ("classification", "sparsity", "token_metrics")


def measurement_path(name: str) -> Path:
    """Return the folder of a measurement, one of `MEASUREMENTS`, for `evaluate.load` and `evaluate.combine`.

    Raises:
        ValueError: If the name is unknown.
    """
    check_choice("name", name, MEASUREMENTS)
    return Path(__file__).parent / name


def load_measurement(name: str, *, keep_in_memory: bool = True, **kwargs: Any) -> "EvaluationModule":
    """Load a measurement of this package through `evaluate`.

    Args:
        name: One of `MEASUREMENTS`.
        keep_in_memory: Collect inputs in memory instead of in a locked file under `HF_METRICS_CACHE`. Must be False if
            `num_process` processes share one evaluation.
        **kwargs: Passed to `evaluate.load`.

    Returns:
        A module with `add`, `add_batch` and `compute`.

    Raises:
        ValueError: If the name is unknown.
        ImportError: If the measurement needs scikit-learn, which is not installed.
    """
    path = measurement_path(name)
    from evaluate import load  # imported here because it takes seconds

    try:
        module: EvaluationModule = load(str(path), keep_in_memory=keep_in_memory, **kwargs)
    except ImportError as error:  # evaluate takes the module's name for the package's
        if "sklearn" not in str(error):
            raise
        raise ImportError(
            f"The measurement {name!r} needs scikit-learn: pip install scikit-learn, or the extra "
            "'hf-pdecay[examples]'."
        ) from error
    return module
