"""A loop whose target counts changes: ``python -m tests.distributed.base_run FOLDER ENGINE CASE…``, or by torchrun.

ENGINE is single, ddp, fsdp2, zero2 or zero3, and a CASE is JSON: its name, and what it changes. For each case the first
process writes ``NAME.pt``: the weights at the start and at the end, and what was found. The global batch is the same in
every engine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_pdecay import AdamWLp, LpDecay, measure_sparsity
from hf_pdecay.optim.shards import group_params, ranked
from hf_pdecay.target.control import SparsityControl
from tests.helpers.launching import leave

from .on_cpu import deepspeed_on_cpu


STEPS, BATCH = 60, 8


class Block(nn.Module):
    """A layer with all that a run may change: a matrix, a norm and biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.down(torch.tanh(self.up(self.norm(hidden))))
        return hidden


class Model(nn.Module):
    """An embedding, two blocks, a pooler that is never used and a new head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.pooler = nn.Embedding(50, 23), nn.Linear(23, 23)
        self.blocks = nn.ModuleList([Block(23), Block(23)])
        self.head = nn.Linear(23, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        found: Tensor = self.head(hidden.mean(1))
        return found


def groups_of(model: nn.Module, case: dict[str, Any]) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    head = [param for name, param in named if name.startswith("head")]
    rows = [param for name, param in named if name.endswith("up.weight")] if case.get("rows") else []
    others = [param for name, param in named if not any(param is each for each in (*head, *rows))]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": head, "decay_to": "zero"}]
    return [*groups, {"params": rows, "group": "row", "target_sparsity": 0.5}] if rows else groups


def optimizer_of(groups: list[dict[str, Any]], case: dict[str, Any]) -> Any:
    if case.get("optim") == "sgd":
        return LpDecay(torch.optim.SGD(groups, lr=0.05, momentum=0.9), lambda_p=0.01, decay_to="base")
    return AdamWLp(groups, lr=3e-3, lambda_p=0.01, decay_to="base")


def batches(first: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """This process's part of each global batch."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in range(first, STEPS + 1):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 50, (BATCH, 12), generator=generator)
        yield step, tokens[rank::world], (tokens.sum(1) % 5)[rank::world]


