"""Sharded parameters (DTensor, as FSDP2 makes them): each rank steps its shard as if it were a plain tensor."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .rounding import mix32


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor. Does not import torch's module, without which there cannot be one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a DTensor that this rank holds, which shares its memory; another tensor unchanged."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local_grad(param: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of this rank's shard, which may communicate. A plain tensor raises a ValueError."""
    if not is_dtensor(grad):
        raise ValueError(
            f"AdamWLp takes a DTensor as the gradient of a DTensor parameter (shape {tuple(param.shape)}), not "
            f"{type(grad).__name__}."
        )
    if not are_placed_alike(param, grad):
        like = cast(Any, param)
        grad = cast(Any, grad).redistribute(like.device_mesh, like.placements)
    part = local(grad)
    # A tensor that a collective still fills has no address before the wait.
    return part if type(part) is Tensor else cast(Any, part).wait()


def are_placed_alike(param: Tensor, grad: Tensor) -> bool:
    """Whether this rank holds the same elements of two DTensors."""
    one, other = cast(Any, param), cast(Any, grad)
    return bool(one.placements == other.placements and one.device_mesh == other.device_mesh)


def parts_here(
    params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]] | None:
    """Return this rank's shards, which the caller must keep alive; None if a gradient must be moved or waited for."""
    shards, their = list(params), list(grads)
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if not is_dtensor(param):
            continue
        shards[index] = local(param)
        if grad is not None:
            if not is_dtensor(grad) or not are_placed_alike(param, grad):
                return None
            part = their[index] = local(grad)
            if type(part) is not Tensor:
                return None
    return shards, their


def shard_place(param: Tensor, place: int) -> int:
    """Return the place of a DTensor's shard in the optimizer: shards draw different bits, replicas the same."""
    sharded = cast(Any, param)
    for coordinate, placement in zip(sharded.device_mesh.get_coordinate(), sharded.placements, strict=True):
        if placement.is_shard():
            place = mix32((place + coordinate) & 0xFFFFFFFF)
    return place


Groups = tuple[Any, ...]
"""The process groups that the shards of a tensor lie across; empty if each process has the whole tensor."""


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
    """Return the sum of tensors of one shape, each summed over its process groups first."""
    sums = [all_sum(part, groups) for groups, part in parts.items()]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def shard_groups(param: Tensor) -> tuple[int, Groups]:
    """Return the index of this process's shard of a DTensor, and the process groups that the shards lie across."""
    sharded = cast(Any, param)
    slot, groups = 0, []
    for dim, placement in enumerate(sharded.placements):
        if not placement.is_replicate():
            slot = slot * sharded.device_mesh.size(dim) + sharded.device_mesh.get_local_rank(dim)
            groups.append(sharded.device_mesh.get_group(dim))
    return slot, tuple(groups)


class Span(NamedTuple):
    """The indices along ``dim`` of a sharded tensor that this process holds; the last processes may have fewer."""

    dim: int
    start: int
    size: int
    groups: Groups


def span_of(param: Tensor) -> Span | None:
    """Return where a shard lies in the whole tensor; None if it is whole. A ValueError unless sharded as by FSDP2."""
    if not is_dtensor(param):
        return None
    sharded = cast(Any, param)
    split = [(dim, placement) for dim, placement in enumerate(sharded.placements) if not placement.is_replicate()]
    if not split:
        return None
    mesh_dim, placement = split[0]
    if len(split) > 1 or type(placement).__name__ != "Shard":
        raise ValueError(
            f"Invalid group: weights that are placed as {sharded.placements}; units of weights need shards along one "
            "dimension, as FSDP2 makes them."
        )
    length = param.shape[placement.dim]
    size = -(-length // sharded.device_mesh.size(mesh_dim))
    start = min(sharded.device_mesh.get_local_rank(mesh_dim) * size, length)
    return Span(placement.dim, start, size, shard_groups(param)[1])


def common_groups(spans: Sequence[Span | None]) -> Groups:
    """Return the process groups that all these tensors are sharded across; a ValueError if they differ."""
    groups = {span.groups if span is not None else () for span in spans}
    if len(groups) > 1:
        raise ValueError("Invalid group: a unit has members that lie across different processes; shard all alike.")
    return groups.pop() if groups else ()


def first_index(span: Span | None, dim: int) -> int:
    """Return the index along a dimension at which this process's shard of a tensor begins."""
    return span.start if span is not None and span.dim == dim else 0


def any_alive(param: Tensor, base: Tensor | None = None) -> Tensor:
    """Return a 0-dim bool tensor: whether any weight, on any rank that holds a shard of it, is not 0, or its base."""
    alive = local(param).any() if base is None else (local(param) != local(base)).any()
    owners = Owners.of([param]) if is_dtensor(param) else None
    return alive if owners is None else owners.reduced(alive, torch.distributed.ReduceOp.MAX)


class Owners(NamedTuple):
    """The processes that hold DTensors: the process groups of their meshes, and the device of the first DTensor."""

    groups: Groups
    device: torch.device

    @classmethod
    def of(cls, sharded: Sequence[Tensor]) -> Owners | None:
        """Return the processes that hold these DTensors; None without any."""
        if not sharded:
            return None
        groups = {}
        for mesh in dict.fromkeys(cast(Any, tensor).device_mesh for tensor in sharded):
            for dim in range(mesh.ndim):
                group = mesh.get_group(dim)
                groups[group.group_name] = group
        return cls(tuple(groups.values()), local(sharded[0]).device)

    def reduced(self, flag: Tensor, op: Any) -> Tensor:
        """All-reduce one flag over each process group."""
        number = flag.to(torch.int32)
        for group in self.groups:
            torch.distributed.all_reduce(number, op=op, group=group)
        return number.to(torch.bool)


def agreed_finite(finite: bool | Tensor, owners: Owners | None) -> bool | Tensor:
    """Return whether gradients are finite on all ranks that hold shards, given whether they are on this one."""
    if owners is None:
        return finite
    flag = owners.reduced(torch.as_tensor(finite, device=owners.device), torch.distributed.ReduceOp.MIN)
    return bool(flag) if isinstance(finite, bool) else flag
