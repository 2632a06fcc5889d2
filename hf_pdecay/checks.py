"""Checks of values that a user gives; their messages name the argument, the value and what would be right."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Real


def is_number(value: object) -> bool:
    """Whether a value is a real number, and no boolean."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Check that an argument is one of some strings.

    Args:
        name: Name of the argument, for the message.
        value: What was given.
        choices: What may be given.

    Raises:
        ValueError: If the value is not one of the choices.
    """
    if value not in choices:
        raise ValueError(f"Invalid {name}: {name}={value!r}; it must be one of {', '.join(choices)}.")
