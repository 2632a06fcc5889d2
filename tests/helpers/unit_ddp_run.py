"""Structured decay under DDP: ``torchrun -m tests.helpers.unit_ddp_run OUTPUT_DIR``, on two processes of this CPU."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from datasets import Dataset

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments

from .launching import leave
from .models import build


RULES = {"mlp": {"group": "neuron", "target_sparsity": 0.5}, "attn": {"group": "2:4"}}


def main() -> None:
    rows = torch.randint(0, 64, (48, 16), generator=torch.Generator().manual_seed(0)).tolist()
    args = PDecayTrainingArguments(
        sys.argv[1],
        use_cpu=True,
        report_to="none",
        max_steps=30,
        learning_rate=1e-2,
        save_strategy="no",
        disable_tqdm=True,
        lp_rules=RULES,
    )
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = PDecayTrainer(model=build("llama"), args=args, train_dataset=data)
    trainer.train()
    trainer.save_model()
    if dist.get_world_size() != 2:
        raise SystemExit(f"{dist.get_world_size()} processes")
    for name, param in trainer.model.named_parameters():
        others = [torch.empty_like(param) for _ in range(2)]
        dist.all_gather(others, param.detach())
        if not torch.equal(others[0], others[1]):
            raise SystemExit(f"{name} differs between the processes")
    leave()


if __name__ == "__main__":
    main()
