"""The settings of the decay, whichever way they were given: as fields of their own, or in ``optim_args``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..checks import check_lambda_p, check_p_norm, is_number
from ..optim.named import ADAMW_LP, OPTIMIZERS, parse_options
from ..rules.spec import load_rules
from ..target.budgets import check_budget, check_p_norms, check_target
from ..target.control import DECAY, check_decay
from ..target.schedule import BEGIN, END, check_schedule


SPARSITY_LOGGING = ("overall", "layer")

_GIVEN_ELSEWHERE = ("optim", "options", "target_modules")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class DecaySettings:
    """What a run asks of the decay, checked.

    Args:
        p_norm: These, up to ``near_zero_threshold``, are the fields of
            :class:`~hf_pdecay.PDecayTrainingArguments`, which explains them.
        lambda_p: See there.
        target_sparsity: See there; None for none.
        sparsity_begin: See there.
        sparsity_end: See there.
        sparsity_schedule: See there.
        sparsity_budget: See there.
        sparsity_decay: See there.
        p_norm_begin: See there; None for the same p throughout.
        keep_zeros: See there.
        lp_rules: See there; becomes a dict, or None for none.
        skip_nonfinite: See there.
        sparsity_logging: See there.
        near_zero_threshold: See there.
        optim: Which optimizer, one of :data:`.optim.named.OPTIMIZERS`.
        options: What that one takes beside the decay, as texts: ``{"moments": "bfloat16"}``.
        target_modules: Hugging Face's ``optim_target_modules``: which modules' weights decay, None for all that do by
            default.

    Raises:
        ValueError: If a value is out of its range or the rules cannot be read.
        ImportError: If the optimizer or an option of it needs a package that is not installed.
    """

    p_norm: float = 0.8
    lambda_p: float = 0.01
    target_sparsity: float | None = None
    sparsity_begin: float = BEGIN
    sparsity_end: float = END
    sparsity_schedule: str = "cubic"
    sparsity_budget: str = "global"
    sparsity_decay: float = DECAY
    p_norm_begin: float | None = None
    keep_zeros: bool = False
    lp_rules: dict | str | None = None
    skip_nonfinite: bool = True
    sparsity_logging: str = "overall"
    near_zero_threshold: float = 1e-13
    optim: str = ADAMW_LP
    options: Mapping[str, str] = field(default_factory=dict)
    target_modules: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check, and bring to the types that are declared."""
        # The dataclass is frozen for others.
        object.__setattr__(self, "p_norm", check_p_norm(self.p_norm))
        object.__setattr__(self, "lambda_p", check_lambda_p(self.lambda_p))
        object.__setattr__(self, "lp_rules", load_rules(self.lp_rules) or None)
        object.__setattr__(self, "target_sparsity", check_target(self.target_sparsity))
        check_schedule(self.sparsity_begin, self.sparsity_end, self.sparsity_schedule)
        check_budget(self.sparsity_budget)
        check_decay(self.sparsity_decay)
        check_p_norms(self.p_norm, self.p_norm_begin, targeted=self.target_sparsity is not None)
        for name in ("keep_zeros", "skip_nonfinite"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Invalid {name}: {name}={getattr(self, name)!r}; it must be True or False.")
        if self.sparsity_logging not in SPARSITY_LOGGING:
            raise ValueError(
                f"Invalid sparsity_logging: sparsity_logging={self.sparsity_logging!r}; it must be one of "
                f"{', '.join(SPARSITY_LOGGING)}."
            )
        if not is_number(self.near_zero_threshold) or not self.near_zero_threshold >= 0:
            raise ValueError(
                f"Invalid near_zero_threshold: near_zero_threshold={self.near_zero_threshold!r}; it must be a number "
                "of at least 0."
            )
        parse_options(self.optim, self.options)

    @classmethod
    def from_optim_args(
        cls, optim_args: str | None, target_modules: str | Sequence[str] | None = None, optim: str = ADAMW_LP
    ) -> DecaySettings:
        """Read ``optim_args``: ``"p_norm=0.8,target_sparsity=0.9"``, with ``lp_rules`` as the path of a JSON file.

        Args:
            optim_args: Text of ``KEY=VALUE``, separated by commas; the keys are the arguments of this class and the
                options of the optimizer.
            target_modules: ``optim_target_modules``.
            optim: Which optimizer.

        Raises:
            ValueError: If a key is not known or is there twice, or a value is not of its type or out of its range.
            ImportError: If the optimizer or an option of it needs a package that is not installed.
        """
        if optim_args is not None and not isinstance(optim_args, str):
            raise ValueError(
                f"Invalid optim_args: optim_args={optim_args!r}; it must be a text such as "
                "'p_norm=0.8,target_sparsity=0.9'."
            )
        kinds = {each.name: str(each.type) for each in fields(cls) if each.name not in _GIVEN_ELSEWHERE}
        known = [*kinds, *OPTIMIZERS[optim].options]
        given = split_optim_args(optim_args)
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}? Known keys" if near else "known keys"
                raise ValueError(
                    f"Invalid optim_args: the key {key!r} in optim_args={optim_args!r} is not known; {hint} are "
                    f"{', '.join(known)}."
                )
        values = {key: _value(key, text, kinds[key]) for key, text in given.items() if key in kinds}
        options = {key: text for key, text in given.items() if key not in kinds}
        return cls(**values, optim=optim, options=options, target_modules=target_modules)

    @property
    def control_options(self) -> dict[str, Any]:
        """Keyword arguments of :class:`~hf_pdecay.target.control.SparsityControl`."""
        names = ("target_sparsity", "sparsity_begin", "sparsity_end", "sparsity_schedule", "sparsity_budget")
        return {name: getattr(self, name) for name in (*names, "sparsity_decay", "p_norm_begin", "keep_zeros")}

    @property
    def effective(self) -> dict[str, Any]:
        """The settings that have an effect, for the card."""
        names = ["p_norm", "keep_zeros"]
        control = ["sparsity_begin", "sparsity_end", "sparsity_schedule"]
        if self.p_norm_begin is not None:
            names += ["p_norm_begin", *control[:2]]
        names += (
            ["lambda_p"]
            if self.target_sparsity is None
            else ["target_sparsity", *control, "sparsity_budget", "sparsity_decay"]
        )
        return {name: getattr(self, name) for name in dict.fromkeys(names)} | dict(self.options)


