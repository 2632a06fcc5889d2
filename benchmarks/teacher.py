"""Measure how much longer a training step with a teacher takes: `--teacher self` against none.

    python benchmarks/teacher.py
    python benchmarks/teacher.py --device cuda --width 2048 --layers 16 --vocabulary 49152 --length 512

All runs are of one Llama, data and optimizer in one process, and take turns. A case counts by its shortest step,
because noise only adds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments


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
        self.times.append(time.perf_counter())


def step_seconds(options: argparse.Namespace, settings: dict[str, Any]) -> float:
    """Return the time of the shortest step of a short run."""
    set_seed(0)
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        num_key_value_heads=max(1, options.width // 128),
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


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=4, help="runs of each case (4)")
    sizes = {"width": 256, "layers": 6, "vocabulary": 8192, "batch": 4, "length": 128}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of the model or its data ({default})")
    options = parser.parse_args()
    seconds = [
        {name: step_seconds(options, settings) for name, settings in CASES.items()} for _ in range(options.rounds)
    ]
    print(f"{'teacher':<26}{'ms':>9}{'ratio':>8}")
    best = {name: min(each[name] for each in seconds) for name in CASES}
    for name, shortest in best.items():
        print(f"{name:<26}{1000 * shortest:9.1f}{shortest / best['none']:8.2f}")


if __name__ == "__main__":
    main()
