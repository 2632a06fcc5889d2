"""Weight decay for any p norm around any optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..checks import check_lambda_p, check_p_norm
from .base_optimizers import Batch, batches, check_base, is_schedule_free, step_batch, takes_found_inf
from .bases import ZERO, base_in, decays_in_units, decays_to_base, holds_unchanged
from .decay_after_step import can_compile, copies, decay_weights, on_device, rate_on
from .decay_optimizer import DecayOptimizer
from .defaults import LAMBDA_P, P_NORM
from .distributed import Owners, agreed_finite, is_dtensor, local, shard_place
from .dormancy import Awakening, dormant_entry, is_awake, placed
from .gradients import check_dense, finite_by_norm, grads_finite
from .param_groups import is_left_alone, steps_decay
from .tensor_step import Decay, Stepped, noise_place, smallest
from .unit_decay import UnitDecay, unit_decay_of
from .unit_kinds import ELEMENT, kind_of
from .units import check_units
from .validation import check_decay_settings, check_dtypes, check_saved_groups


def _of_base(name: str, doc: str) -> Any:
    """Return a property that is the base optimizer's attribute of that name."""
    return property(lambda self: getattr(self.base, name), lambda self, value: setattr(self.base, name, value), doc=doc)


class LpDecay(DecayOptimizer):
    r"""Decoupled weight decay for any p norm around another optimizer.

    Each step is the base optimizer's, followed by the decay of :class:`~hf_pdecay.AdamWLp`, whose factor comes from the
    weight before the step:

        w_{n+1} = w' · s / (s + α λ_p),   s = |w_n|^(2-p)         p < 2
        w_{n+1} = w' / (1 + α λ_p |w_n|^(p-2))                    p >= 2

    with w' the weight after the base's step and α the group's ``lr`` (https://huggingface.co/papers/2404.10824,
    algorithm 1, with another optimizer in place of Adam). Around ``torch.optim.AdamW`` it equals ``AdamWLp`` to
    rounding, and is slower. The base's own ``weight_decay`` keeps its meaning.

    The param groups, the defaults and the state are the base's own objects, so schedulers, ``SparsityControl`` and
    checkpoints find everything in one place. A checkpoint of the base alone loads too.

    - Zero absorbs, dormant tensors sleep, zeros are kept, and units decay as one, as in ``AdamWLp``.
    - Memory: while the base steps, a copy of the weights that decay or keep their zeros, in their dtype. torch's
      optimizers that step each tensor by itself step one batch of tensors at a time; others step and copy all at once.
    - bfloat16 and float16 weights decay in float32 and are rounded stochastically, by bits that depend only on the step
      and the place of the weight. The base rounds its own result before that: torch's optimizers to nearest, which
      loses updates below half of the last bit.
    - A step with a NaN or infinite gradient is skipped and counted before the base sees it, see :attr:`skipped_steps`.
      On an accelerator that takes one wait for the device a step, as in ``GradScaler``, unless the base reads it there
      (torch's optimizers with ``fused=True``) or ``skip_nonfinite`` is False. The decay itself never waits.
    - Schedule-free optimizers train y and are used at x, an average of y and of their own z: y decays as above and z by
      the same factors, so x shrinks by them too, and is zero where y is.

    Args:
        base_optimizer: The optimizer, whose groups may name their own ``p_norm``, ``lambda_p`` and ``keep_zeros``. It
            must be stepped through this one from now on.
        p_norm: p, above 0. Below 2 weights become exactly zero.
        lambda_p: λ_p, at least 0. The penalty minimised is (λ_p / p) ‖w‖_p^p.
        keep_zeros: Whether weights that are zero stay zero, also where λ_p or the learning rate is 0.
        decay_to: ``"zero"``, or ``"base"``: then the distance of each weight from its value before the first step
            decays, as in ``AdamWLp``.
        skip_nonfinite: Whether a NaN or infinite gradient in any group with this set skips the step of all groups.

    Raises:
        TypeError: If ``base_optimizer`` is not an optimizer.
        ValueError: If a hyperparameter is out of its range, a parameter is of a dtype that cannot decay, or the decay
            would be wrong around the base: it steps within backward, needs a closure, finds its step size itself, or
            decays already.

    Example:
        >>> optimizer = LpDecay(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), p_norm=0.8, lambda_p=0.001)
        >>> loss.backward()
        >>> optimizer.step()
    """

    base: Optimizer
    param_groups = _of_base("param_groups", "The base optimizer's param groups.")
    state = _of_base("state", "The base optimizer's state; each tensor that has stepped has the entry ``dormant`` too.")
    defaults = _of_base("defaults", "The base optimizer's defaults, those of the decay among them.")

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        p_norm: float = P_NORM,
        lambda_p: float = LAMBDA_P,
        keep_zeros: bool = False,
        decay_to: str = ZERO,
        skip_nonfinite: bool = True,
    ) -> None:
        check_base(base_optimizer)
        groups = [{"decay_to": decay_to, **group} for group in base_optimizer.param_groups]
        if is_schedule_free(base_optimizer) and any(map(decays_to_base, groups)):
            raise ValueError(
                "Invalid decay_to: decay_to='base' around a schedule-free optimizer, which trains other weights than "
                "it saves; take another optimizer, or decay_to='zero'."
            )
        settings: dict[str, Any] = {"p_norm": p_norm, "lambda_p": lambda_p, "keep_zeros": keep_zeros}
        settings["decay_to"] = decay_to
        # The counters are settings, so that a checkpoint carries them.
        settings.update(skip_nonfinite=skip_nonfinite, skipped_steps=0, decay_steps=0)
        check_decay_settings({"lr": 0.0, **settings})
        for group in base_optimizer.param_groups:
            check_decay_settings({**settings, **group})
            check_dtypes({**settings, **group}, "LpDecay")
            check_units(group)
        base_optimizer.defaults.update(settings)
        for group in base_optimizer.param_groups:
            for name, value in settings.items():
                group.setdefault(name, value)
        # Optimizer.__init__ would make new groups and a new state; this makes only the hooks.
        self.__setstate__({"base": base_optimizer})

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy holds."""
        return {"base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a copy."""
        super().__setstate__({"_awakening": Awakening(), **state})

    def __repr__(self) -> str:
        return f"LpDecay({self.base!r})"

    def _append(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the base does."""
        self.base.zero_grad(set_to_none=set_to_none)

    def train(self) -> None:
        """Put a schedule-free base into training mode, with the same zeros; others have no such mode."""
        self._switch(True)

    def eval(self) -> None:
        """Put a schedule-free base into evaluation mode, with zeros where the trained weights have them."""
        self._switch(False)

    @torch.no_grad()
    def _switch(self, training: bool) -> None:
        if not is_schedule_free(self.base):
            return
        tensors = [
            (local(param), local(state["z"]))
            for group in filter(_changes_weights, self.param_groups)
            for param in group["params"]
            if group["train_mode"] is not training and (state := self._entry(param)) and not bool(state["dormant"])
        ]
        for weight, z in tensors:
            # Weights may have been pruned since the last step, in either mode.
            zero = weight == 0
            weight.masked_fill_(zero, 0)
            z.masked_fill_(zero, 0)
        base: Any = self.base
        (base.train if training else base.eval)()
        for weight, z in tensors:
            # A weight and its z may cancel to 0, which would end it.
            weight.masked_fill_((weight == 0) & (z != 0), torch.finfo(weight.dtype).tiny)

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state and groups, which hold the decay's too, as ``Optimizer.state_dict`` does."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self.base.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of the base alone.

        Settings that the checkpoint does not name, such as ``p_norm`` in one of the base, keep their values.

        Args:
            state_dict: What ``state_dict()`` of either optimizer returned.

        Raises:
            ValueError: If the groups are those of another model or a hyperparameter is out of its range.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        before_load = self.param_groups
        if "param_groups" in state_dict:
            check_saved_groups(state_dict["param_groups"], self.param_groups)
            state_dict = {**state_dict, "param_groups": self._merged_groups(state_dict)}
        self.base.load_state_dict(state_dict)
        for group, ours in zip(self.param_groups, before_load, strict=True):
            # An optimizer around another may have checkpoints of its own form.
            for name, value in ours.items():
                group.setdefault(name, value)
        states = {
            param: state for group in self.param_groups for param in group["params"] if (state := self.state.get(param))
        }
        # Some bases make the state of all tensors at once; in a checkpoint of ours, those with the entry have stepped.
        ours = any("dormant" in state for state in states.values())
        for param, state in states.items():
            if "dormant" in state:
                # The base has cast it to the dtype of the parameter, and moved it.
                state["dormant"] = placed(state["dormant"].bool())
            elif not ours:
                state["dormant"] = dormant_entry(param, base_in(state))
        self._awakening = Awakening()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _entry(self, param: Tensor) -> dict[str, Any]:
        """Return the state of a parameter that has stepped, else an empty dict; a base may keep more in `state`."""
        state: dict[str, Any] = self.state.get(param) or {}
        return state if "dormant" in state else {}

    def _step(self, norm: Tensor | float | None) -> bool | Tensor:
        for group in self.param_groups:
            # Not the rate, which may be on the device.
            check_p_norm(group["p_norm"])
            check_lambda_p(group["lambda_p"])
            check_dense(group["params"], "LpDecay")
            check_dtypes(group, "LpDecay")
        finite = self._finite(norm)
        if finite is False:
            return finite
        self._awakening.hear()
        unit_decays = {
            index: self._unit_decay(index, group)
            for index, group in enumerate(self.param_groups)
            if decays_in_units(group) and steps_decay(group)
        }
        for unit_decay in unit_decays.values():
            unit_decay.before_step()
        for batch in batches(self.base, _changes_weights):
            self._step_batch(batch, finite)
        for index, group in enumerate(self.param_groups):
            group["decay_steps"] += 1
            if index in unit_decays:
                unit_decays[index].after_step(finite)
        self._awakening.ask(
            {param: state for group in self.param_groups for param in group["params"] if (state := self._entry(param))}
        )
        return finite

    def _finite(self, norm: Tensor | float | None) -> bool | Tensor:
        """Return whether the gradients of careful groups are finite; a tensor if the base can take it."""
        careful = [param for group in self.param_groups if group["skip_nonfinite"] for param in group["params"]]
        if not careful:
            return True
        finite = finite_by_norm(norm)
        if finite is None:
            sharded = [param for group in self.param_groups for param in group["params"] if is_dtensor(param)]
            grads = [local(param.grad) for param in careful if param.grad is not None]
            finite = agreed_finite(grads_finite(grads), Owners.of(sharded))
        return finite if takes_found_inf(self.base) else bool(finite)

    def _step_batch(self, batch: Batch, finite: bool | Tensor) -> None:
        """Step a batch of parameters and decay their single weights, by factors from a copy of them."""
        fresh: dict[Tensor, dict[str, Any]] = {}
        copied = {index: self._copied(index, params, fresh) for index, params in batch.items()}
        self._step_base(batch, finite)
        for param, entries in fresh.items():
            # Only now, as base optimizers make their state where there is none.
            self.state[param].update(entries)
        for index, tensors in copied.items():
            self._decay_weights(self.param_groups[index], tensors, finite)

    def _step_base(self, batch: Batch, finite: bool | Tensor) -> None:
        if not isinstance(finite, Tensor):
            step_batch(self.base, batch)
            return
        # The contract of GradScaler with optimizers that read on the device whether to step.
        base: Any = self.base
        base.grad_scale, base.found_inf = None, (~finite).to(torch.float32)
        try:
            step_batch(base, batch)
        finally:
            del base.grad_scale, base.found_inf

    def _copied(
        self, group_index: int, params: dict[int, Tensor], fresh: dict[Tensor, dict[str, Any]]
    ) -> list[Stepped]:
        """Copy a group's weights that will decay, and note in ``fresh`` the entries of those not stepped before."""
        group = self.param_groups[group_index]
        places = {param: noise_place(group_index, index) for index, param in params.items() if param.grad is not None}
        indices = {param: index for index, param in params.items()}
        awake: dict[Tensor, bool | Tensor] = {}
        bases: dict[Tensor, Tensor | None] = {}
        # The weights of units at most keep their zeros here.
        whole, holds = not decays_in_units(group), holds_unchanged(group)
        for param in places:
            state = self.state.get(param) or {}
            if "dormant" not in state:
                state = fresh[param] = dict(self._base_entry(group, param))
                base = state.get("base")
                asleep = kind_of(group) == ELEMENT
                state["dormant"] = dormant_entry(param, base) if asleep else torch.zeros((), dtype=torch.bool)
            bases[param] = state.get("base")
            awake[param] = whole and holds
            if whole and not holds and not is_left_alone(group, indices[param]):
                awake[param] = is_awake(param, state["dormant"], bases[param])
        decays = _may_decay(group)
        by_kind: dict[Any, list[Tensor]] = {}
        for param in places:
            if group["keep_zeros"] or (decays and awake[param] is not False):
                by_kind.setdefault((param.device, param.dtype), []).append(param)
        return [
            Stepped(param, before, None, awake[param], places[param], base=bases[param])
            for alike in by_kind.values()
            for param, before in zip(alike, copies([local(param) for param in alike]), strict=True)
        ]

    def _rate(self, group: dict[str, Any]) -> float | Tensor:
        """Return α of a group; schedule-free optimizers warm up by themselves."""
        rate: float | Tensor = group["scheduled_lr" if is_schedule_free(self.base) else "lr"]
        return rate

    def _unit_decay(self, group_index: int, group: dict[str, Any]) -> UnitDecay:
        """Return the decay of a param group by units, which has taken the norms."""

        def alpha_lambda(device: torch.device) -> float | Tensor:
            return rate_on(self._rate(group), device) * float(group["lambda_p"])

        def averaged(index: int) -> Tensor | None:
            return self.state[group["params"][index]].get("z") if is_schedule_free(self.base) else None

        place = noise_place(group_index)
        steps, bases = (lambda _: group["decay_steps"]), self._bases(group)
        unit_decay = unit_decay_of(group, place, alpha_lambda, steps, averaged, bases)
        unit_decay.take_norms("compiled" if can_compile(group["params"]) else "")
        return unit_decay

    def _decay_weights(self, group: dict[str, Any], copied: list[Stepped], finite: bool | Tensor) -> None:
        by_device: dict[torch.device, list[Stepped]] = {}
        for tensor in copied:
            param, place = tensor.weight, tensor.place
            z = local(self.state[param]["z"]) if is_schedule_free(self.base) else None
            if is_dtensor(param):
                # Autograd looks at the DTensor; the decay changes the shard that it holds.
                torch.autograd.graph.increment_version(param)
                place = shard_place(param, place)
            base = None if tensor.base is None else local(tensor.base)
            stepped = tensor._replace(weight=local(param), averaged=z, place=place, base=base)
            by_device.setdefault(tensor.before.device, []).append(stepped)
        for device, tensors in by_device.items():
            alpha_lambda = rate_on(self._rate(group), device) * group["lambda_p"]
            step = group["decay_steps"] + 1
            decay_weights(tensors, Decay(group["p_norm"], alpha_lambda, group["keep_zeros"], step, finite))


def _changes_weights(group: dict[str, Any]) -> bool:
    return steps_decay(group) or group["keep_zeros"]


def _may_decay(group: dict[str, Any]) -> bool:
    """Whether a group's decay can change a weight in this step; where the host does not know the rate, it may."""
    if on_device(group["lr"]):
        return steps_decay(group)
    least = min((smallest(param.dtype) for param in group["params"]), default=1.0)
    return bool(float(group["lr"]) * group["lambda_p"] >= least)
