"""Real runs of ``PDecayTrainer``: ``python -m tests.distributed.layout_run FOLDER ENGINE CASE …``, or by torchrun.

ENGINE says how processes share a run, and a CASE is JSON: the name of its folder, and what it changes. The global batch
is the same in every layout.

On a CPU Accelerate must be told of FSDP and DeepSpeed, see ``on_cpu``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments
from tests.helpers.launching import leave

from .on_cpu import deepspeed_on_cpu, fsdp_on_cpu, tensor_parallel_on_cpu


BATCH = 8
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def zero_config(stage: int, bf16: bool) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
        | ({"stage3_param_persistence_threshold": 2000, "sub_group_size": 20_000} if stage == 3 else {}),
        "bf16": {"enabled": bf16},
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
    }


class InOrder(PDecayTrainer):
    """Takes the data as it lies, and makes the loss of one step NaN on one process."""

    nan_at: int | None = None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step + 1 != self.nan_at or not self.model.training:
            return loss
        return loss * (float("nan") if self.is_world_process_zero() else 1.0)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def model(seed: int) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def divided(folder: Path) -> LlamaForCausalLM:
    """The same model, its tensors divided among the processes by transformers' own plan."""
    if torch.distributed.get_rank() == 0:
        model(0).save_pretrained(folder)
    torch.distributed.barrier()
    return LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")


def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 64, (1024, 1), generator=generator)
    strides = torch.randint(1, 4, (1024, 1), generator=generator)
    rows = ((starts + strides * torch.arange(24)) % 64).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def run(folder: Path, engine: str, case: dict[str, Any]) -> None:
    """Train as a case says, and leave the model and what was found in the case's folder."""
    options = dict(case)
    differing = options.pop("differing", {})
    if os.environ.get("RANK", "0") != "0":
        options |= differing
    out = folder / options.pop("name")
    zeroed, resume, nan_at, base = (options.pop(name, None) for name in ("zeroed", "resume", "nan_at", "base"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    accumulate = options.setdefault("gradient_accumulation_steps", 1)
    if engine == "fsdp2":
        os.environ["FSDP_STATE_DICT_TYPE"] = options.pop("state_dict_type", "SHARDED_STATE_DICT")
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = options.pop("ram_efficient", "false")
    # With use_cpu Accelerate would leave DeepSpeed off.
    if engine.startswith("zero"):
        options["deepspeed"] = zero_config(int(engine[-1]), options.get("bf16", False))
    else:
        options["use_cpu"] = True
    settings = {
        "report_to": "none",
        "max_steps": 100,
        "logging_steps": 10,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "warmup_steps": 5,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": BATCH // (1 if engine == "tp" else world) // accumulate,
        "disable_tqdm": True,
    }
    args = PDecayTrainingArguments(str(out), **(settings | options))
    trained = divided(out / "start") if engine == "tp" else model(0)
    if base is not None:
        trained = LlamaForCausalLM.from_pretrained(base)
    if zeroed is not None:
        torch.nn.init.zeros_(trained.get_parameter(zeroed))
    trainer = InOrder(model=trained, args=args, train_dataset=data())
    trainer.nan_at = nan_at
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    loss = trainer.evaluate(data().select(range(64)))["eval_loss"]
    kinds = sorted({type(param).__name__ for param in trainer.model.parameters()})
    # Of each process, where each has the whole model.
    whole = [param.detach() for param in trainer.model.parameters() if engine == "ddp"]
    sums = gather_object([float(sum(param.double().abs().sum() for param in whole))])
    if trainer.is_world_process_zero():
        taught = [line["loss_teacher"] for line in trainer.state.log_history if "loss_teacher" in line]
        found = {"eval_loss": loss, "kinds": kinds, "teacher": taught, "held": _held_of_teacher(trainer), "sums": sums}
        (out / "found.json").write_text(json.dumps(found))


def _held_of_teacher(trainer: PDecayTrainer) -> float:
    """What part of the teacher's weights this process holds, 0 without a teacher."""
    ours = {id(module) for module in trainer.model.modules()}
    found = [each for each in gc.get_objects() if isinstance(each, LlamaForCausalLM) and id(each) not in ours]
    params = [param for each in found[:1] for param in each.parameters()]
    held = sum((param.to_local() if isinstance(param, DTensor) else param).numel() for param in params)
    return held / max(1, sum(param.numel() for param in params))


def main() -> None:
    folder, engine, *cases = sys.argv[1:]
    if engine == "fsdp2":
        os.environ |= FSDP2
        fsdp_on_cpu()
    elif engine.startswith("zero"):
        deepspeed_on_cpu()
    elif engine == "tp":
        tensor_parallel_on_cpu()
    for case in cases:
        run(Path(folder), engine, json.loads(case))
    leave()


if __name__ == "__main__":
    main()
