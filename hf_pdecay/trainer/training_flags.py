"""What a user sets for the decay, beside the target.

A new field here or in ``Target`` is a new setting everywhere: ``HfArgumentParser``, ``optim_args``, the flags of
``hf-pdecay preview``, the card and the tables in docs/ read the fields of :class:`DecayFields`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from ..checks import check_choice, check_lambda_p, check_p_norm, is_number
from ..optim.defaults import LAMBDA_P, P_NORM
from ..sparsity.defaults import NEAR_ZERO_THRESHOLD
from ..target.settings import Target, check_p_norms, setting


SPARSITY_LOGGING = ("overall", "layer")

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
# How a string becomes a value of a type, and which strings are valid.
_READERS: dict[type, Any] = {
    float: (float, "a number"),
    int: (int, "a whole number"),
    bool: (lambda string: _BOOLEANS[string.lower()], "true or false"),
}


@dataclass
class DecayFields(Target):
    """All settings of the decay that are fields of ``PDecayTrainingArguments``; ``metadata["help"]`` explains each."""

    p_norm: float = setting(P_NORM, "p of the norm, above 0. Below 2 weights become exactly zero.")
    lambda_p: float | None = setting(
        None,
        "Strength of the p-norm decay, at least 0; 0 is AdamW. The penalty is (lambda_p / p) times the sum of the "
        f"weights' magnitudes to the power p. A target sets it itself. Unset for {LAMBDA_P:g}; beside targets in "
        "lp_rules, unset for no decay of what no rule takes.",
    )
    lp_rules: dict | str | None = setting(
        None,
        "Rules by parameter name, as JSON text or a JSON file: "
        '{"regex": {"p_norm": 0.5, "lambda_p": 0.02}, "mlp": {"target_sparsity": 0.9, "group": "neuron"}, '
        '"other": "off"}. The first match wins.',
    )
    skip_nonfinite: bool = setting(True, "Whether a step with NaN or infinite gradients is skipped and counted.")
    sparsity_logging: str = setting(
        "overall", "What sparsity to log: overall, or layer for that of each decayed tensor as well.", SPARSITY_LOGGING
    )
    near_zero_threshold: float = setting(
        NEAR_ZERO_THRESHOLD, "Magnitude below which a non-zero weight counts as near zero in reports."
    )

    def __post_init__(self) -> None:
        """Check the values; strings, as YAML makes of ``1e-4``, become numbers and booleans."""
        for name in SETTINGS:
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, read_setting(name, value))
        super().__post_init__()
        self.p_norm = check_p_norm(self.p_norm)
        self.lambda_p = None if self.lambda_p is None else check_lambda_p(self.lambda_p)
        check_p_norms(targeted=self.target_sparsity is not None, p_norm=self.p_norm)
        if not isinstance(self.skip_nonfinite, bool):
            raise ValueError(
                f"Invalid skip_nonfinite: skip_nonfinite={self.skip_nonfinite!r}; it must be True or False."
            )
        check_choice("sparsity_logging", self.sparsity_logging, SPARSITY_LOGGING)
        if not is_number(self.near_zero_threshold) or not self.near_zero_threshold >= 0:
            raise ValueError(
                f"Invalid near_zero_threshold: near_zero_threshold={self.near_zero_threshold!r}; it must be a number "
                "of at least 0."
            )


SETTINGS = {field.name: field for field in fields(DecayFields)}
"""The settings by name, each with ``default`` and ``metadata``."""

_TYPES = get_type_hints(DecayFields)


def read_setting(name: str, string: str) -> Any:
    """Return a setting's value from a string such as ``"0.8"`` or ``"none"``; ValueError if it is not of its type."""
    kinds = get_args(_TYPES[name]) or (_TYPES[name],)
    if type(None) in kinds and string.lower() == "none":
        return None
    if kinds[0] not in _READERS:
        return string
    read, right = _READERS[kinds[0]]
    try:
        return read(string)
    except (ValueError, KeyError):
        raise ValueError(f"Invalid {name}: {name}={string!r}; it must be {right}.") from None
