"""A run that prunes its model at once, from rows of its training data, where the schedule would prune step by step."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..checks import MODEL_ERRORS
from ..layers.matrices import decayable_parameter_names
from ..names import clean_name
from ..one_shot.blocks import find_blocks
from ..one_shot.methods import AUTO, METHODS, OFF
from ..one_shot.model import (
    Share,
    calibrating,
    check_config,
    check_rows,
    check_runs,
    context_of,
    prune_matrices,
)
from ..one_shot.own_text import own_rows
from ..one_shot.streaming import options_of
from ..optim.bases import decays_to_base
from ..optim.unit_kinds import ELEMENT, n_of_m
from ..target.budgets import Budget
from ..target.settings import Target
from ..terminal import get_logger
from .teacher_cache import documents_of


logger = get_logger(__name__)

# Calibration rows, how many of them the model writes itself, and the most tokens of each.
_ROWS, _OWN, _LONGEST = 64, 32, 2048
# Of a target beyond this fraction the schedule makes the rest.
_MOST = 0.5
# A model that predicts no better than by chance has a loss of log(vocabulary). One whose loss is below this share of
# it, on the first tokens of the first rows, has been trained.
_TRAINED, _READ = 0.8, (4, 256)
_STEPS_AFTER = 10  # for the schedule


def planned_method(model: nn.Module, asked: str, budgets: Sequence[Budget], engine: str | None = None) -> str:
    """Return how a run can prune at once: as asked, or ``"off"`` if ``"auto"`` cannot be.

    Args:
        model: The model, which may be on the meta device.
        asked: The setting ``one_shot``.
        budgets: What shares a target.
        engine: What shards the run, if anything does.

    Raises:
        ValueError: If a method was asked for that cannot be.
    """
    if asked == OFF:
        return OFF
    reason = _why_not(model, budgets, engine)
    if asked == AUTO:
        return OFF if reason or not _predicts_tokens(model) else AUTO
    if reason:
        raise ValueError(f"Invalid one_shot: one_shot={asked!r} {reason}.")
    return asked


def _why_not(model: Any, budgets: Sequence[Budget], engine: str | None) -> str | None:
    if any(decays_to_base(group) for budget in budgets for group, _ in budget.members):
        return "where weights decay to their base: pruning at once makes zeros, not unchanged weights; leave it out"
    if not any(_amount(budget) for budget in budgets):
        kinds = ", ".join(sorted({budget.kind for budget in budgets}))
        return f"prunes to a target of single weights, or to N:M, and the targets are for {kinds}; leave it out"
    if engine:
        return (
            f"under {engine}, which shards the model; prune it first, by hf-pdecay prune, and train on with "
            "keep_zeros=True"
        )
    if hasattr(model, "peft_config"):
        return "with adapters, whose weights begin at zero; leave it out"
    try:
        check_config(getattr(model, "config", None), type(model).__name__)
        find_blocks(model)
    except ValueError as error:
        return f"prunes models of text block by block: {str(error).rstrip('.')}"
    return None


def _predicts_tokens(model: Any) -> bool:
    return hasattr(model, "can_generate") and bool(model.can_generate())


def cut_at(target: Target, total_steps: int) -> float:
    """Return after which fraction of a run it prunes at once.

    That is halfway from ``sparsity_begin`` to ``sparsity_end``, or before that where the schedule would have made as
    many zeros as are made at once.
    """
    begin, end = target.sparsity_begin, target.sparsity_end
    schedule, asked = target.schedule(total_steps), target.target_sparsity or 0.0
    halfway = (schedule.begin + schedule.end) // 2
    first = next((step for step in range(schedule.begin, halfway) if asked * schedule.progress(step) >= _MOST), halfway)
    latest = end - (_STEPS_AFTER + 1) / max(total_steps, 1)
    return max(begin, min(first / max(total_steps, 1), latest))


class OneShotCut:
    """Prunes a model once.

    Args:
        model: The model, not wrapped.
        batches: The training batches, which have ``input_ids``; the first of them are read now.
        method: A method, or ``"auto"``.
        must: Whether a method was asked for: then what stands in its way is an error.
        seed: For the order of the batches, so that a resumed run reads the same.

    Attributes:
        method: The method, ``"off"`` if ``"auto"`` finds that the model is untrained or cannot be pruned so.

    Raises:
        ValueError: If the batches or the model cannot be used, and a method was asked for.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Any], method: str, *, must: bool = True, seed: int = 0
    ) -> None:
        self.method, self._must = method, must
        self._rows = torch.empty(0)
        reason = None
        try:
            _check_repeats(batches, must=must)
            with _reading(batches, seed):
                self._rows = _rows(model, batches)
            if method == AUTO:
                self.method = METHODS[0] if _is_trained(model, self._rows) else OFF
            if self.method != OFF:
                check_runs(model, self._rows)
        except MODEL_ERRORS as error:
            reason, self.method = str(error), OFF
        if _several():
            agreed: list[Any] = [self._rows, self.method, reason]
            torch.distributed.broadcast_object_list(agreed)
            self._rows, self.method, reason = agreed
        if reason is not None and must:
            raise ValueError(reason)

    def prune(
        self, model: nn.Module, budgets: Sequence[Budget], widths: Mapping[str, float] | None = None, *, tell: bool
    ) -> None:
        """Prune the model in place towards the targets of its budgets; under DDP in all processes alike.

        Args:
            model: The model, not wrapped.
            budgets: What shares a target.
            widths: How many bits weights are rounded to in training, by name: 8 and 4 bits are chosen with the zeros.
            tell: Whether to say what was done.

        Raises:
            ValueError: If the model cannot be pruned so, and a method was asked for.
        """
        start = time.perf_counter()
        params = {clean_name(name): param for name, param in model.named_parameters()}
        known = decayable_parameter_names(model)
        names = {id(params[name]): name for name in known}
        shares = [
            Share(
                amount,
                {names[id(param)] for param in budget.params if id(param) in names},
                {names[key]: numbers for key, numbers in budget.still.items() if key in names},
                even=False,
            )
            for budget in budgets
            if (amount := _amount(budget)) is not None
        ]
        lacking = [share for share in shares if not _has(share, params)]
        if not lacking:
            return
        report, failure = None, None
        rows, own = _with_own(model, self._rows)
        try:
            report = prune_matrices(model, rows, lacking, self.method, widths)
        except MODEL_ERRORS as error:
            if self._must:
                raise
            failure = error
        if _several():
            for name in known:
                torch.distributed.broadcast(params[name].detach(), 0)
        if failure is not None and tell:
            logger.warning("The run prunes step by step from here, as with one_shot=off: %s", failure)
        if report is not None and tell:
            logger.warning(
                "Pruned to %.2f%% zeros by %s, from %d rows of %d tokens, %d of them its own, in %.0f s (one_shot).",
                *(100 * report.sparsity, self.method, *rows.shape, own, time.perf_counter() - start),
            )


