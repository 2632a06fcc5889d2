"""Structured decay: groups of weights that shrink by one factor each, and the weakest weights of N:M blocks.

With w_g the |g| weights of a group before the step and α λ_p as ever:

    s_g = (‖w_g‖₂ / √|g|)^(2-p),   w_g ← w'_g · s_g / (s_g + α λ_p)

The square of the root mean square r takes the place of w² in the derivation of the rule for single weights
(https://huggingface.co/papers/2404.10824, algorithm 1), so what is minimised is (λ_p / p) Σ_g |g| r_g^p: for p = 1 the
group lasso (Yuan and Lin 2006) with its usual weights √|g|.

The norms are taken before the optimizer's step, and the weights multiplied after it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..decay import shrink_factor
from .couplings import Coupled, Place, check_structure, couplings_of, group_size, kind_of, n_of_m
from .distributed import is_dtensor
from .foreach import chunk_size
from .group_divisors import GroupDivisors
from .rounding import LOW_PRECISION, noise_bits, stochastic_round
from .tensor_step import Hyperparameters, Structure


if TYPE_CHECKING:
    from .triton_groups import GroupFactors

# λ_p with which the optimizer's own step is done in place of one that is not 0: no weight feels it, at no learning
# rate, and yet the step rounds stochastically and takes the fast path of those that decay.
UNFELT = 5e-324

# Roots of sums of squares are taken in float32; random bits of the multiplication are others than those of the step.
_NOISE = 1 << 19


@dataclass
class _Norms:
    """What is known of the groups on one device before the step: numbers of the couplings, and r of all groups."""

    numbers: list[int]
    rms: Tensor
    dormant: Tensor | None


class Shrinkage:
    """The shrink of one param group around a step of its optimizer. No wait for the device, but at the first step.

    A group that is wholly zero at its first step decays no earlier than it has become non-zero, which the entry
    ``dormant_groups`` of the param group remembers. Other groups that are wholly zero stay so while λ_p > 0 and p < 2,
    whatever the learning rate. A root mean square below about 1e-19 counts as 0, as its square is 0 in float32.

    It is made before the step, and takes the norms. What the step does not do itself, :meth:`apply` does after it.

    Args:
        group: The param group, with ``group`` other than ``"element"``.
        backend: ``"compiled"`` or ``"triton"`` if its functions take the norms, which differ in their last bits. It is
            not known to this class whether they can be had.

    Attributes:
        tables: What these functions find, if they do.

    Raises:
        ValueError: If a parameter is a shard, or ``couplings`` do not fit.
    """

    def __init__(self, group: dict[str, Any], backend: str = "") -> None:
        self._group = group
        self._params: list[Tensor] = [param.detach() for param in group["params"]]
        self._grads = [param.grad is not None for param in group["params"]]
        if any(is_dtensor(param) for param in self._params):
            raise ValueError(
                f"Invalid group: group={kind_of(group)!r} on sharded parameters; structured decay takes whole ones: "
                "train on one process or under DDP."
            )
        check_structure(group)  # couplings may have changed since, and compiled functions believe every place
        self._blocks = n_of_m(kind_of(group))
        self._coupled = couplings_of(group)
        self._norms: list[_Norms] = []
        self._before: dict[int, Tensor] = {}
        self._factors: list[tuple[Coupled, Tensor]] | None = None
        self.tables: GroupDivisors | GroupFactors | None = None
        if self._blocks is None:
            self.tables = _tables(self._params, self._coupled, backend)
            self._take_norms()

    def _take_norms(self) -> None:
        by_device: dict[torch.device, list[int]] = {}
        for number, each in enumerate(self._coupled):
            by_device.setdefault(self._params[each.places[0].param].device, []).append(number)
        kept = self._group.get("dormant_groups")
        masks: list[Tensor | None] = [None] * len(self._coupled)
        for device, numbers in by_device.items():
            if self.tables is not None:
                rms = self.tables.norms()
            else:
                rms = torch.cat([self._mean_squares(self._coupled[number], device) for number in numbers]).sqrt_()
            zero = rms == 0
            counts = [self._coupled[number].count for number in numbers]
            if kept is None:
                dormant = zero
            elif all(kept[number] is None for number in numbers):
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
        self._group["dormant_groups"] = masks

    def _mean_squares(self, coupled: Coupled, device: torch.device) -> Tensor:
        total: Tensor | float = 0.0
        for place in coupled.places:
            own = square_sums(self._params[place.param], place, coupled.count)
            total = own.to(device) + total
        return total / group_size(coupled, self._params)  # type: ignore[return-value]

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
                for place in each.places
            }
        if self.tables is not None:
            self._all_factors(alpha_lambda)
            dims = {place.param: place.dim for each in self._coupled for place in each.places}
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
        places = [place.param for each in self._coupled for place in each.places]
        return self.tables is not None and awake and all(self._grads[index] for index in places)

    def remember(self, done: Container[int]) -> None:
        """Copy the weights of N:M blocks whose shrink is to be done after the step.

        Args:
            done: Indices of the parameters whose shrink the step does itself.
        """
        if self._blocks is not None:
            places = [place for each in self._coupled for place in each.places]
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
            first_place: Place of the first parameter in the optimizer.
            finite: Whether there was a step.
            averaged: The weights z of a schedule-free optimizer for the parameter with an index, if there are any.
            done: Indices of the parameters whose shrink the step has done itself.
        """
        if finite is False:
            return
        p_norm: float = self._group["p_norm"]
        for each in self._coupled if self._blocks is not None else ():
            for place in each.places:
                before = self._before.get(place.param)
                if before is None or self._blocks is None:
                    continue
                noise = first_place + place.param + _NOISE, step_of(place.param)
                strength = alpha_lambda(before.device)
                for weights in (self._params[place.param], averaged(place.param)):
                    if weights is not None:
                        _shrink_weakest(weights, before, place.dim, self._blocks, p_norm, strength, finite, noise)
        for each, factor in self._all_factors(alpha_lambda):
            stepped = [place.param for place in each.places if self._grads[place.param]]
            if not stepped:
                continue  # no step was made with them
            if isinstance(finite, Tensor):
                factor = torch.where(finite.to(factor.device), factor, torch.ones_like(factor))
            for nth, place in enumerate(each.places):
                if place.param in done:
                    continue
                # The counter of one without a gradient stands still, and so would its random bits.
                counted = place.param if self._grads[place.param] else stepped[0]
                noise = first_place + place.param + _NOISE * (1 + nth), step_of(counted)
                spread = factor.repeat_interleave(place.size) if place.size > 1 else factor
                for weights in (self._params[place.param], averaged(place.param)):
                    if weights is not None:
                        part = weights.narrow(place.dim, place.offset, len(spread))
                        _scale(part, place.dim, spread.to(part.device), *noise)

    def _all_factors(self, alpha_lambda: Callable[[torch.device], float | Tensor]) -> list[tuple[Coupled, Tensor]]:
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


