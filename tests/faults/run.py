"""A life of a training run, under ``accelerate launch`` or called: ``python -m tests.faults.run FOLDER``.

``FOLDER/plan.json`` says when the run is to be killed, a kill for each life; ``FOLDER/killed`` has a line for each life
that ended so. A life resumes from the newest whole checkpoint, if there is one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments
from hf_pdecay.trainer.checkpoints import newest_whole
from tests.helpers.models import tiny_gpt2

from .moments import Kill, Moments, StepMoments


STEPS = 24
LOGGING_STEPS = 2
SAVE_STEPS = 6


def live(folder: Path) -> None:
    """Train until the end, or until the kill that the plan has for this life."""
    rank = int(os.environ.get("RANK", "0"))
    killed, plan = folder / "killed", folder / "plan.json"
    number = len(killed.read_text().splitlines()) if killed.exists() else 0
    kills = [Kill(**each) for each in json.loads(plan.read_text())] if plan.exists() else []
    kill = kills[number] if number < len(kills) else None
    (folder / f"pid-{number}-{rank}").write_text(str(os.getpid()))

    def before_death(label: str) -> None:
        with open(killed, "a", encoding="utf-8") as file:
            file.write(f"rank {rank}, step {moments.step}, moment {moments.moment}: {label}\n")
        for other in [] if kill is None or kill.alone else folder.glob(f"pid-{number}-*"):
            if other.name != f"pid-{number}-{rank}":
                with suppress(ProcessLookupError):
                    os.kill(int(other.read_text()), signal.SIGKILL)

    moments = Moments(
        folder / "out",
        kill if kill is not None and kill.rank == rank else None,
        before_death,
        None if plan.exists() else folder / f"moments-{rank}",
    )

    class Trainer(PDecayTrainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            with moments.saving():
                super()._save_checkpoint(*args, **kwargs)

    rows = torch.randint(0, 64, (104, 16), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    args = PDecayTrainingArguments(
        str(folder / "out"),
        use_cpu=True,
        report_to="none",
        max_steps=STEPS,
        logging_steps=LOGGING_STEPS,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=SAVE_STEPS,
        load_best_model_at_end=True,
        learning_rate=1e-2,
        warmup_steps=3,
        lr_scheduler_type="cosine",
        target_sparsity=0.8,
        weight_decay=0.01,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        disable_tqdm=True,
    )
    # Dropout and shuffling stay on: the random state is part of what a resumed run must continue.
    trainer = Trainer(
        model=tiny_gpt2(),
        args=args,
        train_dataset=data.select(range(96)),
        eval_dataset=data.select(range(96, 104)),
    )
    trainer.callback_handler.callbacks.insert(0, StepMoments(moments))  # before ours
    moments.watch_files()
    trainer.train(resume_from_checkpoint=newest_whole(args.output_dir) is not None or None)
    trainer.save_model()


if __name__ == "__main__":
    live(Path(sys.argv[1]))
