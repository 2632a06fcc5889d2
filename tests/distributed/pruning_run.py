"""Cuts and counts of sharded weights beside those of whole ones: ``python -m tests.distributed.pruning_run FOLDER``.

To be run by torchrun on four processes. Each writes ``rank{N}.json``: for each case whether its weights became those of
one process, and what it found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_pdecay import AdamWLp, measure_sparsity
from hf_pdecay.optim.shards import Ranked, held, ranked
from hf_pdecay.target.ranking import Ranking, prune_least
from tests.helpers.launching import leave


FRACTIONS = (0.0001, 0.37, 0.9, 0.9999)


def weights(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 210), (7, 33), (1, 129), (3, 64, 50), (513,)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.1) for shape in shapes]
    made[0][:100] = 0
    made[3] = (made[3] * 20).round() / 20  # many equal ones
    return [each.to(dtype) for each in made]


def whole(param: Tensor) -> Tensor:
    return param.full_tensor() if isinstance(param, DTensor) else param


def cut(tensors: Sequence[Ranked], fraction: float) -> list[float]:
    ranking = Ranking(tensors)
    found = ranking.least(max(ranking.rank(fraction), 1))
    prune_least(tensors, found)
    return [ranking.numel, found.score, found.ties, found.equal, ranking.quantile(fraction)]


def compare(placed: list[nn.Parameter], dtype: torch.dtype, moments: bool) -> dict[str, Any]:
    """Cut sharded and whole weights alike, with the moments that a step of each leaves."""
    same, exact, counted = True, True, True
    for fraction in FRACTIONS:
        alone = [nn.Parameter(each) for each in weights(dtype)]
        for param, each in zip(placed, alone, strict=True):
            param.data.copy_(distribute_like(param, each.detach()))
        optimizers = [AdamWLp(params, lr=1e-3, lambda_p=0.0) for params in (placed, alone)]
        if moments:
            for k, (param, each) in enumerate(zip(placed, alone, strict=True)):
                generator = torch.Generator().manual_seed(k)
                grad = torch.randn(each.shape, generator=generator, dtype=torch.float64).to(dtype)
                each.grad, param.grad = grad, distribute_like(param, grad)
            for optimizer in optimizers:
                optimizer.step()
        of = [
            cut([ranked(param, optimizer) for param in params], fraction)
            for params, optimizer in zip((placed, alone), optimizers, strict=True)
        ]
        same = same and of[0] == of[1]
        exact = exact and all(torch.equal(whole(a.detach()), b) for a, b in zip(placed, alone, strict=True))
        reports = [measure_sparsity(nn.ParameterList(params)) for params in (placed, alone)]
        counted = counted and all(
            (a.zeros, a.near_zeros, a.shape) == (b.zeros, b.near_zeros, b.shape)
            and abs(a.norm - b.norm) <= 1e-5 * b.norm
            for a, b in zip(*(each.tensors for each in reports), strict=True)
        )
    return {"same": same, "exact": exact, "counted": counted}


def distribute_like(param: Tensor, value: Tensor) -> Tensor:
    if not isinstance(param, DTensor):
        return value
    return distribute_tensor(value, param.device_mesh, param.placements)


def main() -> None:
    dist.init_process_group("gloo")
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def placed(mesh: Any, *placements: Any, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        return [nn.Parameter(distribute_tensor(each, mesh, placements)) for each in weights(dtype)]

    def mixed(dtype: torch.dtype) -> list[nn.Parameter]:
        """As under expert parallelism: shards across all processes, across two of them, and whole weights."""
        across_all = placed(line, Shard(0), dtype=dtype)
        across_two = placed(square["tp"], Shard(0), dtype=dtype)
        plain = [nn.Parameter(each) for each in weights(dtype)]
        return [across_all[0], across_two[1], plain[2], across_two[3], across_all[4]]

    results: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        cases = {
            "rows": placed(line, Shard(0), dtype=dtype),
            "replicas of rows": placed(square, Replicate(), Shard(0), dtype=dtype),
            "replicas that the mesh does not know": placed(square["tp"], Shard(0), dtype=dtype),
            "replicated": placed(line, Replicate(), dtype=dtype),
            "different meshes": mixed(dtype),
        }
        for name, params in cases.items():
            for moments in (False, True):
                key = f"{name}, {str(dtype).removeprefix('torch.')}, {'moments' if moments else 'magnitudes'}"
                results[key] = compare(params, dtype, moments)
        both = placed(square, Shard(0), Shard(0), dtype=dtype)
        results[f"rows of rows, {str(dtype).removeprefix('torch.')}"] = compare(both, dtype, False)
    # Columns come in another order, and so do equal ones; how many go is the same.
    columns = placed(line, Shard(0), dtype=torch.float32)
    columns[0] = nn.Parameter(distribute_tensor(weights(torch.float32)[0], line, [Shard(1)]))
    columns[3] = nn.Parameter(distribute_tensor(weights(torch.float32)[3], line, [Shard(2)]))
    counts = []
    for fraction in FRACTIONS:
        tensors = [held(param) for param in columns]
        numel, *_ = cut([each._replace(weight=each.weight.detach()) for each in tensors], fraction)
        counts.append([round(fraction * numel), sum(int((whole(each.detach()) == 0).sum()) for each in columns)])
    results["columns"] = counts
    (Path(sys.argv[1]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
