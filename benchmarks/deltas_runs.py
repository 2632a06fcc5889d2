"""The runs of `deltas.py`: the models and data, the methods, and what is measured of a run."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llm import Data, loss, low_precision, model_folder


TRIAL_SEED = 100
MAIN = 0.99  # unchanged, where ours chooses its rate and where the others are compared
BYTES = 4.5  # that a changed float32 weight takes in our files, to choose LoRA's rank


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Args:
        title: Its name in the table.
        rate: The learning rate that it tries first.
    """

    title: str
    rate: float


METHODS = {
    "full": Method("all weights, AdamW", 1e-4),
    "base": Method('`decay_to="base"`', 1e-4),
    "lora": Method("LoRA", 1e-3),
    "shira_random": Method("SHiRA, random mask", 1e-3),
    "supertuning": Method("Super-Tuning", 1e-3),
    "shira_magnitude": Method("SHiRA, mask of the largest weights", 1e-3),
    "bitfit": Method("BitFit", 1e-3),
}


@dataclass(frozen=True)
class Run:
    """The values that identify one run.

    Args:
        task: ``"gsm8k"`` or ``"sst2"``.
        method: A key of ``METHODS``.
        unchanged: The target of ours; None for others.
        steps: Optimizer steps.
        seed: Seed of the order of the training rows; ``TRIAL_SEED`` for a run that chooses a learning rate.
        learning_rate: Highest learning rate.
        settings: Settings of ours beside their defaults, to try; empty in what is reported.
    """

    task: str
    method: str
    unchanged: float | None
    steps: int
    seed: int
    learning_rate: float
    settings: str = ""


@dataclass
class Task:
    """A model with the rows to train on, to choose by and to report, and what the Trainer is told about them."""

    model: Any
    base: Path
    train: Any
    held: Any
    test: Any
    other: Any = None
    arguments: dict[str, Any] = field(default_factory=dict)
    collate: Any = None
    kind: str = "CAUSAL_LM"


def gsm8k(options: argparse.Namespace, run: Run, aside: Path) -> Task:
    """Return SmolLM2-135M, or ``--model``, with the rows of ``llm.py``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = model_folder(options.model)
    data = Data(options.data, AutoTokenizer.from_pretrained(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = data.train, data.dev[:12], data.test[:60], data.other[:12]
    return Task(model, base, *rows, {"per_device_train_batch_size": 1})


def sst2(options: argparse.Namespace, run: Run, aside: Path) -> Task:
    """Return MiniLM-L6 with a new head, and the sentences; the last 700 training sentences are held out."""
    import torch

    from quality.tasks import Ragged
    from quality.tasks import sst2 as published

    task: Any = published(options.data, run.seed, run.steps, fast=True)
    train = task.train.columns
    columns = [{name: column[part] for name, column in train.items()} for part in (slice(0, -700), slice(-700, None))]
    parts = [split.columns for split in (task.dev, task.test)]
    reported = {name: torch.cat([part[name] for part in parts]) for name in train}
    task.model.save_pretrained(aside / "base")
    arguments = {name: value for name, value in task.arguments.items() if name not in ("max_steps", "warmup_steps")}
    rows = Ragged(**columns[0]), Ragged(**columns[1]), Ragged(**reported)
    return Task(task.model, aside / "base", *rows, None, arguments, task.collate, "SEQ_CLS")


TASKS = {"gsm8k": gsm8k, "sst2": sst2}


def score(task: Task, model: Any, rows: Any) -> dict[str, float]:
    """Return the loss, and for sentences the accuracy, of a model."""
    if task.collate is None:
        return {"loss": loss(model, rows)}
    import torch

    model.eval()
    total = right = 0.0
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            batch = task.collate([rows[index] for index in range(start, min(start + 64, len(rows)))])
            outputs: Any = model(**{name: value for name, value in batch.items() if name != "labels"})
            logits = outputs.logits
            total += float(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
            right += int((logits.argmax(-1) == batch["labels"]).sum())
    return {"loss": total / len(rows), "accuracy": right / len(rows)}


def adapted(run: Run, task: Task) -> Any:
    """Return the model in PEFT's form for a method, with as many weights, or bytes, as ours at 99%."""
    import peft
    import torch

    weights = sum(param.numel() for param in task.model.parameters())
    budget = round((1 - MAIN) * weights)
    heads = {id(module) for name in ("classifier", "lm_head", "score") if (module := getattr(task.model, name, None))}
    layers = [
        module for module in task.model.modules() if isinstance(module, torch.nn.Linear) and id(module) not in heads
    ]
    sides = sum(sum(layer.weight.shape) for layer in layers)
    common: dict[str, Any] = {"task_type": task.kind, "target_modules": "all-linear"}
    if run.method == "lora":
        rank = max(round(BYTES * budget / (4 * sides)), 1)
        return peft.get_peft_model(task.model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, **common))
    if run.method == "supertuning":
        inside = sum(layer.weight.numel() for layer in layers)
        return peft.get_peft_model(task.model, peft.SupertuningConfig(sparsity=1 - budget / inside, **common))
    config = peft.ShiraConfig(r=math.ceil(budget / sides), random_seed=run.seed, **common)
    if run.method == "shira_magnitude":
        config.mask_fn = largest  # type: ignore[assignment]
    return peft.get_peft_model(task.model, config)


def largest(layer: Any, rank: int, **_: Any) -> Any:
    """Return SHiRA's mask of the largest weights of a layer."""
    import torch

    kept = layer.weight.detach().abs().flatten().topk(rank * sum(layer.weight.shape)).indices
    mask = torch.zeros(layer.weight.numel(), dtype=torch.bool, device=layer.weight.device)
    mask[kept] = True
    return mask.view_as(layer.weight)


