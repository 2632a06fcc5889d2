"""Prunes a model in memory, block by block."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice
from ..layers.matrices import decayable_parameter_names
from ..names import clean_name
from ..storage.source import RAGGED, quantization_method
from .blocks import Block, Target, check_held, find_blocks, targets_of
from .budgets import divide
from .capture import Capture, Key
from .few_bits import WITH_CODES, prune_to_codes
from .fisher import Information, output_information
from .methods import METHODS, WITH_HESSIAN
from .report import BlockPruning, OneShotReport
from .selection import Amount, check_amount, check_divides, check_zeros, share
from .sparsegpt import prune_by_hessian
from .streaming import Stream
from .wanda import magnitude_mask, wanda_mask


def prune_one_shot(
    model: nn.Module,
    rows: Tensor,
    *,
    method: str = "fisher",
    sparsity: float | None = None,
    pattern: str | None = None,
) -> OneShotReport:
    """Prune a trained model in place, without training, from the inputs that some rows of text give its matrices.

    The rows run through one block at a time: its matrices are pruned from their inputs, and the pruned block's outputs
    are the inputs of the next. Besides the model, memory holds the hidden states of all rows twice, and what one block
    needs: a float32 Hessian of (inputs, inputs) for each of its matrices. ``"fisher"`` first makes a backward pass for
    512 tokens at a time, which keeps their activations in memory.

    Pruned is what a target would prune by default (:func:`~hf_pdecay.decayable_parameter_names`), in the repeated
    blocks of the model: also Hugging Face's ``Conv1D``, and fused experts, each as a matrix of its own. Embeddings,
    heads, tied tensors and what is outside the blocks stay dense. Zeros that are there stay zeros.

    Args:
        model: A model that takes token ids first, such as one of transformers.
        rows: Token ids of shape (rows, tokens), without padding.
        method: ``"fisher"``, ``"sparsegpt"`` (:func:`~hf_pdecay.sparsegpt`), ``"wanda"`` (:func:`~hf_pdecay.wanda`), or
            ``"magnitude"``: the smallest weights of each matrix. ``"fisher"`` is SparseGPT with a score that is also
            multiplied by the mean square of the gradient of the weight's output, and with the zeros divided over the
            matrices by the same gradients; see :func:`.fisher.output_information`.
        sparsity: Fraction of zeros in all pruned matrices, exactly, and, except by ``"fisher"``, in each.
        pattern: N:M, such as ``"2:4"``, in place of a sparsity: at most N of M consecutive inputs stay.

    Returns:
        What was pruned, and the error of each block.

    Raises:
        ValueError: If an argument is invalid, the model is quantized, sharded, an encoder-decoder or without repeated
            blocks, it cannot run the rows, or a matrix has more zeros already.
    """
    fraction, blocks = check_amount(sparsity, pattern)
    check_config(getattr(model, "config", None), type(model).__name__)
    check_rows(model, rows)
    report = prune_matrices(model, rows, [Share(blocks or fraction or 0.0, targets_of(model))], method)
    report.asked = pattern or float(sparsity or 0)
    return report


@dataclass(frozen=True)
class Share:
    """Parameters, by their names, that share a fraction of zeros, or the N and M of a pattern.

    Args:
        still: By a parameter's name, the numbers of its matrices that are left alone.
        even: Whether a matrix that has more zeros than its part is refused; else the others get fewer.
    """

    amount: float | tuple[int, int]
    names: Collection[str]
    still: Mapping[str, Collection[int]] = field(default_factory=dict)
    even: bool = True


@torch.no_grad()
def prune_matrices(
    model: nn.Module, rows: Tensor, shares: Sequence[Share], method: str, widths: Mapping[str, float] | None = None
) -> OneShotReport:
    """:func:`prune_one_shot` of some parameters; each belongs to one share.

    ``widths`` are the bits by name of parameters that are rounded from here on: with a Hessian, those of 8 and 4 bits
    get values now that this rounding will leave as they are, see :func:`.few_bits.prune_to_codes`.
    """
    check_choice("method", method, METHODS)
    stack = find_blocks(model)
    asked = {name: share for share in shares for name in share.names}
    targets = {name: target for name, target in targets_of(model).items() if name in asked}
    check_held(model, targets)
    rows = rows.to(next(model.parameters()).device)
    with calibrating(model):
        first = Capture(targets.values(), hessian=False)
        stream = Stream(model, stack, rows, first)
        seen = {name for name, _ in first.sums}
        pruned = [target for target in targets.values() if target.linear or target.name in seen]
        by_block = divided(stream.blocks, pruned)
        _check(by_block, asked)
        # Within the few inputs of one output that compete for N:M, how much the output matters changes nothing.
        by_gradient = [
            target for targets in by_block for target in targets if isinstance(asked[target.name].amount, float)
        ]
        information = Information({}, {})
        if method == "fisher" and by_gradient:
            information = output_information(model, by_gradient, rows, stream.options)
        plans = _planned(by_block, asked, information, widths or {})
        report = OneShotReport(method, "", (rows.shape[0], rows.shape[1]))
        for place, block in enumerate(stream.progress("Pruning")):
            capture = Capture([plan.target for plan in plans[place]] * (method != "magnitude"), method in WITH_HESSIAN)
            stream.capture(capture)
            for plan in plans[place]:
                if not plan.prune(method, capture.sums, information.outputs) and plan.name not in report.unseen:
                    report.unseen.append(plan.name)
            names = tuple(dict.fromkeys(plan.target.name for plan in plans[place]))
            weights = sum(plan.matrix.numel() for plan in plans[place])
            zeros = sum(int((plan.matrix == 0).sum()) for plan in plans[place])
            report.blocks.append(BlockPruning(block.name, names, weights, zeros, stream.passed()))
    chosen = {name for block in report.blocks for name in block.tensors}
    sizes = {clean_name(name): param.numel() for name, param in model.named_parameters()}
    report.dense = {name: sizes[name] for name in decayable_parameter_names(model) if name not in chosen}
    return report


@torch.no_grad()
def check_runs(model: nn.Module, rows: Tensor) -> None:
    """Raise ValueError if the blocks of a model cannot be pruned from rows, as far as the first of them tells."""
    stack = find_blocks(model)
    check_held(model, targets_of(model))
    with calibrating(model):
        Stream(model, stack, rows[:1].to(next(model.parameters()).device), Capture([], hessian=False))


def check_config(config: Any, name: str, runs: bool = True) -> None:
    """Raise ValueError if a model of this config and class is quantized, or if it ``runs`` and text does not run it."""
    if runs and getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder, which text alone does not run; name a model of one stack.")
    method = quantization_method(config.to_dict()) if hasattr(config, "to_dict") else None
    if method not in (None, RAGGED):
        raise ValueError(
            f"{name} is quantized (quant_method {method!r}); take the plain model, from which it was made."
        )


def check_rows(model: nn.Module, rows: Tensor) -> None:
    """Raise ValueError if rows are not token ids that the model takes."""
    kinds = (torch.int64, torch.int32)
    if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.dtype not in kinds or not rows.numel():
        what = f"{tuple(rows.shape)} of {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"Invalid rows: rows={what}; they must be token ids, int64 of shape (rows, tokens).")
    longest = context_of(getattr(model, "config", None))
    if longest is not None and rows.shape[1] > longest:
        raise ValueError(f"Invalid rows: they have {rows.shape[1]} tokens, and the model takes at most {longest}.")
    own: Any = model
    embeddings = own.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    most = getattr(embeddings, "num_embeddings", None)
    if most is not None and not 0 <= int(rows.min()) <= int(rows.max()) < most:
        raise ValueError(
            f"Invalid rows: they have token {int(rows.max())} (lowest {int(rows.min())}), and the model knows {most}: "
            "0 and up. Is the tokenizer another model's?"
        )


def check_summed(summed: Tensor, name: str) -> None:
    """Raise ValueError if what a matrix was multiplied by is not finite."""
    if not bool(summed.isfinite().all()):
        raise ValueError(
            f"The inputs of {name} are NaN or infinite; if the model is in float16, load it in float32 or bfloat16 "
            "(--dtype)."
        )


def context_of(config: Any) -> int | None:
    """Return the most tokens that a model of this config takes; None if it does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


