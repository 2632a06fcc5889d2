"""Quantises a model in memory, block by block, and keeps its zeros."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..layers.matrices import decayable_parameter_names
from ..names import clean_name
from ..storage.codes import find_codes
from .blocks import Target, check_held, find_blocks, targets_of
from .capture import Capture, Key
from .gptq import nearest, quantize_by_hessian
from .grid import BLOCK, Grid
from .model import calibrating, check_config, check_rows, check_summed, divided
from .quantization_report import BlockQuantization, QuantizationReport
from .selection import float_of
from .streaming import Stream


def quantize_one_shot(
    model: nn.Module, rows: Tensor | None = None, *, bits: float = 4, block: int = BLOCK
) -> QuantizationReport:
    """Quantise a trained model in place, without training, so that every zero stays exactly zero.

    Each weight becomes a whole code times the scale of its block of consecutive inputs, in the dtype that it has: the
    model stays an ordinary one. Without ``rows`` weights are rounded to nearest (:func:`~hf_pdecay.round_to_nearest`).
    With them the rows run through one block of the model at a time, as for :func:`~hf_pdecay.prune_one_shot`, and its
    matrices are quantised by :func:`~hf_pdecay.gptq` from the inputs that the quantised blocks before it give.

    Quantised are the matrices that a target would prune by default: embeddings, heads and tied tensors are left alone.
    Those that no row reaches, and those outside the repeated blocks, are rounded to nearest. A matrix whose weights are
    such products already, as after an earlier call, stays as it is.

    Args:
        model: Any model; with ``rows`` one that takes token ids first, such as one of transformers.
        rows: Token ids of shape (rows, tokens), without padding.
        bits: Width of the codes: 8 to 2, or 1.58 for -1, 0 and 1.
        block: Consecutive inputs that share a scale.

    Returns:
        What was quantised, and the error of each block.

    Raises:
        ValueError: If an argument is invalid, or the model is quantized already, sharded or without matrices that
            decay; with ``rows`` also if it is an encoder-decoder, has no repeated blocks or cannot run the rows.
    """
    return quantize_model(model, rows, Grid(bits, block))


@torch.no_grad()
def quantize_model(model: nn.Module, rows: Tensor | None, grid: Grid) -> QuantizationReport:
    """:func:`quantize_one_shot` on a grid."""
    targets = targets_of(model)
    check_config(getattr(model, "config", None), type(model).__name__, runs=rows is not None)
    check_held(model, targets)
    if not targets:
        raise ValueError(f"{type(model).__name__} has no matrices that decay by default, so there is nothing to do.")
    for target in targets.values():
        if not bool(target.param.isfinite().all()):
            raise ValueError(f"{target.name} has NaN or infinite weights, which have no scale.")
    report = QuantizationReport(grid.bits, grid.block)
    if rows is not None:
        check_rows(model, rows)
        report.rows = (rows.shape[0], rows.shape[1])
        _by_rows(model, rows, targets, grid, report)
    done = {name for entry in report.blocks for name in entry.tensors}
    rest: dict[str, list[Target]] = {}
    for target in targets.values():
        if target.name not in done:
            rest.setdefault(_block_of(target.name), []).append(target)
    for name, held in rest.items():
        report.blocks.append(_quantized(name, held, None, grid, report))
    if rows is not None:
        alone = [target.name for held in rest.values() for target in held]
        report.unseen += [name for name in alone if name not in report.coded]
    sizes = {clean_name(name): param.numel() for name, param in model.named_parameters()}
    report.left = {name: sizes[name] for name in decayable_parameter_names(model) if name not in targets}
    return report


def _by_rows(
    model: nn.Module, rows: Tensor, targets: Mapping[str, Target], grid: Grid, report: QuantizationReport
) -> None:
    """Quantise the matrices in the blocks of a model from the inputs that rows give them."""
    rows = rows.to(next(model.parameters()).device)
    with calibrating(model):
        stream = Stream(model, find_blocks(model), rows, Capture([], hessian=False))
        held = divided(stream.blocks, list(targets.values()))
        for place, block in enumerate(stream.progress("Quantising")):
            capture = Capture(held[place], hessian=True)
            stream.capture(capture)
            entry = _quantized(block.name, held[place], capture.sums, grid, report)
            entry.output_error = stream.passed()
            report.blocks.append(entry)


def _quantized(
    name: str, targets: Iterable[Target], sums: dict[Key, Tensor] | None, grid: Grid, report: QuantizationReport
) -> BlockQuantization:
    """Quantise matrices, by their Hessians where there are such."""
    entry = BlockQuantization(name, tuple(target.name for target in targets))
    change = whole = 0.0
    for target in targets:
        for number, matrix in enumerate(target.matrices):
            hessian = None if sums is None else sums.pop((target.name, number), None)
            label = f"{target.name}[{number}]" if target.param.dim() == 3 else target.name
            new = kept_codes(matrix, grid)
            if new is not None:
                report.coded.append(label)
            elif hessian is None:
                new = nearest(matrix, grid)
                report.unseen += [label] * (sums is not None)
            else:
                check_summed(hessian, target.name)
                new = quantize_by_hessian(matrix, hessian, grid)
            entry.weights += matrix.numel()
            entry.zeros += int((matrix == 0).sum())
            entry.new_zeros += int(((matrix != 0) & (new == 0)).sum())
            change += float((float_of(new) - float_of(matrix)).square().sum())
            whole += float(float_of(matrix).square().sum())
            matrix.copy_(new)
    entry.weight_error = (change / whole) ** 0.5 if whole else 0.0
    return entry


def kept_codes(weight: Tensor, grid: Grid) -> Tensor | None:
    """Return a matrix whose weights have codes of a grid, with scales that the grid has; None for another matrix."""
    if weight.dtype == torch.float64:
        return None
    try:
        codes, scales = find_codes(weight, grid.bits, grid.block)
    except ValueError:
        return None
    if grid.scales is None:
        return weight
    stored = scales.to(grid.scales).float()
    if not bool(stored.isfinite().all()) or not bool(stored.all()):
        return None
    wide = stored.repeat_interleave(grid.block, -1)[..., : weight.shape[-1]]
    return (codes * wide).to(weight.dtype)


def _block_of(name: str) -> str:
    """The layer of a stack, such as ``transformer.h.0``, or the module in which a parameter lies."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name.rpartition(".")[0] or name
