"""Structured decay: units of weights that each decay by one factor, and the weakest weights of N:M blocks.

With w_u the |u| weights of a unit before the step and α λ_p as for single weights:

    s_u = (‖w_u‖₂ / √|u|)^(2-p),   w_u ← w'_u · s_u / (s_u + α λ_p)

The square of the root mean square r takes the place of w² in the derivation of the rule for single weights
(https://huggingface.co/papers/2404.10824, algorithm 1). So the penalty is (λ_p / p) Σ_u |u| r_u^p: for p = 1 the group
lasso (Yuan and Lin 2006) with its usual weights √|u|.

The norms are taken before the optimizer's step, and the weights are multiplied after it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .bases import change, holds_unchanged
from .cpu.units import UnitDivisors
from .decay import shrink_factor
from .distributed import is_dtensor, local, span_of
from .param_groups import is_left_alone, still_entries
from .tensor_step import Hyperparameters, Structure, is_flat
from .unit_kinds import kind_of, n_of_m
from .unit_operations import decay_weakest, mean_squares, scale, weights_here
from .unit_tables import UnitTables
from .units import Member, Units, check_units, is_still, units_of


# Random bits of the multiplication differ from those of the step.
_NOISE = 1 << 19


def unit_decay_of(group: dict[str, Any], *arguments: Any, **more: Any) -> UnitDecay:
    """Return the decay of a param group around one step. Raises a ValueError if ``units`` do not fit the parameters."""
    check_units(group)  # units may have changed since the last step, and compiled functions believe every place
    kind = CoupledDecay if n_of_m(kind_of(group)) is None else BlockDecay
    return kind(group, *arguments, **more)


@dataclass
class UnitDecay(ABC):
    """The decay of one param group around one step of its optimizer.

    The order of the calls is :meth:`take_norms`, :meth:`structures` for a step that can decay units itself,
    :meth:`before_step`, the step, :meth:`after_step`.

    Args:
        first_place: Place of the group's first parameter in the optimizer.
        step_of: By the index of a parameter, the number of its step, from which its random bits come.
        averaged: By the index of a parameter, the weights z of a schedule-free optimizer, which decay alike.
        bases: By the index of a parameter, what its weights decay to; all parameters, or none if they decay to 0.
    """

    group: dict[str, Any]
    first_place: int
    alpha_lambda: Callable[[torch.device], float | Tensor]
    step_of: Callable[[int], int | Tensor]
    averaged: Callable[[int], Tensor | None] = lambda _: None
    bases: Mapping[int, Tensor] = field(default_factory=dict)
    tables: UnitTables | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._params: list[Tensor] = [param.detach() for param in self.group["params"]]
        self._with_grad = {index for index, param in enumerate(self.group["params"]) if param.grad is not None}
        self._sharded = {index for index, param in enumerate(self._params) if is_dtensor(param)}
        self._units = units_of(self.group)
        self._done: Collection[int] = ()
        self._norms: list[_Norms] = []
        self._factors: list[tuple[Units[int], Tensor]] | None = None
        self._before: dict[int, Tensor] = {}

    @abstractmethod
    def take_norms(self, backend: str = "") -> None:
        """Take the norms before the step, by the functions of the backend; a ValueError for unsuitable shards."""

    @abstractmethod
    def structures(self, hyper: Hyperparameters) -> dict[int, Structure]:
        """Return, by the index of a parameter, what a step needs to decay it itself; ``hyper`` has the group's λ_p."""

    def before_step(self, done: Collection[int] = ()) -> None:
        """Prepare for :meth:`after_step`; ``done``, what the step decays itself, must have all sharded parameters."""
        self._done = done
        if {member.param for _, member in self._members()} & self._sharded & self._with_grad - set(done):
            raise ValueError(self._refusal())

    @property
    def lasts(self) -> bool:
        """Whether the step decays all parameters itself, and the next one can be repeated with tables filled anew."""
        # This includes parameters without units: the hyperparameters of their step would not be renewed.
        return self._with_grad <= set(self._done)

    def after_step(self, finite: bool | Tensor = True) -> None:
        """Multiply the weights that the step has not decayed itself; ``finite`` says whether there was a step."""
        if finite is not False:
            with torch.no_grad():
                self._decay(finite)

    @abstractmethod
    def _decay(self, finite: bool | Tensor) -> None: ...

    def _refusal(self) -> str:
        return (
            f"Invalid group: group={kind_of(self.group)!r} on sharded parameters, which takes AdamWLp, weights in one "
            "piece and the backends 'compiled' on a CPU or 'triton' on a GPU. Or train on one process or under DDP."
        )

    def _members(self) -> Iterator[tuple[Units[int], Member[int]]]:
        for layer in self._units:
            for member in layer.members:
                yield layer, member

    def _weights(self, index: int) -> Iterator[Tensor]:
        """The weights of a parameter, and the averaged weights of a schedule-free optimizer."""
        yield self._params[index]
        averaged = self.averaged(index)
        if averaged is not None:
            yield averaged


