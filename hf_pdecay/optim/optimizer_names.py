"""Optimizers with p-norm decay by name, as ``--optim`` and ``--optim_args`` give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .adamw_lp import AdamWLp
from .backends import BACKENDS
from .lp_decay import LpDecay
from .moments import MOMENTS, check_moments
from .muon import MuonWithAdamW, by_kind


Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Option:
    """An option: ``parse`` converts a string or raises ValueError; ``right`` ends the sentence "it must be …"."""

    parse: Callable[[str], Any]
    right: str


@dataclass(frozen=True)
class Named:
    """The optimizer that a name stands for."""

    make: Callable[..., Optimizer]  # from groups, Adam's hyperparameters, and options
    options: Mapping[str, Option] = field(default_factory=dict)  # in --optim_args
    package: tuple[str, str] | None = None  # if not torch: its package, and the extra of hf-pdecay that installs it
    arrange: Callable[[Iterable[Any]], Groups] | None = None  # how it arranges param groups
    takes_complex: bool = False  # whether it steps complex parameters right


def _number(low: float, high: float = math.inf, *, whole: bool = False) -> Option:
    def parse(text: str) -> float:
        value = int(text) if whole else float(text)
        if not low <= value < high:
            raise ValueError
        return value

    kind = "a whole number" if whole else "a number"
    span = f"of at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g})"
    return Option(parse, f"{kind} {span}" if low > -math.inf else f"{kind} below {high:g}")


def _one_of(*names: str) -> Option:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError
        return text

    return Option(parse, f"one of {', '.join(names)}")


def _parse_switch(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


def _parse_moments(text: str) -> str:
    check_moments(text)  # its package too
    return text


_SWITCH = Option(_parse_switch, "true or false")


def _from(module: str, kind: str, *ignored: str) -> Callable[..., Optimizer]:
    """Return a function that makes an optimizer, without Adam's ``ignored`` settings, and imports its module then."""

    def make(groups: Groups, *, options: dict[str, Any], **given: Any) -> Optimizer:
        taken = {name: value for name, value in given.items() if name not in ignored}
        optimizer: Optimizer = getattr(import_module(module), kind)(groups, **taken, **options)
        return optimizer

    return make


def _muon(groups: Groups, *, options: dict[str, Any], **given: Any) -> Optimizer:
    return MuonWithAdamW(groups, **given, **options)


_MOMENTUM = {"momentum": _number(0, 1), "nesterov": _SWITCH}
_MOMENTS = Option(_parse_moments, f"one of {', '.join(MOMENTS)}")
_BNB = ("bitsandbytes", "bitsandbytes")
_TORCHAO = ("torchao", "8bit")
_BNB_8BIT = {"min_8bit_size": _number(0, whole=True), "is_paged": _SWITCH}
_TORCHAO_OPTIONS = {"block_size": _number(1, whole=True), "bf16_stochastic_round": _SWITCH}

ADAMW_LP = "adamw_lp"

OPTIMIZERS: dict[str, Named] = {
    # It needs no decay around it.
    ADAMW_LP: Named(AdamWLp, {"backend": _one_of(*BACKENDS), "moments": _MOMENTS}, takes_complex=True),
    "sgd_lp": Named(
        _from("torch.optim", "SGD", "betas", "eps"), {**_MOMENTUM, "dampening": _number(0)}, takes_complex=True
    ),
    "muon_lp": Named(
        _muon,
        {**_MOMENTUM, "ns_steps": _number(1, 100, whole=True), "adjust_lr_fn": _one_of("match_rms_adamw", "original")},
        arrange=by_kind,
        takes_complex=True,
    ),
    "adafactor_lp": Named(
        _from("torch.optim", "Adafactor", "betas", "eps"), {"beta2_decay": _number(-math.inf, 0), "d": _number(1)}
    ),
    "lion_lp": Named(_from("bitsandbytes.optim", "Lion", "eps"), package=_BNB),
    "lion_8bit_lp": Named(_from("bitsandbytes.optim", "Lion8bit", "eps"), _BNB_8BIT, _BNB),
    "adamw_bnb_8bit_lp": Named(_from("bitsandbytes.optim", "AdamW8bit"), _BNB_8BIT, _BNB),
    "adamw_torch_8bit_lp": Named(_from("torchao.optim", "AdamW8bit"), _TORCHAO_OPTIONS, _TORCHAO),
    "adamw_torch_4bit_lp": Named(_from("torchao.optim", "AdamW4bit"), _TORCHAO_OPTIONS, _TORCHAO),
    "schedule_free_adamw_lp": Named(
        _from("schedulefree", "AdamWScheduleFree"),
        {"warmup_steps": _number(0, whole=True), "r": _number(0), "weight_lr_power": _number(0)},
        ("schedulefree", "schedulefree"),
    ),
}
"""The optimizers of ``--optim NAME``, whose names are those of transformers followed by ``_lp``."""


