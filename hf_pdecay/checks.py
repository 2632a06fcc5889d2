"""Checks of arguments. Each message names the argument, its value and what would be right."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real


MODEL_ERRORS = (RuntimeError, LookupError, TypeError, ValueError, AttributeError)
"""What a model may raise for an input, or as a whole, that it cannot run."""


def is_number(value: object) -> bool:
    """Whether a value is a real number other than a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError if an argument is not one of the choices."""
    if value not in choices:
        raise ValueError(f"Invalid {name}: {name}={value!r}; it must be one of {', '.join(choices)}.")


def asked_percent(value: object) -> str:
    """Return a question for the end of an error on a fraction that may have been given in percent; else nothing."""
    percent = is_number(value) and 1 < value < 100  # type: ignore[operator]
    return f" Was {value / 100:g} meant?" if percent else ""  # type: ignore[operator]


def check_p_norm(p_norm: float, name: str = "p_norm") -> float:
    """Return p as a float; raise ValueError, which names the argument, unless p is finite and above 0."""
    return _check_number(name, p_norm, "a finite number above 0, such as 0.8", above_zero=True)


def check_lambda_p(lambda_p: float) -> float:
    """Return ``lambda_p`` as a float; raise ValueError unless it is finite and at least 0."""
    return _check_number("lambda_p", lambda_p, "a finite number of at least 0, such as 0.01", above_zero=False)


def _check_number(name: str, value: object, right: str, *, above_zero: bool) -> float:
    number = float(value) if is_number(value) else math.nan  # type: ignore[arg-type]
    if not math.isfinite(number) or number < 0 or (above_zero and number == 0):
        raise ValueError(f"Invalid {name}: {name}={value!r}; it must be {right}.")
    return number
