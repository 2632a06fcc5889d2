"""Steps of sharded parameters (DTensor) beside those of whole ones: ``python -m tests.helpers.sharded_run OUTPUT_DIR``.

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
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from hf_pdecay import AdamWLp
from hf_pdecay.optim.cpu import step as compiled
from tests.helpers.launching import leave


STEPS = 8
OPTIONS: dict[str, Any] = {"lr": 0.02, "p_norm": 0.3, "lambda_p": 5.0, "weight_decay": 0.1}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights() -> dict[str, torch.Tensor]:
    """Whole tensors, whose rows two ranks share."""
    half_zero = normal(8, 40, seed=1)
    half_zero[4:] = 0
    return {
        "even": normal(8, 40, seed=2) * 0.3,
        "uneven": normal(7, 33, seed=3) * 0.3,
        "empty on one rank": normal(1, 129, seed=4) * 0.3,
        "vector": normal(5, seed=5) * 0.3,
        "zero on one rank": half_zero,
        "zero": torch.zeros(6, 40),
    }


class Case:
    """Sharded parameters and their optimizer, and whole ones on each rank."""

    def __init__(self, mesh: DeviceMesh, placement: Placement, backend: str) -> None:
        self.mesh, self.placement = mesh, placement
        whole = weights()
        self.names = list(whole)
        self.sharded = [nn.Parameter(distribute_tensor(each, mesh, [placement])) for each in whole.values()]
        self.whole = [nn.Parameter(each.clone()) for each in whole.values()]
        self.optimizer = AdamWLp(self.sharded, backend=backend, **OPTIONS)
        self.single = AdamWLp(self.whole, backend=backend, **OPTIONS)

    def step(
        self,
        seed: int,
        bad: Callable[[int, torch.Tensor], None] | None = None,
        make: Callable[[torch.Tensor], DTensor] | None = None,
    ) -> None:
        """Step both on new gradients.

        Args:
            seed: Which gradients.
            bad: Spoils the gradient of a place.
            make: Makes sharded gradients of whole ones; by default placed as the weights.
        """
        for k, (param, rival) in enumerate(zip(self.sharded, self.whole, strict=True)):
            grad = normal(*rival.shape, seed=100 * seed + k)
            if bad is not None:
                bad(k, grad)
            rival.grad = grad
            param.grad = distribute_tensor(grad, self.mesh, [self.placement]) if make is None else make(grad)
        self.optimizer.step()
        self.single.step()

    def found(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {
            name: (full(param), rival.detach().clone())
            for name, param, rival in zip(self.names, self.sharded, self.whole, strict=True)
        }


def full(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.full_tensor()
    return tensor.detach().clone()


def trained(mesh: DeviceMesh, placement: Placement, backend: str) -> Any:
    calls: list[int] = []
    first: dict[str, Any] = {}
    dormant: list[bool] = []
    step: Any = compiled.Batch.step

    def counted(batch: Any, finite: Any = True) -> None:
        calls.append(len(batch._params))
        step(batch, finite)

    setattr(compiled.Batch, "step", counted)  # noqa: B010
    try:
        case = Case(mesh, placement, backend)
        for seed in range(STEPS):
            case.step(seed)
            if not first:
                first = case.found()
                dormant = [bool(case.optimizer.state[param]["dormant"]) for param in case.sharded]
    finally:
        setattr(compiled.Batch, "step", step)  # noqa: B010
    return {
        "first": first,
        "weights": case.found(),
        "calls": calls,
        "dormant": dict(zip(case.names, dormant, strict=True)),
    }


def skipped(mesh: DeviceMesh, backend: str, value: float) -> Any:
    case = Case(mesh, Shard(0), backend)
    case.step(0)
    before = case.found()

    def spoil(k: int, grad: torch.Tensor) -> None:
        if k == 0:
            grad[-1, -1] = value  # of the last rank

    case.step(1, spoil)
    counts = [int(case.optimizer.state[param]["step"]) for param in case.sharded]
    skips, after = case.optimizer.skipped_steps, case.found()
    case.step(2)
    return {"before": before, "after": after, "counts": counts, "skips": skips, "later": case.found()}


def followed(mesh: DeviceMesh) -> Any:
    """Which steps do again what the last one did, and what comes of all."""
    case = Case(mesh, Shard(0), "compiled")
    plans: dict[str, bool] = {}

    def step(name: str, **how: Any) -> None:
        plan = case.optimizer._cache.last
        case.step(len(plans), **how)
        plans[name] = plan is not None and case.optimizer._cache.last is plan

    def spoil(k: int, grad: torch.Tensor) -> None:
        if k == 0:
            grad[-1, -1] = torch.nan  # of the last rank

    for name in ("first", "zeros wake", "third", "fourth"):
        step(name)
    step("bad gradient of one rank", bad=spoil)
    for optimizer in (case.optimizer, case.single):
        optimizer.param_groups[0]["lr"] = 0.01
    loss = (case.sharded[0] * case.sharded[0]).sum()
    step("other rate")
    try:
        loss.backward()
        raised = ""
    except RuntimeError as error:
        raised = str(error)
    step("replicated gradients", make=lambda grad: distribute_tensor(grad, mesh, [Replicate()]))
    step("after these")
    step("as before")

    def unfinished(grad: torch.Tensor) -> DTensor:
        part = AsyncCollectiveTensor(distribute_tensor(grad, mesh, [Shard(0)]).to_local())
        return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=grad.shape, stride=grad.stride())

    step("gradients under way", make=unfinished)
    step("and no more")
    step("as ever")
    here: Any = case.sharded[0]
    here._local_tensor = here._local_tensor.clone()
    step("weights elsewhere")
    return {"weights": case.found(), "plans": plans, "raised": raised}


def resumed(mesh: DeviceMesh, backend: str) -> Any:
    case = Case(mesh, Shard(0), backend)
    for seed in range(2):
        case.step(seed)
    again = AdamWLp(case.sharded, backend=backend, **OPTIONS)
    again.load_state_dict(copy.deepcopy(case.optimizer.state_dict()))
    case.optimizer = again
    case.step(2)
    return {"weights": case.found()}


def fsdp(mesh: DeviceMesh, moments: str | None) -> Any:
    """Forward and backward by FSDP2 itself. Both ranks see one batch, whose mean gradient is that of one rank."""
    torch.manual_seed(0)
    model: nn.Sequential = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 1))
    nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
    single = copy.deepcopy(model)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    pairs = []
    for each in (model, single):
        optimizer = AdamWLp(each.parameters(), backend="compiled", moments=moments, **OPTIONS)
        for seed in range(STEPS):
            optimizer.zero_grad()
            each(normal(16, 9, seed=seed)).square().mean().backward()
            optimizer.step()
        pairs.append([full(param) for param in each.parameters()])
        state = optimizer.state[next(iter(each.parameters()))]
    return {
        "weights": {str(k): pair for k, pair in enumerate(zip(*pairs, strict=True))},
        "dtype": state["exp_avg"].dtype,
    }


def other_placement(mesh: DeviceMesh, backend: str, of_weight: Placement, of_grad: Placement) -> Any:
    """torch allows a gradient that is sharded otherwise than its weight, and its AdamW redistributes it."""
    whole, grad = normal(8, 8, seed=1), normal(8, 8, seed=2)
    param, rival = nn.Parameter(distribute_tensor(whole, mesh, [of_weight])), nn.Parameter(whole.clone())
    param.grad, rival.grad = distribute_tensor(grad, mesh, [of_grad]), grad
    for each in (param, rival):
        AdamWLp([each], backend=backend, **OPTIONS).step()
    return {"weights": {"w": (full(param), full(rival))}}


def summand(mesh: DeviceMesh, backend: str) -> Any:
    """The gradient of a replicated weight under data parallelism: each rank holds a summand of it."""
    whole, batch = normal(8, seed=1), normal(4, 8, seed=2)
    param, rival = nn.Parameter(distribute_tensor(whole, mesh, [Replicate()])), nn.Parameter(whole.clone())
    (distribute_tensor(batch, mesh, [Shard(0)]) * param).sum().backward()
    (batch * rival).sum().backward()
    for each in (param, rival):
        optimizer = AdamWLp([each], backend=backend, **OPTIONS)
        optimizer.step()
    return {"weights": {"w": (full(param), full(rival))}, "placements": str(param.grad.placements)}  # type: ignore[union-attr]


def stale(mesh: DeviceMesh, backend: str) -> Any:
    """A graph from before the step, whose saved weights the step changed."""
    param = nn.Parameter(distribute_tensor(normal(8, 8), mesh, [Shard(0)]))
    loss = (param * param).sum()
    param.grad = distribute_tensor(normal(8, 8), mesh, [Shard(0)])
    AdamWLp([param], backend=backend, **OPTIONS).step()
    try:
        loss.backward()
    except RuntimeError as error:
        return {"raised": str(error)}
    return {"raised": ""}


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    cases: dict[str, Callable[[], Any]] = {
        "followed": partial(followed, mesh),
        "skipped inf": partial(skipped, mesh, "compiled", float("inf")),
        "replicated weights": partial(trained, mesh, Replicate(), "compiled"),
        "fsdp": partial(fsdp, mesh, None),
        "fsdp bfloat16": partial(fsdp, mesh, "bfloat16"),
        "fsdp 8bit": partial(fsdp, mesh, "8bit"),
    }
    for backend in ("compiled", "foreach"):
        cases[f"trained {backend}"] = partial(trained, mesh, Shard(0), backend)
        cases[f"skipped {backend}"] = partial(skipped, mesh, backend, float("nan"))
        cases[f"resumed {backend}"] = partial(resumed, mesh, backend)
        cases[f"summand {backend}"] = partial(summand, mesh, backend)
        cases[f"stale {backend}"] = partial(stale, mesh, backend)
        cases[f"sharded {backend}"] = partial(other_placement, mesh, backend, Shard(0), Shard(1))
        cases[f"replicated {backend}"] = partial(other_placement, mesh, backend, Shard(0), Replicate())
    results = {}
    for name, case in cases.items():
        try:
            results[name] = case()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    torch.save(results, Path(sys.argv[1]) / f"rank{dist.get_rank()}.pt")
    leave()


if __name__ == "__main__":
    main()