def parse_options(name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Convert options from strings; ValueError if one is invalid, ImportError if the optimizer's package is missing."""
    named = _named(name)
    if named.package is not None:
        package, extra = named.package
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(f"optim={name!r} needs {package}: pip install 'hf-pdecay[{extra}]' ({error}).") from error
    values = {}
    for key, text in (options or {}).items():
        if key not in named.options:
            has = f"it has {', '.join(sorted(named.options))}" if named.options else "it has none"
            raise ValueError(f"Invalid optim_args: optim={name!r} has no option {key!r}; {has}.")
        try:
            values[key] = named.options[key].parse(str(text).strip())
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"Invalid optim_args: {key}={text!r} for optim={name!r}; it must be {named.options[key].right}."
            ) from error
    if values.get("nesterov") and name == "sgd_lp" and (not values.get("momentum") or values.get("dampening")):
        raise ValueError(
            "Invalid optim_args: nesterov=true for optim='sgd_lp' takes a momentum above 0 and no dampening, such as "
            "momentum=0.9,nesterov=true."
        )
    return values


def arranged(name: str, param_groups: Iterable[Any]) -> list[Any]:
    """Return param groups as the named optimizer has them: Muon's matrices are in separate groups.

    Raises:
        ValueError: If it would step complex parameters wrongly.
    """
    named = _named(name)
    groups = list(param_groups) if named.arrange is None else named.arrange(param_groups)
    tensors = [param for group in groups for param in (group["params"] if isinstance(group, Mapping) else [group])]
    shapes = [tuple(tensor.shape) for tensor in tensors if tensor.is_complex()]
    if shapes and not named.takes_complex:
        able = ", ".join(other for other, described in OPTIMIZERS.items() if described.takes_complex)
        raise ValueError(
            f"Invalid optim: optim={name!r} does not take complex parameters, and {len(shapes)} are to be trained, "
            f"such as one of shape {shapes[0]}; take one of {able}."
        )
    return groups


def make_optimizer(
    name: str,
    param_groups: Iterable[Tensor] | Iterable[dict[str, Any]],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    options: Mapping[str, Any] | None = None,
    **decay: Any,
) -> AdamWLp | LpDecay:
    """Make the optimizer that a name stands for.

    Args:
        name: One of :data:`OPTIMIZERS`.
        param_groups: Parameters or param groups, such as :func:`~hf_pdecay.build_param_groups` returns.
        lr: Learning rate.
        betas: For the optimizers that have them, as ``eps``.
        eps: Added to Adam's denominator.
        weight_decay: λ₂ of the groups that name none. SGD's is not decoupled.
        options: Option → string, as ``--optim_args "momentum=0.9,nesterov=true"`` gives them.
        **decay: ``p_norm``, ``lambda_p``, ``keep_zeros`` and ``skip_nonfinite``, as of :class:`LpDecay`.

    Raises:
        ValueError: If the name, an option or a hyperparameter is unknown or out of its range.
        ImportError: If the optimizer's package is not installed.
    """
    values = parse_options(name, options)
    groups = arranged(name, param_groups)
    if name == ADAMW_LP:
        return AdamWLp(groups, lr, betas, eps, weight_decay, **decay, **values)
    base = OPTIMIZERS[name].make(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, options=values)
    return LpDecay(base, **decay)


def _named(name: str) -> Named:
    if name not in OPTIMIZERS:
        raise ValueError(f"Invalid optim: optim={name!r}; with p-norm decay there are {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name]
