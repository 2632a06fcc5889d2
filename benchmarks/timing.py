"""Timing optimizers against each other: all of them in every round, in a new order each time."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor

from clocks import clock
from contenders import Contender, Size
from memory import MOMENTS, extra_bytes, least_bytes, state_bytes


# A visit lasts at least this long, with several steps if one is shorter, so that clocks and launches do not matter.
_VISIT_SECONDS = 0.01
_MOST_STEPS = 50
# An optimizer slower than a multiple of the baseline and than a number of seconds takes part in fewer rounds.
_SLOW_TIMES, _SLOW_SECONDS = 12, 0.2
_LEAST_ROUNDS = 3
# Steps of the baseline in a round; the others are compared with their median.
_BASELINE_VISITS = 3

OWN, STATE, NOTHING = "all its own", "a state of its own", "nothing of its own"


@dataclass
class Entrant:
    """A contender in the race, and its measurements.

    Attributes:
        name: Name of the contender.
        step: Does one step.
        block: Steps in a visit, timed together.
        every: It takes part in every n-th round.
        extra_bytes: Peak memory of tensors made during a step.
        state_bytes: Bytes of the optimizer's state.
        least_bytes: Bytes that a step has to move.
        seconds: For each round, seconds a step in each visit.
        contender: Its contender; None for the copy.
        note: The backend that AdamWLp's ``auto`` chose.
    """

    name: str
    step: Callable[[], Any]
    block: int = 1
    every: int = 1
    extra_bytes: int = 0
    state_bytes: int = 0
    least_bytes: int = 0
    seconds: dict[int, list[float]] = field(default_factory=dict)
    contender: Contender | None = None
    note: str = ""

    @property
    def all_seconds(self) -> list[float]:
        """Seconds a step of all visits."""
        return [value for values in self.seconds.values() for value in values]


@dataclass
class Race:
    """The results of the rounds of one size.

    Attributes:
        baseline: The entrant that the others are compared with.
        others: The other entrants.
        copy: A plain copy of a large tensor, and the bytes that it reads and writes.
        left_out: Contenders that could not run, and why.
        sharing: What each optimizer does not share with others.
        rounds: Number of rounds.
    """

    baseline: Entrant
    others: list[Entrant]
    copy: Entrant
    left_out: dict[str, str]
    sharing: str
    rounds: int

    @property
    def entrants(self) -> list[Entrant]:
        """All optimizers, the baseline first."""
        return [self.baseline, *self.others]

    def find(self, name: str) -> Entrant | None:
        """Return an optimizer by its name, if it took part."""
        return next((entrant for entrant in self.entrants if entrant.name == name), None)

    def ratios(self, entrant: Entrant, to: Entrant | None = None) -> list[float]:
        """Return time over that of another entrant, the baseline by default, visit by visit within rounds."""
        other = (self.baseline if to is None else to).seconds
        return [
            value / median(other[number])
            for number, values in entrant.seconds.items()
            if number in other
            for value in values
        ]


class NotEnoughMemoryError(Exception):
    """A size does not fit."""


def make_params(size: Size, device: str, seed: int = 0) -> list[Tensor]:
    """Return weights of magnitudes from 0.01 up, with gradients that move them away from zero.

    So repeated steps with the same gradients make neither zeros nor denormal numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def magnitudes(shape: tuple[int, ...], scale: float) -> Tensor:
        values = torch.empty(shape, dtype=size.dtype, device=device)
        return values.normal_(generator=generator).abs_().add_(0.5).mul_(scale)

    params: list[Tensor] = []
    for shape in size.shapes:
        weight, grad = magnitudes(shape, 0.02), magnitudes(shape, 1e-3)
        weight[..., ::2].neg_()
        grad[..., 1::2].neg_()
        params.append(torch.nn.Parameter(weight))
        params[-1].grad = grad
    return params


