"""AdamW with weight decay for any p norm: the optimizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .backends import MIN_COMPILED, BackendChoice, all_finite
from .bases import ZERO, base_in, decays_in_units, holds_unchanged
from .decay_optimizer import DecayOptimizer
from .defaults import LAMBDA_P, P_NORM
from .distributed import agreed_finite, is_dtensor, local, local_grad, shard_place
from .dormancy import Awakening, dormant_entry, is_awake, is_awake_for_good, placed
from .gradients import as_real, check_dense, finite_by_norm
from .moments import as_stored, clone, is_quantized, zero_moment
from .param_groups import is_left_alone, steps_decay
from .step_cache import StepCache, hyper_of
from .tensor_step import Hyperparameters, Structure, TensorStep, alpha_lambda_p, noise_place
from .unit_decay import UnitDecay, unit_decay_of
from .unit_kinds import ELEMENT, kind_of
from .validation import FOREIGN_KEYS, check_dtypes, check_hyperparameters, check_state_dict


class AdamWLp(DecayOptimizer):
    r"""AdamW with decoupled weight decay for any p norm.

    Each step is AdamW's, followed by a decay of every weight by a factor of the weight before the step:

        w_{n+1} = w' · s / (s + α λ_p),   s = |w_n|^(2-p)

    with w' the result of ``torch.optim.AdamW`` (https://huggingface.co/papers/2404.10824, algorithm 1;
    ``hf_pdecay/optim/reference.py`` has the whole rule). For p < 2 small weights become exactly zero in a few steps.
    ``lambda_p=0`` is bit-identical to ``torch.optim.AdamW``; with ``weight_decay`` it is the elastic net.

    - Zero absorbs: a weight of exact zero stays zero while α λ_p > 0. A tensor that is wholly zero at its first step
      (LoRA's B, a zero-initialised head) does not decay until it has become non-zero.
    - bfloat16 and float16 weights that decay are computed in float32 and rounded stochastically, as are such moments.
      The random bits depend only on the step and the place of the weight: runs resume exactly and replicas agree.
    - A param group's ``group`` names the unit that decays as one: ``"element"`` (the default), ``"row"``, ``"column"``,
      ``"neuron"``, ``"head"``, ``"rank"``, or N:M such as ``"2:4"``, where the weakest of each M weights decay. Its
      ``units`` say where they lie, see :func:`~hf_pdecay.optim.units.units_of`; without them a row is an index of
      dimension 0 and a column one of dimension 1, as in ``nn.Linear`` and convolutions.

    Every hyperparameter lives in ``param_groups``, so a group may have its own and a scheduler may change them; all
    keys: :class:`~hf_pdecay.optim.param_groups.DecayGroup`.

    Args:
        params: Parameters, or dicts of param groups.
        lr: Learning rate α, a float or a one-element tensor, at least 0.
        betas: Decay of the first and the second moment, each in [0, 1).
        eps: Added to the denominator, at least 0.
        weight_decay: λ₂, the decoupled L2 decay of AdamW, at least 0.
        p_norm: p, above 0. Below 2 weights become exactly zero, and the smaller p, the sharper the choice.
        lambda_p: λ_p, at least 0. The penalty minimised is (λ_p / p) ‖w‖_p^p.
        keep_zeros: Whether weights that are zero stay zero, also where λ_p or the learning rate is 0.
        decay_to: ``"zero"``, or ``"base"``: then the distance of each weight from its value before the first step
            decays, and weights become bit-identical to that value, see :mod:`~hf_pdecay.optim.bases`.
        maximize: Whether to maximise the objective.
        skip_nonfinite: Whether a NaN or infinite gradient in any group with this set skips the step of all of them;
            :attr:`skipped_steps` counts such steps.
        moments: How both moments are stored: ``"float32"``, ``"bfloat16"`` (rounded stochastically) or ``"8bit"``
            (torchao's blocks of 256, for tensors of at least 4096 weights and whole blocks, float32 for others); None
            for the dtype of the weights.
        backend: How the step is computed; not part of a checkpoint. ``"compiled"`` is one C++ function, for CPUs;
            ``"triton"`` one kernel, for GPUs; ``"foreach"`` plain torch operations, for any device; ``"reference"``
            plain formulas in float64. ``"auto"`` takes the fastest available, tensor by tensor, and logs why.

    Raises:
        ValueError: If a hyperparameter is out of its range, or a parameter that decays is complex.
        ImportError: If ``moments="8bit"`` and torchao is not installed.

    Example:
        >>> optimizer = AdamWLp(model.parameters(), lr=1e-3, p_norm=0.8, lambda_p=0.01)
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        p_norm: float = P_NORM,
        lambda_p: float = LAMBDA_P,
        keep_zeros: bool = False,
        decay_to: str = ZERO,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        moments: str | None = None,
        backend: str = "auto",
    ) -> None:
        self._backend = BackendChoice(backend)
        self._cache = _Cache()
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults.update(p_norm=p_norm, lambda_p=lambda_p, keep_zeros=keep_zeros, decay_to=decay_to, maximize=maximize)
        # The counter is a default, so that a checkpoint carries it.
        defaults.update(skip_nonfinite=skip_nonfinite, moments=moments, skipped_steps=0)
        check_hyperparameters(defaults)
        super().__init__(params, defaults)

    _check_group = staticmethod(check_hyperparameters)

    @property
    def backends(self) -> dict[str, tuple[str, str]]:
        """For each type of device that holds weights, the backend of the step and why; may compile it."""
        numel: dict[str, int] = {}
        for group in self.param_groups:
            for param in group["params"]:
                numel[param.device.type] = numel.get(param.device.type, 0) + local(param).numel()
                if is_dtensor(param) and kind_of(group) != ELEMENT:
                    # However few weights there are: sharded units take more than plain operations.
                    numel[param.device.type] = max(numel[param.device.type], MIN_COMPILED)
        decays = any(steps_decay(group) or group["keep_zeros"] for group in self.param_groups)
        return {device: self._backend.choice(device, count, decays) for device, count in numel.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy holds: a checkpoint and the backend."""
        return {**super().__getstate__(), "_backend": self._backend, "_cache": self._cache}

    def __deepcopy__(self, memo: dict[int, Any]) -> AdamWLp:
        """Return a copy of the optimizer and of its parameters."""
        for state in self.state.values():
            for moment in (state.get("exp_avg"), state.get("exp_avg_sq")):
                if moment is not None and is_quantized(moment):
                    memo[id(moment)] = clone(moment)
        copied: AdamWLp = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of ``torch.optim.AdamW``.

        Settings that the checkpoint does not name, such as ``p_norm`` in one of AdamW, keep their values.

        Args:
            state_dict: What ``state_dict()`` of either optimizer returned.

        Raises:
            ValueError: If groups, shapes or units are those of another model, or the checkpoint is AMSGrad's.
        """
        check_state_dict(state_dict, self.param_groups)
        super().load_state_dict({**state_dict, "param_groups": self._merged_groups(state_dict, FOREIGN_KEYS)})
        for group, theirs in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, key in zip(group["params"], theirs["params"], strict=True):
                state = self.state.get(param)
                if not state:
                    continue
                # Some versions of torch count in numbers or other dtypes; in bfloat16 a counter would stall.
                state["step"] = torch.as_tensor(state["step"]).to(torch.float32)
                # torch casts all state but the step to the dtype of the parameter: back to what it was saved as.
                saved = state_dict["state"][key]
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = as_stored(saved[name], param, group["moments"], signed=name == "exp_avg")
                if "dormant" in state:
                    state["dormant"] = placed(state["dormant"].bool())
                else:
                    # AdamW does not say which tensors have been zero from the start: those that still are.
                    state["dormant"] = dormant_entry(param, base_in(state))
        self._cache = _Cache()

    def _step(self, norm: Tensor | float | None) -> bool | Tensor:
        cache, self._cache.last = self._cache.last, None
        unit_decays: dict[int, UnitDecay] = {}
        # Which backend does which tensors: as in the last step, if nothing but numbers has changed.
        if cache is None or not cache.follow(self.param_groups, self.state):
            unit_decays = self._unit_decays()
            cache = self._assign(unit_decays)
        finite = self._finite(norm, cache)
        # AdamW's step and the decay of single weights, and of units where the backend can do it in the same pass.
        for share in cache.shares:
            share.backend.step(finite if share.careful else True)
        # The decay of all other units.
        for index, unit_decay in unit_decays.items():
            unit_decay.after_step(finite if self.param_groups[index]["skip_nonfinite"] else True)
        if cache.lasts:  # others hold gradients
            self._cache.last = cache
        return finite

    def _unit_decays(self) -> dict[int, UnitDecay]:
        """Return the decay of each param group that decays by units, by the index of the group."""
        in_units = {
            index: group
            for index, group in enumerate(self.param_groups)
            if decays_in_units(group) and steps_decay(group)
        }
        if in_units and not self._backend.chosen:
            _ = self.backends  # chosen from all weights, whether or not they have gradients in this step
        chosen = {device: name for device, (name, _) in self._backend.chosen.items()}
        decays = {}
        for index, group in in_units.items():
            alpha_lambda = partial(alpha_lambda_p, group["lr"], group["lambda_p"])
            steps = partial(self._step_of, group)
            decays[index] = unit_decay_of(group, noise_place(index), alpha_lambda, steps, bases=self._bases(group))
            decays[index].take_norms(chosen.get(group["params"][0].device.type, "") if group["params"] else "")
        return decays

    def _step_of(self, group: dict[str, Any], index: int) -> int | Tensor:
        step: Tensor | int = self.state.get(group["params"][index], {}).get("step", 0)
        return int(step.item()) if isinstance(step, Tensor) and step.is_cpu else step

    def _assign(self, unit_decays: Mapping[int, UnitDecay]) -> StepCache:
        """Choose a backend for each tensor, and make the state of tensors that have none yet."""
        for group in self.param_groups:
            check_dense(group["params"], "AdamWLp")
            check_dtypes(group, "AdamWLp")
        self._cache.awakening.hear()
        hypers = [hyper_of(group) for group in self.param_groups]
        steps: list[TensorStep] = []
        stepped: list[tuple[int, int, Tensor]] = []  # index of the param group, index in it, and parameter
        for index, (group, hyper) in enumerate(zip(self.param_groups, hypers, strict=True)):
            steps += self._tensor_steps(index, group, hyper, unit_decays.get(index))
            stepped += [
                (index, number, param) for number, param in enumerate(group["params"]) if param.grad is not None
            ]
        shares = self._backend.assign(steps)
        states = {param: self.state[param] for *_, param in stepped}
        self._cache.awakening.ask(states)
        shrunk = [stepped[share.indices[index]] for share in shares for index in share.backend.shrunk]
        for index, unit_decay in unit_decays.items():
            unit_decay.before_step({number for owner, number, _ in shrunk if owner == index})
        lasts = all(is_awake_for_good(state["dormant"]) for state in states.values())
        lasts = lasts and all(unit_decay.lasts for unit_decay in unit_decays.values())
        tables = [(decay.tables, hypers[index]) for index, decay in unit_decays.items() if decay.tables is not None]
        return StepCache(self.param_groups, self.state, hypers, steps, shares, lasts, tables)

    def _tensor_steps(
        self, group_index: int, group: dict[str, Any], hyper: Hyperparameters, unit_decay: UnitDecay | None
    ) -> list[TensorStep]:
        structures: dict[int, Structure] = {}
        if unit_decay is not None:
            structures = unit_decay.structures(hyper)
            # The single weights of units do not decay in the step.
            hyper = replace(hyper, lambda_p=0.0, rounds=True)
        steps = []
        for index, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            place = noise_place(group_index, index)
            state = self.state[param]
            if not state:
                self._init_state(param, group)
            elif not param.is_cpu and state["step"].device != param.device:
                state["step"] = state["step"].to(param.device)
            base = base_in(state)
            awake: bool | Tensor = holds_unchanged(group)
            if not awake and not is_left_alone(group, index):
                awake = is_awake(param, state["dormant"], base)
            exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
            if is_dtensor(param):
                # Autograd looks at the DTensor; the step below changes the shard that it holds.
                torch.autograd.graph.increment_version(param)
                grad, place = local_grad(param, grad), shard_place(param, place)
                param, exp_avg, exp_avg_sq = map(local, (param, exp_avg, exp_avg_sq))
                base = None if base is None else local(base)
            if param.is_complex():  # stepped as torch's AdamW does
                param, grad, exp_avg, exp_avg_sq = map(as_real, (param, grad, exp_avg, exp_avg_sq))
            tensors = param, grad, exp_avg, exp_avg_sq, state["step"]
            steps.append(TensorStep(*tensors, awake, hyper, place, structures.get(index), base))
        return steps

    def _finite(self, norm: Tensor | float | None, cache: StepCache) -> bool | Tensor:
        """Return whether the gradients of all careful tensors are finite."""
        careful = [share.backend for share in cache.shares if share.careful]
        if not careful:
            return True
        known = finite_by_norm(norm)
        return agreed_finite(all_finite(careful), cache.owners) if known is None else known

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        state.update(self._base_entry(group, param))
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        state["exp_avg"] = zero_moment(param, group["moments"], signed=True)
        state["exp_avg_sq"] = zero_moment(param, group["moments"], signed=False)
        whole = kind_of(group) == ELEMENT  # else units are dormant, not tensors
        state["dormant"] = dormant_entry(param, base_in(state)) if whole else torch.zeros((), dtype=torch.bool)


class _Cache:
    """What an optimizer remembers from one step to the next, beside its state; a copy is empty."""

    def __init__(self) -> None:
        self.last: StepCache | None = None  # what the next step can do again
        self.awakening = Awakening()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Cache, ()
