"""Pruning a model's folder without training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..checks import check_choice
from ..sparsity.card_text import add_note, add_section, set_sparsity
from ..sparsity.counting import measure_sparsity
from ..sparsity.file_names import CARD_FILE, REPORT_FILE
from ..storage.casting import cast_config
from ..storage.folder import CONFIG, write_json
from ..storage.loading import class_of, load_whole, unused_note
from ..storage.source import Source, read_source
from .calibration import calibration_rows, read_texts
from .methods import METHODS
from .model import check_config, context_of, prune_one_shot
from .report import OneShotReport
from .selection import check_amount


DTYPES = ("auto", "float32", "bfloat16", "float16")
_LONGEST = 2048  # tokens in a row, unless asked for
_HEADING = "## Sparsity\n\n"


def prune_folder(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    method: str = "fisher",
    sparsity: float | None = None,
    pattern: str | None = None,
    rows: int = 128,
    row_length: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> OneShotReport:
    """Prune a saved model without training, by :func:`prune_one_shot`, and copy the other files of its folder.

    Args:
        model: A folder with ``config.json``, safetensors (plain or compressed) and a tokenizer, or a name on the Hub,
            which is downloaded.
        out: The folder to write. It appears when it is whole.
        data: A file of text, ``.txt`` or ``.jsonl``, or one of these with ``.gz``. Of a JSON row it is the column
            ``text``, or else all strings.
        method: As for :func:`prune_one_shot`.
        sparsity: As for :func:`prune_one_shot`.
        pattern: As for :func:`prune_one_shot`.
        rows: Number of calibration rows.
        row_length: Tokens in each; by default as many as the model takes, at most 2048.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, in which the model runs and is saved; ``"auto"`` for
            that of its files.
        device: Where the model runs, such as ``"cuda"``; by default a GPU if there is one.
        seed: Chooses the rows.
        overwrite: Replace ``out`` if it is a model's folder.

    Returns:
        What was pruned, and the error of each block.

    Raises:
        ValueError: If an argument is invalid, the data are too short, or the model cannot be pruned so.
    """
    check_choice("method", method, METHODS)
    check_choice("dtype", dtype, DTYPES)
    check_amount(sparsity, pattern)
    place = _device(device)
    texts = read_texts(data)
    source = read_source(model, out, overwrite)
    source.check_unquantized(ragged=True)
    tokens = _tokens(source, texts, rows, row_length, seed)
    loaded, unused = load_whole(source, dtype)
    try:
        report = prune_one_shot(loaded.to(place), tokens, method=method, sparsity=sparsity, pattern=pattern)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise ValueError(
            f"The model and what one block needs do not fit on {place} ({reason}); give fewer rows, dtype='bfloat16', "
            "or device='cpu' (--rows, --dtype, --device)."
        ) from error
    if unused:
        report.notes.append(unused_note(unused, loaded))
    with source.rewritten() as aside:
        loaded.save_pretrained(str(aside))
        report.left_out = source.copy_along(aside)
        # Keys of the config that the class does not know stay as they are in the file.
        write_json(aside / CONFIG, source.config if dtype == "auto" else cast_config(source.config, dtype))
        pruned = [name for block in report.blocks for name in block.tensors]
        measure_sparsity(loaded, decayed=pruned).save(aside / REPORT_FILE)
        _note(aside / CARD_FILE, report)
    return report


def _tokens(source: Source, texts: list[str], rows: int, row_length: int | None, seed: int) -> torch.Tensor:
    cls = class_of(source)
    config = cls.config_class.from_pretrained(source.folder)
    check_config(config, cls.__name__)
    tokenizer = _tokenizer(source.folder)
    limits = [limit for limit in (context_of(config), tokenizer.model_max_length) if limit is not None]
    longest = min(limits)
    if row_length is not None and row_length > longest:
        raise ValueError(
            f"Invalid row_length: row_length={row_length}; the model or its tokenizer takes at most {longest} tokens."
        )
    length = min(longest, _LONGEST) if row_length is None else row_length
    return calibration_rows(texts, tokenizer, rows=rows, row_length=length, seed=seed)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    patterns = ("tokenizer*", "vocab*", "*.model", "spiece*")
    if any(any(folder.glob(pattern)) for pattern in patterns):
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"The tokenizer of {str(folder)!r} cannot be loaded ({reason}).") from error
    raise ValueError(f"{str(folder)!r} has no tokenizer, which the text needs; save the model's tokenizer there.")


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"Invalid device: device={device!r} is not here ({reason}).") from error
    return place


def _note(card: Path, report: OneShotReport) -> None:
    """Say in a card, if there is one, what was pruned."""
    if not card.is_file():
        return
    rows, length = report.rows
    note = (
        f"`hf-pdecay prune` has set {report.sparsity:.2%} of {report.weights:,} weights to zero by {report.method}, "
        f"without training, from {rows:,} rows of {length:,} tokens. `{REPORT_FILE}` counts the zeros of each tensor."
    )
    text = set_sparsity(card.read_text(encoding="utf-8"), report.sparsity)
    if _HEADING in text:
        text = add_note(text, f"{note}\nThe counts below are those of the model before.")
    else:
        text = add_section(text, f"{_HEADING}{note}")
    card.write_text(text, encoding="utf-8")
