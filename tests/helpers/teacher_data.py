"""Rows for runs with a teacher."""

from __future__ import annotations

from typing import Any

import torch


def masked_rows(count: int, length: int = 16) -> list[dict[str, Any]]:
    """Rows of tokens below 64 that have padding at their end, and no labels for their beginning."""
    rows = []
    for number, ids in enumerate(torch.randint(1, 64, (count, length), generator=torch.Generator().manual_seed(1))):
        begin, end = number % 4, 6 + number % 10
        mask = torch.ones_like(ids)
        mask[end:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:begin] = -100
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def labelled_rows(count: int, **labels: int) -> list[dict[str, Any]]:
    """Rows of tokens with a class below each number; the argument is the name of the label."""
    return [
        {key: row[key] for key in ("input_ids", "attention_mask")}
        | {name: torch.tensor(number % below) for name, below in labels.items()}
        for number, row in enumerate(masked_rows(count))
    ]
