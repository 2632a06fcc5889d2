"""The memory and communication that training a model needs, computed from the shapes of its parameters.

Counted is what stays from step to step: weights, gradients, the optimizer's moments, master weights, DDP's buckets.
Activations, layers that FSDP2 and ZeRO-3 gather temporarily, and DeepSpeed's buckets are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..checks import check_choice
from ..optim.moments import MOMENTS, quantized_bytes
from ..sparsity.counting import counted_bytes, counting_temporaries
from ..tables import NameTable
from ..target.cost import Traffic, pruning_cost
from ..target.settings import Target
from .model_size import ModelSize, TensorSize


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

LAYOUTS = ("single", "ddp", "fsdp2", "zero2", "zero3")
PRECISIONS = ("bf16", "no")
DTYPES = {"float32": 4, "bfloat16": 2}

_STEP_SHARDED = ("fsdp2", "zero2", "zero3")  # processes step different weights
_MODEL_SHARDED = ("fsdp2", "zero3")  # and hold different weights of the model
_ZERO = ("zero2", "zero3")


@dataclass(frozen=True)
class Setup:
    """How a model is trained; raises ValueError if an argument is out of range or unknown.

    Args:
        gpus: Number of GPUs, one process each.
        mixed_precision: One of :data:`PRECISIONS`, as in the accelerate config.
        dtype: Dtype of the loaded weights, one of :data:`DTYPES`.
        moments: As in :class:`~hf_pdecay.AdamWLp`; None for the dtype of the weights that the optimizer steps.
    """

    gpus: int = 8
    mixed_precision: str = "bf16"
    dtype: str = "float32"
    moments: str | None = None
    max_steps: int = 1000

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name in ("gpus", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Invalid {name}: {name}={getattr(self, name)}; it must be at least 1.")
        check_choice("mixed_precision", self.mixed_precision, PRECISIONS)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        if self.moments is not None:
            check_choice("moments", self.moments, MOMENTS)

    def refusal(self, layout: str) -> str | None:
        """Return why a layout does not allow this setup, or None if it does."""
        if self.moments == "8bit" and layout in _STEP_SHARDED:
            return (
                f"Invalid moments: moments='8bit' under layout={layout!r}, whose shards torchao cannot quantise; take "
                "moments of float32 or bfloat16, or the layout single or ddp."
            )
        if layout in _ZERO and self.dtype != "float32" and self.mixed_precision == "no":
            return (
                f"Invalid dtype: dtype={self.dtype!r} without mixed precision under layout={layout!r}, where DeepSpeed "
                "expects float32; take mixed_precision of bf16 or dtype of float32."
            )
        return None


@dataclass(frozen=True)
class Memory:
    """Bytes that stay from step to step, on the GPU that has most of them."""

    weights: int
    gradients: int
    moments: int
    master: int
    buckets: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Added:
    """What hf_pdecay adds to AdamW under a layout, for each process: :class:`~.target.cost.PruningCost`, and more.

    ``step`` leaves out dormant tensors, for which processes ask once a step whether they are awake: on a CPU until they
    are, on a GPU in all steps. The bytes are those of temporaries on a GPU during a pruning step or a log event.
    """

    step: Traffic
    pruning: Traffic
    ties: Traffic
    lambda_p: Traffic
    log: Traffic
    pruning_bytes: int
    log_bytes: int


@dataclass(frozen=True)
class Estimate:
    """The result of :func:`estimate`, by layout; ``left_out`` says why a layout does not allow the setup."""

    size: ModelSize
    setup: Setup
    memory: dict[str, Memory]
    added: dict[str, Added]
    left_out: dict[str, str]

    @property
    def pruning_steps(self) -> int:
        """Number of pruning steps of a run with a target."""
        return len(Target().schedule(self.setup.max_steps).pruning_steps)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; bytes are per GPU."""
        size = self.size
        return {
            "model": size.name,
            "parameters": size.parameters,
            "decayed": size.decayed_parameters,
            "tensors": len(size.tensors),
            "decayed_tensors": len(size.decayed),
            "tensors_assumed": size.assumed,
            **asdict(self.setup),
            "pruning_steps": self.pruning_steps,
            "layouts": {
                layout: {
                    "gpus": _processes(layout, self.setup.gpus),
                    "memory": {**asdict(memory), "total": memory.total},
                    "added": asdict(self.added[layout]),
                }
                for layout, memory in self.memory.items()
            },
            "left_out": self.left_out,
        }

    def memory_table(self) -> NameTable:
        """Return a table of bytes per parameter and GiB per GPU, with a row for each layout."""
        headings = ("layout", "GPUs", "weights", "gradients", "moments", "master", "buckets", "bytes", "GiB")
        table = NameTable("Bytes per parameter, and GiB, on each GPU", headings)
        for layout, memory in self.memory.items():
            cells = [f"{size / self.size.parameters:.2f}" if size else "-" for size in vars(memory).values()]
            total = f"{memory.total / self.size.parameters:.2f}", f"{memory.total / 2**30:.2f}"
            table.add_row(layout, str(_processes(layout, self.setup.gpus)), *cells, *total)
        return table

    def added_table(self) -> NameTable:
        """Return a table of what hf_pdecay adds to AdamW, with a row for each layout."""
        headings = ("layout", "a step", "pruning", "λ_p after it", "a log event", "pruning, MiB", "log, MiB")
        table = NameTable("What hf_pdecay adds to AdamW: all-reduces / KiB, temporary MiB", headings)
        for layout, added in self.added.items():
            traffics = added.step, added.pruning + added.ties, added.lambda_p, added.log
            temporaries = (f"{size / 2**20:.0f}" for size in (added.pruning_bytes, added.log_bytes))
            table.add_row(layout, *map(_traffic_cell, traffics), *temporaries)
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the tables and notes on them."""
        size, setup = self.size, self.setup
        tensors = f"{len(size.decayed):,} of {len(size.tensors):,} tensors" + (", assumed" if size.assumed else "")
        share = size.decayed_parameters / size.parameters
        yield f"{size.name}: {size.parameters:,} weights; {size.decayed_parameters:,} ({share:.1%}) decay"
        yield f"in {tensors}"
        moments = setup.moments or "as the weights"
        yield f"mixed_precision={setup.mixed_precision}, dtype={setup.dtype}, moments={moments}"
        yield self.memory_table()
        yield (
            "Not counted: activations, temporary copies (layers under FSDP2 and ZeRO-3, gradients "
            "in float32 while ZeRO steps), DeepSpeed's buckets, and, where a pretrained model is pruned at once "
            "(one_shot), 4 bytes × inputs² for each matrix of a block."
        )
        yield self.added_table()
        steps = f"{setup.max_steps:,} steps"
        yield (
            f"These are temporary. A run of {steps} with a target prunes {self.pruning_steps} times, "
            "fewer if it prunes at once."
        )
        yield from self.left_out.values()


def estimate(size: ModelSize, setup: Setup, layout: str = "all") -> Estimate:
    """Estimate what training needs under a layout, or under ``"all"`` that allow the setup.

    Raises ValueError if the layout is not one of :data:`LAYOUTS`, or does not allow the setup.
    """
    check_choice("layout", layout, (*LAYOUTS, "all"))
    refusals = {name: setup.refusal(name) for name in (LAYOUTS if layout == "all" else [layout])}
    left_out = {name: reason for name, reason in refusals.items() if reason is not None}
    if layout in left_out:
        raise ValueError(left_out[layout])
    layouts = [name for name in refusals if name not in left_out]
    memory = {name: memory_of(size, name, setup) for name in layouts}
    return Estimate(size, setup, memory, {name: added_by(size, name, setup.gpus) for name in layouts}, left_out)


def memory_of(size: ModelSize, layout: str, setup: Setup) -> Memory:
    """Return the bytes on the GPU that has most of them; the layout must allow the setup."""
    whole, held = size.parameters, sum(_held(size.tensors, layout, setup.gpus))
    low = setup.mixed_precision == "bf16"
    if layout in _ZERO:
        # DeepSpeed casts the model and steps a float32 copy of its partition; stage 3 needs no copy in float32.
        width = DTYPES["bfloat16" if low else "float32"]
        weights, gradients, stepped = width * (whole if layout == "zero2" else held), width * held, "float32"
        master = 0 if layout == "zero3" and not low else DTYPES["float32"] * held
        buckets = 0
    else:
        # FSDP2 steps in float32 under mixed precision, whatever was loaded.
        stepped = "float32" if layout == "fsdp2" and low else setup.dtype
        weights = gradients = DTYPES[stepped] * held
        master, buckets = 0, gradients if layout == "ddp" else 0
    if setup.moments == "8bit":
        moments = sum(quantized_bytes(tensor.numel) for tensor in size.tensors)
    else:
        moments = 2 * DTYPES[setup.moments or stepped] * held
    return Memory(weights, gradients, moments, master, buckets)


def added_by(size: ModelSize, layout: str, gpus: int) -> Added:
    """Return what hf_pdecay adds to AdamW for a model under a layout."""
    shards = gpus if layout in _STEP_SHARDED else 0
    pruning = pruning_cost(size.decayed_parameters, _held(size.decayed, layout, gpus), shards)
    # Whether gradients are finite on all processes.
    step = Traffic(1, 4) if layout == "fsdp2" else Traffic()
    log = Traffic(1, counted_bytes(len(size.tensors))) if layout in _MODEL_SHARDED else Traffic()
    held = _held(size.tensors, layout if layout in _MODEL_SHARDED else "single", gpus)
    log_bytes = counting_temporaries(max(held, default=0))
    return Added(step, pruning.pruning, pruning.ties, pruning.lambda_p, log, pruning.temporaries, log_bytes)


def _processes(layout: str, gpus: int) -> int:
    return 1 if layout == "single" else gpus


def _held(tensors: Sequence[TensorSize], layout: str, gpus: int) -> list[int]:
    """Weights of each tensor that the optimizer steps, on the process that has most of them."""
    if layout not in _STEP_SHARDED:
        return [tensor.numel for tensor in tensors]
    if layout == "fsdp2":  # rows; the first process has most of them
        sizes = [(tensor.shape[0] if tensor.shape else 1, tensor.numel) for tensor in tensors]
        return [-(-rows // gpus) * (numel // rows) if rows else 0 for rows, numel in sizes]
    return [-(-tensor.numel // gpus) for tensor in tensors]


def _traffic_cell(traffic: Traffic) -> str:
    return f"{traffic.all_reduces} / {traffic.bytes / 2**10:.1f}" if traffic.all_reduces else "-"
