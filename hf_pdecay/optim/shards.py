"""The weights that this process holds of a parameter: whole, sharded by DTensor, or partitioned by DeepSpeed.

The attributes that DeepSpeed sets on parameters and optimizers identify it; it is never imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from .bases import base_in, base_of, change
from .distributed import Groups, all_sum, is_dtensor, local, shard_groups
from .moments import dequantize


# Entries beside second moments of projected gradients (GaLore, APOLLO, Conda, SOAP), whatever their shape.
_PROJECTIONS = frozenset(("projector", "Q", "GG"))


def full_shape(param: Tensor) -> torch.Size:
    """Return the shape of a whole parameter."""
    shape: torch.Size = getattr(param, "ds_shape", param.shape)
    return shape


def full_numel(param: Tensor) -> int:
    """Return the number of weights of a whole parameter."""
    return full_shape(param).numel()


def is_sharded(param: Tensor) -> bool:
    """Whether processes hold different weights of a parameter of the model."""
    return is_dtensor(param) or hasattr(param, "ds_tensor")


def is_flat_shard(param: Tensor) -> bool:
    """Whether an optimizer steps a parameter as a part of a flat tensor, as under DeepSpeed."""
    return hasattr(param, "_z3_optimizer") or hasattr(param, "_hp_mapping")


def held(param: Any) -> Ranked:
    """Return the weights that this process holds of a parameter of the model; they share its memory."""
    if is_dtensor(param):
        return Ranked(local(param), None, *shard_groups(param))
    if hasattr(param, "ds_tensor"):
        return _of_group(param.ds_process_group, _unpadded(param, param.ds_tensor.detach()))
    return Ranked(param)


def ranked(param: Any, optimizer: Optimizer) -> Ranked:
    """Return the weights that this process steps of a parameter of :func:`group_params`, with moment and base."""
    if hasattr(param, "_z3_optimizer"):
        return _of_group(param.ds_process_group, *_partition_of_zero3(param))
    if hasattr(param, "_hp_mapping"):
        return _of_group(param._dp_group, *_fragment_of_zero12(param, _deepspeed_optimizer(optimizer)))
    second = second_moment(param, optimizer)
    if second is not None:
        second = dequantize(local(second), torch.promote_types(second.dtype, torch.float32))
    base = base_of(param, optimizer)
    if is_dtensor(param):
        return Ranked(local(param), second, *shard_groups(param), None if base is None else local(base))
    return Ranked(param, second, base=base)


def change_here(param: Any, optimizer: Optimizer) -> Tensor:
    """Return the change of the weights that this process steps of a parameter that decays to its base, in float32.

    It is 0 before the first step, and in float64 for float64 weights.
    """
    tensor = ranked(param, optimizer)
    weight = tensor.weight.detach()
    base = weight if tensor.base is None else tensor.base
    return change(weight, base, torch.promote_types(weight.dtype, torch.float32))


def second_moment(param: Tensor, optimizer: Optimizer) -> Tensor | None:
    """Return the second moment of each weight of a parameter; None if the optimizer keeps another one, or none."""
    # state[param] would make an entry for a parameter that has never had a gradient.
    state = optimizer.state.get(param) or {}
    second = state.get("exp_avg_sq")
    if not isinstance(second, Tensor) or second.shape != param.shape or not _PROJECTIONS.isdisjoint(state):
        return None
    return second


def group_params(optimizer: Any) -> list[list[Tensor]]:
    """Return the model's parameters in each param group of an optimizer, where DeepSpeed puts flat partitions.

    Args:
        optimizer: Any optimizer, which Accelerate or DeepSpeed may have wrapped.
    """
    engine = _deepspeed_optimizer(optimizer)
    if engine is None:
        return [list(group["params"]) for group in optimizer.param_groups]
    if hasattr(engine, "sub_group_to_group_id"):
        lists: list[list[Tensor]] = [[] for _ in engine.param_groups]
        for number, params in enumerate(engine.fp16_groups):
            lists[engine.sub_group_to_group_id[number]] += params
        return lists
    return [list(params) for params in getattr(engine, "bit16_groups", None) or engine.bf16_groups]


def settle(model: torch.nn.Module) -> None:
    """Have FSDP2 free what a forward pass left gathered, so that the model has the optimizer's parameters."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return
    for part in model.modules():
        if isinstance(part, module.FSDPModule):
            part.reshard()


