"""What AdamWLp and LpDecay have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _global_optimizer_pre_hooks

from .bases import base_in, decays_to_base
from .gradients import are_as_noted, note_versions
from .units import check_units
from .validation import check_decay_settings, check_dtypes


class DecayOptimizer(Optimizer):
    """An optimizer whose param groups decay by a p norm.

    A caller that knows the norm of all gradients, as from clipping, sets ``grad_norm`` before a step. If it is finite
    the step need not look at the gradients, which saves an eighth of its time. It does look if a gradient has been
    replaced or changed since; a change through ``.data`` cannot be seen, so set the norm after it.
    """

    _grad_norm: Tensor | float | None = None
    given_bases: dict[Tensor, Tensor] | None = None  # of parameters that have not stepped yet
    _check_group = staticmethod(check_decay_settings)

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped for NaN or infinite gradients. Reading it synchronises with the device."""
        return max((int(group["skipped_steps"]) for group in self.param_groups), default=0)

    @property
    def grad_norm(self) -> Tensor | float | None:
        """The norm of all gradients as they are now, for the next step; None if not known."""
        return self._grad_norm

    @grad_norm.setter
    def grad_norm(self, norm: Tensor | float | None) -> None:
        self.take_norm(norm, [param for group in self.param_groups for param in group["params"]])

    def take_norm(self, norm: Tensor | float | None, params: Iterable[Tensor]) -> None:
        """Note a norm of the gradients of some parameters; the next step uses it if these are all that it looks at."""
        self._grad_norm = norm
        if norm is not None:
            note_versions(params)

    def take_bases(self, bases: Mapping[Tensor, Tensor]) -> None:
        """See :func:`~hf_pdecay.optim.bases.give_bases`."""
        able = {param for group in self.param_groups if decays_to_base(group) for param in group["params"]}
        for param, base in bases.items():
            if param not in able:
                raise ValueError(f"A base for a parameter of shape {tuple(param.shape)}, whose group decays to zero.")
            if (base.shape, base.dtype, base.device) != (param.shape, param.dtype, param.device):
                raise ValueError(
                    f"Invalid base: {tuple(base.shape)}, {base.dtype} on {base.device}; it must be like its parameter: "
                    f"{tuple(param.shape)}, {param.dtype} on {param.device}."
                )
            state = self.state.get(param) or {}
            if "dormant" in state and "base" not in state:
                raise ValueError(f"A base for a parameter of shape {tuple(param.shape)}, which has stepped before.")
        self.given_bases = {**(self.given_bases or {}), **bases}

    def _base_entry(self, group: Mapping[str, Any], param: Tensor) -> dict[str, Tensor]:
        """Return what the state of a parameter that is about to step for the first time has for its base."""
        if not decays_to_base(group):
            return {}
        given = (self.given_bases or {}).pop(param, None)
        return {"base": param.detach().clone() if given is None else given}

    def _bases(self, group: Mapping[str, Any]) -> dict[int, Tensor]:
        """Return the bases of a group's parameters before a step, by their index."""
        bases: dict[int, Tensor] = {}
        for index, param in enumerate(group["params"] if decays_to_base(group) else ()):
            base = base_in(self.state.get(param))
            if base is None and param.grad is not None:
                self.given_bases = self.given_bases or {}
                base = self.given_bases.setdefault(param, param.detach().clone())
            bases[index] = param.detach() if base is None else base
        return bases

    def _pop_norm(self) -> Tensor | float | None:
        """Return the norm of all gradients that a step looks at; None if not known, or if they may have changed."""
        norm, self._grad_norm = self._grad_norm, None
        if norm is None or self._optimizer_step_pre_hooks or _global_optimizer_pre_hooks:
            return None
        careful = (param for group in self.param_groups if group["skip_nonfinite"] for param in group["params"])
        return norm if are_as_noted(careful) else None

    def _count_skipped(self, finite: bool | Tensor) -> None:
        for group in self.param_groups:
            if not group["skip_nonfinite"]:
                continue
            skipped = group["skipped_steps"]
            if isinstance(finite, Tensor):
                # In place, so that the replays of a CUDA graph count too.
                if not isinstance(skipped, Tensor):
                    skipped = torch.full((), skipped, dtype=torch.int64, device=finite.device)
                group["skipped_steps"] = skipped.to(finite.device).add_(~finite)
            else:
                group["skipped_steps"] = skipped + 1

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, whose missing hyperparameters are the optimizer's defaults.

        Raises:
            ValueError: If a hyperparameter, ``units`` or the dtype of a parameter is invalid.
        """
        self._check_group({**self.defaults, **param_group})
        before = len(self.param_groups)
        self._append(param_group)
        try:
            for group in self.param_groups[before:]:
                check_dtypes(group, type(self).__name__)
                check_units(group)
        except ValueError:
            del self.param_groups[before:]
            raise

    def _append(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)

    def _merged_groups(self, state_dict: dict[str, Any], dropped: Collection[str] = ()) -> list[dict[str, Any]]:
        """Return the param groups of a checkpoint, completed by this optimizer's values, without ``dropped`` keys."""
        groups = []
        for ours, theirs in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group = {key: value for key, value in {**ours, **theirs}.items() if key not in dropped}
            self._check_group(group)
            check_units({**group, "params": ours["params"]})
            groups.append(group)
        return groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step, and return what the closure returned, or None.

        Args:
            closure: Recomputes the loss and returns it, with gradients enabled; called once, before the step.

        Raises:
            ValueError: If a gradient is sparse, a hyperparameter is out of its range, or the requested backend cannot
                step a tensor.
        """
        loss = evaluate(closure)
        rates = [(group, group["lr"]) for group in self.param_groups if group.get("rate_scale", 1.0) != 1]
        try:
            for group, rate in rates:
                # A new tensor if it is one, as a scheduler holds the old one.
                group["lr"] = rate * group["rate_scale"]
            finite = self._step(self._pop_norm())
        finally:
            for group, rate in rates:
                group["lr"] = rate
        if finite is not True:
            self._count_skipped(finite)
        return loss

    def _step(self, norm: Tensor | float | None) -> bool | Tensor:
        """Do one step, and return whether the gradients were finite; ``norm`` is that of all gradients if known."""
        raise NotImplementedError


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """Return what a closure returns with gradients enabled; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
