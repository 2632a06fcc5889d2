"""Names of the files that a run writes beside a model."""

from __future__ import annotations


REPORT_FILE = "sparsity.json"
HISTORY_FILE = "sparsity.jsonl"
PICTURE_FILE = "sparsity.png"
CARD_FILE = "README.md"

RUN_FILES = (REPORT_FILE, HISTORY_FILE, PICTURE_FILE, CARD_FILE)
