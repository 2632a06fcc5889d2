"""Which optimizers p-norm decay can be put around, and why not around the others.

Those of other libraries are known by the names of their classes, so that none has to be imported.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


_IN_BACKWARD = (
    "it steps within backward, so that there is no step to take the weights before and to decay them after. Take the "
    "optimizer that does the same in step()"
)
_OWN_RATE = "its step size is not the group's lr but one that it finds, and the decay would not follow it"
_OTHER_FORM = "it keeps the averaged weights where the decay does not reach them. Take {} of the same package"

_REFUSED = {
    "AcceleratedOptimizer": "it is prepared already: put LpDecay around the optimizer within it, then call prepare",
    "AdaLomo": _IN_BACKWARD,
    "AdamWScheduleFreeClosure": _OTHER_FORM.format("AdamWScheduleFree"),
    "AdamWScheduleFreePaper": _OTHER_FORM.format("AdamWScheduleFree"),
    "AdamWScheduleFreeReference": _OTHER_FORM.format("AdamWScheduleFree"),
    "CPUOffloadOptimizer": "it steps copies of the weights on the CPU and writes them over what was decayed",
    "DAdaptAdaGrad": _OWN_RATE,
    "DAdaptAdam": _OWN_RATE,
    "DAdaptAdan": _OWN_RATE,
    "DAdaptLion": _OWN_RATE,
    "DAdaptSGD": _OWN_RATE,
    "LBFGS": "it calls the closure many times in a step, and reads the curvature off the way that it went itself, "
    "which a decay changes. Take one that steps once, such as torch.optim.SGD",
    "LayerWiseDummyOptimizer": _IN_BACKWARD,
    "Lomo": _IN_BACKWARD,
    "Prodigy": _OWN_RATE,
    "RAdamScheduleFreeClosure": _OTHER_FORM.format("RAdamScheduleFree"),
    "SGDScheduleFreeClosure": _OTHER_FORM.format("SGDScheduleFree"),
    "SGDScheduleFreeReference": _OTHER_FORM.format("SGDScheduleFree"),
    "SparseAdam": "it takes sparse gradients alone, and decay acts on all weights of a tensor. Set sparse=False on "
    "the embedding and take torch.optim.Adam",
}

_SCHEDULE_FREE = {"AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"}


def check_base(base: Any) -> None:
    """Check that p-norm decay around an optimizer is right.

    Raises:
        TypeError: If it is not an optimizer.
        ValueError: If it is one around which the decay would be wrong or do nothing; the sentence says why.
    """
    if not isinstance(base, Optimizer):
        kind = (
            f"the class {base.__name__}; make it first" if isinstance(base, type) else f"a {_wrapped_name(type(base))}"
        )
        raise TypeError(f"Invalid base_optimizer: it must be a torch.optim.Optimizer, not {kind}.")
    reason = _refusal(base)
    if reason is not None:
        raise ValueError(f"LpDecay does not go around {_wrapped_name(type(base))}: {reason}.")


def is_schedule_free(base: Optimizer) -> bool:
    """Whether an optimizer keeps beside the weights that it trains others, z, of which both are averaged for use."""
    return not _SCHEDULE_FREE.isdisjoint(_names(base))


def takes_found_inf(base: Optimizer) -> bool:
    """Whether an optimizer can be told on the device that it is not to step, as torch's ``GradScaler`` does."""
    return bool(getattr(base, "_step_supports_amp_scaling", False))


def _refusal(base: Optimizer) -> str | None:
    for name in _names(base):
        if name in _REFUSED:
            return _REFUSED[name]
    # What stands in for an optimizer need not have defaults.
    defaults: dict[str, Any] = base.defaults
    if "lambda_p" in defaults:
        return "it decays by p norm already"
    if defaults.get("gradient_release"):
        return _IN_BACKWARD
    params: list[Tensor] = [param for group in base.param_groups for param in group["params"]]
    if any(getattr(param, "_in_backward_optimizers", None) for param in params):
        return _IN_BACKWARD
    if any(group.get("differentiable") for group in base.param_groups):
        return "differentiable=True differentiates through the step, and the decay changes weights in place"
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return "its step needs a closure, to call it as often as it likes. Take one that steps once, such as SGD"
    for group in base.param_groups:
        if group.get("lr") is None:
            return (
                "its step size is not the group's lr, which is None or not there, and the decay would not follow it. "
                "Give it an lr (transformers' Adafactor: relative_step=False, scale_parameter=False)"
            )
    return None


def _names(base: Optimizer) -> list[str]:
    return [cls.__name__ for cls in type(base).__mro__]


def _wrapped_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