@dataclass(frozen=True)
class _Plan:
    """What to prune in one matrix, of shape (outputs, inputs)."""

    target: Target
    number: int
    matrix: Tensor
    amount: Amount
    bits: float | None

    @property
    def name(self) -> str:
        return f"{self.target.name}[{self.number}]" if self.target.param.dim() == 3 else self.target.name

    def prune(self, method: str, sums: dict[Key, Tensor], importance: Mapping[Key, Tensor]) -> bool:
        """Prune the matrix in place; return False if no row has reached it."""
        matrix, key = self.matrix, (self.target.name, self.number)
        if method == "magnitude":
            matrix.masked_fill_(magnitude_mask(matrix, self.amount), 0.0)
            return True
        summed = sums.pop(key, None)
        if summed is not None:
            check_summed(summed, self.name)
        if summed is None or method == "wanda":
            norms = matrix.new_zeros(matrix.shape[1], dtype=torch.float32) if summed is None else summed.sqrt()
            matrix.masked_fill_(wanda_mask(matrix, norms, self.amount), 0.0)
            return summed is not None
        if self.bits is not None and self.bits in WITH_CODES:
            matrix.copy_(prune_to_codes(matrix, summed, self.amount, importance.get(key), int(self.bits)))
        else:
            matrix.copy_(prune_by_hessian(matrix, summed, self.amount, importance.get(key)))
        return True


