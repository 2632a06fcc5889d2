"""Sharded parameters (DTensor, as FSDP2 makes them): each rank steps its own shard as if it were a plain tensor."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .rounding import mix32


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor. Does not import torch's module for them: without it there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a DTensor that this rank holds, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local_grad(param: Tensor, grad: Tensor) -> Tensor:
    """Return the part of a DTensor's gradient that belongs to the shard of this rank, which may take communication.

    Raises:
        ValueError: If the gradient is a plain tensor, of which nobody knows what part it is.
    """
    if not is_dtensor(grad):
        raise ValueError(
            f"AdamWLp takes a DTensor as the gradient of a DTensor parameter (shape {tuple(param.shape)}), not "
            f"{type(grad).__name__}."
        )
    if not are_placed_alike(param, grad):
        like = cast(Any, param)
        grad = cast(Any, grad).redistribute(like.device_mesh, like.placements)
    part = local(grad)
    # What a collective still fills waits for it in torch's operations, but has no address.
    return part if type(part) is Tensor else cast(Any, part).wait()


def are_placed_alike(param: Tensor, grad: Tensor) -> bool:
    """Whether the parts of two DTensors that this rank holds are of the same elements."""
    one, other = cast(Any, param), cast(Any, grad)
    return bool(one.placements == other.placements and one.device_mesh == other.device_mesh)


def parts_here(
    params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]] | None:
    """Return the parts of parameters and gradients that this rank holds, which others keep alive.

    None if a gradient has to be moved or waited for first.
    """
    some, their = list(params), list(grads)
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if not is_dtensor(param):
            continue
        some[index] = local(param)
        if grad is not None:
            if not is_dtensor(grad) or not are_placed_alike(param, grad):
                return None
            part = their[index] = local(grad)
            if type(part) is not Tensor:
                return None
    return some, their


def shard_place(param: Tensor, place: int) -> int:
    """Return the place of a DTensor's shard in the optimizer, so that shards draw random bits of their own.

    Replicas get the same place, and so the same bits.
    """
    sharded = cast(Any, param)
    for coordinate, placement in zip(sharded.device_mesh.get_coordinate(), sharded.placements, strict=True):
        if placement.is_shard():
            place = mix32((place + coordinate) & 0xFFFFFFFF)
    return place


Groups = tuple[Any, ...]
"""Process groups that the shards of a tensor lie across; none for a tensor that is whole on each process."""


def all_sum(numbers: Tensor, groups: Groups) -> Tensor:
    """Return the sum of the tensors of all processes that hold shards, in place where the device can communicate."""
    for group in groups:
        # NCCL alone cannot reduce what is offloaded to the CPU.
        able = numbers.device.type in torch.distributed.get_backend_config(group)
        sent = numbers if able else numbers.to(torch.device("cuda", torch.cuda.current_device()))
        torch.distributed.all_reduce(sent, group=group)
        numbers = sent.to(numbers.device)
    return numbers


def total(parts: Mapping[Groups, Tensor]) -> Tensor:
    """Return the sum of some tensors of one shape, each summed over the processes of its groups first."""
    sums = [all_sum(part, groups) for groups, part in parts.items()]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def shard_groups(param: Tensor) -> tuple[int, Groups]:
    """Return which of a DTensor's shards this process holds, and the groups that they lie across.

    Across the other dimensions of its mesh, and outside of that, are replicas.
    """
    sharded = cast(Any, param)
    slot, groups = 0, []
    for dim, placement in enumerate(sharded.placements):
        if not placement.is_replicate():
            slot = slot * sharded.device_mesh.size(dim) + sharded.device_mesh.get_local_rank(dim)
            groups.append(sharded.device_mesh.get_group(dim))
    return slot, tuple(groups)


class Span(NamedTuple):
    """Which part of a tensor's indices this process holds.

    Attributes:
        dim: The dimension that the tensor is sharded along.
        start: The first index of it here.
        each: How many indices a process has, where there are enough.
        groups: Process groups that the shards lie across.
    """

    dim: int
    start: int
    each: int
    groups: Groups


def span_of(param: Tensor) -> Span | None:
    """Return where the shard of a DTensor lies in the whole tensor; None for a tensor that is whole.

    Raises:
        ValueError: If it is sharded along several dimensions, or in another way than FSDP2 does it.
    """
    if not is_dtensor(param):
        return None
    sharded = cast(Any, param)
    split = [(number, each) for number, each in enumerate(sharded.placements) if not each.is_replicate()]
    if not split:
        return None
    number, placement = split[0]
    if len(split) > 1 or type(placement).__name__ != "Shard":
        raise ValueError(
            f"Invalid group: weights that are placed as {sharded.placements}; groups of weights that processes share "
            "are known for shards along one dimension, as FSDP2 makes them."
        )
    size, each = param.shape[placement.dim], -(-param.shape[placement.dim] // sharded.device_mesh.size(number))
    start = min(sharded.device_mesh.get_local_rank(number) * each, size)
    return Span(placement.dim, start, each, shard_groups(param)[1])


def common_groups(spans: Sequence[Span | None]) -> Groups:
    """Return the process groups that tensors are sharded across, none if they are whole.

    Raises:
        ValueError: If they are not the same for all.
    """
    found = {span.groups if span is not None else () for span in spans}
    if len(found) > 1:
        raise ValueError(
            "Invalid group: a group of weights has members that lie across different processes; shard all of them "
            "alike."
        )
    return found.pop() if found else ()


def first_index(span: Span | None, dim: int) -> int:
    """Return the index along a dimension at which this process's part of a tensor begins."""
    return span.start if span is not None and span.dim == dim else 0


def any_nonzero(param: Tensor) -> Tensor:
    """Return a 0-dim bool tensor: whether any weight, on any rank that holds a shard of it, is not 0."""
    found = local(param).any()
    owners = Owners.of([param]) if is_dtensor(param) else None
    return found if owners is None else owners.reduced(found, torch.distributed.ReduceOp.MAX)


class Owners(NamedTuple):
    """Who holds some DTensors: the process groups of all dimensions of their meshes, and the device of the first."""

    groups: Groups
    device: torch.device

    @classmethod
    def of(cls, sharded: Sequence[Tensor]) -> Owners | None:
        """Return who holds some DTensors; None if there are none."""
        if not sharded:
            return None
        groups = {}
        for mesh in dict.fromkeys(cast(Any, tensor).device_mesh for tensor in sharded):
            for dim in range(mesh.ndim):
                group = mesh.get_group(dim)
                groups[group.group_name] = group
        return cls(tuple(groups.values()), local(sharded[0]).device)

    def reduced(self, flag: Tensor, op: Any) -> Tensor:
        """One all-reduce of one flag for each group."""
        number = flag.to(torch.int32)
        for group in self.groups:
            torch.distributed.all_reduce(number, op=op, group=group)
        return number.to(torch.bool)


def agreed_finite(finite: bool | Tensor, owners: Owners | None) -> bool | Tensor:
    """Return whether gradients are finite on all ranks that hold shards of parameters, given whether they are here."""
    if owners is None:
        return finite
    flag = owners.reduced(torch.as_tensor(finite, device=owners.device), torch.distributed.ReduceOp.MIN)
    return bool(flag) if isinstance(finite, bool) else flag
