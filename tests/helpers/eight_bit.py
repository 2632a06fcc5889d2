"""Moments in 8 bits: values for them, and what torchao makes of these."""

from __future__ import annotations

from typing import Any

import torch


def state_of(values: torch.Tensor, signed: bool) -> Any:
    """The values as torchao stores them."""
    from torchao.optim.subclass_8bit import OptimState8bit

    state = OptimState8bit.zeros(values.shape, signed=signed, block_size=256, device=values.device)
    state.copy_(values)
    return state


def borders(signed: bool) -> torch.Tensor:
    """Values at and beside the middle between any two neighbouring numbers of the map, in blocks whose scale is 1."""
    numbers = state_of(torch.zeros(256), signed).qmap
    middles = numbers[:-1] + (numbers[1:] - numbers[:-1]) * 0.5
    found = [numbers, middles]
    for direction in (-torch.inf, torch.inf):
        beside = middles
        for _ in range(3):
            beside = torch.nextafter(beside, torch.tensor(direction))
            found.append(beside)
    values = torch.cat([*found, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-30, 6e-8, 2e-7, -2e-7])])
    values = values if signed else values.clamp(min=0)
    blocks = values.new_zeros(-(-len(values) // 255), 256)
    for row, some in zip(blocks, values.split(255), strict=True):
        row[: len(some)] = some
        row[-1] = 1
    return blocks.flatten()
