"""The settings of a run's decay, whether they were given as fields or in ``optim_args``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..one_shot.methods import METHODS
from ..optim.bases import BASE, ZERO
from ..optim.defaults import LAMBDA_P
from ..optim.optimizer_names import ADAMW_LP, OPTIMIZERS, parse_options
from ..rules.spec import load_rules, parse_rules
from ..target.settings import Target
from .training_flags import SETTINGS, DecayFields, read_setting


class _Given(dict[str, str]):
    """Settings as strings.

    Attributes:
        unparsed: Words of a script's command line that no argparse parser has known yet.
        was_read: Whether arguments of a run have been made, which read them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unparsed: list[str] = []
        self.was_read = False


GIVEN = _Given()
"""Settings that ``hf-pdecay run`` was given as flags, for the arguments of every run in this process."""

# Settings that change no weight, and rules, which take too much room.
_NOT_ON_CARDS = ("lp_rules", "skip_nonfinite", "sparsity_logging", "near_zero_threshold")


@dataclass
class DecaySettings(DecayFields):
    """All that a run sets for the decay, checked: ValueError for a bad value, ImportError for a missing package.

    Args:
        optim: Name of the optimizer, one of :data:`.optim.optimizer_names.OPTIMIZERS`.
        options: Options of that optimizer, as strings: ``{"moments": "bfloat16"}``.
        target_modules: ``optim_target_modules``: the modules whose weights decay; None for the default.
    """

    optim: str = ADAMW_LP
    options: Mapping[str, str] = field(default_factory=dict)
    target_modules: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check the values; rules become a dict, or None if there are none."""
        super().__post_init__()
        self.lp_rules = load_rules(self.lp_rules) or None
        parse_options(self.optim, self.options)
        self._check_to_base()

    def _check_to_base(self) -> None:
        if not self.to_base:
            if self.base_from is not None:
                raise ValueError(
                    f"Invalid base_from: base_from={self.base_from!r} without decay_to='base' has no effect; give that."
                )
            return
        rules = parse_rules(self.lp_rules) if isinstance(self.lp_rules, dict) else []
        for name in ("weight_bits", "activation_bits"):
            width = getattr(self, name) or next((rule.bits[name] for rule in rules if rule.bits.get(name)), None)
            if width is not None:
                raise ValueError(
                    f"Invalid {name}: {name}={width:g} with decay_to='base': what is rounded to few bits equals its "
                    f"base nowhere. Leave {name} out, or take decay_to='zero'."
                )
        if self.one_shot in METHODS:
            raise ValueError(
                f"Invalid one_shot: one_shot={self.one_shot!r} with decay_to='base': pruning at once makes zeros, not "
                "unchanged weights. Leave it out; the schedule brings the run to its target."
            )
        if self.optim == "schedule_free_adamw_lp":
            raise ValueError(
                f"Invalid optim: optim={self.optim!r} with decay_to='base': schedule-free optimizers save other "
                "weights than they step. Take optim='adamw_lp'."
            )

    @property
    def to_base(self) -> bool:
        """Whether weights decay to their base, in the whole run or by a rule."""
        rules = parse_rules(self.lp_rules) if isinstance(self.lp_rules, dict) else []
        return self.decay_to == BASE or any(rule.decay_to == BASE for rule in rules)

    @classmethod
    def from_optim_args(
        cls,
        optim_args: str | None,
        target_modules: str | Sequence[str] | None = None,
        optim: str = ADAMW_LP,
        **flags: str,
    ) -> DecaySettings:
        """Read settings and optimizer options from ``optim_args``; ``lp_rules`` is the path of a JSON file there.

        ``flags`` are settings as strings, which win over ``optim_args``; their ``lp_rules`` may be JSON.
        """
        given = split_optim_args(optim_args)
        known = [*SETTINGS, *OPTIMIZERS[optim].options]
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}? Known keys" if near else "known keys"
                raise ValueError(
                    f"Invalid optim_args: the key {key!r} in optim_args={optim_args!r} is not known; {hint} are "
                    f"{', '.join(known)}."
                )
        if given.get("lp_rules", "").startswith(("{", "[")):
            raise ValueError(
                f"Invalid lp_rules in optim_args: lp_rules={given['lp_rules']!r}; commas separate the keys of "
                "optim_args, so it must be the path of a JSON file here."
            )
        values = {key: read_setting(key, string) for key, string in (given | flags).items() if key in SETTINGS}
        options = {key: string for key, string in given.items() if key not in SETTINGS}
        return cls(**values, optim=optim, options=options, target_modules=target_modules)

    @property
    def strength(self) -> float:
        """λ_p of what decays without a target or a λ_p of its own."""
        return LAMBDA_P if self.lambda_p is None else self.lambda_p

    @property
    def effective(self) -> dict[str, Any]:
        """The settings that have an effect, for the card."""
        idle = {*_NOT_ON_CARDS}
        if self.p_norm_begin is None:
            idle.add("p_norm_begin")
        rules = parse_rules(self.lp_rules) if isinstance(self.lp_rules, dict) else []
        of_rules = any(rule.targeted for rule in rules)
        if self.target_sparsity is not None or (self.lambda_p is None and of_rules):
            idle.add("lambda_p")
        if self.target_sparsity is None:
            idle.add("target_sparsity")
        if self.target_sparsity is None and not of_rules:
            between = {"sparsity_begin", "sparsity_end"} if self.p_norm_begin is not None else set()
            idle |= {field.name for field in fields(Target)} - {"keep_zeros", "p_norm_begin", *between}
            idle.add("one_shot")
        idle |= {name for name in ("weight_bits", "activation_bits") if getattr(self, name) is None}
        if self.decay_to == ZERO:
            idle.add("decay_to")
        idle.add("one_shot" if self.to_base else "rate_growth")
        if self.base_from is None:
            idle.add("base_from")
        if self.teacher is None:
            idle |= {name for name in SETTINGS if name.startswith("teacher")}
        values = {name: getattr(self, name) for name in SETTINGS} | {"lambda_p": self.strength}
        return {name: value for name, value in values.items() if name not in idle} | dict(self.options)


def split_optim_args(optim_args: str | None) -> dict[str, str]:
    """Split ``"KEY=VALUE,KEY=VALUE"``; ValueError if a key or a value is missing, or a key is given twice."""
    if optim_args is not None and not isinstance(optim_args, str):
        raise ValueError(
            f"Invalid optim_args: optim_args={optim_args!r}; it must be a string such as "
            "'p_norm=0.8,target_sparsity=0.9'."
        )
    pairs: dict[str, str] = {}
    for pair in (optim_args or "").split(","):
        key, _, value = (side.strip() for side in pair.partition("="))
        if not pair.strip():
            continue
        if not key or not value:
            raise ValueError(
                f"Invalid optim_args: {pair.strip()!r} in optim_args={optim_args!r} is not KEY=VALUE; right would be "
                "p_norm=0.8,target_sparsity=0.9."
            )
        if key in pairs:
            raise ValueError(f"Invalid optim_args: optim_args={optim_args!r} has {key!r} twice; give it once.")
        pairs[key] = value
    return pairs