def _with_own(model: nn.Module, rows: Tensor) -> tuple[Tensor, int]:
    """Replace half of the calibration rows by text that the model writes, and return how many these are.

    What is pruned by the rows of a task alone costs the model much of what else it knows.
    """
    try:
        own = own_rows(model, min(_OWN, len(rows)), rows.shape[1])
    except MODEL_ERRORS as error:  # as for a model that does not write
        logger.info("The model writes no rows for its calibration: %s", str(error).strip().split("\n")[0])
        return rows, 0
    return torch.cat([rows[: _ROWS - _OWN], own.to(rows.dtype)]), len(own)


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _check_repeats(batches: Any, *, must: bool) -> None:
    """Raise ValueError if rows that are read now may be lost to the run."""
    dataset = getattr(batches, "dataset", None)
    while isinstance(dataset, IterableDatasetShard):
        dataset = dataset.dataset
    known = sys.modules.get("datasets")
    if known is not None and isinstance(dataset, known.IterableDataset):
        return
    if dataset is not None and not isinstance(dataset, IterableDataset):
        return
    source: Any = batches if dataset is None else dataset
    if not must or iter(source) is iter(source):
        raise ValueError(
            f"Invalid one_shot: it reads the first rows before the run does, and {type(source).__name__} may give them "
            "only once; leave it out, or make each iteration begin anew."
        )


