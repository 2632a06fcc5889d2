"""A run with a teacher in one process or several: ``python -m tests.helpers.teacher_run OUT TEACHER BATCH``."""

from __future__ import annotations

import sys

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments

from .models import build
from .teacher_data import masked_rows


def main() -> None:
    out, teacher, batch = sys.argv[1:4]
    args = PDecayTrainingArguments(
        out,
        use_cpu=True,
        report_to="none",
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=int(batch),
        disable_tqdm=True,
        teacher=teacher,
    )
    trainer = PDecayTrainer(model=build("llama"), args=args, train_dataset=masked_rows(32))
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
