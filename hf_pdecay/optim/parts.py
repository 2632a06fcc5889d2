"""The step of an optimizer in parts, where that is the same: so a few tensors at a time need a copy, not all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


# The parameters of a part: by the number of their param group, and there by their place in it.
Part = dict[int, dict[int, Tensor]]

# torch's own that step each tensor by itself, with all that they know of it in its own state.
_EACH_ALONE = {
    "ASGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
}


def part_size(device: torch.device) -> int:
    """Number of weights in a part, unless one tensor has more. On a GPU many, as each part takes its own launches."""
    return 1 << 22 if device.type == "cpu" else 1 << 28


def parts(base: Optimizer, counts: Callable[[dict[str, Any]], bool]) -> Iterator[Part]:
    """Yield what is to step together: all parameters, or some after others where the base does each by itself.

    Args:
        base: The optimizer.
        counts: Whether the weights of a param group count towards the size of a part.
    """
    if not steps_each_alone(base):
        yield {number: dict(enumerate(group["params"])) for number, group in enumerate(base.param_groups)}
        return
    part: Part = {}
    size = 0
    for number, group in enumerate(base.param_groups):
        counted = counts(group)
        for place, param in enumerate(group["params"]):
            # Of a sharded one as many as all processes have: they have to agree on parts, as bases may communicate.
            numel = param.numel() if counted and param.grad is not None else 0
            if size and size + numel > part_size(param.device):
                yield part
                part, size = {}, 0
            part.setdefault(number, {})[place] = param
            size += numel
    yield part


def step_part(base: Optimizer, part: Part) -> None:
    """Let an optimizer step the parameters of a part, and no others."""
    groups = base.param_groups
    if sum(map(len, part.values())) == sum(len(group["params"]) for group in groups):
        base.step()
        return
    base.param_groups = [{**groups[number], "params": list(params.values())} for number, params in part.items()]
    try:
        base.step()
    finally:
        base.param_groups = groups


def steps_each_alone(base: Optimizer) -> bool:
    """Whether an optimizer's step of some tensors and then of others is that of all together."""
    kind = type(base)
    if kind is not getattr(torch.optim, kind.__name__, None) or kind.__name__ not in _EACH_ALONE:
        return False
    # Whoever has put something of their own around its step counts on one a step.
    own = base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks
    return "step" not in vars(base) and not any((*own, _global_optimizer_pre_hooks, _global_optimizer_post_hooks))
