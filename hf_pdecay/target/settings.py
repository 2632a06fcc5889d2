"""What a user sets to ask for a sparsity. A setting is defined once, here or in ``trainer.training_flags``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checks import asked_percent, check_choice, check_p_norm, is_number
from .schedule import SHAPES, Schedule


BUDGETS = ("global", "tensor")


def setting(default: Any, explanation: str, choices: Sequence[str] | None = None) -> Any:
    """Return a dataclass field that ``HfArgumentParser`` reads; the explanation is for ``--help`` and docs/."""
    return field(default=default, metadata={"help": explanation, **({"choices": list(choices)} if choices else {})})


@dataclass
class Target:
    """The settings of a :class:`~hf_pdecay.SparsityControl`; each field's ``metadata["help"]`` explains it.

    Raises:
        ValueError: If a value is out of its range.
    """

    target_sparsity: float | None = setting(
        None,
        "Fraction of exact zeros in the decayed weights at the end, in [0, 1), such as 0.9; of weights that decay as "
        "units the fraction of zero units. It sets lambda_p itself. Unset or 0 for what lambda_p gives.",
    )
    sparsity_begin: float = setting(
        0.1, "Fraction of the run after which zeros begin, for target_sparsity and p_norm_begin."
    )
    sparsity_end: float = setting(
        0.75, "Fraction of the run after which the target is reached. From then on zeros stay."
    )
    sparsity_schedule: str = setting(
        "cubic", "How the sparsity grows in between: cubic (steep at first), linear or cosine.", SHAPES
    )
    sparsity_budget: str = setting(
        "global",
        "What the target holds for: all decayed weights together (global), or each tensor, and each layer of units, "
        "by itself (tensor).",
        BUDGETS,
    )
    # The default is from the figures in docs/choosing.md.
    sparsity_decay: float = setting(
        0.3,
        "Strength of the decay that goes with a target, at least 0: 0 for pruning alone; 1 for the lambda_p at which "
        "half of the weights that are to stay would also be gone by the end if they had no gradient. More helps if "
        "the model would overfit.",
    )
    rate_growth: float = setting(
        0.5,
        "With decay_to=base and a target: the learning rate grows by (1 / share of the weights that may change) to "
        "this power, at 99% and 0.5 to 10 times. 0 for the given rate; 0.5 keeps the length of the whole step.",
    )
    p_norm_begin: float | None = setting(
        None,
        "p at the beginning. It goes to p_norm between sparsity_begin and sparsity_end. Unset for the same p "
        "throughout.",
    )
    keep_zeros: bool = setting(
        False, "Whether decayed weights that are zero at the start stay zero: fine-tunes a sparse model."
    )

    def __post_init__(self) -> None:
        """Check the values; a target of 0 becomes None."""
        self.target_sparsity = check_target(self.target_sparsity)
        begin, end = self.sparsity_begin, self.sparsity_end
        if not (is_number(begin) and is_number(end) and 0 <= begin < end <= 1):
            raise ValueError(
                f"Invalid sparsity_begin, sparsity_end: sparsity_begin={begin!r} and sparsity_end={end!r}; they must "
                "be fractions of the run with 0 <= sparsity_begin < sparsity_end <= 1."
                + (asked_percent(begin) or asked_percent(end))
            )
        check_choice("sparsity_schedule", self.sparsity_schedule, SHAPES)
        check_choice("sparsity_budget", self.sparsity_budget, BUDGETS)
        if not is_number(self.sparsity_decay) or not 0 <= self.sparsity_decay < math.inf:
            raise ValueError(
                f"Invalid sparsity_decay: sparsity_decay={self.sparsity_decay!r}; it must be a finite number of at "
                "least 0, such as 1."
            )
        if not is_number(self.rate_growth) or not 0 <= self.rate_growth <= 1:
            raise ValueError(
                f"Invalid rate_growth: rate_growth={self.rate_growth!r}; it must be a number from 0 to 1, such as 0.5."
            )
        check_p_norms(targeted=self.target_sparsity is not None, p_norm_begin=self.p_norm_begin)
        if not isinstance(self.keep_zeros, bool):
            raise ValueError(f"Invalid keep_zeros: keep_zeros={self.keep_zeros!r}; it must be True or False.")

    def schedule(self, total_steps: int) -> Schedule:
        """Return when a run of ``total_steps`` optimizer steps prunes; raise ValueError for an invalid number."""
        if not is_number(total_steps) or total_steps < 0:
            raise ValueError(f"Invalid total_steps: total_steps={total_steps!r}; it must be the run's number of steps.")
        begin, end = round(self.sparsity_begin * total_steps), round(self.sparsity_end * total_steps)
        return Schedule(begin, end, self.sparsity_schedule)


def check_target(target: float | None, name: str = "target_sparsity") -> float | None:
    """Return a target as a float, None for None and 0; raise ValueError if it is outside [0, 1)."""
    if target is None:
        return None
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 <= target < 1:
        raise ValueError(
            f"Invalid {name}: {name}={target!r}; it must be at least 0 and below 1, such as 0.9 for 90%."
            + asked_percent(target)
        )
    return float(target) or None


def check_p_norms(*, targeted: bool, **p_norms: float | None) -> None:
    """Check values of p, given by their names, for weights with or without a target; None passes.

    Raises:
        ValueError: If one is not a finite number above 0, or is 2 or more with a target.
    """
    for name, value in p_norms.items():
        if value is not None and check_p_norm(value, name) >= 2 and targeted:
            raise ValueError(
                f"Invalid {name}: {name}={value:g} with a target_sparsity; for p >= 2 nothing that decays reaches 0. "
                f"Take {name} below 2, such as 0.8, or no target."
            )
