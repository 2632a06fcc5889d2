"""``lp_rules``, read and checked; needs no model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..checks import check_choice, check_lambda_p, check_p_norm
from ..low_bit.grid import check_width
from ..optim.bases import DECAY_TO
from ..optim.unit_kinds import ELEMENT
from ..target.budgets import implied_target
from ..target.settings import check_target


RuleSpec = Mapping[str, Any]

# What is escaped, a set of characters, or a dot that is not repeated.
_ESCAPE_SET_OR_DOT = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\.(?![*+?{])", re.DOTALL)

_DECAY_KEYS = ("p_norm", "lambda_p", "target_sparsity", "group", "decay_to")
_BITS_KEYS = ("weight_bits", "activation_bits")
_RULE_KEYS = (*_DECAY_KEYS, *_BITS_KEYS)


@dataclass(frozen=True)
class Rule:
    """One entry of ``lp_rules``; p, λ_p and what weights decay to are those of the run if None.

    Args:
        text: The pattern, a regular expression.
        target_sparsity: Fraction of zeros, or of unchanged weights, in the parameters that it matches; None for a share
            in the target of the run; 0 to leave them to their λ_p.
        off: Whether they do not decay.
        sets_decay: Whether it says how they decay, or that they do not. If not, a later rule or the run does.
        bits: What it says of ``weight_bits`` and ``activation_bits``; None for those of the dtype.
    """

    text: str
    p_norm: float | None = None
    lambda_p: float | None = None
    target_sparsity: float | None = None
    group: str = ELEMENT
    decay_to: str | None = None
    off: bool = False
    sets_decay: bool = True
    bits: Mapping[str, float | None] = field(default_factory=dict, hash=False)

    def matches(self, name: str) -> bool:
        """Whether the pattern is found in a name; a dot without a quantifier stands for itself, as names have dots."""
        text = self.text
        if text != ".":
            text = _ESCAPE_SET_OR_DOT.sub(lambda part: r"\." if part[0] == "." else part[0], text)
        return re.search(text, name) is not None

    @property
    def targeted(self) -> bool:
        """Whether its weights have a target of their own."""
        implied = implied_target(self.group, None) is not None and self.target_sparsity is None
        return bool(self.target_sparsity) or implied


def load_rules(spec: str | RuleSpec | None) -> dict[str, Any]:
    """Read and check ``lp_rules``; return them as a plain dict in their order, in which the first match wins.

    Args:
        spec: A JSON string that starts with ``{``, the path of a JSON file, a mapping, or None for no rules. Keys are
            regular expressions over parameter names; values are ``"off"`` or objects with ``p_norm``, ``lambda_p``,
            ``target_sparsity``, ``group``, ``decay_to``, ``weight_bits`` and ``activation_bits``.

    Raises:
        ValueError: If the file is missing or not JSON, a pattern does not compile, a key appears twice, or a key or
            value is unknown.
    """
    if spec is None:
        return {}
    if isinstance(spec, str):
        text, where = spec, "the given string"
        if not spec.lstrip().startswith(("{", "[")):
            where = spec
            try:
                text = Path(spec).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"Invalid lp_rules: cannot read the file {spec!r} ({error}); give a JSON file, or a JSON string "
                    "that starts with '{'."
                ) from error
        try:
            spec = json.loads(text, object_pairs_hook=partial(_once, where))
        except json.JSONDecodeError as error:
            raise ValueError(
                f'Invalid lp_rules: {where} is not JSON ({error}); valid would be {{"attn": {{"p_norm": 0.5}}}}.'
            ) from error
    if not isinstance(spec, Mapping):
        raise ValueError(f"Invalid lp_rules: lp_rules={spec!r}; it must be a JSON object of pattern → settings.")
    rules = dict(spec)
    parse_rules(rules)
    return rules


def _once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, whose keys must differ: json would silently take the last of equal keys."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"Invalid lp_rules: {where} has {key!r} twice in one object; give it once.")
        result[key] = value
    return result


def parse_rules(rules: RuleSpec) -> list[Rule]:
    """Turn rules into :class:`Rule` objects, in their order; raise ValueError if one is invalid."""
    return [_parse_rule(pattern, settings) for pattern, settings in rules.items()]


def _parse_rule(pattern: str, settings: Any) -> Rule:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"Invalid lp_rules: the pattern {pattern!r} is not a regular expression ({error}).") from error
    if settings == "off":
        return Rule(pattern, off=True)
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"Invalid lp_rules: {pattern!r} has the value {settings!r}; it must be 'off' or an object with "
            f"{', '.join(_RULE_KEYS)}."
        )
    unknown = [key for key in settings if key not in _RULE_KEYS]
    if unknown:
        raise ValueError(
            f"Invalid lp_rules: {pattern!r} has the unknown key {unknown[0]!r}; known keys are {', '.join(_RULE_KEYS)}."
        )
    try:
        group, target = settings.get("group", ELEMENT), settings.get("target_sparsity")
        implied_target(group, target)
        widths = {key: settings[key] for key in _BITS_KEYS if key in settings}
        if "decay_to" in settings:
            check_choice("decay_to", settings["decay_to"], DECAY_TO)
        return Rule(
            pattern,
            group=group,
            decay_to=settings.get("decay_to"),
            p_norm=check_p_norm(settings["p_norm"]) if "p_norm" in settings else None,
            lambda_p=check_lambda_p(settings["lambda_p"]) if "lambda_p" in settings else None,
            target_sparsity=None if target is None else check_target(target) or 0.0,
            sets_decay=not settings or any(key in settings for key in _DECAY_KEYS),
            bits={key: None if width is None else check_width(width, key) for key, width in widths.items()},
        )
    except ValueError as error:
        raise ValueError(f"Invalid lp_rules: {pattern!r}: {error}") from error
