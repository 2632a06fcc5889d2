"""Measure how much longer a training step with a teacher takes, and what of its answers a cache keeps.

    python benchmarks/teacher.py
    python benchmarks/teacher.py --width 576 --layers 30 --vocabulary 49152 --batch 1 --length 256 --rounds 1
    python benchmarks/teacher.py --device cuda --width 2048 --layers 16 --vocabulary 49152 --length 512
    python benchmarks/teacher.py --model FOLDER --text FILE FILE

The first three compare `--teacher self` with none. All runs are of one Llama, data and optimizer in one process, and
take turns. A case counts by its shortest step, on a CPU in time of the processor, because noise only adds. The last
compares the loss of what `--teacher_cache` keeps with that of all logits: a language model is the teacher of itself
with the smallest 30% of each matrix set to zero, on the first 2,048 tokens of the texts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    set_seed,
)

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments
from hf_pdecay.trainer.distillation_loss import kept_kl_sum, kl_sum, summary


STEPS = 8  # of a run; the first two warm up
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "logits": {"teacher": "self", "teacher_hidden": 0.0},
    "logits and hidden states": {"teacher": "self"},
}


class Stopwatch(TrainerCallback):
    """Notes how long each step takes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the time."""
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() if args.device.type == "cuda" else time.process_time())


def step_seconds(options: argparse.Namespace, settings: dict[str, Any]) -> float:
    """Return the time of the shortest step of a short run."""
    set_seed(0)
    heads = max(1, options.width // 64)
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // next(size for size in (2, 3, 1) if heads % size == 0),
        vocab_size=options.vocabulary,
    )
    rows = torch.randint(0, options.vocabulary, (STEPS * options.batch, options.length))
    data = [{"input_ids": row, "labels": row} for row in rows]
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = PDecayTrainingArguments(
            folder,
            use_cpu=options.device == "cpu",
            report_to="none",
            max_steps=STEPS,
            per_device_train_batch_size=options.batch,
            logging_steps=STEPS,
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        trainer = PDecayTrainer(model=LlamaForCausalLM(config), args=args, train_dataset=data, callbacks=[watch])
        trainer.train()
    return min(end - begin for begin, end in zip(watch.times[2:], watch.times[3:], strict=False))


def compare_kept(folder: str, texts: list[str]) -> None:
    """Print how near the divergence from what a cache keeps, and its gradient, are to those of all logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = "".join(Path(file).read_text(encoding="utf-8") for file in texts)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :2048].view(4, -1)
    with torch.no_grad():
        teacher = model(input_ids=ids).logits.flatten(0, 1)
        for matrix in (module.weight for module in model.get_decoder().modules() if isinstance(module, nn.Linear)):
            matrix.mul_(matrix.abs() > matrix.abs().flatten().kthvalue(int(0.3 * matrix.numel())).values)
        student = model(input_ids=ids).logits.flatten(0, 1).requires_grad_()
    print(
        "| temperature | divergence, of all logits' | cosine of the gradients | norm of the gradient, of all logits' |"
    )
    print("|---:|---:|---:|---:|")
    tokens = torch.arange(len(student))
    for temperature in (1.0, 2.0, 4.0):
        whole = kl_sum(student, teacher.clone(), tokens >= 0, temperature)
        kept = kept_kl_sum(student, summary(teacher), tokens, temperature)
        full, ours = (torch.autograd.grad(each, student)[0].flatten() for each in (whole, kept))
        cosine = nn.functional.cosine_similarity(full, ours, 0)
        print(f"| {temperature:g} | {kept / whole:.2f} | {cosine:.3f} | {ours.norm() / full.norm():.2f} |")


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=4, help="runs of each case (4)")
    sizes = {"width": 256, "layers": 6, "vocabulary": 8192, "batch": 4, "length": 128}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of the model or its data ({default})")
    parser.add_argument("--model", help="folder of a language model, to see what a cache keeps of its answers")
    parser.add_argument("--text", nargs="+", default=[], help="files of text for --model")
    options = parser.parse_args()
    if options.model:
        compare_kept(options.model, options.text)
        return
    seconds = [
        {name: step_seconds(options, settings) for name, settings in CASES.items()} for _ in range(options.rounds)
    ]
    print(f"{'teacher':<26}{'ms':>9}{'ratio':>8}")
    best = {name: min(each[name] for each in seconds) for name in CASES}
    for name, shortest in best.items():
        print(f"{name:<26}{1000 * shortest:9.1f}{shortest / best['none']:8.2f}")


if __name__ == "__main__":
    main()