def keep_biases(model: Any) -> None:
    """Train biases and a new head alone; a model without biases trains its norms instead."""
    has_biases = any(name.endswith(".bias") for name, _ in model.named_parameters())
    for name, param in model.named_parameters():
        chosen = name.endswith(".bias") if has_biases else param.ndim == 1
        param.requires_grad_(chosen or name.startswith("classifier."))


def make_trainer(run: Run, task: Task, output: str) -> Any:
    """Return the Trainer of a run."""
    import torch
    from transformers import Trainer, TrainingArguments

    from hf_pdecay import PDecayTrainer, PDecayTrainingArguments

    common: dict[str, Any] = {
        "output_dir": output,
        "max_steps": run.steps,
        "learning_rate": run.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(run.steps // 20, 1),
        "bf16": low_precision(),
        "use_cpu": not torch.cuda.is_available(),
        "seed": run.seed,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_grad_norm": 1.0,
    } | task.arguments
    data = {"train_dataset": task.train, "data_collator": task.collate}
    if run.method == "base":
        pairs = (pair.partition("=") for pair in filter(None, run.settings.split(",")))
        tried = {name: _value(value) for name, _, value in pairs}
        args = PDecayTrainingArguments(**common | tried, decay_to="base", target_sparsity=run.unchanged)
        return PDecayTrainer(model=task.model, args=args, **data)
    if run.method == "bitfit":
        keep_biases(task.model)
    model = task.model if run.method in ("full", "bitfit") else adapted(run, task)
    return Trainer(model=model, args=TrainingArguments(**common), **data)


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def execute(run: Run, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Make a run; return its lines of the results file."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder)
        task = TASKS[run.task](options, run, aside)
        with open(os.devnull, "w") as nothing:
            stdout, sys.stdout = sys.stdout, nothing  # the Trainer prints its logs
            try:
                trainer = make_trainer(run, task, folder)
                start = time.perf_counter()
                if run.steps:
                    trainer.train()
                seconds = time.perf_counter() - start
            finally:
                sys.stdout = stdout
        shared = {
            "seconds": round(seconds, 1),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
            "date": time.strftime("%Y-%m-%d"),
            "versions": {name: version(name) for name in ("hf-pdecay", "torch", "transformers", "peft")},
        }
        model = trainer.model
        if run.seed == TRIAL_SEED or not run.steps:
            shared |= {f"held_{name}": value for name, value in score(task, model, task.held).items()}
        if run.seed == TRIAL_SEED:
            return [asdict(run) | shared | {"unchanged_share": unchanged(task, model)}]
        lines = []
        own = None
        if hasattr(model, "merge_and_unload"):
            model.save_pretrained(aside / "adapter")
            own = (aside / "adapter" / "adapter_model.safetensors").stat().st_size
            model = model.merge_and_unload()
        lines.append(asdict(run) | report(task, model, aside, own if run.method == "lora" else None) | shared)
        if own is not None:
            lines[0]["adapter_bytes"] = own
        if run.method == "full" and run.steps:
            cut(task, model, MAIN)
            cut_run = replace(run, method="cut", unchanged=MAIN)
            lines.append(asdict(cut_run) | report(task, model, aside, None) | shared)
        return lines


def report(task: Task, model: Any, aside: Path, stored: int | None) -> dict[str, Any]:
    """Return the reported figures of a trained model; ``stored``: the bytes of its adapter, if that is its file."""
    from hf_pdecay import write_delta

    figures: dict[str, Any] = {f"test_{name}": value for name, value in score(task, model, task.test).items()}
    if task.other:
        figures |= {f"other_{name}": value for name, value in score(task, model, task.other).items()}
    figures["unchanged_share"] = unchanged(task, model)
    if figures["unchanged_share"] < 0.5:  # a delta is no smaller
        stored = stored or sum(path.stat().st_size for path in task.base.glob("*.safetensors"))
    elif stored is None and figures["unchanged_share"] < 1:
        model.save_pretrained(aside / "tuned")
        write_delta(task.base, aside / "tuned", aside / "delta", base_name=str(task.base), zstd=True, overwrite=True)
        stored = sum(path.stat().st_size for path in (aside / "delta").glob("*.safetensors"))
    return figures | {"bytes": stored or 0}


def base_tensors(task: Task) -> dict[str, Any]:
    """Return the tensors of the base's files by name."""
    from safetensors.torch import load_file

    return {name: tensor for path in task.base.glob("*.safetensors") for name, tensor in load_file(path).items()}


def unchanged(task: Task, model: Any) -> float | None:
    """Return the share of all weights of the base whose bits are those that a model has; of a merged one for PEFT's."""
    import torch

    if hasattr(model, "merge_and_unload"):
        return None
    now, same, count = model.state_dict(), 0, 0
    for name, tensor in base_tensors(task).items():
        same += int((now[name].view(torch.int32) == tensor.view(torch.int32)).sum())
        count += tensor.numel()
    return same / count


def cut(task: Task, model: Any, share: float) -> None:
    """Set this share of the weights, those that changed least, back to the base."""
    import torch

    now = model.state_dict()
    base = base_tensors(task)
    changes = torch.cat([(now[name] - tensor).abs().flatten() for name, tensor in base.items()])
    least = changes.kthvalue(round(share * len(changes))).values
    with torch.no_grad():
        for name, tensor in base.items():
            now[name].copy_(torch.where((now[name] - tensor).abs() <= least, tensor, now[name]))