class Run:
    """A model and its optimizer in an engine."""

    def __init__(self, engine: str, case: dict[str, Any]) -> None:
        self.engine, self.case = engine, case
        self.at_end: dict[str, int] | None = None  # what was unchanged after the last pruning
        self.model: Any = Model()
        if case.get("bf16"):
            self.model.to(torch.bfloat16)
        self.start = {name: param.detach().clone() for name, param in self.model.named_parameters()}
        if engine == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            for block in self.model.blocks:
                fully_shard(block)
            fully_shard(self.model)
        self.optimizer = optimizer_of(groups_of(self.model, case), case)
        self.wrapped: Any = self.model
        if engine == "ddp":
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, find_unused_parameters=True)
        elif engine.startswith("zero"):
            import deepspeed

            config = {
                "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": int(engine[-1])}
                | ({"stage3_param_persistence_threshold": 100, "sub_group_size": 3000} if engine == "zero3" else {}),
                "bf16": {"enabled": bool(case.get("bf16"))},
            }
            self.wrapped, self.optimizer, *_ = deepspeed.initialize(
                model=self.model, optimizer=self.optimizer, config=config
            )
        self.control = SparsityControl(self.optimizer, STEPS, target_sparsity=0.9)

    def train(self, first: int = 1, last: int = STEPS) -> None:
        for step, tokens, wanted in batches(first):
            if step > last:
                return
            loss = nn.functional.cross_entropy(self.wrapped(tokens).float(), wanted)
            if step == self.case.get("nan_at") and (not dist.is_initialized() or dist.get_rank() == 0):
                loss = loss * float("nan")
            zero = self.engine.startswith("zero")
            self.wrapped.backward(loss) if zero else loss.backward()
            self.control.before_step(step)
            if zero:
                self.wrapped.step()
            else:
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.control.after_step(step)
            if step == STEPS * 3 // 4:
                self.at_end = self.counted()

    def counted(self) -> dict[str, int]:
        """Unchanged weights by tensor, as measured."""
        report = measure_sparsity(self.model, changed_by=self.optimizer)
        return {tensor.name: tensor.zeros for tensor in report.tensors}

    def weights(self) -> dict[str, Tensor]:
        """The whole weights, on each process."""
        if self.engine == "fsdp2":
            return {name: param.detach().full_tensor() for name, param in self.model.named_parameters()}  # type: ignore[attr-defined]
        if self.engine == "zero3":
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
                return {name: param.detach().clone() for name, param in self.model.named_parameters()}
        return {name: param.detach().clone() for name, param in self.model.named_parameters()}

    def stepped(self) -> int:
        """How many of the weights that the optimizer steps, in float32 under DeepSpeed, are equal to their base."""
        same = {}
        for params in group_params(self.optimizer):
            for param in params:
                tensor = ranked(param, self.optimizer)
                count = 0 if tensor.base is None else int((tensor.weight == tensor.base).sum())
                same.setdefault(tensor.groups, []).append(count)
        total = 0
        for groups, counts in same.items():
            number = torch.tensor(sum(counts))
            for group in groups:
                dist.all_reduce(number, group=group)
            total += int(number)
        return total

    def save(self, folder: Path) -> None:
        if self.engine.startswith("zero"):
            self.wrapped.save_checkpoint(folder)
        elif self.engine == "fsdp2":
            import torch.distributed.checkpoint as dcp
            from torch.distributed.checkpoint.state_dict import get_state_dict

            model, optimizer = get_state_dict(self.model, self.optimizer)
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        elif not dist.is_initialized() or dist.get_rank() == 0:
            torch.save([self.model.state_dict(), self.optimizer.state_dict()], folder.with_suffix(".ckpt"))

    def load(self, folder: Path) -> None:
        if dist.is_initialized():
            dist.barrier()
        if self.engine.startswith("zero"):
            self.wrapped.load_checkpoint(folder)
        elif self.engine == "fsdp2":
            import torch.distributed.checkpoint as dcp
            from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

            model, optimizer = get_state_dict(self.model, self.optimizer)
            state = {"model": model, "optimizer": optimizer}
            # torch has saved no state of the pooler, which has never stepped, and asks for one.
            dcp.load(state, checkpoint_id=folder, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
            set_state_dict(
                self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
        else:
            model, optimizer = torch.load(folder.with_suffix(".ckpt"))
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)


def main() -> None:
    out, engine, *cases = sys.argv[1:]
    if engine.startswith("zero"):
        deepspeed_on_cpu()
        import deepspeed

        deepspeed.init_distributed("gloo")
    elif engine != "single":
        dist.init_process_group("gloo")
    for words in cases:
        case = json.loads(words)
        run = Run(engine, case)
        start, at = run.start, case.get("resumed_at")
        if at:
            run.train(last=at)
            run.save(Path(out) / case["name"])
            run = Run(engine, case)
            run.load(Path(out) / case["name"])
            run.train(first=at + 1)
        else:
            run.train()
        weights = run.weights()
        sums = [sum(int(each.view(torch.uint8).long().sum()) for each in weights.values())]
        gathered: list[Any] = [None] * (dist.get_world_size() if dist.is_initialized() else 1)
        if dist.is_initialized():
            dist.all_gather_object(gathered, sums)
        else:
            gathered = [sums]
        found = {
            "start": start,
            "weights": weights,
            "counted": run.counted(),
            "at_end": run.at_end,
            "stepped": run.stepped(),
            "sums": gathered,
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups],
            "excess": run.control.excess(),
            "skipped": max(int(group["skipped_steps"]) for group in run.optimizer.param_groups),
        }
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(found, Path(out) / f"{case['name']}.pt")
    leave()


if __name__ == "__main__":
    main()
