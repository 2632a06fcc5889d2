"""Pruning and quantising a model's folder without training."""

from __future__ import annotations

import os

from ..checks import check_choice
from ..exports.formats import PLAIN, Coded, format_of
from ..sparsity.file_names import CODES_FILE, REPORT_FILE
from .blocks import targets_of
from .calibration import read_texts
from .grid import BLOCK, Grid
from .methods import METHODS
from .model import prune_one_shot
from .quantization_report import QuantizationReport
from .quantizing import quantize_model
from .report import OneShotReport
from .rewriting import Calibration, Rewriting
from .selection import check_amount


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
    check_amount(sparsity, pattern)
    texts = read_texts(data)
    with Rewriting(model, out, Calibration(rows, row_length, dtype, device, seed, overwrite)) as job:
        tokens = job.rows(texts)
        report = prune_one_shot(job.load(), tokens, method=method, sparsity=sparsity, pattern=pattern)
    count, length = report.rows
    note = (
        f"`hf-pdecay prune` has set {report.sparsity:.2%} of {report.weights:,} weights to zero by {report.method}, "
        f"without training, from {count:,} rows of {length:,} tokens. `{REPORT_FILE}` counts the zeros of each tensor."
    )
    job.save(report, [name for block in report.blocks for name in block.tensors], note)
    return report


def quantize_folder(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    bits: float = 4,
    block: int | None = None,
    format: str = PLAIN,
    rows: int = 128,
    row_length: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> QuantizationReport:
    """Quantise a saved model, by :func:`quantize_one_shot`, and copy the other files of its folder.

    The new folder is an ordinary one: its weights have the dtype of the model, and each is exactly a code times the
    scale of its block. ``codes.json`` says which, and how wide the codes are. With another format the same codes and
    scales are stored as its runtime reads them.

    Args:
        model: A folder with ``config.json`` and safetensors (plain or compressed), or a name on the Hub, which is
            downloaded.
        out: The folder to write. It appears when it is whole.
        data: A file of text as for :func:`prune_folder`, for GPTQ; None rounds to nearest, which needs no tokenizer.
        bits: Width of the codes: 8 to 2, or 1.58 for -1, 0 and 1.
        block: Consecutive inputs that share a scale; by default 128, and 32 in GGUF, which has no other.
        format: ``"plain"``; or, with 8 or 4 bits, ``"pack-quantized"`` (a folder for compressed-tensors, by which
            transformers and vLLM load it), ``"torchao"`` (a folder for torchao, by which transformers loads it), or
            ``"gguf"`` (a file in Q8_0 or Q4_0, for llama.cpp).
        rows: As for :func:`prune_folder`.
        row_length: As for :func:`prune_folder`.
        dtype: As for :func:`prune_folder`. In bfloat16 and float16 scales have fewer digits, so that products are
            exact.
        device: As for :func:`prune_folder`.
        seed: As for :func:`prune_folder`.
        overwrite: As for :func:`prune_folder`.

    Returns:
        What was quantised, and the error of each block.

    Raises:
        ValueError: If an argument is invalid, the data are too short, the model cannot be quantised so or stored in
            the format, or the format's package is not installed.
    """
    export = format_of(format, bits, block)
    if export is None:
        grid = Grid(bits, BLOCK if block is None else block)
    else:
        dtype = export.dtype if dtype == "auto" else dtype
        grid = Grid(bits, export.block or (BLOCK if block is None else block), export.scales)
    texts = None if data is None else read_texts(data)
    with Rewriting(model, out, Calibration(rows, row_length, dtype, device, seed, overwrite)) as job:
        if export is not None:
            export.check_source(job.source)
        tokens = None if texts is None else job.rows(texts)
        loaded = job.load()
        if export is not None:
            export.check_model(loaded, Coded(list(targets_of(loaded)), int(bits), grid.block))
        report = quantize_model(loaded, tokens, grid)
    names = [name for entry in report.blocks for name in entry.tensors]
    how = "rounding to nearest" if report.rows is None else "GPTQ from {:,} rows of {:,} tokens".format(*report.rows)
    where = f"`{CODES_FILE}` names the tensors" if export is None else f"the format is {format}"
    note = (
        f"`hf-pdecay quantize` has rounded {report.weights:,} weights to codes of {bits:g} bits by {how}, without "
        f"training, and kept all {report.zeros:,} zeros. Each is exactly a code times the scale of {grid.block} "
        f"consecutive inputs; {where}."
    )
    if export is None:
        job.save(report, names, note, {"bits": bits, "block": grid.block, "tensors": names})
        return report
    coded, write = Coded(names, int(bits), grid.block), export.write
    job.save(report, names, note, write=lambda aside, model: write(aside, model, coded, job.source))
    return report