def _tables(params: Sequence[Tensor], coupled: Sequence[Coupled], backend: str) -> GroupDivisors | GroupFactors | None:
    """What finds the factors of all groups, if the backend's functions take all parameters, which are on one device."""
    weights = [params[place.param] for each in coupled for place in each.places]
    if len({weight.device for weight in weights}) != 1:
        return None
    made: type[GroupDivisors | GroupFactors] = GroupDivisors
    if backend == "triton":
        from .triton_groups import GroupFactors  # imports triton, which takes its time

        made = GroupFactors
    known = backend in ("compiled", "triton") and all(made.takes(weight) for weight in weights)
    return made(params, coupled) if known else None


def _mask(kept: Tensor | None, count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, dtype=torch.bool, device=device) if kept is None else kept.to(device)


def square_sums(weights: Tensor, place: Place, count: int) -> Tensor:
    """Return the sum of the squares of each group's weights in one parameter, in float32, or float64 where they are.

    Args:
        weights: The parameter.
        place: Where in it the groups lie.
        count: Number of groups.

    Returns:
        A tensor of shape ``(count,)``.
    """
    dim = place.dim
    part = weights.detach().narrow(dim, place.offset, count * place.size)
    dtype = torch.promote_types(part.dtype, torch.float32)
    others = [each for each in range(part.dim()) if each != dim]
    if not others:
        found = part.to(dtype).square()
    elif not part.is_cpu or part.stride(dim) == max(part.stride()):
        found = torch.linalg.vector_norm(part, dim=others, dtype=dtype).square_()
    else:
        # torch's norm along any but the last dimension takes ten times as long on a CPU.
        found = torch.zeros(part.shape[dim], dtype=dtype)
        for piece, _ in _pieces(part, dim):
            found += piece.to(dtype).square().sum(others)
    return _by_group(found, place.size)


