"""A run that prunes its model at once, from rows of its training data, where the schedule would prune step by step."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..layers.matrices import decayable_parameter_names
from ..names import clean_name
from ..one_shot.blocks import find_blocks
from ..one_shot.methods import AUTO, METHODS, OFF
from ..one_shot.model import Share, check_config, check_rows, context_of, prune_matrices
from ..optim.unit_kinds import ELEMENT, n_of_m
from ..target.budgets import Budget
from ..target.settings import Target
from ..terminal import get_logger
from .engines import engine_of


logger = get_logger(__name__)

# Calibration rows, and the most tokens of each.
_ROWS, _LONGEST = 64, 2048
# Of a target beyond this fraction the schedule makes the rest.
_MOST = 0.5
# A model that predicts no better than by chance has a loss of log(vocabulary). One whose loss is below this share of
# it, on the first tokens of the first rows, has been trained.
_TRAINED, _READ = 0.8, (4, 256)
_STEPS_AFTER = 10  # for the schedule


def planned_method(trainer: Trainer, asked: str, budgets: Sequence[Budget]) -> str:
    """Return how a run can prune at once: as asked, or ``"off"`` if ``"auto"`` cannot be.

    Args:
        trainer: A complete Trainer.
        asked: The setting ``one_shot``.
        budgets: What shares a target.

    Raises:
        ValueError: If a method was asked for that cannot be.
    """
    if asked == OFF:
        return OFF
    reason = _why_not(trainer, budgets)
    if asked == AUTO:
        return OFF if reason or not _predicts_tokens(trainer.model) else AUTO
    if reason:
        raise ValueError(f"Invalid one_shot: one_shot={asked!r} {reason}.")
    return asked


def _why_not(trainer: Trainer, budgets: Sequence[Budget]) -> str | None:
    if not any(_amount(budget) for budget in budgets):
        kinds = ", ".join(sorted({budget.kind for budget in budgets}))
        return f"prunes to a target of single weights, or to N:M, and the targets are for {kinds}; leave it out"
    if engine_of(trainer):
        return (
            f"under {engine_of(trainer)}, which shards the model; prune it first, by hf-pdecay prune, and train on "
            "with keep_zeros=True"
        )
    if hasattr(trainer.model, "peft_config"):
        return "with adapters, whose weights begin at zero; leave it out"
    model: Any = trainer.model
    try:
        check_config(getattr(model, "config", None), type(model).__name__)
        find_blocks(model)
    except ValueError as error:
        return f"prunes models of text block by block: {str(error).rstrip('.')}"
    return None


def _predicts_tokens(model: Any) -> bool:
    return hasattr(model, "can_generate") and bool(model.can_generate())


def cut_at(target: Target, total_steps: int) -> float:
    """Return after which fraction of a run it prunes at once: halfway from ``sparsity_begin`` to ``sparsity_end``."""
    begin, end = target.sparsity_begin, target.sparsity_end
    latest = end - (_STEPS_AFTER + 1) / max(total_steps, 1)
    return max(begin, min((begin + end) / 2, latest))


class OneShotCut:
    """Prunes a model once.

    Args:
        model: The model, not wrapped.
        batches: The training batches, which have ``input_ids``; the first of them are read now.
        method: A method, or ``"auto"``.
        seed: For the order of the batches, so that a resumed run reads the same.

    Attributes:
        method: The method, ``"off"`` if ``"auto"`` finds that the model is untrained or cannot be pruned so.

    Raises:
        ValueError: If the batches cannot be used.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], method: str, seed: int = 0) -> None:
        self.method = self._asked = method
        try:
            with _reading(batches, seed):
                self._rows = _rows(model, batches)
            if method == AUTO:
                self.method = METHODS[0] if _is_trained(model, self._rows) else OFF
        except ValueError:
            if method != AUTO:
                raise
            self.method = OFF
        if _several():
            agreed: list[Any] = [self._rows, self.method]
            torch.distributed.broadcast_object_list(agreed)
            self._rows, self.method = agreed

    def prune(self, model: nn.Module, budgets: Sequence[Budget], *, tell: bool) -> None:
        """Prune the model in place towards the targets of its budgets; under DDP in all processes alike.

        Args:
            model: The model, not wrapped.
            budgets: What shares a target.
            tell: Whether to say what was done.

        Raises:
            ValueError: If the model cannot be pruned so, and a method was asked for.
        """
        start = time.perf_counter()
        params = {clean_name(name): param for name, param in model.named_parameters()}
        known = decayable_parameter_names(model)
        names = {id(params[name]): name for name in known}
        shares = [
            Share(amount, {names[key] for param in budget.params if (key := id(param)) in names.keys() - budget.still})
            for budget in budgets
            if (amount := _amount(budget)) is not None
        ]
        lacking = [share for share in shares if not _has(share, params)]
        if not lacking:
            return
        try:
            report = prune_matrices(model, self._rows, lacking, self.method)
        except ValueError as error:
            if self._asked != AUTO:
                raise
            if tell:
                logger.warning("The run prunes step by step from here, as with one_shot=off: %s", error)
            return
        if _several():
            for name in known:
                torch.distributed.broadcast(params[name].detach(), 0)
        if tell:
            logger.warning(
                "Pruned to %.2f%% zeros by %s, from %d rows of %d tokens, in %.0f s (one_shot).",
                *(100 * report.sparsity, self.method, *self._rows.shape, time.perf_counter() - start),
            )


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def _reading(batches: Any, seed: int) -> Iterator[None]:
    """Leave a data loader as it was, so that the run sees the rows in the order in which it would see them."""
    epoch = getattr(batches, "iteration", None)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        if epoch is not None:  # one of Accelerate's, which counts its passes and waits for the end of each
            batches.iteration = epoch
            batches.end()


def _amount(budget: Budget) -> float | tuple[int, int] | None:
    return min(budget.target, _MOST) if budget.kind == ELEMENT else n_of_m(budget.kind)


def _has(share: Share, params: Mapping[str, Tensor]) -> bool:
    """Whether parameters have the zeros that they share already."""
    fraction = 1 - share.amount[0] / share.amount[1] if isinstance(share.amount, tuple) else share.amount
    numel = sum(params[name].numel() for name in share.names)
    return numel - sum(int(params[name].count_nonzero()) for name in share.names) >= round(fraction * numel)


def _is_trained(model: Any, rows: Tensor) -> bool:
    """Whether a model predicts the next tokens of some rows better than by chance."""
    training = model.training
    some = rows[: _READ[0], : _READ[1]].to(next(model.parameters()).device)
    model.eval()
    try:
        with torch.no_grad():
            logits = model(some).logits[:, :-1]
    finally:
        model.train(training)
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
        length = max(length, *(min(len(text), most) for text in new))
        count += sum(map(len, new))
        if count >= _ROWS * length:
            break
    tokens = torch.cat(texts) if texts else torch.empty(0, dtype=torch.int64)
    rows = tokens[: len(tokens) // length * length].view(-1, length)[:_ROWS]
    check_rows(model, rows)
    return rows


def _texts(model: nn.Module, batch: Any) -> list[Tensor]:
    """The token ids of each row of a batch."""
    ids = batch.get("input_ids") if hasattr(batch, "get") else None
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(
            f"Invalid one_shot: the batches for {type(model).__name__} have no input_ids of shape (rows, tokens), and "
            "it prunes models of text; leave it out."
        )
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        mask = torch.ones_like(ids)
    return [row[seen.bool()].cpu() for row, seen in zip(ids, mask, strict=True)]
