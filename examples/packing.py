"""Blocks of tokens for `finetune_llm.py`: each holds several examples that do not see one another."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from datasets import Dataset


@dataclass
class Example:
    """Tokens, and labels: the tokens to learn, and -100 elsewhere, always at the first token."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)

    def __getitem__(self, span: slice) -> "Example":
        """Return a span of the tokens; nothing predicts its first token."""
        return Example(self.input_ids[span], [-100, *self.labels[span][1:]])

    @property
    def learned(self) -> int:
        """Number of tokens to learn."""
        return sum(label != -100 for label in self.labels)


def fit(example: Example, size: int) -> Iterator[Example]:
    """Split an example into pieces of at most `size` tokens; each begins with the last token of the previous one.

    So every token is learned once, as in a text. A later piece of a long answer does not see the question.
    """
    for first in range(0, max(len(example) - 1, 1), size - 1):
        piece = example[first : first + size]
        if piece.learned:
            yield piece


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Divide examples over blocks of at most `size` tokens, longest first, each into the fullest block that has room.

    Returns the numbers of the examples in each block.
    """
    blocks: list[list[int]] = []
    room: list[tuple[int, int]] = []  # the free tokens of each block, and its number, in order
    for number in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        position = bisect_left(room, (lengths[number], 0))
        left, block = room.pop(position) if position < len(room) else (size, len(blocks))
        if block == len(blocks):
            blocks.append([])
        blocks[block].append(number)
        if left > lengths[number]:
            insort(room, (left - lengths[number], block))
    return blocks


def to_dataset(blocks: Sequence[Sequence[Example]]) -> Dataset:
    """Join the examples of each block; positions restart with each example, so that a model can separate them."""
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for block in blocks:
        columns["input_ids"].append([token for example in block for token in example.input_ids])
        columns["labels"].append([label for example in block for label in example.labels])
        columns["position_ids"].append([position for example in block for position in range(len(example))])
    return Dataset.from_dict(columns)


@dataclass
class Collator:
    """Makes a batch of blocks, padded to the longest of them.

    In packed blocks the padding is one more example without labels: a mask over it would make the model ignore where
    examples begin. So would a cache, which some releases of transformers make even in training.

    Args:
        packed: Whether blocks hold several examples.
        filling: Token for the padding.
        extra: Further arguments of the model.
    """

    packed: bool
    filling: int
    extra: dict[str, Any]

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Return the batch."""
        width = max(len(row["input_ids"]) for row in rows)
        missing = [width - len(row["input_ids"]) for row in rows]

        def stack(name: str, fillings: Sequence[Sequence[int]]) -> torch.Tensor:
            return torch.tensor([[*row[name], *filling] for row, filling in zip(rows, fillings, strict=True)])

        batch = {
            "input_ids": stack("input_ids", [[self.filling] * count for count in missing]),
            "labels": stack("labels", [[-100] * count for count in missing]),
        }
        if self.packed:
            batch["position_ids"] = stack("position_ids", [range(count) for count in missing])
        else:
            batch["attention_mask"] = torch.tensor([[1] * (width - count) + [0] * count for count in missing])
        return {**batch, **self.extra}


def model_options(model: Any) -> dict[str, Any]:
    """Return the further arguments of a model, see `Collator`."""
    return {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}


@torch.no_grad()
def keeps_apart(model: Any, rows: int, tolerance: float = 1e-3) -> bool:
    """Whether a model scores an example alone as it does packed with another, in batches of `rows` blocks.

    This runs the model: whether it respects restarting positions depends on its class, its attention and the release
    of transformers. Models with a state, such as Mamba, do not; flash attention does in batches of one block.

    Args:
        model: The model, with its weights on the training device.
        rows: Blocks in a batch.
        tolerance: Permitted rounding difference, relative to the largest score.
    """
    if "position_ids" not in signature(model.forward).parameters:
        return False
    vocabulary = model.config.get_text_config().vocab_size
    tokens = [number * 7919 % vocabulary for number in range(1, 9)]
    first, second = Example(tokens[:3], tokens[:3]), Example(tokens[3:], tokens[3:])
    together, alone = (
        Collator(True, 0, model_options(model))(list(to_dataset([block] * rows)))
        for block in ([first, second], [second])
    )
    was_training = model.training
    model.eval()
    try:
        scores = [
            model(**{key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()})
            .logits[:, -len(second) :]
            .float()
            for batch in (together, alone)
        ]
    finally:
        model.train(was_training)
    return bool((scores[0] - scores[1]).abs().max() <= tolerance * scores[1].abs().max())
