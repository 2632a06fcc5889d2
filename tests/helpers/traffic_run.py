"""All-reduces of a run under FSDP2 beside those of `estimate.py`: ``python -m tests.helpers.traffic_run OUTPUT_DIR``.

To be run by torchrun on two processes. Each writes ``rank{N}.json``: for each part of each step what it sent.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_pdecay import AdamWLp, measure_sparsity
from hf_pdecay.cli.model_size import of_model
from hf_pdecay.cli.training_estimate import added_by
from hf_pdecay.rules.assign import build_param_groups
from hf_pdecay.target.control import SparsityControl
from tests.helpers.launching import leave


STEPS = 60
WIDTHS = {"few weights": 24, "more than the sample has": 270}


def model(width: int) -> nn.Module:
    torch.manual_seed(0)
    hidden = nn.Linear(width, width), nn.LayerNorm(width)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), *hidden, nn.Linear(width, 5))


@contextmanager
def spied(sent: list[int]) -> Iterator[None]:
    """Note the bytes of each all-reduce."""
    all_reduce = dist.all_reduce

    def spy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = spy
    try:
        yield
    finally:
        dist.all_reduce = all_reduce


def watched(call: Callable[[], Any]) -> list[int]:
    """Do something, and return how many all-reduces it made of how many bytes in all."""
    sent: list[int] = []
    with spied(sent):
        call()
    return [len(sent), sum(sent)]


def made(net: nn.Module) -> tuple[AdamWLp, SparsityControl]:
    fully_shard(net)
    optimizer = AdamWLp(build_param_groups(net, p_norm=0.8, lambda_p=0.0), lr=1e-3)
    return optimizer, SparsityControl(optimizer, STEPS, target_sparsity=0.5)


def run(width: int) -> dict[str, Any]:
    net = model(width)
    said = asdict(added_by(of_model(net), "fsdp2", 2))
    optimizer, control = made(net)
    found: dict[str, list[list[int]]] = {"step": [], "pruning": [], "lambda_p": [], "log": [], "no pruning": []}
    for step in range(1, STEPS + 1):
        net(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        found["lambda_p"].append(watched(partial(control.before_step, step)))
        found["step"].append(watched(optimizer.step))
        kind = "pruning" if control.schedule.prunes(step) else "no pruning"
        found[kind].append(watched(partial(control.after_step, step)))
        optimizer.zero_grad()
        found["log"].append(watched(partial(measure_sparsity, net)))
    return {"found": found, "said": said, "pruning_steps": len(control.schedule.pruning_steps), "tied": tied(width)}


def tied(width: int) -> list[int]:
    """A pruning step among weights that are equal in sevens; it zeroes only some of such seven."""
    net = model(width)
    with torch.no_grad():
        for param in net.parameters():
            param.copy_((torch.arange(param.numel()) // 7 + 1).view(param.shape) / param.numel())
    optimizer, control = made(net)
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    for rate in (0.0, 1e-3):  # a step that changes no weight
        for group in optimizer.param_groups:
            group["lr"] = rate
        if not rate:
            optimizer.step()
    return watched(partial(control.after_step, control.schedule.end))


def main() -> None:
    dist.init_process_group("gloo")
    results = {name: run(width) for name, width in WIDTHS.items()}
    (Path(sys.argv[1]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
