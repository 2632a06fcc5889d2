"""Names of the files that a run writes beside a model, and of its checkpoints."""

from __future__ import annotations

import re


REPORT_FILE = "sparsity.json"
HISTORY_FILE = "sparsity.jsonl"
PICTURE_FILE = "sparsity.png"
CARD_FILE = "README.md"
CODES_FILE = "codes.json"

# The Trainer's own: a checkpoint folder, and the file in it that is written last.
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "trainer_state.json"

RUN_FILES = (REPORT_FILE, HISTORY_FILE, PICTURE_FILE, CARD_FILE)
