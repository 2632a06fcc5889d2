"""Structured decay: groups of weights that shrink by one factor each, and the weakest weights of N:M blocks.

With w_g the |g| weights of a group before the step and α λ_p as ever:

    s_g = (‖w_g‖₂ / √|g|)^(2-p),   w_g ← w'_g · s_g / (s_g + α λ_p)

The square of the root mean square r takes the place of w² in the derivation of the rule for single weights
(https://huggingface.co/papers/2404.10824, algorithm 1), so what is minimised is (λ_p / p) Σ_g |g| r_g^p: for p = 1 the
group lasso (Yuan and Lin 2006) with its usual weights √|g|.

The norms are taken before the optimizer's step, and the weights multiplied after it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..decay import shrink_factor
from . import compiled
from .distributed import is_dtensor
from .foreach import chunk_size
from .rounding import LOW_PRECISION, noise_bits, stochastic_round
from .tensor_step import Hyperparameters, Structure, is_flat


ELEMENT = "element"
COUPLED = ("row", "column", "neuron", "head", "rank")
KINDS = f"{ELEMENT}, {', '.join(COUPLED)}, or N:M such as 2:4"

# λ_p with which the optimizer's own step is done in place of one that is not 0: no weight feels it, at no learning
# rate, and yet the step rounds stochastically and takes the fast path of those that decay.
UNFELT = 5e-324

# Roots of sums of squares are taken in float32; random bits of the multiplication are others than those of the step.
_NOISE = 1 << 19
_N_OF_M = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})")


class Place(NamedTuple):
    """Where the groups of a coupling lie in one parameter; see :class:`hf_pdecay.groups.Member`.

    Attributes:
        param: Index of the parameter in the param group.
        dim: Dimension along which the groups lie.
        size: Consecutive indices of it that belong to one group.
        offset: Index at which the first group begins.
    """

    param: int
    dim: int
    size: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Coupled:
    """As many groups as one layer has, and where they lie in the parameters of a param group."""

    count: int
    places: tuple[Place, ...]
    name: str = ""


def kind_of(group: Mapping[str, Any]) -> str:
    """Return what decays as one in a param group: ``"element"``, a kind of :data:`COUPLED`, or N:M."""
    kind: str = group.get("group", ELEMENT)
    return kind


def n_of_m(kind: str) -> tuple[int, int] | None:
    """Return N and M of ``"N:M"``; None for another kind.

    Raises:
        ValueError: If the kind is not known, or N is not below M.
    """
    match = _N_OF_M.fullmatch(kind) if isinstance(kind, str) else None
    if match is None:
        if kind != ELEMENT and kind not in COUPLED:
            raise ValueError(f"Invalid group: group={kind!r}; it must be one of {KINDS}.")
        return None
    n, m = int(match[1]), int(match[2])
    if n >= m:
        raise ValueError(f"Invalid group: group={kind!r}; of N:M, N weights of M stay, so N must be below M: 2:4.")
    return n, m


def couplings_of(group: Mapping[str, Any]) -> list[Coupled]:
    """Return the couplings of a param group; without any, rows are along dimension 0 and columns along dimension 1.

    For N:M the places say along which dimension the blocks lie, by default 1.
    """
    given = group.get("couplings")
    if given is not None:
        return [
            Coupled(
                each["count"],
                tuple(Place(m["param"], m["dim"], m.get("size", 1), m.get("offset", 0)) for m in each["members"]),
                each.get("name", ""),
            )
            for each in given
        ]
    dim = 0 if kind_of(group) == "row" else 1
    return [Coupled(param.shape[dim], (Place(index, dim),)) for index, param in enumerate(group["params"])]


def check_structure(group: Mapping[str, Any]) -> None:
    """Check ``group`` and ``couplings`` of a param group.

    Raises:
        ValueError: If the kind is not known, or the couplings are missing or do not fit the parameters.
    """
    kind, params = kind_of(group), group["params"]
    blocks = n_of_m(kind)
    if kind == ELEMENT:
        return
    if group.get("couplings") is None:
        if kind not in ("row", "column") and blocks is None:
            raise ValueError(
                f"Invalid couplings: group={kind!r} without couplings, which say where in the parameters each {kind} "
                "lies; lp_rules find them for the models that are known."
            )
        least = 1 if kind == "row" else 2
        for param in params:
            if param.dim() < least:
                raise ValueError(
                    f"Invalid group: group={kind!r} on a parameter of shape {tuple(param.shape)}; it takes at least "
                    f"{least} dimensions."
                )
    try:
        coupled = couplings_of(group)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Invalid couplings: couplings={group.get('couplings')!r}; it must be a list of "
            '{"count": 4, "name": "layer", "members": [{"param": 0, "dim": 0, "size": 1, "offset": 0}]}.'
        ) from error
    taken: dict[int, tuple[int, list[tuple[int, int]]]] = {}
    for each in coupled:
        if not each.places or not _whole(each.count, 1):
            raise ValueError(f"Invalid couplings: {each!r} has no groups or no members.")
        for place in each.places:
            _check_place(each, place, params, taken, blocks)


def _check_place(
    coupled: Coupled,
    place: Place,
    params: Sequence[Tensor],
    taken: dict[int, tuple[int, list[tuple[int, int]]]],
    blocks: tuple[int, int] | None,
) -> None:
    where = f"{coupled.name or 'a coupling'}: {place!r}"
    if not _whole(place.param, 0) or place.param >= len(params):
        raise ValueError(f"Invalid couplings: {where} names parameter {place.param!r} of {len(params)}.")
    shape = tuple(params[place.param].shape)
    if not (_whole(place.dim, 0) and _whole(place.size, 1) and _whole(place.offset, 0)) or place.dim >= len(shape):
        raise ValueError(f"Invalid couplings: {where} does not fit a parameter of shape {shape}.")
    end = place.offset + coupled.count * place.size
    if end > shape[place.dim]:
        raise ValueError(
            f"Invalid couplings: {where} with {coupled.count} groups reaches index {end} of dimension {place.dim} of a "
            f"parameter of shape {shape}."
        )
    dim, spans = taken.setdefault(place.param, (place.dim, []))
    if dim != place.dim or any(start < end and place.offset < stop for start, stop in spans):
        raise ValueError(f"Invalid couplings: {where} has weights that are in another group of this kind already.")
    spans.append((place.offset, end))
    if blocks is not None and shape[place.dim] % blocks[1]:
        raise ValueError(
            f"Invalid group: group='{blocks[0]}:{blocks[1]}' on {coupled.name or 'a parameter'} of shape {shape}, "
            f"whose dimension {place.dim} is not divisible by {blocks[1]}."
        )


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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
        by_compiled: Whether the C++ function adds up the squares of what lies on a CPU. It is not known to this class
            whether there is one; the sums differ in their last bits.

    Raises:
        ValueError: If a parameter is a shard.
    """

    def __init__(self, group: dict[str, Any], by_compiled: bool = False) -> None:
        self._group = group
        self._params: list[Tensor] = [param.detach() for param in group["params"]]
        self._grads = [param.grad is not None for param in group["params"]]
        if any(is_dtensor(param) for param in self._params):
            raise ValueError(
                f"Invalid group: group={kind_of(group)!r} on sharded parameters; structured decay takes whole ones: "
                "train on one process or under DDP."
            )
        self._blocks = n_of_m(kind_of(group))
        self._coupled = couplings_of(group)
        self._norms: list[_Norms] = []
        self._before: dict[int, Tensor] = {}
        self._factors: list[tuple[Coupled, Tensor]] | None = None
        self._sums: dict[int, Tensor] = {}
        if self._blocks is None:
            if by_compiled:
                dims = {place.param: place.dim for each in self._coupled for place in each.places}
                known = [index for index in dims if _is_summed(self._params[index])]
                sums = compiled.square_sums([self._params[index] for index in known], [dims[index] for index in known])
                self._sums = dict(zip(known, sums, strict=True))
            self._take_norms()

    def _take_norms(self) -> None:
        by_device: dict[torch.device, list[int]] = {}
        for number, each in enumerate(self._coupled):
            by_device.setdefault(self._params[each.places[0].param].device, []).append(number)
        kept = self._group.get("dormant_groups")
        masks: list[Tensor | None] = [None] * len(self._coupled)
        for device, numbers in by_device.items():
            squares = torch.cat([self._mean_squares(self._coupled[number], device) for number in numbers])
            zero = squares == 0
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
            self._norms.append(_Norms(numbers, squares.sqrt_(), dormant))
        self._group["dormant_groups"] = masks

    def _mean_squares(self, coupled: Coupled, device: torch.device) -> Tensor:
        total: Tensor | float = 0.0
        for place in coupled.places:
            sums = self._sums.get(place.param)
            if sums is None:
                own = square_sums(self._params[place.param], place, coupled.count)
            else:
                own = _by_group(sums.narrow(0, place.offset, coupled.count * place.size), place.size)
            total = own.to(device) + total
        return total / group_size(coupled, self._params)  # type: ignore[return-value]

    def structures(
        self, hyper: Hyperparameters, alpha_lambda: Callable[[torch.device], float | Tensor]
    ) -> dict[int, Structure]:
        """Return what a step that can do the shrink itself needs of each parameter on a CPU, by the index of it.

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
        found: dict[int, Structure] = {}
        for each, factor in self._all_factors(alpha_lambda):
            divisor = factor.reciprocal()
            for place in each.places:
                param = self._params[place.param]
                if not param.is_cpu or not any(self._grads[other.param] for other in each.places):
                    continue
                dtype = torch.promote_types(param.dtype, torch.float32)
                spread = (divisor.repeat_interleave(place.size) if place.size > 1 else divisor).to(dtype)
                if place.param not in found:
                    whole = len(spread) == param.shape[place.dim]
                    table = spread if whole else torch.ones(param.shape[place.dim], dtype=dtype)
                    found[place.param] = Structure(hyper, place.dim, table)
                table = found[place.param].divisors  # type: ignore[assignment]
                table[place.offset : place.offset + len(spread)] = spread
        return found

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
            if not any(self._grads[place.param] for place in each.places):
                continue  # no step was made with them
            if isinstance(finite, Tensor):
                factor = torch.where(finite.to(factor.device), factor, torch.ones_like(factor))
            for nth, place in enumerate(each.places):
                if place.param in done:
                    continue
                noise = first_place + place.param + _NOISE * (1 + nth), step_of(place.param)
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
        factor = shrink_factor(norms.rms, p_norm, alpha_lambda)
        if p_norm < 2:
            factor.masked_fill_(norms.rms == 0, 0)
        if norms.dormant is not None:
            factor.masked_fill_(norms.dormant, 1)
        return factor


def _mask(kept: Tensor | None, count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, dtype=torch.bool, device=device) if kept is None else kept.to(device)


def group_size(coupled: Coupled, params: Sequence[Tensor]) -> int:
    """Return how many weights a group of a coupling has."""
    return sum(
        params[place.param].numel() // params[place.param].shape[place.dim] * place.size for place in coupled.places
    )


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


def _is_summed(weights: Tensor) -> bool:
    return weights.is_cpu and weights.dtype in compiled.CODES and weights.numel() > 0 and is_flat(weights)


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
