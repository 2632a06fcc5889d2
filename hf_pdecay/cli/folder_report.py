"""The report of a folder: the zeros of the model in it, read tensor by tensor."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..inference.result import LIKELY_FROM
from ..layers.matrices import decayable_parameter_names
from ..layers.saved_names import NamesInModel
from ..names import lora_factor, saved_names
from ..optim.unit_operations import alive_here
from ..optim.units import Member
from ..shrinking.estimate import Estimator, ShrinkEstimate
from ..sparsity.counting import count_tensor
from ..sparsity.defaults import NEAR_ZERO_THRESHOLD
from ..sparsity.file_names import REPORT_FILE
from ..sparsity.report import SparsityReport, TensorSparsity
from ..storage.compressed_file import is_compressed_file
from ..storage.encoding import smallest_payload
from ..storage.folder import CONFIG, read_config
from ..storage.lossy_quantizers import WORTH_KEEPING, what_is_lost
from ..storage.source import RAGGED, quantization_method
from ..storage.untrusted import meta_model
from ..terminal import get_logger
from .folder_tensors import countable, model_folder, read_tensors, weight_files


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

logger = get_logger(__name__)


@dataclass(frozen=True)
class FolderReport:
    """What is in a folder of a model; prints as a table.

    Args:
        folder: The folder that was read.
        sparsity: Zeros of its tensors. The run's ``sparsity.json``, or else the model's class, says which decayed.
        ranks: Number of ranks and of dead ones by layer, for a LoRA adapter.
        stored: Bytes of its tensors.
        compressed: About the bytes that ``hf-pdecay compress`` would need, without zstd. Equal to ``stored`` for
            weights that are quantized or shrunk layer by layer, because it refuses those.
        options: Bytes of the tensors if all floats were in one dtype: ``"float32"``, ``"bfloat16"``,
            ``"compressed_float32"`` and ``"compressed_bfloat16"``.
        negative_zeros: The number of zeros that are -0.0, and about the bytes that their signs cost when compressed.
        shrunk: What ``hf-pdecay shrink`` would leave. None if the architecture is not known, the tensors have other
            names than the model's parameters, or they are compressed, quantized or shrunk layer by layer.
        packed: Bytes of the files of weights, for a compressed folder.
        quantized: What the ``quantization_config`` of the folder says, if it has one.
    """

    folder: Path
    sparsity: SparsityReport
    ranks: dict[str, tuple[int, int]] = field(default_factory=dict)
    stored: int = 0
    compressed: int = 0
    options: dict[str, int] = field(default_factory=dict)
    negative_zeros: tuple[int, int] = (0, 0)
    shrunk: ShrinkEstimate | None = None
    packed: int | None = None
    quantized: Any = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        sizes = {"bytes": self.stored, "compressed_bytes": self.compressed}
        result = {"folder": str(self.folder), **self.sparsity.to_dict(), **sizes}
        result |= {"bytes_by_dtype": self.options}
        result |= dict(zip(("negative_zeros", "negative_zero_bytes"), self.negative_zeros, strict=True))
        if self.ranks:
            result["ranks"] = {name: {"ranks": ranks, "dead": dead} for name, (ranks, dead) in self.ranks.items()}
        if self.packed is not None:
            result["compressed_folder_bytes"] = self.packed
        if self.shrunk is not None:
            result["shrink"] = self.shrunk.to_dict()
        return result

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table and sentences on what the zeros are good for."""
        yield self.sparsity.to_table()
        if self.ranks:
            ranks, dead = map(sum, zip(*self.ranks.values(), strict=True))
            yield f"{dead} of {ranks} ranks in {len(self.ranks)} layers are dead."
            if dead == ranks:
                yield "This is normal before training: B is zero."
            elif dead:
                yield f"hf-pdecay shrink {_word(self.folder)} OUT removes them."
            return
        if self.packed is not None:
            share = self.packed / max(self.stored, 1)
            yield f"The folder is compressed: {share:.1%} of {self.stored / 1e6:,.1f} MB."
            yield f"hf-pdecay decompress {_word(self.folder)} OUT gives the plain one."
        elif self.compressed < self.stored:
            size = f"{self.compressed / self.stored:.1%} of its {self.stored / 1e6:,.1f} MB"
            yield f"hf-pdecay compress {_word(self.folder)} OUT stores it in about {size}."
        narrow = self.options.get("compressed_bfloat16", self.stored)
        if self.packed is None and narrow < min(self.compressed, self.options.get("bfloat16", 0)):
            yield (
                f"With --dtype bfloat16, which rounds the weights, about {narrow / self.stored:.1%}; dense "
                f"bfloat16 has {self.options['bfloat16'] / self.stored:.1%}."
            )
        if self.negative_zeros[0]:
            yield "{:,} zeros are -0.0, whose signs cost about {:,} bytes when compressed.".format(*self.negative_zeros)
        if self.shrunk is not None and self.shrunk.sentence(_word(self.folder)):
            yield self.shrunk.sentence(_word(self.folder))
        if self.quantized or self.sparsity.sparsity >= WORTH_KEEPING:
            yield self._quantisers()
        yield from self._inference()

    def _quantisers(self) -> str:
        """What a quantiser has made of zeros, or may."""
        if self.quantized:
            method = quantization_method({"quantization_config": self.quantized})
            lost = what_is_lost(self.quantized)
            return (
                f"The model is quantised by {method}{'' if lost is None else f': {lost}'}. Packed weights are not "
                f"counted above; hf-pdecay check BEFORE {_word(self.folder)} says which zeros are kept."
            )
        return (
            "Many quantisers fill zeros in, such as HQQ, quanto's int4, Q4_K and the other GGUF types with a minimum. "
            f"hf-pdecay quantize {_word(self.folder)} OUT keeps them, and hf-pdecay check {_word(self.folder)} AFTER "
            "says what another tool kept."
        )

    def _inference(self) -> Iterator[str]:
        """What sparse inference would make of the tensors, for some numbers of rows."""
        decayed = [tensor for tensor in self.sparsity.tensors if tensor.decayed and len(tensor.shape) == 2]
        counts = {rows: sum(tensor.sparsity >= least for tensor in decayed) for rows, least in LIKELY_FROM.items()}
        if not any(counts.values()):
            return
        numbers = ", ".join(
            f"{counts[rows]} for {_rows(rows)} (from {least:.0%} zeros)" for rows, least in LIKELY_FROM.items()
        )
        yield (
            "hf_pdecay.to_sparse_inference(model) measures which layers are faster sparse on a CPU, and swaps those: "
            f"likely {numbers}, of {len(decayed)} tensors."
        )
        swapped = [tensor for tensor in decayed if tensor.sparsity >= LIKELY_FROM[1]]
        dense = sum(4 * tensor.parameters for tensor in swapped)
        shares = {
            name: sum(tensor.parameters / 8 + size * (tensor.parameters - tensor.zeros) for tensor in swapped) / dense
            for name, size in (("float32", 4), ("bfloat16", 2), ("int8", 1))
        }
        said = ", ".join(f"{share:.0%} in {name}" for name, share in shares.items())
        yield f"For 1 row these read so much of what dense float32 layers read: {said} (values)."


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