class BlockDecay(UnitDecay):
    """The decay of N:M blocks: the M - N weakest of M consecutive weights decay, each by its own factor."""

    def _members(self) -> Iterator[tuple[Units[int], Member[int]]]:
        return (pair for pair in super()._members() if not is_left_alone(self.group, pair[1].param))

    @property
    def _blocks(self) -> tuple[int, int]:
        return n_of_m(kind_of(self.group)) or (0, 0)

    def take_norms(self, backend: str = "") -> None:
        """Check that no block lies in several processes; blocks need no norms."""
        for layer, member in self._members():
            span = span_of(self._params[member.param])
            if span is not None and span.dim == member.dim and span.size % self._blocks[1]:
                raise ValueError(
                    f"Invalid group: group={kind_of(self.group)!r} on {layer.name or 'a parameter'}: each process has "
                    f"{span.size} of the indices along the blocks, which must be divisible by {self._blocks[1]}."
                )

    def structures(self, hyper: Hyperparameters) -> dict[int, Structure]:
        """See :meth:`UnitDecay.structures`."""
        return {member.param: Structure(hyper, member.dim, blocks=self._blocks) for _, member in self._members()}

    def before_step(self, done: Collection[int] = ()) -> None:
        """Copy the weights that the step does not decay itself."""
        super().before_step(done)
        left = {member.param for _, member in self._members()} & self._with_grad - set(done)
        self._before = {index: self._params[index].clone() for index in left}

    def _decay(self, finite: bool | Tensor) -> None:
        for _, member in self._members():
            before = self._before.get(member.param)
            if before is None:
                continue
            noise = self.first_place + member.param + _NOISE, self.step_of(member.param)
            settings = self.group["p_norm"], self.alpha_lambda(before.device), finite, noise
            for weights in self._weights(member.param):
                decay_weakest(weights, before, member.dim, self._blocks, *settings, self.bases.get(member.param))


@dataclass
class _Norms:
    """Before the step, on one device: indices of layers, r of all their units, and which units are dormant."""

    layers: list[int]
    rms: Tensor
    dormant: Tensor | None  # or left alone by a target