SETTINGS = tuple(each.name for each in fields(DecaySettings) if each.name not in _GIVEN_ELSEWHERE)
"""Names of the settings that ``optim_args`` can give, whatever the optimizer."""


def split_optim_args(optim_args: str | None) -> dict[str, str]:
    """Split ``"KEY=VALUE,KEY=VALUE"`` into keys and values, as texts; blanks around them do not count.

    Raises:
        ValueError: If a part has no key or no value, or a key is there twice.
    """
    found: dict[str, str] = {}
    for part in (optim_args or "").split(","):
        key, _, value = (each.strip() for each in part.partition("="))
        if not part.strip():
            continue
        if not key or not value:
            raise ValueError(
                f"Invalid optim_args: {part.strip()!r} in optim_args={optim_args!r} is not KEY=VALUE; right would be "
                "p_norm=0.8,target_sparsity=0.9."
            )
        if key in found:
            raise ValueError(f"Invalid optim_args: optim_args={optim_args!r} has {key!r} twice; give it once.")
        found[key] = value
    return found


def _value(key: str, text: str, kind: str) -> Any:
    """The value of a key, from its text."""
    if "None" in kind and text.lower() == "none":
        return None
    if "float" in kind:
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"Invalid {key} in optim_args: {key}={text!r}; it must be a number.") from None
    if kind == "bool":
        if text.lower() not in _BOOLEANS:
            raise ValueError(f"Invalid {key} in optim_args: {key}={text!r}; it must be true or false.")
        return _BOOLEANS[text.lower()]
    if key == "lp_rules" and text.startswith(("{", "[")):
        raise ValueError(
            f"Invalid lp_rules in optim_args: lp_rules={text!r}; commas part the keys of optim_args, so it must be "
            "the path of a JSON file here."
        )
    return text
