"""Measure what asking for a sparsity costs: the share of a run's time that its control takes.

    python benchmarks/control.py
    python benchmarks/control.py --model small --steps 400

Trains one of the models of `overhead.py` with `target_sparsity=0.9` and adds up the time of setting λ_p and of pruning.
A run of up to 3,000 steps has about 40 pruning steps: with twice as many steps the share is half as much.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from typing import Any
from unittest.mock import patch

from transformers import set_seed

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments, Schedule, SparsityControl
from overhead import MODELS, Model, Spans, load_data, silence, train_clm


def measure(model: Model, steps: int) -> str:
    """Train once; return a line with the share of the control and the time of a step and of pruning."""
    data = load_data(model)
    set_seed(42)
    with tempfile.TemporaryDirectory() as folder, silence():
        args = PDecayTrainingArguments(
            folder,
            max_steps=steps,
            target_sparsity=0.9,
            per_device_train_batch_size=model.batch,
            learning_rate=2e-3,
            logging_steps=steps,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = PDecayTrainer(model=model.build(), args=args, train_dataset=data, data_collator=train_clm.collate)
        spans = Spans(), Spans()
        timed: dict[str, Any] = {
            name: span.around(getattr(SparsityControl, name))
            for name, span in zip(("before_step", "after_step"), spans, strict=True)
        }
        with patch.multiple(SparsityControl, **timed):
            begin = time.perf_counter()
            trainer.train()
            whole = time.perf_counter() - begin
        weights = trainer.measure_sparsity().decayed.parameters
    schedule = Schedule(round(0.1 * steps), round(0.75 * steps))
    prunings = sum(schedule.prunes(step) for step in range(1, steps + 1))
    control = [sum(span.seconds) for span in spans]
    return (
        f"{model.name}, {weights / 1e6:.2f} M decayed weights, {steps} steps of {1e3 * whole / steps:.1f} ms: the "
        f"control takes {sum(control) / whole:.2%} of the time; at each of {prunings} pruning steps λ_p takes "
        f"{1e3 * control[0] / prunings:.1f} ms and pruning {1e3 * control[1] / prunings:.1f} ms"
    )


def main() -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="tiny", help="model of overhead.py")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the run (1000)")
    options = parser.parse_args()
    print(measure(MODELS[options.model], options.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
