"""Train a sparse causal language model in a bare Accelerate loop: the optimizer and its control without the Trainer.

    python examples/no_trainer.py --target_sparsity 0.9 --output_dir out
    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/no_trainer.py --train_file input.txt

Model and text are those of `train_clm.py`; that script and `options.py` must lie beside this one. `--batch_size` is the
number of blocks of a step on all processes together. A run that resumes from a checkpoint (`--save_steps`) is
bit-identical to an uninterrupted one, on the same number of processes.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from datasets import Dataset
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import get_scheduler

from hf_pdecay import (
    AdamWLp,
    SparsityControl,
    build_param_groups,
    decayed_parameter_names,
    group_params,
    load_rules,
    measure_sparsity,
    settle,
)
from options import arg, parse_options
from train_clm import (
    PRESETS,
    DataArguments,
    ModelArguments,
    collate,
    load_documents,
    load_model,
    load_tokenizer,
    to_blocks,
)


@dataclass
class LoopArguments:
    """What the loop does."""

    output_dir: str = arg("no_trainer_output", help="Folder of the model.")
    max_steps: int = arg(1000, help="Steps of the optimizer.")
    batch_size: int = arg(16, help="Blocks of a step, on all processes and in all micro-batches together.")
    gradient_accumulation_steps: int = arg(1, help="Micro-batches of a step.")
    learning_rate: float = arg(2e-3, help="Highest learning rate; it falls along a cosine.")
    warmup_steps: int = arg(100, help="Steps in which the learning rate rises.")
    max_grad_norm: float = arg(1.0, help="Norm to which gradients are clipped.")
    p_norm: float = arg(0.8, help="p of the decay.")
    lambda_p: float = arg(0.0, help="Strength of the decay, without a target.")
    target_sparsity: float | None = arg(None, help="Fraction of exact zeros in the decayed weights.")
    lp_rules: str | None = arg(None, help="JSON string or file: p, λ_p and targets of parameters by regex.")
    logging_steps: int = arg(50, help="Steps from one line of the log to the next.")
    save_steps: int = arg(0, help="Steps from one checkpoint to the next; 0 for none.")
    resume_from_checkpoint: str | None = arg(None, help="Checkpoint from which the run resumes.")
    mixed_precision: str | None = arg(None, help="Overrides the launcher's.", choices=["no", "fp16", "bf16"])
    seed: int = arg(42, help="Seed of the weights and of the order of the blocks.")
    cpu: bool = arg(False, help="Stay on the CPU; needed also if the launcher is told so.")

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        lowest = {"max_steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "logging_steps": 1}
        for name, least in (lowest | {"warmup_steps": 0, "save_steps": 0}).items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {least}")
        folder = self.resume_from_checkpoint
        # DeepSpeed writes `latest` instead of an optimizer.
        if folder is not None and not any(any(Path(folder).glob(mark)) for mark in ("optimizer*", "latest")):
            raise ValueError(f"--resume_from_checkpoint {folder!r} is not a checkpoint; name a folder step-N")


@dataclass
class Progress:
    """The number of finished steps; a checkpoint carries it."""

    step: int = 0

    def state_dict(self) -> dict[str, int]:
        """Return the entry of a checkpoint."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the entry of a checkpoint."""
        self.step = state["step"]