def _by_group(sums: Tensor, size: int) -> Tensor:
    """Sums of groups from those of indices, ``size`` of which are one group."""
    return sums.view(-1, size).sum(1) if size > 1 else sums


def _pieces(part: Tensor, dim: int, block: int = 1) -> Iterator[tuple[Tensor, slice]]:
    """Yield views of a bounded number of weights, each with the part of dimension ``dim`` that it has.

    Where they divide that dimension, it is in multiples of ``block``.
    """
    size = chunk_size(part.device)
    whole = slice(None)
    if part.numel() <= size:
        yield part, whole
        return
    axis = max(range(part.dim()), key=part.stride)
    step = max(1, size * part.shape[axis] // part.numel())
    if axis == dim:
        step = -(-step // block) * block
    for start in range(0, part.shape[axis], step):
        extent = min(step, part.shape[axis] - start)
        yield part.narrow(axis, start, extent), slice(start, start + extent) if axis == dim else whole


def _scale(part: Tensor, dim: int, factor: Tensor, noise_place: int, step: int | Tensor) -> None:
    """Multiply weights by factors along a dimension, in place."""
    first = 0
    shape = [1] * part.dim()
    for piece, span in _pieces(part, dim):
        shape[dim] = -1
        _multiply(piece, factor[span].view(shape), noise_place, step, first)
        first += piece.numel()


def _multiply(piece: Tensor, factor: Tensor, noise_place: int, step: int | Tensor, first: int) -> None:
    """Multiply weights in place: in float32 and with stochastic rounding in low precision.

    What falls below the smallest normal number becomes 0, as a weight would else stay subnormal for long.
    """
    low = piece.dtype in LOW_PRECISION
    working = piece.to(torch.float32) if low else piece
    working.mul_(factor)
    tiny = torch.finfo(working.dtype).tiny
    torch.ops.aten.hardshrink.out(working, tiny * (1 - 2.0**-20), out=working)
    if low:
        noise = noise_bits(step, noise_place, first, piece.numel(), piece.device)
        piece.copy_(stochastic_round(working, piece.dtype, noise))


def _shrink_weakest(
    weights: Tensor,
    before: Tensor,
    dim: int,
    blocks: tuple[int, int],
    p_norm: float,
    alpha_lambda: float | Tensor,
    finite: bool | Tensor,
    noise: tuple[int, int | Tensor],
) -> None:
    """Shrink those weights that were the M - N weakest of M before the step, each by its own factor."""
    first = 0
    old = before.movedim(dim, -1)
    for (piece, _), (was, _) in zip(
        _pieces(weights.movedim(dim, -1), weights.dim() - 1, blocks[1]),
        _pieces(old, old.dim() - 1, blocks[1]),
        strict=True,
    ):
        magnitude = was.abs().to(torch.promote_types(was.dtype, torch.float32))
        factor = shrink_factor(magnitude, p_norm, alpha_lambda)
        stays = ~weakest(magnitude, blocks)
        if isinstance(finite, Tensor):
            stays |= ~finite.to(stays.device)
        _multiply(piece, factor.masked_fill_(stays, 1), *noise, first)
        first += piece.numel()


def weakest(scores: Tensor, blocks: tuple[int, int], *, exact: bool = False) -> Tensor:
    """Return which of each M consecutive scores along the last dimension are among the M - N least.

    Args:
        scores: Of any shape whose last dimension is divisible by M; at least 0.
        blocks: N and M.
        exact: Whether of equal scores as many are taken as it takes; otherwise none that equals one that stays.

    Returns:
        A bool tensor of the shape of ``scores``.
    """
    n, m = blocks
    split = scores.unflatten(-1, (-1, m))
    if exact:
        order = split.argsort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(split, dtype=torch.bool).scatter_(-1, order[..., n:], True).flatten(-2)
    if blocks == (2, 4):
        a, b, c, d = split.unbind(-1)
        larger, other = torch.maximum(a, b), torch.maximum(c, d)
        least = torch.maximum(
            torch.minimum(larger, other), torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
        ).unsqueeze(-1)
    else:
        least = split.topk(n, -1).values[..., -1:]
    return (split < least).flatten(-2)
