"""A folder of what a teacher said, so that no row is computed twice: in a later epoch, or in a later run.

A row is found by a checksum of what the teacher is given and where tokens have labels, not by its place in the
data. Of each of these tokens the largest probabilities are kept, and what the rest of them add up to.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from ..files import write_text, written_aside
from ..terminal import get_logger
from .distillation_loss import Answers, joined, summary


logger = get_logger(__name__)

CACHE_FILE = "teacher_cache.json"
"""The file in a cache that says whose it is."""

_FORMAT = 1
_KEY = 16  # bytes
# What is collected before it becomes a file.
_FILE_BYTES = 2**26
_FILE_ROWS = 2**16
_OLD = 3600.0  # seconds after which a file that is being written belongs to no living process
_IGNORED = -100


class _Place(NamedTuple):
    """Where a row's answers are."""

    file: str
    begin: int
    tokens: int
    classes: int


class TeacherCache:
    """The answers of one teacher in a folder, which processes and runs may share.

    Each process writes files of its own, and a file appears whole or not at all.

    Raises:
        ValueError: If ``folder`` cannot be a cache.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.computed = self.found = 0  # rows
        self._places: dict[bytes, _Place] = {}
        self._read: set[str] = set()
        self._new: dict[bytes, Answers] = {}
        self._bytes = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = json.loads((self.folder / CACHE_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            known = {}
        except (OSError, ValueError) as error:
            raise ValueError(f"Invalid teacher_cache: teacher_cache={folder!r} cannot be a cache ({error}).") from error
        if known and known.get("format") != _FORMAT:
            raise ValueError(
                f"Invalid teacher_cache: teacher_cache={folder!r} has format {known.get('format')!r} and this release "
                f"reads {_FORMAT}; name an empty folder."
            )
        self._known: dict[str, Any] = known
        for aside in self.folder.glob(".*.tmp"):
            if time.time() - aside.stat().st_mtime > _OLD:
                aside.unlink(missing_ok=True)
        self._refresh()

    def digest_for(self, files: str | None) -> str | None:
        """The checksum of the teacher that answered, if it was loaded from files with this checksum."""
        return self._known.get("digest") if files and self._known.get("files") == files else None

    def admit(self, name: str, digest: str, files: str | None) -> None:
        """Note whose answers these are; ValueError if another teacher has answered, OSError without a right to write.

        Args:
            name: What the user calls the teacher.
            digest: A checksum of its weights.
            files: A checksum of the files that it is loaded from; None for none.
        """
        if self._known and self._known["digest"] != digest:
            raise ValueError(
                f"Invalid teacher_cache: teacher_cache={str(self.folder)!r} has the answers of another teacher than "
                f"teacher={name!r}, or in another teacher_dtype; name an empty folder."
            )
        self._note(format=_FORMAT, digest=digest, files=files or self._known.get("files"))

    @property
    def apart(self) -> dict[str, bool]:
        """For kinds of attention, whether the teacher reads each document of a long row by itself."""
        return dict(self._known.get("apart", {}))

    def note_apart(self, kind: str, apart: bool) -> None:
        """Note this for a kind of attention."""
        self._note(apart=self.apart | {kind: apart})

    def _note(self, **changes: Any) -> None:
        known = self._known | changes
        if known != self._known:
            write_text(self.folder / CACHE_FILE, json.dumps(known))
            self._known = known

    def answers(
        self, keys: list[bytes], sizes: list[int], ask: Callable[[], Tensor], common: int, device: torch.device
    ) -> Answers:
        """Return the answers for the rows of a batch, of all tokens that count, one after another.

        Args:
            keys: Of each row, see :func:`keys_of`.
            sizes: Tokens that count in each row.
            ask: Asks the teacher for the logits of all these tokens, (tokens, classes).
            common: The classes of the model; of the teacher's no more are kept.
            device: Where to put them.
        """
        missing = {key for key in keys if key not in self._places and key not in self._new}
        if missing and self._refresh():
            missing -= self._places.keys()
        self.computed += len(missing)
        self.found += len(keys) - len(missing)
        if missing:
            logits = ask()
            for key, row in zip(keys, logits[:, :common].split(sizes), strict=True):
                if key in missing and key not in self._new:
                    self._new[key] = summary(row).to(torch.device("cpu"))
                    self._bytes += self._new[key].nbytes
        rows = [self._new[key] if key in self._new else self._stored(self._places[key]) for key in keys]
        if self._bytes > _FILE_BYTES or len(self._new) > _FILE_ROWS:
            self.flush()
        return joined(rows).to(device)

    def flush(self) -> None:
        """Write what is new."""
        new, self._new, self._bytes = self._new, {}, 0
        for width in {answer.ids.shape[-1] for answer in new.values()}:
            rows = {key: answer for key, answer in new.items() if answer.ids.shape[-1] == width}
            both = joined(list(rows.values()))
            sizes = [[answer.ids.shape[0], answer.classes] for answer in rows.values()]
            tensors = {
                "keys": torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, _KEY),
                "sizes": torch.tensor(sizes, dtype=torch.int32),
                **{"ids": both.ids, "logs": both.logs, "tails": both.tails},
            }
            file = self.folder / f"rows-{uuid.uuid4().hex}.safetensors"
            with written_aside(file) as aside:
                save_file(tensors, aside)
            self._index(file.name)

    def _refresh(self) -> bool:
        """Read the keys of files that are new, and say whether there are any."""
        names = {path.name for path in self.folder.glob("rows-*.safetensors")} - self._read
        for name in names:
            self._index(name)
        return bool(names)

    def _index(self, name: str) -> None:
        with self._opened(name) as file:
            keys, sizes = file.get_tensor("keys"), file.get_tensor("sizes").tolist()
        begin = 0
        for key, (tokens, classes) in zip(keys.numpy(), sizes, strict=True):
            self._places[key.tobytes()] = _Place(name, begin, tokens, classes)
            begin += tokens
        self._read.add(name)

    def _stored(self, place: _Place) -> Answers:
        with self._opened(place.file) as file:
            rows = slice(place.begin, place.begin + place.tokens)
            ids, logs, tails = (file.get_slice(name)[rows] for name in ("ids", "logs", "tails"))
            return Answers(ids, logs, tails, place.classes)

    def _opened(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"Invalid teacher_cache: {name} in {str(self.folder)!r} cannot be read ({error}); delete it, and its "
                "rows are computed again."
            ) from error


class FlushCallback(TrainerCallback):
    """Writes the new answers of a Trainer's teacher, so that the other processes and the next run find them."""

    def __init__(self, cache: Callable[[], TeacherCache]) -> None:
        self.cache = cache

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write them, and warn if a second epoch has found none."""
        cache = self.cache()
        cache.flush()
        if round(state.epoch or 0) == 2 and not cache.found and state.is_local_process_zero:
            logger.warning(
                "teacher_cache has no use in this run: its rows change in every epoch, as by random masks, so that the "
                "teacher is asked each time. Train without it."
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write them."""
        self.cache().flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write them, and say how many rows the teacher was asked for."""
        cache = self.cache()
        cache.flush()
        logger.info(f"teacher_cache: {cache.found} rows were found, and {cache.computed} computed.")


def documents_of(inputs: Mapping[str, Any]) -> list[slice]:
    """Return the places of the documents that a batch without padding has in one long row; none if it is no such."""
    ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
    if not isinstance(ids, Tensor) or not isinstance(positions, Tensor) or inputs.get("attention_mask") is not None:
        return []
    if ids.ndim != 2 or ids.shape[0] != 1 or positions.shape != ids.shape:
        return []
    begins = (positions[0] == 0).nonzero()[:, 0].tolist()
    ends = [*begins[1:], ids.shape[1]]
    return [slice(begin, end) for begin, end in zip(begins, ends, strict=True)] if begins[:1] == [0] else []


def keys_of(
    name: str,
    classes: int,
    counts: Tensor,
    inputs: Mapping[str, Any],
    labels: Tensor | None,
    documents: Sequence[slice] = (),
) -> Iterator[bytes]:
    """Yield a checksum of each row of a batch: of what a teacher's answer depends on, without padding at the end.

    Args:
        name: Of the logits.
        classes: Of the model.
        counts: Which tokens count, booleans of (rows, ...), on the CPU.
        inputs: What the teacher is given.
        labels: Of a decoder's tokens; None for a model without a decoder.
        documents: Those of a batch of one row; each counts as a row.

    Raises:
        ValueError: If an input is neither tensors nor plain values.
    """
    rows = counts.shape[0]
    given = {key: [_plain(key, leaf) for leaf in tree_leaves(inputs[key])] for key in sorted(inputs)}
    mask = inputs.get("attention_mask") if "input_ids" in inputs else None
    tokens = None if mask is None or mask.ndim != 2 else mask.cpu() != 0
    target = None if labels is None or labels.ndim != 2 else labels.cpu() != _IGNORED
    answered = target if labels is not None else tokens
    if answered is not None and answered.shape == counts.shape:  # padding may have labels, and then it is none
        answered |= counts
    if documents:
        shape = counts.shape
        given = {key: [leaf for leaf in leaves if _is_of(leaf, shape)] for key, leaves in given.items()}
    of_tokens = name == "logits"  # other distributions are over the tokens themselves, with padding
    for row, document in [(0, each) for each in documents] or [(row, slice(None)) for row in range(rows)]:
        checksum = blake2b(f"{name} {classes}".encode(), digest_size=_KEY)
        for key, leaves in [*given.items(), ("counts", [counts])]:
            decodes = labels is not None and (key.startswith("decoder_") or key in ("labels", "counts"))
            real = (target if decodes else tokens) if of_tokens else None
            for leaf in leaves:
                part = leaf
                if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == rows:
                    part = leaf[row][document] if documents else leaf[row]
                    if real is not None and part.ndim and part.shape[0] == real.shape[1]:
                        part = part[: _end(real[row])]
                if isinstance(part, Tensor):
                    checksum.update(f"{key} {part.dtype} {tuple(part.shape)}".encode())
                    checksum.update(part.reshape(-1).contiguous().view(torch.uint8).numpy().data)
                else:
                    checksum.update(f"{key} {part!r}".encode())
        yield checksum.digest()


def _is_of(leaf: Any, shape: torch.Size) -> bool:
    """Whether something has a value for each token; what else comes with documents says where each begins."""
    return isinstance(leaf, Tensor) and leaf.shape[:2] == shape


def _end(real: Tensor) -> int:
    places = real.nonzero()
    return int(places[-1]) + 1 if len(places) else 0


def _plain(key: str, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().cpu()
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return leaf
    raise ValueError(
        f"Invalid teacher_cache: the model is given {key} with a {type(leaf).__name__}, from which no checksum "
        "of a row is made; train without teacher_cache."
    )


def files_digest(folder: Path, kind: str) -> str | None:
    """Return a checksum of samples of the safetensors files in a folder, and of as what they are loaded.

    None if there are none.
    """
    checksum = blake2b(kind.encode(), digest_size=_KEY)
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        size = file.stat().st_size
        checksum.update(f"{file.name} {size}".encode())
        with open(file, "rb") as opened:
            for place in range(64):
                opened.seek(place * size // 64)
                checksum.update(opened.read(4096))
    return checksum.hexdigest() if files else None
