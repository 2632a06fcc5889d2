"""Structured decay: groups of weights that shrink by one factor each, and the weakest weights of N:M blocks.

With w_g the |g| weights of a group before the step and α λ_p as ever:

    s_g = (‖w_g‖₂ / √|g|)^(2-p),   w_g ← w'_g · s_g / (s_g + α λ_p)

The square of the root mean square r takes the place of w² in the derivation of the rule for single weights
(https://huggingface.co/papers/2404.10824, algorithm 1), so what is minimised is (λ_p / p) Σ_g |g| r_g^p: for p = 1 the
group lasso (Yuan and Lin 2006) with its usual weights √|g|.

The norms are taken before the optimizer's step, and the weights multiplied after it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cpu.units import UnitDivisors
from .decay import shrink_factor
from .distributed import is_dtensor, span_of
from .tensor_step import Hyperparameters, Structure
from .unit_operations import mean_squares, scale, shrink_weakest
from .units import Units, check_units, kind_of, n_of_m, units_of


if TYPE_CHECKING:
    from .gpu.units import UnitFactors

# Roots of sums of squares are taken in float32; random bits of the multiplication are others than those of the step.
_NOISE = 1 << 19


@dataclass
class _Norms:
    """What is known of the groups on one device before the step: numbers of the units, and r of all groups."""

    numbers: list[int]
    rms: Tensor
    dormant: Tensor | None


class UnitDecay:
    """The shrink of one param group around a step of its optimizer. No wait for the device, but at the first step.

    A group that is wholly zero at its first step decays no earlier than it has become non-zero, which the entry
    ``dormant_units`` of the param group remembers. Other groups that are wholly zero stay so while λ_p > 0 and p < 2,
    whatever the learning rate. A root mean square below about 1e-19 counts as 0, as its square is 0 in float32.

    It is made before the step, and takes the norms. What the step does not do itself, :meth:`apply` does after it.

    Args:
        group: The param group, with ``group`` other than ``"element"``.
        backend: ``"compiled"`` or ``"triton"`` if its functions take the norms, which differ in their last bits. It is
            not known to this class whether they can be had.

    Attributes:
        tables: What these functions find, if they do.

    Raises:
        ValueError: If a parameter is a shard for which the backend's functions cannot do it, or ``units`` do not
            fit.
    """

    def __init__(self, group: dict[str, Any], backend: str = "") -> None:
        self._group = group
        self._params: list[Tensor] = [param.detach() for param in group["params"]]
        self._grads = [param.grad is not None for param in group["params"]]
        check_units(group)  # units may have changed since, and compiled functions believe every place
        self._blocks = n_of_m(kind_of(group))
        self._coupled = units_of(group)
        self._sharded = {index for index, param in enumerate(self._params) if is_dtensor(param)}
        self._norms: list[_Norms] = []
        self._before: dict[int, Tensor] = {}
        self._factors: list[tuple[Units[int], Tensor]] | None = None
        self.tables: UnitDivisors | UnitFactors | None = None
        if self._blocks is None:
            self.tables = _tables(self._params, self._coupled, backend)
            if self._sharded and self.tables is None:
                raise ValueError(self._refusal())
            self._take_norms()
        for each in self._coupled if self._blocks is not None else ():
            for place in each.members:
                span = span_of(self._params[place.param])
                if self._blocks and span is not None and span.dim == place.dim and span.each % self._blocks[1]:
                    raise ValueError(
                        f"Invalid group: group={kind_of(group)!r} on {each.name or 'a parameter'}, of which a process "
                        f"has {span.each} of the indices along which the blocks lie; a block must lie in one process."
                    )

    def _refusal(self) -> str:
        return (
            f"Invalid group: group={kind_of(self._group)!r} on sharded parameters, which takes AdamWLp, weights in one "
            "piece and the backends 'compiled' on a CPU or 'triton' on a GPU. Or train on one process or under DDP."
        )

    def check(self, done: Container[int]) -> None:
        """Check that the step does itself what nothing else would do.

        Args:
            done: Indices of the parameters whose shrink the step does itself.

        Raises:
            ValueError: If it leaves a sharded parameter to be shrunk after it.
        """
        if any(self._grads[index] and index not in done for index in self._coupled_params() & self._sharded):
            raise ValueError(self._refusal())

    def _coupled_params(self) -> set[int]:
        return {place.param for each in self._coupled for place in each.members}

    def _take_norms(self) -> None:
        by_device: dict[torch.device, list[int]] = {}
        for number, each in enumerate(self._coupled):
            by_device.setdefault(self._params[each.members[0].param].device, []).append(number)
        kept: list[Tensor | None] | None = self._group.get("dormant_units")
        # As many tensors at all times: torch.distributed.checkpoint loads into what an optimizer that has stepped the
        # weights as they are now has. Those on a CPU without a group that sleeps are awake for good.
        masks = [torch.zeros(each.count, dtype=torch.bool) for each in self._coupled]
        for device, numbers in by_device.items():
            if self.tables is not None:
                rms = self.tables.norms()
            else:
                rms = torch.cat([mean_squares(self._coupled[number], self._params) for number in numbers]).sqrt_()
            zero = rms == 0
            counts = [self._coupled[number].count for number in numbers]
            if kept is None:
                dormant = zero
            elif all(_are_awake(kept[number]) for number in numbers):
                dormant = None
            else:
                some = [_mask(kept[number], count, device) for number, count in zip(numbers, counts, strict=True)]
                dormant = torch.cat(some) & zero
            # The host looks once, and on a CPU as long as there is something to see.
            if dormant is not None and (kept is None or dormant.is_cpu) and not dormant.any():
                dormant = None
            if dormant is not None:
                for number, mask in zip(numbers, dormant.split(counts), strict=True):
                    masks[number] = mask.clone()
            self._norms.append(_Norms(numbers, rms, dormant))
        self._group["dormant_units"] = masks

    def structures(
        self, hyper: Hyperparameters, alpha_lambda: Callable[[torch.device], float | Tensor]
    ) -> dict[int, Structure]:
        """Return what a step that can do the shrink itself needs of each parameter, by the index of it.

        Args:
            hyper: Hyperparameters of the param group, with their λ_p.
            alpha_lambda: α λ_p on a device.
        """
        if self._blocks is not None:
            return {
                place.param: Structure(hyper, place.dim, blocks=self._blocks)
                for each in self._coupled
                for place in each.members
            }
        if self.tables is not None:
            self._all_factors(alpha_lambda)
            dims = {place.param: place.dim for each in self._coupled for place in each.members}
            return {index: Structure(hyper, dim, self.tables.tables[index]) for index, dim in dims.items()}
        return {}

    def lasts(self, done: Container[int]) -> bool:
        """Whether the next step may be done as this one, by tables that are filled anew: it does all of the shrink.

        Args:
            done: Indices of the parameters whose shrink the step does itself.
        """
        # Those in no coupling too: their step has hyperparameters of its own, which nobody would renew.
        if not all(index in done for index, there in enumerate(self._grads) if there):
            return False
        if self._blocks is not None:
            return True
        awake = all(norms.dormant is None for norms in self._norms)
        places = [place.param for each in self._coupled for place in each.members]
        return self.tables is not None and awake and all(self._grads[index] for index in places)

    def remember(self, done: Container[int]) -> None:
        """Copy the weights of N:M blocks whose shrink is to be done after the step.

        Args:
            done: Indices of the parameters whose shrink the step does itself.
        """
        if self._blocks is not None:
            places = [place for each in self._coupled for place in each.members]
            self._before = {
                each.param: self._params[each.param].clone()
                for each in places
                if self._grads[each.param] and each.param not in done
            }

    @torch.no_grad()
    def apply(
        self,
        alpha_lambda: Callable[[torch.device], float | Tensor],
        step_of: Callable[[int], int | Tensor],
        first_place: int,
        finite: bool | Tensor = True,
        averaged: Callable[[int], Tensor | None] = lambda _: None,
        done: Container[int] = (),
    ) -> None:
        """Multiply the weights, which the optimizer has stepped.

        Args:
            alpha_lambda: α λ_p on a device.
            step_of: The number of the step of the parameter with an index, from which the random bits come.
            first_place: Member of the first parameter in the optimizer.
            finite: Whether there was a step.
            averaged: The weights z of a schedule-free optimizer for the parameter with an index, if there are any.
            done: Indices of the parameters whose shrink the step has done itself.
        """
        if finite is False:
            return
        p_norm: float = self._group["p_norm"]
        for each in self._coupled if self._blocks is not None else ():
            for place in each.members:
                before = self._before.get(place.param)
                if before is None or self._blocks is None:
                    continue
                noise = first_place + place.param + _NOISE, step_of(place.param)
                strength = alpha_lambda(before.device)
                for weights in (self._params[place.param], averaged(place.param)):
                    if weights is not None:
                        shrink_weakest(weights, before, place.dim, self._blocks, p_norm, strength, finite, noise)
        for each, factor in self._all_factors(alpha_lambda):
            stepped = [place.param for place in each.members if self._grads[place.param]]
            if not stepped:
                continue  # no step was made with them
            if isinstance(finite, Tensor):
                factor = torch.where(finite.to(factor.device), factor, torch.ones_like(factor))
            for nth, place in enumerate(each.members):
                if place.param in done or place.param in self._sharded:
                    continue
                # The counter of one without a gradient stands still, and so would its random bits.
                counted = place.param if self._grads[place.param] else stepped[0]
                noise = first_place + place.param + _NOISE * (1 + nth), step_of(counted)
                spread = factor.repeat_interleave(place.size) if place.size > 1 else factor
                for weights in (self._params[place.param], averaged(place.param)):
                    if weights is not None:
                        part = weights.narrow(place.dim, place.offset, len(spread))
                        scale(part, place.dim, spread.to(part.device), *noise)

    def _all_factors(self, alpha_lambda: Callable[[torch.device], float | Tensor]) -> list[tuple[Units[int], Tensor]]:
        """Each coupling with the factors of its groups."""
        if self._factors is None:
            self._factors = []
            for norms in self._norms:
                factor = self._factor(norms, alpha_lambda(norms.rms.device))
                split = factor.split([self._coupled[number].count for number in norms.numbers])
                self._factors += zip((self._coupled[number] for number in norms.numbers), split, strict=True)
        return self._factors

    def _factor(self, norms: _Norms, alpha_lambda: float | Tensor) -> Tensor:
        p_norm: float = self._group["p_norm"]
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


def _tables(params: Sequence[Tensor], coupled: Sequence[Units[int]], backend: str) -> UnitDivisors | UnitFactors | None:
    """What finds the factors of all groups, if the backend's functions take all parameters, which are on one device."""
    weights = [params[place.param] for each in coupled for place in each.members]
    if len({weight.device for weight in weights}) != 1:
        return None
    made: type[UnitDivisors | UnitFactors] = UnitDivisors
    if backend == "triton":
        from .gpu.units import UnitFactors  # imports triton, which takes its time

        made = UnitFactors
    known = backend in ("compiled", "triton") and all(made.takes(weight) for weight in weights)
    return made(params, coupled) if known else None


def _are_awake(kept: Tensor | None) -> bool:
    return kept is None or (kept.is_cpu and not kept.any())


def _mask(kept: Tensor | None, count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, dtype=torch.bool, device=device) if kept is None else kept.to(device)