class Loop:
    """A run: the model, its data and its progress.

    Raises:
        ValueError: If an option is out of range or the checkpoint belongs to another model.
    """

    def __init__(self, accelerator: Accelerator, options: LoopArguments, model: Any, train: Dataset) -> None:
        self.options = options
        self.accelerator = accelerator
        micro_batches = self.accelerator.num_processes * options.gradient_accumulation_steps
        if options.batch_size % micro_batches:
            raise ValueError(f"--batch_size {options.batch_size} must be a multiple of {micro_batches} micro-batches")
        deepspeed = accelerator.state.deepspeed_plugin
        if deepspeed is not None:
            # DeepSpeed counts micro-batches itself and must know them before it prepares anything.
            deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = options.batch_size // micro_batches
            deepspeed.deepspeed_config["gradient_accumulation_steps"] = options.gradient_accumulation_steps
            deepspeed.deepspeed_config["gradient_clipping"] = options.max_grad_norm
        groups = build_param_groups(
            model,
            p_norm=options.p_norm,
            lambda_p=options.lambda_p,
            rules=load_rules(options.lp_rules),
            isolate_zero=deepspeed is not None,
        )
        optimizer = AdamWLp(groups, lr=options.learning_rate)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.control = SparsityControl(self.optimizer, options.max_steps, target_sparsity=options.target_sparsity)
        self.scheduler = get_scheduler("cosine", optimizer, options.warmup_steps, options.max_steps)
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.scheduler, self.progress)
        if options.resume_from_checkpoint is not None:
            try:
                self.accelerator.load_state(options.resume_from_checkpoint)
            except (RuntimeError, ValueError, KeyError) as error:
                raise ValueError(
                    f"--resume_from_checkpoint {options.resume_from_checkpoint!r} does not fit: {error}"
                ) from error
        # The blocks of the whole run in their order: a resumed run continues where it stopped.
        wanted = options.max_steps * options.batch_size
        generator = torch.Generator().manual_seed(options.seed)
        order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(wanted // len(train) + 1)])
        rest = train.select(order[self.progress.step * options.batch_size : wanted].tolist())
        self.loader = self._loader(rest, options.batch_size // options.gradient_accumulation_steps)

    def _loader(self, blocks: Dataset, batch_size: int) -> Any:
        return self.accelerator.prepare(DataLoader(blocks, batch_size, collate_fn=collate))

    def train(self) -> None:
        """Make the remaining steps."""
        options, accelerator = self.options, self.accelerator
        self.model.train()
        for batch in self.loader:
            with accelerator.accumulate(self.model):
                if accelerator.sync_gradients:
                    self.control.before_step(self.progress.step + 1)
                loss = self.model(**batch).loss
                accelerator.backward(loss)  # DeepSpeed also clips and steps here
                if not accelerator.sync_gradients:
                    continue
                accelerator.clip_grad_norm_(self.model.parameters(), options.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.scheduler.step()
                self.progress.step += 1
                self.control.after_step(self.progress.step)
            if self.progress.step % options.logging_steps == 0:
                mean = accelerator.reduce(loss.detach(), "mean").item()
                self.log(loss=mean, learning_rate=self.scheduler.get_last_lr()[0], sparsity=self.measure().sparsity)
            if options.save_steps and self.progress.step % options.save_steps == 0:
                accelerator.save_state(str(Path(options.output_dir) / f"step-{self.progress.step}"))

    def measure(self) -> Any:
        """Count the zeros in the weights that decay, on all processes."""
        model = self.accelerator.unwrap_model(self.model)
        settle(model)
        names = decayed_parameter_names(model, self.optimizer.param_groups, group_params(self.optimizer))
        return measure_sparsity(model, decayed=names)

    @torch.no_grad()
    def evaluate(self, blocks: Dataset) -> float:
        """Return the mean loss of a token; all blocks have the same number."""
        self.model.eval()
        losses = []
        for batch in self._loader(blocks, 64 * self.accelerator.num_processes):
            scores = self.model(input_ids=batch["input_ids"]).logits[:, :-1].float()
            loss = cross_entropy(scores.transpose(1, 2), batch["labels"][:, 1:], reduction="none").mean(1)
            losses.append(self.accelerator.gather_for_metrics(loss))  # drops the padding blocks of the last batch
        return torch.cat(losses).mean().item()

    def log(self, **figures: float) -> None:
        """Print a line of figures."""
        self.accelerator.print(json.dumps({"step": self.progress.step, **figures}))

    def save(self) -> None:
        """Write the model, which plain transformers loads, and the report of its zeros."""
        report = self.measure()
        weights = self.accelerator.get_state_dict(self.model)  # the whole model, on the main process
        if self.accelerator.is_main_process:
            self.accelerator.unwrap_model(self.model).save_pretrained(self.options.output_dir, state_dict=weights)
            report.save(Path(self.options.output_dir) / "sparsity.json")
            print(report)


def default_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that suit the model, without those that are `given`."""
    trained = {"model_name_or_path", "config_name", "preset"} & given.keys()
    return {} if trained else {"block_size": PRESETS["tiny"][1]["block_size"]}


def start(options: LoopArguments) -> Accelerator:
    """Join the processes that the launcher started."""
    accelerator = Accelerator(
        cpu=options.cpu,
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise ValueError(f"{started} processes were started and do not find each other; on a CPU give --cpu true")
    return accelerator


def prepare(argv: Sequence[str]) -> tuple[Loop, Dataset | None]:
    """Read, check and load everything; raise ValueError or OSError before any training."""
    model_args, data, options = parse_options(argv, (ModelArguments, DataArguments, LoopArguments), default_options)
    accelerator = start(options)
    train, validation, source = load_documents(data)
    tokenizer = load_tokenizer(model_args)
    set_seed(options.seed)
    model = load_model(model_args, tokenizer, data)
    blocks = to_blocks(train, tokenizer, data.block_size, data.max_train_samples, source)
    held_out = to_blocks(validation, tokenizer, data.block_size, data.max_eval_samples, source) if validation else None
    return Loop(accelerator, options, model, blocks), held_out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return its exit code."""
    try:
        loop, held_out = prepare(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print("no_trainer.py: error:", shorten(str(error), 600, placeholder=" ..."), file=sys.stderr)
        return 2
    loop.train()
    if held_out is not None:
        loop.log(eval_loss=loop.evaluate(held_out))
    loop.save()
    # gloo's threads release their objects while this waits; at exit they and Python might wait for each other.
    loop.accelerator.wait_for_everyone()
    loop.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