def copies(params: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of weights and gradients."""
    twins: list[Tensor] = []
    for param in params:
        twins.append(torch.nn.Parameter(param.detach().clone()))
        twins[-1].grad = None if param.grad is None else param.grad.clone()
    return twins


def available_bytes(device: str) -> int:
    """Return the free memory."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def choose_sharing(size: Size, optimizers: int, device: str) -> str:
    """Return which memory each optimizer need not share.

    Raises:
        NotEnoughMemoryError: If not even one set of weights, gradients and moments fits.
    """
    part = size.weights * size.dtype.itemsize
    free = available_bytes(device)
    generous, most = (0.5, 0.8) if device == "cpu" else (0.85, 0.95)  # other processes use a CPU's memory too
    if part * 4 * (optimizers + 1) < generous * free:
        return OWN
    if part * 2 * (optimizers + 2) < generous * free:
        return STATE
    if part * 4 < most * free:
        return NOTHING
    raise NotEnoughMemoryError(
        f"{size.name}: weights, gradients and moments take {part * 4 / 1e9:.0f} GB; {free / 1e9:.0f} GB are free."
    )


def lend_moments(
    optimizer: Any, contender: Contender, params: Sequence[Tensor], pool: Sequence[tuple[Tensor, ...]]
) -> None:
    """Give an optimizer, before its first step, moments that it shares with others.

    The other entries of its state are those that it makes for a tensor of one weight.
    """
    like = params[0]
    single = torch.nn.Parameter(torch.ones(1, dtype=like.dtype, device=like.device))
    single.grad = torch.ones_like(single)
    stand_in = contender.make([single])
    stand_in.step()
    others = {key: value for key, value in stand_in.state[single].items() if key not in MOMENTS}
    for param, moments in zip(params, pool, strict=True):
        counters = {key: torch.zeros_like(value) for key, value in others.items()}
        optimizer.state[param] = {**counters, **dict(zip(MOMENTS, moments, strict=True))}


def line_up(contenders: Sequence[Contender], size: Size, device: str) -> tuple[list[Entrant], dict[str, str], str]:
    """Make the optimizers and warm them up; return them, the ones that cannot run and why, and what they share."""
    left_out = {contender.name: contender.missing for contender in contenders if contender.missing is not None}
    present = [contender for contender in contenders if contender.missing is None]
    sharing = choose_sharing(size, len(present), device)
    common = make_params(size, device)
    pool: list[tuple[Tensor, ...]] = []
    entrants = []
    for contender in present:
        try:
            entrants.append(_enter(contender, size, device, sharing, common, pool))
        except Exception as error:  # the others continue; the table says why this one is absent
            lines = str(error).strip().splitlines() or [type(error).__name__]
            left_out[contender.name] = lines[0][:200]
        if contender.name in left_out:
            free_memory(device)
    return entrants, left_out, sharing


def _enter(
    contender: Contender,
    size: Size,
    device: str,
    sharing: str,
    common: Sequence[Tensor],
    pool: list[tuple[Tensor, ...]],
) -> Entrant:
    """Make an optimizer and warm it up; the first one whose moments others can use leaves them in the pool."""
    params = copies(common) if sharing == OWN else list(common)
    optimizer = contender.make(params)
    lends = sharing == NOTHING and contender.plain_state
    if lends and pool:
        lend_moments(optimizer, contender, params, pool)
    entrant = Entrant(contender.name, optimizer.step, contender=contender)
    warm_up(entrant, device)
    entrant.state_bytes, entrant.least_bytes = state_bytes(optimizer), least_bytes(optimizer, params)
    if contender.backend == "auto":
        entrant.note = ", ".join(name for name, _ in optimizer.backends.values())
    if lends and not pool:
        pool += [tuple(optimizer.state[param][name] for name in MOMENTS) for param in params]
    return entrant


def free_memory(device: str) -> None:
    """Free unreferenced memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def warm_up(entrant: Entrant, device: str) -> None:
    """Do the first steps, which compile and allocate, take the memory of one, and settle the steps of a visit."""
    entrant.step()
    begin = time.perf_counter()
    entrant.extra_bytes = extra_bytes(entrant.step, device)
    seconds = time.perf_counter() - begin
    if seconds < _SLOW_SECONDS:  # one long step is precise enough
        seconds = clock(entrant.step, 1, device)
    entrant.block = min(max(math.ceil(_VISIT_SECONDS / seconds), 1), _MOST_STEPS)
    entrant.seconds[-1] = [seconds]


def copy_entrant(device: str, numel: int) -> Entrant:
    """Return a plain copy of a tensor of float32, far larger than any cache, as something to time with the others."""
    source = torch.ones(numel, device=device)
    target = torch.empty_like(source)
    entrant = Entrant(f"copy of {source.nbytes / 1e6:.0f} MB", lambda: target.copy_(source))
    entrant.least_bytes = 2 * source.nbytes
    warm_up(entrant, device)
    return entrant


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage now, and not again before the end."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def race(
    contenders: Sequence[Contender],
    size: Size,
    device: str,
    rounds: int,
    *,
    seconds: float = math.inf,
    copy_numel: int | None = None,
) -> Race:
    """Time all contenders in every round, in a new random order each time; the first of them is the baseline.

    A visit of several steps begins with one that is not timed, so that what fits into a cache is there for all alike.

    Args:
        contenders: Who takes part.
        size: What they step on.
        device: Where.
        rounds: How many rounds.
        seconds: After so long no round begins any more, once three are done.
        copy_numel: Length of the tensor that is copied.

    Raises:
        NotEnoughMemoryError: If the size does not fit.
        RuntimeError: If the baseline cannot run.
    """
    entrants, left_out, sharing = line_up(contenders, size, device)
    baseline = next((entrant for entrant in entrants if entrant.name == contenders[0].name), None)
    if baseline is None:
        raise RuntimeError(f"{contenders[0].name} cannot run on {size.name}: {left_out.get(contenders[0].name)}")
    numel = copy_numel or (1 << 26 if device == "cpu" else 1 << 28)
    copy = copy_entrant(device, min(numel, max(available_bytes(device) // 16, 1 << 20)))
    slow = max(_SLOW_TIMES * baseline.seconds[-1][0], _SLOW_SECONDS)
    for entrant in entrants:
        if entrant.seconds[-1][0] > slow:
            entrant.every = max(rounds // max(_LEAST_ROUNDS, rounds // 5), 1)
    for entrant in (*entrants, copy):
        entrant.seconds.clear()
    order = random.Random(0)
    end, done = time.perf_counter() + seconds, 0
    with no_garbage_collection():
        for number in range(rounds):
            if number >= _LEAST_ROUNDS and time.perf_counter() > end:
                break
            visits = [entrant for entrant in (*entrants, copy) if number % entrant.every == 0]
            visits += [baseline] * (_BASELINE_VISITS - 1)
            order.shuffle(visits)
            for entrant in visits:
                if entrant.name in left_out:
                    continue
                try:
                    if entrant.block > 1:
                        entrant.step()
                    entrant.seconds.setdefault(number, []).append(clock(entrant.step, entrant.block, device))
                except torch.OutOfMemoryError:
                    if entrant is baseline:
                        raise NotEnoughMemoryError(f"{size.name}: not even {baseline.name} fits.") from None
                    left_out[entrant.name] = "not enough memory beside the others"
                    entrant.step = _over
                    free_memory(device)
            done = number + 1
    for entrant in (*entrants, copy):
        entrant.step = _over  # frees memory that the next size may need
    free_memory(device)
    others = [entrant for entrant in entrants if entrant is not baseline and entrant.name not in left_out]
    return Race(baseline, others, copy, left_out, sharing, done)


def _over() -> None:
    raise RuntimeError("The race is over.")
