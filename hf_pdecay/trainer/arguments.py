"""``TrainingArguments`` with the fields of weight decay for any p norm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..optim.optimizer_names import ADAMW_LP, OPTIMIZERS
from ..target.settings import Target
from .optimizer import check_hyperparameters, name_of
from .settings import GIVEN, DecaySettings, split_optim_args
from .training_flags import SETTINGS, DecayFields, misspelt, refuse_misspelt, take_settings


# What TrainingArguments have if a script says nothing; it depends on the release of torch.
_DEFAULTS = ("adamw_torch", "adamw_torch_fused")


@dataclass
class PDecayTrainingArguments(DecayFields, TrainingArguments):
    """``TrainingArguments`` that know the optimizer ``adamw_lp``.

    The fields of :class:`.training_flags.DecayFields` are added; ``--help`` of ``HfArgumentParser`` explains them.
    ``weight_decay`` keeps its meaning. With an ``optim`` that is not one of ours a field that was set is an error,
    because it would have no effect; ``near_zero_threshold`` alone has one.

    Args:
        optim: Name of the optimizer, ``"adamw_lp"`` by default, or any name that ``TrainingArguments`` takes.
        optim_args: How the step is computed: ``"backend=foreach,moments=bfloat16"``; see :class:`~hf_pdecay.AdamWLp`.
        optim_target_modules: The modules whose weights decay: ``"all-linear"``, a regular expression for the whole
            name, or a list of parts of names.

    Raises:
        ValueError: If a value is out of its range, the rules cannot be read, or ``optim`` does not read what was set.
    """

    optim: str = field(
        default=ADAMW_LP,
        metadata={
            "help": "The optimizer: adamw_lp (AdamW with p-norm weight decay) or any other name that HF accepts.",
            "choices": list(dict.fromkeys([*OPTIMIZERS, *(name.value for name in OptimizerNames)])),
        },
    )
    optim_args: str | None = field(
        default=None,
        metadata={
            "help": "How the optimizer computes its step: backend=foreach,moments=bfloat16 for adamw_lp. Others take "
            "options of their own."
        },
    )
    optim_target_modules: None | str | list[str] = field(
        default=None,
        metadata={
            "help": "Which modules' weights decay: all-linear, or a regular expression for a module's whole name; for "
            "GaLore and APOLLO which are optimized."
        },
    )

    def __post_init__(self) -> None:
        """Check the fields; rules become a dict."""
        apply_given(self)
        settings = self.decay_settings
        for name in SETTINGS:
            setattr(self, name, getattr(settings, name))
        # The parent casts the name to an enum that need not know this one.
        name = name_of(self)
        if name in OPTIMIZERS:
            self.optim = OptimizerNames.ADAMW_TORCH
            check_hyperparameters(self)
        else:
            check_unused(self)
        super(Target, self).__post_init__()  # of TrainingArguments, or what is mixed in before it
        if name in OPTIMIZERS:
            self.optim = name

    @property
    def step_options(self) -> dict[str, Any]:
        """How the optimizer computes its step, from ``optim_args``; ValueError if it names something else."""
        known = OPTIMIZERS[name_of(self)].options
        try:
            options = split_optim_args(self.optim_args)
        except ValueError:
            options = {"": ""}
        if not options.keys() <= known.keys():
            takes = " and ".join(f"{name}=NAME" if name in ("backend", "moments") else f"{name}=…" for name in known)
            raise ValueError(
                f"Invalid optim_args: optim_args={self.optim_args!r}; for optim={self.optim!r} it takes "
                f"{takes or 'nothing'}. p_norm, lambda_p and the rest are arguments of their own."
            )
        return dict(options)

    @property
    def decay_settings(self) -> DecaySettings:
        """The settings of the decay as they are now, checked."""
        name = name_of(self)
        ours: dict[str, Any] = {"optim": name, "options": self.step_options} if name in OPTIMIZERS else {}
        values = {name: getattr(self, name) for name in SETTINGS}
        return DecaySettings(**values, **ours, target_modules=self.optim_target_modules)

    def set_optimizer(self, name: str = ADAMW_LP, *args: Any, **kwargs: Any) -> PDecayTrainingArguments:
        """Set the optimizer and its hyperparameters, as ``TrainingArguments.set_optimizer`` does."""
        super().set_optimizer(OptimizerNames.ADAMW_TORCH if name in OPTIMIZERS else name, *args, **kwargs)
        if name in OPTIMIZERS:
            self.optim = name
        return self


def apply_given(args: TrainingArguments) -> None:
    """Put the settings that ``hf-pdecay run`` was given into the arguments of a run; they win over what stands there.

    Hugging Face's default optimizer becomes ``adamw_lp``.

    Raises:
        ValueError: If the run has another optimizer that is not ours, or ``lp_rules`` is JSON and not a file.
    """
    GIVEN.was_read = True
    if GIVEN.unparsed:  # no parser has known them, or there is none
        taken, rest = take_settings(GIVEN.unparsed)
        GIVEN.unparsed = []
        GIVEN.update(taken)
        refuse_misspelt(rest)
    if not GIVEN:
        return
    if name_of(args) not in OPTIMIZERS:
        if name_of(args) not in _DEFAULTS:
            flags = " ".join(f"--{name} {string}" for name, string in GIVEN.items())
            raise ValueError(
                f"Invalid optim: optim={name_of(args)!r} does not read {flags}; give --optim {ours_for(name_of(args))}."
            )
        args.optim = ADAMW_LP
    if isinstance(args, PDecayTrainingArguments):
        for name, string in GIVEN.items():
            setattr(args, name, string)
        return
    if GIVEN.get("lp_rules", "").startswith("{"):
        raise ValueError(
            "Invalid lp_rules: for a script that does not know lp_rules it must be the path of a JSON file, not JSON."
        )
    pairs = split_optim_args(args.optim_args) | GIVEN
    args.optim_args = ",".join(f"{name}={string}" for name, string in pairs.items())


def check_settings(args: TrainingArguments) -> None:
    """Raise ValueError or ImportError for settings of the decay that are invalid or that ``optim`` does not read."""
    if name_of(args) in OPTIMIZERS:
        settings_of(args)
        check_hyperparameters(args)
    else:
        check_unused(args)


def check_unused(args: TrainingArguments, optimizer: str | None = None) -> None:
    """Raise ValueError if settings of the decay were given to a run whose optimizer does not read them.

    Args:
        args: The arguments of the run.
        optimizer: Type of one that a Trainer was given in place of that which ``args.optim`` names.
    """
    unused: list[str] = []
    if isinstance(args, PDecayTrainingArguments):
        values = {key: getattr(args, key) for key in SETTINGS if key != "near_zero_threshold"}
        unused = [f"{key}={value!r}" for key, value in values.items() if value != SETTINGS[key].default]
    if not unused:
        pairs = (pair.strip() for pair in str(args.optim_args or "").split(","))
        unused = [pair for pair in pairs if misspelt(pair.partition("=")[0].strip()) is not None]
    if not unused:
        return
    what = f"does not read {', '.join(unused)}, so the model would be dense"
    name = name_of(args)
    if optimizer is None:
        raise ValueError(f"Invalid optim: optim={name!r} {what}; give optim={ours_for(name)!r}.")
    raise ValueError(
        f"Invalid optimizers: the {optimizer} that the Trainer was given {what}; give none, or wrap it "
        "in hf_pdecay.LpDecay."
    )


def ours_for(name: str) -> str:
    """Return the name of our optimizer that stands for one of Hugging Face's, ``adamw_lp`` without a nearer one."""
    family = name.removeprefix("paged_").removesuffix("_32bit").replace("adamw_8bit", "adamw_bnb_8bit")
    near = (f"{family}_lp", f"{family.removesuffix('_8bit')}_lp")
    return next((known for known in near if known in OPTIMIZERS), ADAMW_LP)


def settings_of(args: TrainingArguments) -> DecaySettings | None:
    """Return a run's settings of the decay; None for another optimizer in stock ``TrainingArguments``."""
    if isinstance(args, PDecayTrainingArguments):
        return args.decay_settings
    if name_of(args) not in OPTIMIZERS:
        return None
    return DecaySettings.from_optim_args(args.optim_args, args.optim_target_modules, name_of(args))