def divided(blocks: Sequence[Block], targets: Sequence[Target]) -> list[list[Target]]:
    """Return the targets of each block; what several blocks share belongs to the first of them."""
    places: dict[int, int] = {}
    for place, block in enumerate(blocks):
        for param in block.module.parameters():
            places.setdefault(id(param), place)
    by_block: list[list[Target]] = [[] for _ in blocks]
    for target in targets:
        if id(target.param) in places:
            by_block[places[id(target.param)]].append(target)
    return by_block


def _check(by_block: Sequence[Sequence[Target]], asked: Mapping[str, Share]) -> None:
    """Raise ValueError if a matrix cannot get what is asked for."""
    for target in (target for targets in by_block for target in targets):
        blocks = asked[target.name].amount
        for matrix in target.matrices:
            if isinstance(blocks, tuple):
                check_divides(blocks, matrix.shape[1], target.name)
            if not bool(matrix.isfinite().all()):
                raise ValueError(f"{target.name} has NaN or infinite weights, which cannot be ranked.")


def _planned(
    by_block: Sequence[Sequence[Target]],
    asked: Mapping[str, Share],
    information: Information,
    widths: Mapping[str, float],
) -> list[list[_Plan]]:
    """Say what each matrix gets, so that the totals are exact; raise ValueError if one cannot get it."""
    flat = [
        (place, target, number, matrix)
        for place, targets in enumerate(by_block)
        for target in targets
        for number, matrix in enumerate(target.matrices)
        if number not in asked[target.name].still.get(target.name, ())
    ]
    zeros = [int((matrix == 0).sum()) for *_, matrix in flat]
    amounts: list[Amount] = [
        aim if isinstance(aim := asked[target.name].amount, tuple) else 0 for _, target, *_ in flat
    ]
    for division in {id(each): each for each in asked.values()}.values():
        if isinstance(division.amount, tuple):
            continue
        together = [index for index, entry in enumerate(flat) if asked[entry[1].name] is division]
        sizes = [flat[index][3].numel() for index in together]
        goal = round(division.amount * sum(sizes))
        least = [0 if division.even else zeros[index] for index in together]
        if sum(least) > goal:
            raise ValueError(
                f"Invalid sparsity: {sum(least):,} of {sum(sizes):,} weights are zero already, and {goal:,} were asked "
                "for. Zeros stay zeros; ask for more."
            )
        even = dict(zip(together, share(goal, sizes, least), strict=True))
        costs = {index: information.costs.get((flat[index][1].name, flat[index][2])) for index in together}
        ranked = {index: cost for index, cost in costs.items() if cost is not None}
        total = sum(even[index] for index in ranked)
        even |= zip(ranked, divide(total, list(ranked.values())), strict=True)
        for index, count in even.items():
            amounts[index] = count
    plans: list[list[_Plan]] = [[] for _ in by_block]
    for (place, target, number, matrix), amount, count in zip(flat, amounts, zeros, strict=True):
        plan = _Plan(target, number, matrix, amount, widths.get(target.name))
        check_zeros(count, amount, matrix.numel(), plan.name)
        plans[place].append(plan)
    return plans


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while, with experts that multiply one after the other."""
    modes: Mapping[nn.Module, bool] = {module: module.training for module in model.modules()}
    own: Any = model
    config = getattr(model, "config", None)
    experts = getattr(config, "_experts_implementation", None) if hasattr(model, "set_experts_implementation") else None
    model.eval()
    try:
        if experts is not None:
            own.set_experts_implementation("eager")
        yield
    finally:
        if experts is not None:
            own.set_experts_implementation(experts)
        for module, training in modes.items():
            module.training = training