@torch.no_grad()
def report_folder(folder: str | os.PathLike[str], near_zero_threshold: float = NEAR_ZERO_THRESHOLD) -> FolderReport:
    """Count the zeros of a saved model, one tensor in memory at a time.

    Args:
        folder: A folder with a model or an adapter in safetensors, or a run's with checkpoints.
        near_zero_threshold: Magnitude below which a non-zero weight counts as near zero.

    Raises:
        ValueError: If the folder holds no model, or a file of it is cut short.
    """
    path = model_folder(Path(folder))
    packed = any(map(is_compressed_file, weight_files(path)))
    config = read_config(path) if (path / CONFIG).is_file() else {}
    method = quantization_method(config)
    model = meta_model(path)
    run_report = _report_of_run(path)
    decayed = _decayed(run_report, model)
    names_in_model = NamesInModel(model)
    of_run = [] if run_report is None else run_report.tensors
    of_adapter = {saved_names(tensor.name)[1]: tensor.name for tensor in of_run}
    estimator = None if packed or method else _estimator(model)
    tensors: list[TensorSparsity] = []
    ranks = _RankCounter()
    stored = compressed = 0
    options = dict.fromkeys(("float32", "bfloat16", "compressed_float32", "compressed_bfloat16"), 0)
    negative, signs = 0, 0
    for name, raw in read_tensors(weight_files(path)):
        tensor = countable(raw)
        own = of_adapter.get(name) or names_in_model(name)
        stored += raw.nbytes
        numel, values = tensor.numel(), int(tensor.count_nonzero())
        compressed += (payload := smallest_payload(numel, values, raw.element_size()))
        wide = tensor.is_floating_point() and raw.element_size() > 1
        for kind, width in (("float32", 4), ("bfloat16", 2)):
            options[kind] += numel * width if wide else raw.nbytes
            options[f"compressed_{kind}"] += smallest_payload(numel, values, width) if wide else payload
        if wide and values < numel and (found := int((tensor.signbit() & (tensor == 0)).sum())):
            negative += found
            signs += -(-(numel - values) // 8)
        if estimator is not None:
            estimator.see(own, tensor)
        if tensor.is_floating_point():
            is_decayed = decayed.get(own, tensor.ndim > 1 and "embed" not in name)  # a guess for unknown models
            counts = count_tensor(tensor, near_zero_threshold)
            tensors.append(TensorSparsity(own, tuple(tensor.shape), *counts, is_decayed))
            ranks.see(name, tensor)
    return FolderReport(
        path,
        # Only the run knows which weights decayed as units.
        SparsityReport(_together(tensors, model), near_zero_threshold, [] if run_report is None else run_report.units),
        ranks.counts(),
        stored,
        stored if method and method != RAGGED else compressed,  # `compress` refuses other methods
        options,
        (negative, signs),
        None if estimator is None else estimator.estimate(),
        sum(file.stat().st_size for file in weight_files(path)) if packed else None,
        None if method in (None, RAGGED) else config.get("quantization_config"),
    )


class _RankCounter:
    """Counts the dead ranks of a LoRA adapter whose tensors come one by one."""

    def __init__(self) -> None:
        self._alive: dict[str, dict[str, Tensor]] = {}

    def see(self, name: str, tensor: Tensor) -> None:
        layer, factor = lora_factor(name) or ("", "")
        if layer and tensor.ndim > 1:
            dim = int(factor == "B")
            self._alive.setdefault(layer, {})[factor] = alive_here(tensor, Member(name, dim), tensor.shape[dim])

    def counts(self) -> dict[str, tuple[int, int]]:
        """Number of ranks and of dead ones, by layer."""
        return {
            layer: (len(alive["A"]), int((~(alive["A"] & alive["B"])).sum()))
            for layer, alive in self._alive.items()
            if len(alive) == 2 and len(alive["A"]) == len(alive["B"])
        }


def _word(folder: Path) -> str:
    return shlex.quote(str(folder))


def _report_of_run(folder: Path) -> SparsityReport | None:
    """The counts that a run has left in the folder, if they can be read."""
    if not (folder / REPORT_FILE).is_file():
        return None
    try:
        return SparsityReport.load(folder / REPORT_FILE)
    except ValueError as error:
        logger.warning("%s Weights that decay by default count as decayed, and units are not reported.", error)
        return None


def _estimator(model: Any) -> Estimator | None:
    """What looks for dead neurons and heads; None if the architecture is not known."""
    try:
        return None if model is None else Estimator(model)
    except ValueError:
        return None


def _decayed(run_report: SparsityReport | None, model: Any) -> dict[str, bool]:
    """Whether each tensor decayed, by its name in the model: as the run says, or else as it does by default.

    ``model`` is None if its class is not known.
    """
    decayed: dict[str, bool] = {}
    if run_report is not None and (run_report.delta is None or run_report.decayed.tensors):
        decayed = {tensor.name: tensor.decayed for tensor in run_report.tensors}
    elif model is not None:
        chosen = set(decayable_parameter_names(model))
        decayed = {name: name in chosen for name, _ in model.named_parameters()}
    return {name: False for name, _ in (() if model is None else model.named_buffers())} | decayed


def _together(tensors: Sequence[TensorSparsity], model: Any) -> list[TensorSparsity]:
    """One entry for each name: the parts of a parameter that a file has in several tensors are added up."""
    shapes = {} if model is None else {name: tuple(param.shape) for name, param in model.named_parameters()}
    result: dict[str, TensorSparsity] = {}
    for tensor in tensors:
        first = result.get(tensor.name)
        if first is None:
            result[tensor.name] = tensor
            continue
        result[tensor.name] = TensorSparsity(
            tensor.name,
            shapes.get(tensor.name, first.shape),
            first.parameters + tensor.parameters,
            first.zeros + tensor.zeros,
            first.near_zeros + tensor.near_zeros,
            math.hypot(first.norm, tensor.norm),
            first.decayed,
        )
    return list(result.values())