@contextmanager
def _reading(batches: Any, seed: int) -> Iterator[None]:
    """Leave a data loader as it was, so that the run sees the rows in the order in which it would see them."""
    epoch = getattr(batches, "iteration", None)
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would set the GPUs' generators too.
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        loader = getattr(batches, "base_dataloader", batches)
        if getattr(loader, "_iterator", None) is not None:
            loader._iterator = None  # persistent workers, which have drawn numbers: the run starts its own
        if epoch is not None:  # one of Accelerate's, which counts its passes and waits for the end of each
            batches.iteration = epoch
            batches.end()


def _amount(budget: Budget) -> float | tuple[int, int] | None:
    return min(budget.target, _MOST) if budget.kind == ELEMENT else n_of_m(budget.kind)


def _has(share: Share, params: Mapping[str, Tensor]) -> bool:
    """Whether parameters have the zeros that they share already."""
    fraction = 1 - share.amount[0] / share.amount[1] if isinstance(share.amount, tuple) else share.amount
    numel = zeros = 0
    for name in share.names:
        still = share.still.get(name, ())
        parts = [part for number, part in enumerate(params[name]) if number not in still] if still else [params[name]]
        numel += sum(part.numel() for part in parts)
        zeros += sum(part.numel() - int(part.count_nonzero()) for part in parts)
    return zeros >= round(fraction * numel)


def _is_trained(model: Any, rows: Tensor) -> bool:
    """Whether a model predicts the next tokens of some rows better than by chance."""
    some = rows[: _READ[0], : _READ[1]].to(next(model.parameters()).device)
    with calibrating(model), torch.no_grad():
        logits = model(some, **options_of(model)).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), some[:, 1:].flatten())
    return bool(loss < _TRAINED * torch.tensor(float(logits.shape[-1])).log())


def _rows(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """Rows of equal length from the tokens of some batches, without padding, one text after the other."""
    most = min(context_of(getattr(model, "config", None)) or _LONGEST, _LONGEST)
    texts: list[Tensor] = []
    length, count = 1, 0  # of a row, and tokens
    for batch in batches:
        new = _texts(model, batch)
        texts += new
        length = max([length, *(min(len(text), most) for text in new)])
        count += sum(map(len, new))
        enough = [count >= _ROWS * length]
        if _several() and isinstance(batches, DataLoaderDispatcher):  # one process reads for all, batch by batch
            torch.distributed.broadcast_object_list(enough)
        if enough[0]:
            break
    tokens = torch.cat(texts) if texts else torch.empty(0, dtype=torch.int64)
    rows = tokens[: len(tokens) // length * length].view(-1, length)[:_ROWS]
    check_rows(model, rows)
    return rows


def _texts(model: nn.Module, batch: Any) -> list[Tensor]:
    """The token ids of each row of a batch, or of each document in its one row without padding."""
    ids = batch.get("input_ids") if hasattr(batch, "get") else None
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(
            f"Invalid one_shot: the batches for {type(model).__name__} have no input_ids of shape (rows, tokens), and "
            "it prunes models of text; leave it out."
        )
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and "mask" not in name:
            raise ValueError(
                f"Invalid one_shot: the batches for {type(model).__name__} have {name} beside input_ids, and it prunes "
                "models by text alone; leave it out."
            )
    documents = documents_of(batch)
    if documents:
        return [ids[0, place].cpu() for place in documents]
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        mask = torch.ones_like(ids)
    return [row[seen.bool()].cpu() for row, seen in zip(ids, mask, strict=True)]
