"""The report of a folder: the zeros of the model in it, read tensor by tensor."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..layers.matrices import decayable_parameter_names
from ..names import lora_factor, natural_key, saved_names
from ..optim.unit_operations import alive_here
from ..optim.units import Member
from ..shrinking.building import WRONG_CONFIG, at_most
from ..shrinking.estimate import Estimator, ShrinkEstimate
from ..sparsity.counting import NEAR_ZERO_THRESHOLD, REPORT_FILE, SparsityReport, TensorSparsity, count_tensor
from ..storage.folder import CONFIG, INDEX, WEIGHTS, check_shard_name, read_config, read_json
from ..storage.manifest import METHOD
from ..trainer.checkpoints import names_in_files, newest_whole
from ..trainer.pareto import SEARCH_FILE


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

logger = logging.getLogger(__name__)

# From about here on a sparse layer is faster, see docs/inference.md.
_WORTHWHILE = 0.8


@dataclass(frozen=True)
class FolderReport:
    """What is in a folder of a model; prints as a table.

    Args:
        folder: The folder that was read.
        sparsity: Zeros of its tensors. Which of them decayed, the run's ``sparsity.json`` says, or else the model's
            class.
        ranks: Of a LoRA adapter, number of ranks and of dead ones by layer.
        stored: Bytes of its tensors.
        compressed: About how many bytes ``hf-pdecay compress`` would store them in, without zstd; of weights that are
            quantized or shrunk layer by layer, which it does not take, as many as they have.
        shrunk: What ``hf-pdecay shrink`` would leave; None where the architecture is not known, or the tensors have
            other names than the model's parameters, or are compressed, quantized or shrunk layer by layer.
        packed: Of a compressed folder, bytes of its files of weights.
    """

    folder: Path
    sparsity: SparsityReport
    ranks: dict[str, tuple[int, int]] = field(default_factory=dict)
    stored: int = 0
    compressed: int = 0
    shrunk: ShrinkEstimate | None = None
    packed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        sizes = {"bytes": self.stored, "compressed_bytes": self.compressed}
        found = {"folder": str(self.folder), **self.sparsity.to_dict(), **sizes}
        if self.ranks:
            found["ranks"] = {name: {"ranks": ranks, "dead": dead} for name, (ranks, dead) in self.ranks.items()}
        if self.packed is not None:
            found["compressed_folder_bytes"] = self.packed
        if self.shrunk is not None:
            found["shrink"] = self.shrunk.to_dict()
        return found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table, and what the zeros are good for as sentences."""
        yield self.sparsity.to_table()
        if self.ranks:
            ranks, dead = (sum(each[place] for each in self.ranks.values()) for place in (0, 1))
            yield f"{dead} of {ranks} ranks in {len(self.ranks)} layers are dead."
            if dead == ranks:
                yield "So they are in an adapter that has not been trained: its B is zero."
            elif dead:
                yield f"hf-pdecay shrink {_word(self.folder)} OUT takes them out."
            return
        if self.packed is not None:
            share = self.packed / max(self.stored, 1)
            yield f"The folder is compressed: {share:.1%} of {self.stored / 1e6:,.1f} MB."
            yield f"hf-pdecay decompress {_word(self.folder)} OUT gives the plain one."
        elif self.compressed < self.stored:
            share = self.compressed / self.stored
            yield (
                f"hf-pdecay compress {_word(self.folder)} OUT stores it in about {share:.1%} of its "
                f"{self.stored / 1e6:,.1f} MB."
            )
        if self.shrunk is not None and self.shrunk.sentence(_word(self.folder)):
            yield self.shrunk.sentence(_word(self.folder))
        layers = [each for each in self.sparsity.tensors if each.decayed and each.sparsity >= _WORTHWHILE]
        if layers:
            yield (
                f"{len(layers)} tensors have at least {_WORTHWHILE:.0%} zeros: hf_pdecay.to_sparse_inference(model) "
                "measures which of their layers are faster sparse on a CPU, and swaps those."
            )


