"""``TrainingArguments`` with the fields of weight decay for any p norm."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..optim.named import ADAMW_LP, OPTIMIZERS
from ..target.budgets import BUDGETS
from ..target.schedule import SHAPES
from .optimizer import check_hyperparameters, name_of
from .settings import SPARSITY_LOGGING, DecaySettings, split_optim_args


@dataclass
class PDecayTrainingArguments(TrainingArguments):
    """``TrainingArguments`` that know the optimizer ``adamw_lp``.

    Only the parameters of its own are listed; all others are those of ``transformers.TrainingArguments``.
    ``weight_decay`` keeps its meaning. With another ``optim`` the fields below have no effect.

    Args:
        > Parameters that control the decay

        optim: Name of the optimizer, ``"adamw_lp"`` by default, or any name that ``TrainingArguments`` takes.
        p_norm: p of the norm, above 0. Below 2 weights become exactly zero; 0.8 by default.
        lambda_p: λ_p, at least 0; 0.01 by default. The penalty is (λ_p / p) ‖w‖_p^p. A target sets λ_p itself.
        target_sparsity: Fraction of exact zeros in the decayed weights at the end, in [0, 1), such as 0.9; unset or 0
            for what λ_p gives.
        sparsity_begin: Fraction of the run after which zeros begin; 0.1 by default.
        sparsity_end: Fraction of the run after which the target is reached; 0.75 by default. From then on zeros stay.
        sparsity_schedule: How the sparsity grows in between: ``"cubic"`` (steep at first), ``"linear"`` or
            ``"cosine"``.
        sparsity_budget: What the target is for: ``"global"``, all decayed weights together, or ``"tensor"``, each.
        sparsity_decay: How strong the decay is that goes with a target, 0.3 by default. 1 stands for the λ_p by
            which half of the weights that are to stay would be gone by the end too, had they no gradient; 0 for cuts
            alone. More helps where the data are few and the model would overfit.
        p_norm_begin: p at the beginning, from where it goes to ``p_norm`` between ``sparsity_begin`` and
            ``sparsity_end``; unset for the same p throughout.
        keep_zeros: Whether decayed weights that are zero at the start stay zero.
        lp_rules: Rules by parameter name, as JSON text, a JSON file or a dict: regex → ``"off"`` or an object such as
            ``{"p_norm": 0.5, "lambda_p": 0.02}`` or ``{"target_sparsity": 0.5}``; the first match wins. Becomes a dict.
        optim_args: How the step is computed: ``"backend=foreach,moments=bfloat16"``; see :class:`~hf_pdecay.AdamWLp`.
        optim_target_modules: Which modules' weights decay, as it says for GaLore what is optimized: ``"all-linear"``, a
            regular expression for the whole name, or a list of parts of names.
        skip_nonfinite: Whether a step with NaN or infinite gradients is skipped and counted.

        > Parameters that control the logging

        sparsity_logging: ``"overall"``, or ``"layer"`` for the sparsity of each decayed tensor as well.
        near_zero_threshold: Magnitude below which a non-zero weight counts as near zero; 1e-13 by default.

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
    p_norm: float = field(
        default=DecaySettings.p_norm,
        metadata={"help": "p of the p-norm weight decay, above 0. Below 2 weights become exactly zero."},
    )
    lambda_p: float = field(
        default=DecaySettings.lambda_p,
        metadata={"help": "Strength of the p-norm weight decay, at least 0; 0 is AdamW."},
    )
    target_sparsity: float | None = field(
        default=DecaySettings.target_sparsity,
        metadata={
            "help": "Fraction of exact zeros in the decayed weights at the end, such as 0.9; sets lambda_p itself."
        },
    )
    sparsity_begin: float = field(
        default=DecaySettings.sparsity_begin,
        metadata={"help": "Fraction of the run after which zeros begin, for target_sparsity and p_norm_begin."},
    )
    sparsity_end: float = field(
        default=DecaySettings.sparsity_end,
        metadata={"help": "Fraction of the run after which the target is reached and zeros stay."},
    )
    sparsity_schedule: str = field(
        default=DecaySettings.sparsity_schedule,
        metadata={"help": "How the sparsity grows from begin to end.", "choices": list(SHAPES)},
    )
    sparsity_budget: str = field(
        default=DecaySettings.sparsity_budget,
        metadata={
            "help": "What the target is for: all decayed weights together (global), or every tensor (tensor).",
            "choices": list(BUDGETS),
        },
    )
    sparsity_decay: float = field(
        default=DecaySettings.sparsity_decay,
        metadata={"help": "Strength of the decay that goes with target_sparsity, at least 0; 0 for cuts alone."},
    )
    p_norm_begin: float | None = field(
        default=DecaySettings.p_norm_begin,
        metadata={"help": "p at the beginning, from where it goes to p_norm between sparsity_begin and sparsity_end."},
    )
    keep_zeros: bool = field(
        default=DecaySettings.keep_zeros,
        metadata={"help": "Whether decayed weights that are zero at the start stay zero."},
    )
    lp_rules: dict | str | None = field(
        default=DecaySettings.lp_rules,
        metadata={
            "help": "Rules by parameter name, as JSON text or a JSON file: "
            '{"regex": {"p_norm": 0.5, "lambda_p": 0.02}, "mlp": {"target_sparsity": 0.9, "group": "neuron"}, '
            '"other": "off"}. The first match wins.'
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
    skip_nonfinite: bool = field(
        default=DecaySettings.skip_nonfinite,
        metadata={"help": "Whether a step with NaN or infinite gradients is skipped and counted."},
    )
    sparsity_logging: str = field(
        default=DecaySettings.sparsity_logging,
        metadata={
            "help": "What sparsity to log: overall, or layer for that of each decayed tensor as well.",
            "choices": list(SPARSITY_LOGGING),
        },
    )
    near_zero_threshold: float = field(
        default=DecaySettings.near_zero_threshold,
        metadata={"help": "Magnitude below which a non-zero weight counts as near zero in reports."},
    )

    def __post_init__(self) -> None:
        """Check the fields; the parent's are checked by the parent."""
        settings = self.decay_settings
        for name in own_fields():
            setattr(self, name, getattr(settings, name))
        # The parent casts the name to an enum that need not know this one.
        name = name_of(self)
        if name in OPTIMIZERS:
            self.optim = OptimizerNames.ADAMW_TORCH
            check_hyperparameters(self)
        super().__post_init__()
        if name in OPTIMIZERS:
            self.optim = name

    @property
    def step_options(self) -> dict[str, Any]:
        """How the optimizer computes its step, from ``optim_args``: ``"backend=foreach,moments=bfloat16"``.

        Raises:
            ValueError: If ``optim_args`` cannot be read or names something else.
        """
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
        """The settings of the decay as they are now.

        Raises:
            ValueError: If one is out of its range.
            ImportError: If the optimizer or an option of it needs a package that is not installed.
        """
        name = name_of(self)
        ours: dict[str, Any] = {"optim": name, "options": self.step_options} if name in OPTIMIZERS else {}
        values = {name: getattr(self, name) for name in own_fields()}
        return DecaySettings(**values, **ours, target_modules=self.optim_target_modules)

    @property
    def control_options(self) -> dict[str, Any]:
        """Keyword arguments of :class:`~hf_pdecay.target.control.SparsityControl`."""
        return self.decay_settings.control_options

    @property
    def uses_adamw_lp(self) -> bool:
        """Whether the optimizer is AdamW with p-norm weight decay."""
        return self.optim == ADAMW_LP

    def set_optimizer(self, name: str = ADAMW_LP, *args: Any, **kwargs: Any) -> PDecayTrainingArguments:
        """Set the optimizer and its hyperparameters, as ``TrainingArguments.set_optimizer`` does."""
        super().set_optimizer(OptimizerNames.ADAMW_TORCH if name in OPTIMIZERS else name, *args, **kwargs)
        if name in OPTIMIZERS:
            self.optim = name
        return self


def own_fields() -> list[str]:
    """Return the names of the fields that ``PDecayTrainingArguments`` adds to ``TrainingArguments``."""
    inherited = {each.name for each in fields(TrainingArguments)}
    return [each.name for each in fields(PDecayTrainingArguments) if each.name not in inherited]


def settings_of(args: TrainingArguments) -> DecaySettings | None:
    """Return a run's settings of the decay, from the fields that are made for them or from ``optim_args``.

    Args:
        args: ``PDecayTrainingArguments``, or any other once :func:`hf_pdecay.register` was called.

    Returns:
        The settings; None for arguments without any: another optimizer in stock ``TrainingArguments``.

    Raises:
        ValueError: If ``optim_args`` cannot be read, or a value is out of its range.
        ImportError: If the optimizer or an option of it needs a package that is not installed.
    """
    if isinstance(args, PDecayTrainingArguments):
        return args.decay_settings
    if name_of(args) not in OPTIMIZERS:
        return None
    return DecaySettings.from_optim_args(args.optim_args, args.optim_target_modules, name_of(args))
