"""A run with a teacher in one process or several: ``python -m tests.helpers.teacher_run OUT TEACHER BATCH [CACHE]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate.utils import gather_object

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments

from .models import build
from .teacher_data import masked_rows


def main() -> None:
    out, teacher, batch, *cache = sys.argv[1:]
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
        teacher_cache=cache[0] if cache else None,
    )
    trainer = PDecayTrainer(model=build("llama"), args=args, train_dataset=masked_rows(32))
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    if cache:
        asked = gather_object([[trainer._lesson.cache.computed, trainer._lesson.cache.found]])  # type: ignore[attr-defined]
        if trainer.is_world_process_zero():
            (Path(out) / "rows.json").write_text(json.dumps(asked))


if __name__ == "__main__":
    main()
