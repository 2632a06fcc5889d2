"""Which weights of a matrix become zero: scores, how many zeros each part gets, and the lowest of each part.

A weight is dead if no calibration row gives it an input other than zero: it changes no output, so it goes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import asked_percent, is_number
from ..optim.unit_kinds import n_of_m


# The number of zeros of a matrix, or N and M: at most N weights of M consecutive inputs stay.
Amount = int | tuple[int, int]


def check_amount(sparsity: float | None, pattern: str | None) -> tuple[float | None, tuple[int, int] | None]:
    """Return a valid sparsity or the N and M of a valid pattern; raise ValueError if both or neither are given."""
    if (sparsity is None) == (pattern is None):
        raise ValueError(
            f"Invalid sparsity: sparsity={sparsity!r} with pattern={pattern!r}; give one of them: the fraction of "
            "zeros, such as 0.5, or N:M, such as '2:4'."
        )
    if pattern is not None:
        try:
            blocks = n_of_m(pattern)
        except ValueError:
            blocks = None
        if blocks is None:
            raise ValueError(
                f"Invalid pattern: pattern={pattern!r}; it must be N:M, such as '2:4', by which at most 2 "
                "weights of 4 stay."
            )
        return None, blocks
    if not is_number(sparsity) or not 0 < sparsity < 1:  # type: ignore[operator]
        raise ValueError(
            f"Invalid sparsity: sparsity={sparsity!r}; it must be above 0 and below 1.{asked_percent(sparsity)}"
        )
    return float(sparsity), None  # type: ignore[arg-type]


def amount_of(shape: Sequence[int], sparsity: float | None, pattern: str | None) -> Amount:
    """Return what to prune in one matrix of shape (outputs, inputs).

    Raises:
        ValueError: If an argument is invalid, or M does not divide the inputs.
    """
    fraction, blocks = check_amount(sparsity, pattern)
    if blocks is not None:
        check_divides(blocks, shape[1], "weight")
        return blocks
    return round(fraction * shape[0] * shape[1])  # type: ignore[operator]


def check_divides(blocks: tuple[int, int], inputs: int, name: str) -> None:
    """Raise ValueError if a matrix's inputs cannot be cut into blocks of M."""
    if inputs % blocks[1]:
        raise ValueError(
            f"Invalid pattern: pattern='{blocks[0]}:{blocks[1]}' on {name}, whose {inputs} inputs are not divisible by "
            f"{blocks[1]}."
        )


def check_zeros(zeros: int, amount: Amount, numel: int, name: str) -> None:
    """Raise ValueError if a matrix has more zeros than it is to have."""
    if isinstance(amount, int) and zeros > amount:
        raise ValueError(
            f"Invalid sparsity: {name} has {zeros:,} zeros in {numel:,} weights ({zeros / numel:.2%}) already, and "
            f"{amount:,} were asked for. Zeros stay zeros; ask for more."
        )


def scores(weight: Tensor, importance: Tensor, zero: Tensor) -> Tensor:
    """Return how much each weight matters: its magnitude times the importance of its input.

    Below them all, in the order of their magnitudes, are weights whose importance is 0, and last those that are zero.
    """
    magnitude = weight.abs()
    dead = magnitude.reciprocal().neg_().clamp_(min=torch.finfo(weight.dtype).min)
    return torch.where(importance == 0, dead, magnitude.mul_(importance)).masked_fill_(zero, -torch.inf)


def spread(total: int, sizes: Sequence[int]) -> list[int]:
    """Divide a number over parts in proportion to their sizes, by whole numbers; none gets more than its size."""
    whole, seen, given, parts = sum(sizes), 0, 0, []
    for size in sizes:
        seen += size
        parts.append((total * seen // whole if whole else 0) - given)
        given += parts[-1]
    return parts


def share(total: int, sizes: Sequence[int], least: Sequence[int]) -> list[int]:
    """Like :func:`spread`, but each part gets at least a number of its own; these make no more than the total."""
    parts, free, left = list(least), list(range(len(sizes))), total
    while True:
        even = spread(left, [sizes[part] for part in free])
        over = {part for part, count in zip(free, even, strict=True) if least[part] > count}
        if not over:
            for part, count in zip(free, even, strict=True):
                parts[part] = count
            return parts
        left -= sum(least[part] for part in over)
        free = [part for part in free if part not in over]


def lowest(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Return a mask of the lowest values in each row, as many as its count says; of equal ones the first."""
    order = values.argsort(dim=1, stable=True)
    first = torch.arange(values.shape[1], device=values.device) < torch.tensor(counts, device=values.device)[:, None]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, first)


def outside_blocks(values: Tensor, blocks: tuple[int, int]) -> Tensor:
    """Return a mask of all but the N highest of each M consecutive values of a row."""
    n, m = blocks
    groups = values.reshape(-1, m)
    order = groups.argsort(dim=1, stable=True)[:, : m - n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view(values.shape)


def zeroed(values: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in a dtype, with zeros where the mask is true and nowhere else, and no zero negative.

    What the dtype would round to zero becomes its smallest normal number.
    """
    info = torch.finfo(dtype)
    cast = values.clamp(info.min, info.max).to(dtype)
    smallest = torch.full_like(cast, info.tiny).copysign_(cast)
    return torch.where(cast == 0, smallest, cast).masked_fill_(mask, 0.0)


def float_of(weight: Tensor) -> Tensor:
    """Return weights in float32, or in float64 if they are."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
