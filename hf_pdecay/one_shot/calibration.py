"""Calibration rows: token ids from a file of text."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


_TEXT, _ROWS = (".txt", ".text", ".md"), (".jsonl", ".json")
_AT_ONCE = 1000  # documents


def calibration_rows(
    texts: Sequence[str], tokenizer: Any, *, rows: int = 128, row_length: int = 2048, seed: int = 0
) -> Tensor:
    """Return rows of tokens at random places of some texts, for :func:`~hf_pdecay.prune_one_shot`.

    The texts are taken in random order, each followed by the tokenizer's end of text, until they have enough tokens.
    Each row begins and ends with the tokens with which the tokenizer begins and ends every text, if it has such.

    Args:
        texts: Documents.
        tokenizer: A tokenizer of transformers.
        rows: Number of rows.
        row_length: Tokens in each.
        seed: Chooses the texts and the places.

    Returns:
        Token ids, int64 of shape (rows, row_length).

    Raises:
        ValueError: If an argument is invalid, or the texts are too short.
    """
    for name, value, least in (("rows", rows, 1), ("row_length", row_length, 4)):
        if type(value) is not int or value < least:
            raise ValueError(f"Invalid {name}: {name}={value!r}; it must be a whole number of at least {least}.")
    first, last = _edges(tokenizer)
    inner = row_length - len(first) - len(last)
    end = [] if tokenizer.eos_token_id is None or last else [tokenizer.eos_token_id]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    tokens: list[int] = []
    for start in range(0, len(order), _AT_ONCE):
        if len(tokens) >= rows * inner:
            break
        some = [texts[place] for place in order[start : start + _AT_ONCE]]
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            tokens += ids + end
    whole = len(tokens) // inner
    if whole < rows:
        fewer = f"give rows={whole} (--rows {whole})" if whole else "give a smaller row_length (--row_length)"
        raise ValueError(
            f"Invalid rows: rows={rows} of {row_length:,} tokens were asked for, and the text has {len(tokens):,} "
            f"tokens, enough for {whole}; {fewer}, or more text."
        )
    cut = torch.tensor(tokens[: whole * inner], dtype=torch.int64).view(whole, inner)
    chosen = cut[torch.randperm(whole, generator=generator)[:rows]]
    edges = (torch.tensor(ids, dtype=torch.int64).expand(rows, -1) for ids in (first, last))
    before, after = edges
    return torch.cat([before, chosen, after], dim=1)


def _edges(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after each text: of a beginning, a class, a separator."""
    alone = list(tokenizer("", verbose=False)["input_ids"])
    begins, ends = (tokenizer.bos_token_id, tokenizer.cls_token_id), (tokenizer.sep_token_id,)
    first = alone[:1] if alone and alone[0] in begins else []
    last = alone[-1:] if len(alone) > 1 and alone[-1] in ends else []
    return first, last


def read_texts(data: str | os.PathLike[str]) -> list[str]:
    """Return the documents in a file: one in a text file, one for each row of JSON lines.

    A row's document is its column ``text``, or else all its strings. A file may be compressed by gzip.

    Raises:
        ValueError: If the file is missing, has an unknown suffix, or cannot be read.
    """
    path = Path(data)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    suffix = "".join(suffixes[:-1] if zipped else suffixes).rpartition(".")[2]
    if not path.is_file():
        raise ValueError(f"Invalid data: {str(data)!r} is not a file.")
    if f".{suffix}" not in (*_TEXT, *_ROWS):
        raise ValueError(
            f"Invalid data: {str(data)!r} must end in one of {', '.join((*_TEXT, *_ROWS))}, or in one of these and .gz."
        )
    try:
        content = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
        text = content.decode("utf-8-sig")
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"Invalid data: {str(data)!r} cannot be read as UTF-8 text ({error}).") from error
    if not text.strip():
        raise ValueError(f"Invalid data: {str(data)!r} is empty.")
    return [text] if f".{suffix}" in _TEXT else _documents(text, str(data))


def _documents(text: str, name: str) -> list[str]:
    documents: list[str] = []
    whole = text.lstrip().startswith("[")
    lines = json.loads if whole else None
    try:
        for row in lines(text) if lines else (json.loads(line) for line in text.split("\n") if line.strip()):
            if not isinstance(row, dict):
                raise ValueError(f"it holds {json.dumps(row)[:60]}, and must hold an object")
            own = row.get("text")
            strings = [own] if isinstance(own, str) else [value for value in row.values() if isinstance(value, str)]
            if not strings:
                raise ValueError(f"none of its columns holds text: {', '.join(row)}")
            documents.append("\n".join(strings))
    except ValueError as error:
        where = "" if whole and not documents else f"row {len(documents) + 1} of "
        raise ValueError(f"Invalid data: {where}{name!r} cannot be read: {error}.") from error
    return documents