@torch.no_grad()
def publish(optimizer: Any) -> None:
    """Copy an optimizer's weights to the model's; only under DeepSpeed are these different tensors."""
    engine = _deepspeed_optimizer(optimizer)
    if engine is None:
        return
    if not hasattr(engine, "sub_group_to_group_id"):
        engine.update_lp_params()
        return
    # Small parameters stay gathered, and would keep their old values.
    engine._partition_all_parameters()
    for number in range(len(engine.fp16_groups)):
        engine._reassign_or_swap_out_partitioned_parameters(number)
    if engine.persistent_parameters:
        engine.persistent_parameters[0].all_gather(engine.persistent_parameters)


@torch.no_grad()
def wholly_zero(params: Sequence[Tensor]) -> list[bool]:
    """Return for each parameter whether all its weights are 0, on all processes."""
    return [not all_sum(shard.weight.any().to(torch.int64), shard.groups) for shard in map(held, params)]


def _of_group(group: Any, weight: Tensor, exp_avg_sq: Tensor | None = None, base: Tensor | None = None) -> Ranked:
    """A shard across the processes of a process group."""
    return Ranked(weight, exp_avg_sq, torch.distributed.get_rank(group), (group,), base)


def _deepspeed_optimizer(optimizer: Any) -> Any:
    """DeepSpeed's optimizer around an optimizer, inside Accelerate's wrapper; None without DeepSpeed."""
    while optimizer is not None:
        if any(hasattr(optimizer, name) for name in ("sub_group_to_group_id", "bit16_groups", "bf16_groups")):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def _partition_of_zero3(param: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    engine = param._z3_optimizer
    number, start, numel = engine.grad_position[engine.get_param_id(param)]
    flat = engine.fp32_partitioned_groups_flat[number]
    if flat is None or not flat.numel():
        raise ValueError(
            "A target_sparsity cannot reach weights that DeepSpeed keeps on NVMe: offload_optimizer and offload_param "
            "must be 'cpu' or 'none'."
        )
    state = engine.optimizer.state.get(flat) or {}
    second, base = (
        None if whole is None else _unpadded(param, whole.detach().narrow(0, start, numel))
        for whole in (state.get("exp_avg_sq"), base_in(state))
    )
    return _unpadded(param, flat.detach().narrow(0, start, numel)), second, base


def _fragment_of_zero12(param: Any, engine: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    mapping = param._hp_mapping
    if mapping is None:  # other processes have all its weights
        return param.new_empty(0, dtype=torch.float32), None, None
    # The state that DeepSpeed links to the parameter is missing for all param groups but the first.
    partitions = getattr(engine, "single_partition_of_fp32_groups", None) or engine.fp32_groups_flat_partition
    flat, place = partitions[mapping.param_group_index], mapping.get_hp_fragment_address()
    state = engine.optimizer.state.get(flat) or {}
    second, base = (
        None if whole is None else whole.narrow(0, place.start, place.numel)
        for whole in (state.get("exp_avg_sq"), base_in(state))
    )
    return mapping.hp_fragment.detach(), second, base


def _unpadded(param: Any, partition: Tensor) -> Tensor:
    """A partition of a ZeRO-3 parameter without its padding."""
    before = torch.distributed.get_rank(param.ds_process_group) * partition.numel()
    return partition[: max(min(param.ds_numel - before, partition.numel()), 0)]


class Ranked(NamedTuple):
    """A tensor of weights, or this process's shard of one, ranked by |w| v^(1/4), or by |w| alone.

    Attributes:
        slot: Index of the shard among the tensor's shards.
        groups: Process groups that the shards lie across. All their processes must make the same calls in one order.
        base: What the weights decay to if that is not 0: then |w - base| ranks them.
    """

    weight: Tensor
    exp_avg_sq: Tensor | None = None
    slot: int = 0
    groups: Groups = ()
    base: Tensor | None = None

    def viewed(self, view: Callable[[Tensor], Tensor]) -> Ranked:
        """Return the same view of the weights, their second moment and their base."""
        weight, second, base = (
            None if tensor is None else view(tensor.detach()) for tensor in (self.weight, self.exp_avg_sq, self.base)
        )
        return self._replace(weight=cast(Tensor, weight), exp_avg_sq=second, base=base)
