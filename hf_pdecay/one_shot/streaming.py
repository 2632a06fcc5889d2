"""Runs rows through one block of a model at a time: the model itself calls it, with what it gives each block.

Blocks before it return what the one just before it has returned last time, and nothing after it runs. So only the
hidden states between two blocks are kept, and masks, positions and what lies between blocks are the model's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..checks import MODEL_ERRORS
from ..terminal import progress
from .blocks import Block
from .capture import Capture


_TOKENS = 4096  # of a batch, unless a row has more
_CLOSE = 1e-3  # relative difference up to which a block's outputs are the same


class _Reached(BaseException):
    """Ends a forward pass at a block; no model must catch it."""


class Stream:
    """The rows, and the hidden states after the last block that has been :meth:`passed`.

    Args:
        model: A model, in evaluation mode.
        blocks: Its blocks.
        rows: Token ids of shape (rows, tokens), on the model's device.
        capture: What sees the products of the first row, in the whole model.

    Attributes:
        blocks: Those that the model calls, in its order.
        options: What the model is called with beside rows.

    Raises:
        ValueError: If the model cannot run such rows, or its outputs are NaN or infinite.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], rows: Tensor, capture: Capture) -> None:
        self._model = model
        self._batches = list(rows.split(max(_TOKENS // rows.shape[1], 1)))
        self.options = options_of(model)
        self._states: list[Any] = [None] * len(self._batches)
        self._dense: list[Tensor | None] = [None] * len(self._batches)
        self._number = 0
        self.blocks: list[Block] = []
        self._chained = False
        self._try(blocks, rows[:1], capture)

    def progress(self, doing: str) -> Iterable[Block]:
        """Iterate over the blocks with a progress bar."""
        return progress(self.blocks, doing, len(self.blocks), unit="blocks")

    def capture(self, capture: Capture) -> None:
        """Run all rows through the next block, whose products the capture sees."""
        for place, batch in enumerate(self._batches):
            self._dense[place] = first_hidden(self._run(self._number, batch, self._states[place], capture))

    def passed(self) -> float:
        """Run all rows through the next block again, now that it is pruned, and go on to the block after it.

        Returns:
            The mean over all tokens of its outputs' relative error: the norm of the change by that of the output.
        """
        total, count = 0.0, 0
        for place, batch in enumerate(self._batches):
            state = self._run(self._number, batch, self._states[place])
            dense, pruned = self._dense[place], first_hidden(state)
            self._dense[place], self._states[place] = None, state if self._chained else None
            if dense is not None and pruned is not None:
                errors = _relative(pruned, dense)
                total, count = total + float(errors.sum()), count + errors.numel()
        self._number += 1
        return total / count if count else 0.0

    def _try(self, blocks: Sequence[Block], row: Tensor, capture: Capture) -> None:
        """Run one row through the model, and find out whether running block by block gives the same."""
        called: list[tuple[Block, Any]] = []

        def record(block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                called.append((block, _copied(output)))
                return output

            return run

        try:
            with _forwards([(block.module, record(block, block.module.forward)) for block in blocks]), capture:
                self._model(row, **self.options)
        except MODEL_ERRORS as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{type(self._model).__name__} cannot run rows of {row.shape[1]} tokens "
                f"({type(error).__name__}: {reason})"
            ) from error
        for hidden in (first_hidden(state) for _, state in called):
            if hidden is not None and not bool(hidden.isfinite().all()):
                raise ValueError(
                    f"{type(self._model).__name__} has NaN or infinite hidden states on the first row, before any "
                    "pruning; check its weights, and if they are in float16, load it in float32 or bfloat16 (--dtype)."
                )
        self.blocks = list(dict.fromkeys(block for block, _ in called))
        if not self.blocks:
            raise ValueError(
                f"{type(self._model).__name__} calls none of its blocks for rows of text, such as {blocks[0].name}."
            )
        self._chained = len(self.blocks) == len(called) and self._is_chain(row, [state for _, state in called])

    def _is_chain(self, row: Tensor, states: Sequence[Any]) -> bool:
        self._chained = True
        before = None
        for number, state in enumerate(states):
            try:
                mine, whole = first_hidden(self._run(number, row, before)), first_hidden(state)
            except MODEL_ERRORS:  # a block needs more from earlier ones than hidden states
                return False
            if mine is None or whole is None or mine.shape != whole.shape:
                return False
            if not bool((_relative(mine, whole) <= _CLOSE).all()):
                return False
            before = state
        return True

    def _run(self, number: int, batch: Tensor, before: Any, capture: Capture | None = None) -> Any:
        """Return the output of a block, given that of the block before it."""
        outputs: list[Any] = []
        module = self.blocks[number].module
        forward = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with capture or nullcontext():
                outputs.append(forward(*args, **kwargs))
            if self._chained:
                raise _Reached
            return outputs[-1]

        def skip(*args: Any, **kwargs: Any) -> Any:
            return _copied(before)

        earlier = self.blocks[:number] if self._chained else []
        try:
            with _forwards([(module, run), *((block.module, skip) for block in earlier)]):
                self._model(batch, **self.options)
        except _Reached:
            pass
        return outputs[-1]


def options_of(model: nn.Module) -> dict[str, Any]:
    """Return what a model is called with beside rows."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


@contextmanager
def _forwards(replaced: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules other forward methods for a while."""
    own = [(module, vars(module).get("forward")) for module, _ in replaced]
    try:
        for module, forward in replaced:
            module.forward = forward
        yield
    finally:
        for module, before in own:
            if before is None:
                vars(module).pop("forward", None)
            else:
                module.forward = before


def _copied(state: Any) -> Any:
    """A copy, as models may change hidden states in place."""
    return tree_map_only(Tensor, torch.clone, state)


def first_hidden(state: Any) -> Tensor | None:
    """Return the hidden states: the first tensor of floating-point numbers in an output."""
    leaves = tree_leaves(dict(state) if hasattr(state, "items") else state)
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)


def _relative(values: Tensor, dense: Tensor) -> Tensor:
    dense = dense.to(torch.promote_types(dense.dtype, torch.float32))
    norms = dense.norm(dim=-1).clamp(min=torch.finfo(dense.dtype).tiny)
    return (values.to(dense.dtype) - dense).norm(dim=-1) / norms
