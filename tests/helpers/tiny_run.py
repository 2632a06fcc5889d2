"""A real training run in a process of its own: ``python -m tests.helpers.tiny_run OUTPUT_DIR [--option value …]``.

``--kill_at N`` sends SIGKILL to the process itself in step N; ``--dtype bfloat16`` trains low-precision weights.
"""

from __future__ import annotations

import argparse
import os
import signal
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments

from .models import tiny_gpt2


class Kill(TrainerCallback):
    """SIGKILL in the middle of a step, as a crashed machine or an out-of-memory killer would."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--kill_at", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--resume", default=None)
    parser.add_argument("--torch_compile", action="store_true")
    options = parser.parse_args()

    rows = torch.randint(0, 64, (96, 16), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    args = PDecayTrainingArguments(
        options.output_dir,
        use_cpu=True,
        report_to="none",
        max_steps=20,
        logging_steps=2,
        save_strategy="steps",
        save_steps=8,
        learning_rate=1e-2,
        warmup_steps=3,
        lr_scheduler_type="cosine",
        p_norm=0.7,
        lambda_p=0.1,
        weight_decay=0.01,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        disable_tqdm=True,
        # The backend that traces and compiles nothing: what is tested is the wrapped model.
        torch_compile=options.torch_compile,
        torch_compile_backend="aot_eager" if options.torch_compile else None,
    )
    # Dropout stays on: the random state is part of what a resumed run must continue.
    trainer = PDecayTrainer(
        model=tiny_gpt2().to(getattr(torch, options.dtype)),
        args=args,
        train_dataset=data,
        callbacks=[Kill(options.kill_at)] if options.kill_at else [],
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()


if __name__ == "__main__":
    main()