@torch.no_grad()
def report_folder(folder: str | os.PathLike[str], near_zero_threshold: float = NEAR_ZERO_THRESHOLD) -> FolderReport:
    """Count the zeros of a saved model, one tensor in memory at a time.

    Args:
        folder: A folder with a model or an adapter in safetensors, or a run's with checkpoints.
        near_zero_threshold: Magnitude below which a non-zero weight counts as near zero.

    Raises:
        ValueError: If there is no such model, or a file of it is cut short.
    """
    path = Path(folder)
    if not path.exists():
        raise ValueError(f"Invalid folder: there is no {str(folder)!r}.")
    if not path.is_dir():
        raise ValueError(f"Invalid folder: {str(folder)!r} is a file; name the folder that it lies in.")
    if not any(path.glob("*.safetensors")):
        newest = newest_whole(path) if path.is_dir() else None
        if newest is None or not any(Path(newest).glob("*.safetensors")):
            raise ValueError(
                f"Invalid folder: {str(folder)!r} holds no model in safetensors, no checkpoint and no {SEARCH_FILE}; "
                "name a folder that save_model() or a search has written."
            )
        path = Path(newest)
    method = _method(path)
    packed = method == METHOD
    model = _on_meta(path)
    counted = _counted_by_run(path)
    others = {} if model is None else names_in_files(model)
    decayed = _decayed(counted, model, others)
    if model is not None:
        decayed |= {name: False for name, _ in model.named_buffers()}
    in_memory = {names[0]: name for name, names in others.items() if len(names) == 1}
    estimator = None if method else _estimator(model)
    tensors: list[TensorSparsity] = []
    alive: dict[str, dict[str, Tensor]] = {}
    stored = compressed = 0
    for name, kept in _decoded(path) if packed else _tensors(path):
        tensor = _countable(kept)
        stored += kept.nbytes
        compressed += _compressed(tensor, kept.element_size())
        if estimator is not None:
            estimator.see(in_memory.get(name, name), tensor)
        if not tensor.is_floating_point():
            continue
        counts = count_tensor(tensor, near_zero_threshold)
        matrix = tensor.ndim > 1 and "embed" not in name  # the guess where nothing is known
        tensors.append(TensorSparsity(name, tuple(tensor.shape), *counts, decayed.get(name, matrix)))
        layer, factor = lora_factor(name) or ("", "")
        if layer and tensor.ndim > 1:
            dim = int(factor == "B")
            alive.setdefault(layer, {})[factor] = alive_here(tensor, Member(name, dim), tensor.shape[dim])
    ranks = {
        name: (len(both["A"]), int((~(both["A"] & both["B"])).sum()))
        for name, both in alive.items()
        if len(both) == 2 and len(both["A"]) == len(both["B"])
    }
    shrunk = None if estimator is None else estimator.estimate()
    if method and not packed:
        compressed = stored  # which `compress` refuses
    size = sum(each.stat().st_size for each in _files(path)) if packed else None
    # The weights alone do not tell of groups that decay as one.
    groups = [] if counted is None else counted.groups
    found = SparsityReport(tensors, near_zero_threshold, groups)
    return FolderReport(path, found, ranks, stored, compressed, shrunk, size)


def _word(folder: Path) -> str:
    return shlex.quote(str(folder))


def _method(folder: Path) -> str | None:
    """By which method the weights of a folder are stored, as ``hf-pdecay compress`` has its own; None if plainly."""
    settings = read_config(folder).get("quantization_config") if (folder / CONFIG).is_file() else None
    return None if settings is None else str(settings.get("quant_method") if isinstance(settings, dict) else settings)


def _counted_by_run(folder: Path) -> SparsityReport | None:
    """What a run has counted, if it has left that and it can be read."""
    if not (folder / REPORT_FILE).is_file():
        return None
    try:
        return SparsityReport.load(folder / REPORT_FILE)
    except ValueError as error:
        logger.warning("%s What decays by default counts as decayed, and no groups are reported.", error)
        return None


def _countable(tensor: Tensor) -> Tensor:
    """The values in a dtype of which torch counts zeros: not of float8, nor of unsigned numbers of 16 bits and more."""
    if tensor.is_floating_point():
        return tensor.float() if tensor.element_size() == 1 else tensor
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor


def _compressed(tensor: Tensor, size: int) -> int:
    """Bytes of the smallest of a bitmask and values, gaps of a byte and values, and the tensor as it is.

    Args:
        tensor: Of any dtype.
        size: Bytes of a number in the file.
    """
    numel = tensor.numel()
    values = int(tensor.count_nonzero())
    return min(numel * size, -(-numel // 8) + values * size, values * (1 + size))


def _files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, as ``from_pretrained`` takes them; all there are where none has its name.

    Beside them there may be others with the same weights, such as shards of an earlier saving.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return sorted(folder.glob("*.safetensors"))
    placed = read_json(folder / INDEX).get("weight_map")
    names = {check_shard_name(name, INDEX) for name in placed.values()} if isinstance(placed, dict) else set()
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing or not names:
        raise ValueError(
            f"{str(folder)!r} is no whole model: {missing[0]} of its {INDEX} is missing."
            if missing
            else f"{INDEX} in {str(folder)!r} has no weight_map."
        )
    return sorted(folder / name for name in names)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys(), key=natural_key):
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} cannot be read ({error}); it may be cut short.") from error


def _decoded(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from ..storage.reader import tensors_of

    return tensors_of(folder)


def _count(folder: Path) -> int:
    """Number of tensors in a folder's files."""
    total = 0
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            total += len(file.keys())
    return total


def _on_meta(folder: Path) -> Any:
    """The model of a folder without weights; None where its config names no class of transformers."""
    if not (folder / "config.json").is_file():
        return None
    try:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        known = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"), at_most(_count(folder), str(folder)):
            return None if known is None else known(config)
    except (ValueError, SafetensorError, *WRONG_CONFIG):
        return None  # a config that is of another release, or wrong


def _estimator(model: Any) -> Estimator | None:
    """What looks for dead neurons and heads; None where it is not known where a model has them."""
    try:
        return None if model is None else Estimator(model)
    except ValueError:
        return None


def _decayed(counted: SparsityReport | None, model: Any, others: Mapping[str, Sequence[str]]) -> dict[str, bool]:
    """Whether each tensor of a folder decayed, by its name there: as the run says, or else as it does by default.

    Args:
        counted: What the run has counted.
        model: The model without weights, if its class is known.
        others: Under which names parameters are saved, where they are not their own.
    """
    if counted is not None:
        known = {each.name: each.decayed for each in counted.tensors}
    elif model is not None:
        chosen = set(decayable_parameter_names(model))
        known = {name: name in chosen for name, _ in model.named_parameters()}
    else:
        return {}
    return {saved: is_decayed for name, is_decayed in known.items() for saved in others.get(name, saved_names(name))}