class CoupledDecay(UnitDecay):
    """The decay of rows, columns, neurons, heads or ranks. The host waits for the device in the first step only.

    A unit that is wholly zero at its first step is dormant: it decays only once it has become non-zero. Other wholly
    zero units stay zero while λ_p > 0 and p < 2. A root mean square below about 1e-19 has the square 0 in float32.
    """

    def take_norms(self, backend: str = "") -> None:
        """Take the norms of the units, and note in the param group which units are dormant."""
        self.tables = _tables(self._params, self._units, backend, self.bases)
        if self._sharded and self.tables is None:
            raise ValueError(self._refusal())
        by_device: dict[torch.device, list[int]] = {}
        for index, layer in enumerate(self._units):
            by_device.setdefault(self._params[layer.members[0].param].device, []).append(index)
        entries = still_entries(self.group, self._params)
        remembered: list[Tensor] | None = self.group.get("dormant_units")
        # The number of tensors never changes, because torch.distributed.checkpoint loads into existing tensors.
        # A mask on a CPU without a dormant unit says that all units are awake for good.
        masks = [torch.zeros(layer.count, dtype=torch.bool) for layer in self._units]
        for device, layers in by_device.items():
            if self.tables is not None:
                rms = self.tables.norms()
            else:
                changes = {index: change(local(self._params[index]), local(base)) for index, base in self.bases.items()}
                squares = [mean_squares(self._units[index], self._params, changes or None) for index in layers]
                rms = torch.cat(squares).sqrt_()
            counts = [self._units[index].count for index in layers]
            dormant: Tensor | None = None if holds_unchanged(self.group) else rms == 0
            if dormant is not None and remembered is not None:
                known = [remembered[index] for index in layers]
                awake = all(mask.is_cpu and not mask.any() for mask in known)
                dormant = None if awake else torch.cat([mask.to(device) for mask in known]) & dormant
            # On a GPU the host looks only once.
            if dormant is not None and (remembered is None or dormant.is_cpu) and not dormant.any():
                dormant = None
            if dormant is not None:
                for index, mask in zip(layers, dormant.split(counts), strict=True):
                    masks[index] = mask.clone()
            alone = [is_still(self._units[index], entries) and not holds_unchanged(self.group) for index in layers]
            if any(alone):
                rests = torch.tensor(alone, device=device).repeat_interleave(torch.tensor(counts, device=device))
                dormant = rests if dormant is None else dormant | rests
            self._norms.append(_Norms(layers, rms, dormant))
        self.group["dormant_units"] = masks

    def structures(self, hyper: Hyperparameters) -> dict[int, Structure]:
        """See :meth:`UnitDecay.structures`; fills the tables."""
        if self.tables is None:
            return {}
        self._all_factors()
        dims = {member.param: member.dim for _, member in self._members()}
        return {index: Structure(hyper, dim, self.tables.tables[index]) for index, dim in dims.items()}

    @property
    def lasts(self) -> bool:
        """See :attr:`UnitDecay.lasts`."""
        awake = all(norms.dormant is None for norms in self._norms)
        with_grad = all(member.param in self._with_grad for _, member in self._members())
        return super().lasts and self.tables is not None and awake and with_grad

    def _decay(self, finite: bool | Tensor) -> None:
        for layer, factor in self._all_factors():
            stepped = [member.param for member in layer.members if member.param in self._with_grad]
            if not stepped:
                continue  # the step has not touched them
            if isinstance(finite, Tensor):
                factor = torch.where(finite.to(factor.device), factor, torch.ones_like(factor))
            for number, member in enumerate(layer.members):
                if member.param in self._done or member.param in self._sharded:
                    continue
                # The counter of a parameter without a gradient stands still, and so would its random bits.
                counted = member.param if member.param in self._with_grad else stepped[0]
                noise = self.first_place + member.param + _NOISE * (1 + number), self.step_of(counted)
                spread = factor.repeat_interleave(member.size) if member.size > 1 else factor
                for weights in self._weights(member.param):
                    here = weights_here(weights, member, None)
                    of_units = here.narrow(member.dim, member.offset, len(spread))
                    base = self.bases.get(member.param)
                    if base is not None:
                        base = weights_here(base, member, None).narrow(member.dim, member.offset, len(spread))
                    # Matrices of one stack differ in their random bits.
                    first = int(here.storage_offset() - weights.storage_offset())
                    scale(of_units, member.dim, spread.to(weights.device), noise, first, base)

    def _all_factors(self) -> list[tuple[Units[int], Tensor]]:
        """The units of each layer with their factors."""
        if self._factors is None:
            self._factors = []
            for norms in self._norms:
                layers = [self._units[index] for index in norms.layers]
                factors = self._factor(norms).split([layer.count for layer in layers])
                self._factors += zip(layers, factors, strict=True)
        return self._factors

    def _factor(self, norms: _Norms) -> Tensor:
        p_norm: float = self.group["p_norm"]
        alpha_lambda = self.alpha_lambda(norms.rms.device)
        if self.tables is not None:
            dtype = torch.float64 if any(param.dtype == torch.float64 for param in self._params) else torch.float32
            self.tables.fill(p_norm, alpha_lambda, norms.dormant)
            return self.tables.factors().to(dtype)
        factor = shrink_factor(norms.rms, p_norm, alpha_lambda)
        if p_norm < 2:
            factor.masked_fill_(norms.rms == 0, 0)
        if norms.dormant is not None:
            factor.masked_fill_(norms.dormant, 1)
        return factor


def _tables(
    params: Sequence[Tensor], units: Sequence[Units[int]], backend: str, bases: Mapping[int, Tensor]
) -> UnitTables | None:
    """The tables of a backend, if its functions take all parameters and all are on one device."""
    weights = [params[member.param] for layer in units for member in layer.members]
    stacked = any(member.matrix is not None for layer in units for member in layer.members)
    if stacked or backend not in ("compiled", "triton") or len({weight.device for weight in weights}) != 1:
        return None
    kind: type[UnitTables] = UnitDivisors
    if backend == "triton":
        from .gpu.units import UnitFactors  # imports triton, which takes its time

        kind = UnitFactors
    indices = {member.param for layer in units for member in layer.members} & bases.keys()
    alike = all(is_flat(local(params[index]), local(bases[index])) for index in indices)
    return kind(params, units, bases) if alike and all(kind.takes(weight) for weight in weights) else None
