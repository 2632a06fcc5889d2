"""What a user sets for the decay, beside the target.

A new field here or in ``Target`` is a new setting everywhere: ``HfArgumentParser``, ``optim_args``, the flags of
``hf-pdecay preview``, the card and the tables in docs/ read the fields of :class:`DecayFields`.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_type_hints

from ..checks import asked_percent, check_choice, check_lambda_p, check_p_norm, is_number
from ..low_bit.grid import check_width
from ..one_shot.methods import AUTO, METHODS, OFF
from ..optim.bases import DECAY_TO, ZERO
from ..optim.defaults import LAMBDA_P, P_NORM
from ..sparsity.defaults import NEAR_ZERO_THRESHOLD
from ..target.settings import Target, check_p_norms, setting


SPARSITY_LOGGING = ("overall", "layer")
TEACHER_DTYPES = ("bfloat16", "float16", "float32")

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
    decay_to: str = setting(
        ZERO,
        "What weights decay to: zero, or base, the weights with which training starts. With base their change decays, "
        "of all trained weights, and target_sparsity is the fraction that ends bit-identical to the base. save_model "
        "writes the others into the subfolder delta.",
        DECAY_TO,
    )
    base_from: str | None = setting(
        None,
        "A folder or a name on the Hub with the base of decay_to=base, in safetensors with the shapes and dtype of the "
        "model. Unset for the weights with which training starts.",
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
    one_shot: str = setting(
        AUTO,
        "How a language model is pruned at once, to the target or half of its weights, halfway from sparsity_begin to "
        "sparsity_end: fisher, sparsegpt, wanda or magnitude, as by hf-pdecay prune, from rows of the training data. "
        "off prunes step by step. auto is fisher for a pretrained causal language model, and off for others "
        "and beside weight_bits.",
        (AUTO, OFF, *METHODS),
    )
    weight_bits: float | None = setting(
        None,
        "Bits of the weights: 8, 4, 2, 1.58 (the codes -1, 0 and 1) or 1. They are rounded in each forward pass, in "
        "blocks of 128 along the inputs (arXiv 2409.09245), and the model that is saved is rounded. Embeddings and "
        "heads are left alone unless lp_rules names them. Unset for no rounding.",
    )
    activation_bits: float | None = setting(
        None,
        "Bits of the inputs of the layers whose weights weight_bits would round: 8, 4, 2, 1.58 or 1. They are rounded "
        "in each forward pass, in blocks of 128 features, with or without weight_bits. A saved model computes so after "
        "hf_pdecay.round_activations(model). Unset for no rounding.",
    )
    teacher: str | None = setting(
        None,
        "A model to learn from beside the data: a folder, a name on the Hub, or self for the weights before training. "
        "The loss becomes teacher_task times the ordinary one, plus teacher_logits times KL(teacher, model), plus "
        "teacher_hidden times the error of the hidden states. Unset for none.",
    )
    teacher_task: float = setting(1.0, "Weight of the ordinary loss beside a teacher, at least 0.")
    teacher_logits: float = setting(
        1.0,
        "Weight of T² KL(softmax(teacher's logits / T), softmax(model's logits / T)), the mean over the tokens or rows "
        "that have a label, at least 0 (arXiv 1503.02531).",
    )
    teacher_temperature: float = setting(
        1.0, "T of teacher_logits, above 0. Above 1 the teacher's small probabilities count for more."
    )
    teacher_hidden: float | None = setting(
        None,
        "Weight of SquareHead, the squared error of the hidden states over the teacher's squares, as the mean over "
        "layers and over tokens without padding, at least 0 (arXiv 2310.06927). Unset for 1, or for 0 if the teacher "
        "has another depth or width, or with teacher_cache.",
    )
    teacher_dtype: str | None = setting(
        None,
        "In what the teacher's weights are kept: bfloat16, float16 or float32. Unset for what the model's are kept in.",
        TEACHER_DTYPES,
    )
    teacher_cache: str | None = setting(
        None,
        "A folder that keeps what the teacher says of each row, so that later epochs and runs need not ask it again: "
        "the 64 largest probabilities of each token that has a label, and the sum of the others. Hidden "
        "states are not learned then. Unset for none.",
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
        self._check_base()
        check_choice("sparsity_logging", self.sparsity_logging, SPARSITY_LOGGING)
        if not is_number(self.near_zero_threshold) or not self.near_zero_threshold >= 0:
            raise ValueError(
                f"Invalid near_zero_threshold: near_zero_threshold={self.near_zero_threshold!r}; it must be a number "
                "of at least 0."
            )
        check_choice("one_shot", self.one_shot, (AUTO, OFF, *METHODS))
        for name in ("weight_bits", "activation_bits"):
            width = getattr(self, name)
            setattr(self, name, None if width is None else check_width(width, name))
        self._check_teacher()

    def _check_base(self) -> None:
        check_choice("decay_to", self.decay_to, DECAY_TO)
        if self.base_from is not None and (not isinstance(self.base_from, str) or not self.base_from):
            raise ValueError(
                f"Invalid base_from: base_from={self.base_from!r}; it must be a folder or a name on the Hub."
            )

    def _check_teacher(self) -> None:
        if self.teacher is None:
            names = [name for name in SETTINGS if name.startswith("teacher_")]
            given = [name for name in names if getattr(self, name) != SETTINGS[name].default]
            if given:
                raise ValueError(
                    f"Invalid {given[0]}: {given[0]}={getattr(self, given[0])!r} without a teacher has no effect; give "
                    "teacher='self', or a folder or name of a model."
                )
            return
        if not isinstance(self.teacher, str) or not self.teacher:
            raise ValueError(
                f"Invalid teacher: teacher={self.teacher!r}; it must be 'self', or a folder or name of a model."
            )
        weights = {name: getattr(self, name) for name in ("teacher_task", "teacher_logits", "teacher_hidden")}
        for name, weight in weights.items():
            if weight is None and name == "teacher_hidden":
                continue
            if not is_number(weight) or not 0 <= weight < math.inf:
                raise ValueError(f"Invalid {name}: {name}={weight!r}; it must be a finite number of at least 0, as 1.")
        if self.teacher_logits == 0 and self.teacher_hidden == 0:
            raise ValueError(
                f"Invalid teacher: teacher={self.teacher!r} with teacher_logits=0 and teacher_hidden=0 teaches "
                "nothing; give one of the two a weight, such as 1, or no teacher."
            )
        if not is_number(self.teacher_temperature) or not 0 < self.teacher_temperature < math.inf:
            raise ValueError(
                f"Invalid teacher_temperature: teacher_temperature={self.teacher_temperature!r}; it must be a finite "
                "number above 0, such as 1."
            )
        if self.teacher_dtype is not None:
            check_choice("teacher_dtype", self.teacher_dtype, TEACHER_DTYPES)
        if self.teacher_cache is None:
            return
        if not isinstance(self.teacher_cache, str) or not self.teacher_cache:
            raise ValueError(f"Invalid teacher_cache: teacher_cache={self.teacher_cache!r}; it must be a folder.")
        if self.teacher_hidden:
            raise ValueError(
                f"Invalid teacher_hidden: teacher_hidden={self.teacher_hidden!r} with teacher_cache="
                f"{self.teacher_cache!r}, which keeps no hidden states; set teacher_hidden=0."
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
        asked = ""
        if read is float and string.endswith("%"):
            with suppress(ValueError):
                asked = asked_percent(float(string[:-1]))
        raise ValueError(f"Invalid {name}: {name}={string!r}; it must be {right}.{asked}") from None


# With these a value of any setting can be checked alone.
_WHOLE_RUN = DecayFields(sparsity_begin=0.0, sparsity_end=1.0, teacher="self")


def check_alone(name: str, value: Any) -> None:
    """Raise ValueError if a setting cannot have a value, whatever the other settings are."""
    replace(_WHOLE_RUN, **{name: value})


def take_settings(
    words: Sequence[str], known: Collection[str] = (), *, until_script: bool = False
) -> tuple[dict[str, str], list[str]]:
    """Part the words of a command line into settings of the decay, by name, and the rest.

    Args:
        words: The words, in which ``--target_sparsity`` may also be ``--target-sparsity``, and a switch needs no value.
        known: Flags that another parser knows, which stay in the rest.
        until_script: Whether all from the first word on that is neither a flag nor its value, or is ``-m``, is rest.

    Raises:
        ValueError: If a value is missing or wrong.
    """
    given: dict[str, str] = {}
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        flag, equals, string = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if word == "--" or (until_script and (word == "-m" or not word.startswith("-"))):
            return given, [*rest, word, *left]
        if not flag.startswith("--") or name not in SETTINGS or flag in known:
            rest.append(word)
            continue
        if not equals:
            switch = _TYPES[name] is bool
            has_value = bool(left) and (left[0].lower() in _BOOLEANS if switch else not left[0].startswith("--"))
            if not has_value and not switch:
                raise ValueError(f"Invalid {name}: {flag} has no value; give it as {flag}=VALUE.")
            string = left.pop(0) if has_value else "true"
        check_alone(name, string)
        given[name] = string
    return given, rest


def refuse_misspelt(words: Iterable[str]) -> None:
    """Raise ValueError if a flag that nothing knows is like one of the settings."""
    for word in itertools.takewhile(lambda word: word != "--", words):
        flag = word.partition("=")[0]
        if not flag.startswith("--"):
            continue
        near = misspelt(flag.removeprefix("--").replace("-", "_"))
        if near is not None:
            raise ValueError(f"Invalid {flag}: nothing knows it; did you mean --{near}?")


def misspelt(name: str) -> str | None:
    """Return the setting that a name which is none is very like; None without one."""
    near = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.85)
    return near[0] if near else None
