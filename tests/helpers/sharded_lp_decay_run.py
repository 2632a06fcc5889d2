"""LpDecay on sharded parameters (DTensor, FSDP2) beside whole ones.

Run it by ``python -m tests.helpers.sharded_lp_decay_run OUTPUT_DIR``.

To be run by torchrun on two processes. Each writes ``rank{N}.pt``: for each case what it found, or the error's text.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from hf_pdecay import LpDecay
from hf_pdecay.optim import base_optimizers
from hf_pdecay.optim.distributed import local
from hf_pdecay.target.control import SparsityControl
from tests.helpers.launching import leave

from .sharded_run import full, normal, weights


Make = Callable[[Any], torch.optim.Optimizer]
BASES: dict[str, Make] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.02),
}
DECAY: dict[str, Any] = {"p_norm": 0.3, "lambda_p": 5.0}
STEPS = 6


class Case:
    """Sharded parameters and their optimizer, and whole ones on each rank."""

    def __init__(self, mesh: DeviceMesh, make: Make) -> None:
        self.mesh, whole = mesh, weights()
        self.names = list(whole)
        self.sharded = [nn.Parameter(distribute_tensor(each, mesh, [Shard(0)])) for each in whole.values()]
        self.whole = [nn.Parameter(each.clone()) for each in whole.values()]
        self.optimizers = [LpDecay(make(some), **DECAY) for some in (self.sharded, self.whole)]

    def step(self, seed: int, bad: bool = False) -> None:
        for k, (param, rival) in enumerate(zip(self.sharded, self.whole, strict=True)):
            grad = normal(*rival.shape, seed=100 * seed + k)
            if bad and k == 0:
                grad[-1, -1] = float("nan")  # of the last rank
            rival.grad = grad
            param.grad = distribute_tensor(grad, self.mesh, [Shard(0)])
        for optimizer in self.optimizers:
            optimizer.step()

    def found(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        pairs = zip(self.sharded, self.whole, strict=True)
        return {name: (full(a), full(b)) for name, (a, b) in zip(self.names, pairs, strict=True)}


def trained(mesh: DeviceMesh, make: Make) -> Any:
    case = Case(mesh, make)
    for seed in range(STEPS):
        case.step(seed, bad=seed == 2)
        if seed == 0:
            dormant = [bool(case.optimizers[0].state[param]["dormant"]) for param in case.sharded]
    return {
        "weights": case.found(),
        "dormant": dict(zip(case.names, dormant, strict=True)),
        "skipped": [each.skipped_steps for each in case.optimizers],
    }


def model() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))
    nn.init.zeros_(made[2].weight)  # type: ignore[arg-type]
    return made


def shard(each: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in (each[0], each[2], each):  # type: ignore[index]
        fully_shard(layer, mesh=mesh)
    return each


def steps(each: nn.Module, optimizer: LpDecay, seeds: range) -> None:
    control = SparsityControl(optimizer, 40, target_sparsity=0.5)
    for seed in seeds:
        control.before_step(seed)
        optimizer.zero_grad()
        (each(normal(16, 9, seed=seed)) - 1).square().mean().backward()
        optimizer.step()
        control.after_step(seed)


def fsdp(mesh: DeviceMesh, make: Make, folder: Path) -> Any:
    """Both ranks see one batch, whose mean gradient is that of one rank. Resumed through a sharded checkpoint."""
    found = []
    for each in (shard(model(), mesh), model()):
        optimizer = LpDecay(make(each.parameters()), **DECAY)
        steps(each, optimizer, range(1, 41))
        found.append([full(param) for param in each.parameters()])

    cut = shard(model(), mesh)
    optimizer = LpDecay(make(cut.parameters()), **DECAY)
    steps(cut, optimizer, range(1, 21))
    dcp.save({"model": cut.state_dict(), "optimizer": get_optimizer_state_dict(cut, optimizer)}, checkpoint_id=folder)
    again = shard(model(), mesh)
    for param in again.parameters():
        param.data.mul_(2)
    other = LpDecay(make(again.parameters()))
    state: dict[str, Any] = {"model": again.state_dict(), "optimizer": get_optimizer_state_dict(again, other)}
    dcp.load(state, checkpoint_id=folder)
    again.load_state_dict(state["model"])
    set_optimizer_state_dict(again, other, copy.copy(state["optimizer"]))
    steps(again, other, range(21, 41))
    resumed = [full(param) for param in again.parameters()]
    return {
        "weights": {str(k): pair for k, pair in enumerate(zip(*found, strict=True))},
        "resumed": {str(k): pair for k, pair in enumerate(zip(resumed, found[0], strict=True))},
    }


def batched(mesh: DeviceMesh) -> Any:
    """The number of weights of each batch here, and its indices, for tensors split 2 to 1 over the ranks."""
    params = [nn.Parameter(distribute_tensor(torch.ones(3, 10), mesh, [Shard(0)])) for _ in range(6)]
    for param in params:
        param.grad = torch.ones_like(param)
    size, base_optimizers.batch_size = base_optimizers.batch_size, lambda device: 45
    try:
        batches = list(base_optimizers.batches(torch.optim.SGD(params, lr=0.1), lambda group: True))
    finally:
        base_optimizers.batch_size = size
    return {
        "weights": [sum(local(param).numel() for param in batch[0].values()) for batch in batches],
        "places": [list(batch[0]) for batch in batches],
    }


def main() -> None:
    dist.init_process_group("gloo")
    mesh, folder = init_device_mesh("cpu", (2,)), Path(sys.argv[1])
    cases: dict[str, Callable[[], Any]] = {"batched": partial(batched, mesh)}
    for name, make in BASES.items():
        cases[f"trained {name}"] = partial(trained, mesh, make)
        cases[f"fsdp {name}"] = partial(fsdp, mesh, make, folder / name)
    results = {}
    for name, case in cases.items():
        try:
            results[name] = case()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    leave()


if __name__ == "__main__":
    main()
