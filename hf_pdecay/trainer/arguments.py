"""``TrainingArguments`` with the fields of weight decay for any p norm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..optim.optimizer_names import ADAMW_LP, OPTIMIZERS
from ..target.settings import Target
from .optimizer import check_hyperparameters, name_of
from .settings import DecaySettings, split_optim_args
from .training_flags import SETTINGS, DecayFields


@dataclass
class PDecayTrainingArguments(DecayFields, TrainingArguments):
    """``TrainingArguments`` that know the optimizer ``adamw_lp``.

    The fields of :class:`.training_flags.DecayFields` are added; ``--help`` of ``HfArgumentParser`` explains them.
    ``weight_decay`` keeps its meaning. With another ``optim`` the added fields have no effect.

    Args:
        optim: Name of the optimizer, ``"adamw_lp"`` by default, or any name that ``TrainingArguments`` takes.
        optim_args: How the step is computed: ``"backend=foreach,moments=bfloat16"``; see :class:`~hf_pdecay.AdamWLp`.
        optim_target_modules: The modules whose weights decay: ``"all-linear"``, a regular expression for the whole
            name, or a list of parts of names.

    Raises:
        ValueError: If a value is out of its range or the rules cannot be read.
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
        settings = self.decay_settings
        for name in SETTINGS:
            setattr(self, name, getattr(settings, name))
        # The parent casts the name to an enum that need not know this one.
        name = name_of(self)
        if name in OPTIMIZERS:
            self.optim = OptimizerNames.ADAMW_TORCH
            check_hyperparameters(self)
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


def settings_of(args: TrainingArguments) -> DecaySettings | None:
    """Return a run's settings of the decay; None for another optimizer in stock ``TrainingArguments``."""
    if isinstance(args, PDecayTrainingArguments):
        return args.decay_settings
    if name_of(args) not in OPTIMIZERS:
        return None
    return DecaySettings.from_optim_args(args.optim_args, args.optim_target_modules, name_of(args))
