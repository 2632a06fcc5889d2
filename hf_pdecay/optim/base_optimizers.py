"""The optimizers that LpDecay wraps: which ones it refuses and why, and which ones it steps in batches.

Class names identify the optimizers of other libraries, so none has to be imported. A batch needs few copies of weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


Batch = dict[int, dict[int, Tensor]]
"""The parameters of a batch, by the index of their param group and by their index in it."""


_IN_BACKWARD = (
    "it steps within backward, so the decay has no step to take the weights before and to act after. Take the "
    "optimizer that does the same in step()"
)
_OWN_RATE = "its step size is not the group's lr but one that it finds, and the decay would not follow it"
_OTHER_FORM = "it keeps the averaged weights where the decay does not reach them. Take {} of the package schedulefree"

_SCHEDULE_FREE = {"AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"}
_REFUSED = {
    "AcceleratedOptimizer": "it is prepared already: put LpDecay around the optimizer within it, then call prepare",
    "CPUOffloadOptimizer": "it steps copies of the weights on the CPU and writes them over what was decayed",
    "LBFGS": "it calls the closure many times in a step, and estimates curvature from its own updates, which decay "
    "would distort. Take one that steps once, such as torch.optim.SGD",
    "SparseAdam": "it takes sparse gradients alone, and decay acts on all weights of a tensor. Set sparse=False on "
    "the embedding and take torch.optim.Adam",
    **dict.fromkeys(("AdaLomo", "LayerWiseDummyOptimizer", "Lomo"), _IN_BACKWARD),
    **dict.fromkeys(("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD", "Prodigy"), _OWN_RATE),
    "AdamWScheduleFreePaper": _OTHER_FORM.format("AdamWScheduleFree"),
    **{f"{kind}Closure": _OTHER_FORM.format(kind) for kind in _SCHEDULE_FREE},
    **{f"{kind}Reference": _OTHER_FORM.format(kind) for kind in ("AdamWScheduleFree", "SGDScheduleFree")},
}

# torch's optimizers that step each tensor by itself.
_STEPS_ALONE = {
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax"),
    *("Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
}


def check_base(base: Any) -> None:
    """Raise a TypeError if ``base`` is not an optimizer, and a ValueError if decay around it would not work."""
    if not isinstance(base, Optimizer):
        kind = f"the class {base.__name__}; make it first" if isinstance(base, type) else f"a {_name(type(base))}"
        raise TypeError(f"Invalid base_optimizer: it must be a torch.optim.Optimizer, not {kind}.")
    reason = _refusal(base)
    if reason is not None:
        raise ValueError(f"LpDecay does not go around {_name(type(base))}: {reason}.")


def is_schedule_free(base: Optimizer) -> bool:
    """Whether an optimizer keeps weights z beside those that it trains, and averages both for use."""
    return not _SCHEDULE_FREE.isdisjoint(_names(base))


def takes_found_inf(base: Optimizer) -> bool:
    """Whether an optimizer reads the flag of torch's ``GradScaler`` on the device."""
    return bool(getattr(base, "_step_supports_amp_scaling", False))


def batch_size(device: torch.device) -> int:
    """Number of weights in a batch, unless one tensor has more. On a GPU large, because each batch has launches."""
    return 1 << 22 if device.type == "cpu" else 1 << 28


def batches(base: Optimizer, counts: Callable[[dict[str, Any]], bool]) -> Iterator[Batch]:
    """Yield the parameters that step together: all, or a batch at a time if the base steps each tensor by itself.

    ``counts`` says whether the weights of a param group count towards the size of a batch.
    """
    if not steps_alone(base):
        yield {index: dict(enumerate(group["params"])) for index, group in enumerate(base.param_groups)}
        return
    batch: Batch = {}
    size = 0
    for group_index, group in enumerate(base.param_groups):
        counted = counts(group)
        for index, param in enumerate(group["params"]):
            # numel() counts all shards: processes must agree on batches, because bases may communicate.
            numel = param.numel() if counted and param.grad is not None else 0
            if size and size + numel > batch_size(param.device):
                yield batch
                batch, size = {}, 0
            batch.setdefault(group_index, {})[index] = param
            size += numel
    yield batch


def step_batch(base: Optimizer, batch: Batch) -> None:
    """Let an optimizer step only the parameters of a batch."""
    groups = base.param_groups
    if sum(map(len, batch.values())) == sum(len(group["params"]) for group in groups):
        base.step()
        return
    base.param_groups = [{**groups[index], "params": list(params.values())} for index, params in batch.items()]
    try:
        base.step()
    finally:
        base.param_groups = groups


def steps_alone(base: Optimizer) -> bool:
    """Whether stepping tensors in batches gives the same result as stepping all at once."""
    kind = type(base)
    if kind is not getattr(torch.optim, kind.__name__, None) or kind.__name__ not in _STEPS_ALONE:
        return False
    # Code that wraps `step()` expects one call per step.
    hooks = base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks
    return "step" not in vars(base) and not any((*hooks, _global_optimizer_pre_hooks, _global_optimizer_post_hooks))


def _refusal(base: Optimizer) -> str | None:
    for name in _names(base):
        if name in _REFUSED:
            return _REFUSED[name]
    defaults: dict[str, Any] = base.defaults
    if "lambda_p" in defaults:
        return "it decays by p norm already"
    if not is_schedule_free(base) and callable(getattr(base, "train", None)) and callable(getattr(base, "eval", None)):
        return _OTHER_FORM.format("AdamWScheduleFree")
    params: list[Tensor] = [param for group in base.param_groups for param in group["params"]]
    if defaults.get("gradient_release") or any(getattr(param, "_in_backward_optimizers", None) for param in params):
        return _IN_BACKWARD
    if any(group.get("differentiable") for group in base.param_groups):
        return "differentiable=True differentiates through the step, and the decay changes weights in place"
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return "its step needs a closure, to call it as often as it likes. Take one that steps once, such as SGD"
    if any(group.get("lr") is None for group in base.param_groups):
        return (
            "its step size is not the group's lr, which is None or missing, and the decay would not follow it. "
            "Give it an lr (transformers' Adafactor: relative_step=False, scale_parameter=False)"
        )
    return None


def _names(base: Optimizer) -> list[str]:
    return [cls.__name__ for cls in type(base).__mro__]


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
