"""A preview of a run: which weights of a model would decay, by which rule, and how many zeros that gives."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..names import clean_name
from ..one_shot.methods import AUTO, OFF
from ..optim.bases import decays_to_base
from ..optim.param_groups import is_decayed
from ..optim.unit_kinds import ELEMENT, n_of_m
from ..rules.table import group_table
from ..tables import NameTable
from ..target.budgets import Budget
from ..target.control import plan_target
from ..target.pruning import zeros_wanted
from ..target.schedule import Schedule
from ..trainer.optimizer import param_groups_of
from ..trainer.settings import DecaySettings
from .model_size import on_meta


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from torch import nn


@dataclass(frozen=True)
class TensorPreview:
    """A trained parameter and how it decays.

    Args:
        rule: The pattern of its rule, ``"default"``, or why it does not decay.
        p_norm: p; None if it does not decay.
        target_sparsity: Fraction of its budget that must become zero, weights or units; None for no target.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    decayed: bool
    p_norm: float | None
    target_sparsity: float | None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Preview:
    """The result of :func:`preview`; prints as tables.

    Args:
        tensors: The trained parameters, shared ones once, in the model's order.
        budgets: The weights that share a target; empty without a target.
        one_shot: How the model is pruned at once; with ``"auto"`` only if it is pretrained.
        cut: The step after which it is.
        all_tensors: Whether each tensor is printed.
        widths: Bits of the weights that are rounded, by the name of the tensor.
        input_widths: Bits of the inputs that are rounded, by the name of the layer.
        why_no_base: Why the files of the base to which weights decay are not found; None if they are, or none do.
    """

    name: str
    groups: Sequence[dict[str, Any]]
    tensors: Sequence[TensorPreview]
    budgets: Sequence[Budget]
    schedule: Schedule
    max_steps: int
    all_tensors: bool = False
    one_shot: str = OFF
    cut: int | None = None
    widths: Mapping[str, float] = field(default_factory=dict)
    input_widths: Mapping[str, float] = field(default_factory=dict)
    why_no_base: str | None = None

    @property
    def parameters(self) -> int:
        """Number of trained weights."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def decayed_parameters(self) -> int:
        """Number of weights that decay."""
        return sum(tensor.numel for tensor in self.tensors if tensor.decayed)

    @property
    def zeros(self) -> dict[str, tuple[int, int]]:
        """By kind of unit, how many must be zero at the end, of how many; weights for ``"element"`` and N:M."""
        return self._wanted(to_base=False)

    @property
    def unchanged(self) -> dict[str, tuple[int, int]]:
        """The same of those that must be equal to the base."""
        return self._wanted(to_base=True)

    def _wanted(self, *, to_base: bool) -> dict[str, tuple[int, int]]:
        counts: dict[str, tuple[int, int]] = {}
        for budget in self.budgets:
            if budget.to_base != to_base:
                continue
            dead, units = counts.get(budget.kind, (0, 0))
            counts[budget.kind] = dead + zeros_wanted(budget, 1.0), units + budget.units
        return counts

    @property
    def pruning_steps(self) -> list[int]:
        """The steps after which weights are pruned; none without a target, with ``"auto"`` those of ``"off"``."""
        if not self.budgets:
            return []
        if self.cut is None or self.one_shot == AUTO:
            return self.schedule.pruning_steps
        return [self.cut, *replace(self.schedule, begin=self.cut).pruning_steps]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "model": self.name,
            "parameters": self.parameters,
            "decayed": self.decayed_parameters,
            "zeros": {kind: {"zeros": dead, "of": units} for kind, (dead, units) in self.zeros.items()},
            "unchanged": {kind: {"unchanged": dead, "of": units} for kind, (dead, units) in self.unchanged.items()},
            "max_steps": self.max_steps,
            "pruning_steps": self.pruning_steps,
            "one_shot": {"method": self.one_shot, "after": self.cut},
            "weight_bits": dict(self.widths),
            "activation_bits": dict(self.input_widths),
            "tensors": [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in self.tensors],
        }

    def tensor_table(self) -> NameTable:
        """Return a table with a row for each tensor."""
        table = NameTable("Tensors", ("tensor", "shape", "rule"))
        for tensor in self.tensors:
            table.add_row(tensor.name, " × ".join(map(str, tensor.shape)) or "-", tensor.rule)
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the tables and a summary."""
        decayed = sum(tensor.decayed for tensor in self.tensors)
        yield group_table(self.groups)
        if self.all_tensors:
            yield self.tensor_table()
        yield (
            f"{self.name}: {self.decayed_parameters:,} of {self.parameters:,} trained weights decay "
            f"({self.decayed_parameters / self.parameters:.2%}), in {decayed:,} of {len(self.tensors):,} tensors."
        )
        for to_base, kind, (dead, units) in [
            *((False, *each) for each in self.zeros.items()),
            *((True, *each) for each in self.unchanged.items()),
        ]:
            alone = kind == ELEMENT or n_of_m(kind) is not None
            what = "weights" if alone else f"{kind}s"
            by = f", by {kind}" if alone and kind != ELEMENT else ""
            end = "Unchanged" if to_base else "Zero"
            yield f"{end} in the end{by}: {dead:,} of {units:,} {what} ({dead / units:.2%})."
        sizes = {tensor.name: tensor.numel for tensor in self.tensors}
        for width in sorted(set(self.widths.values())):
            count = sum(sizes[name] for name, bits in self.widths.items() if bits == width)
            yield f"Rounded to {width:g} bits: {count:,} weights."
        for width, count in sorted(Counter(self.input_widths.values()).items()):
            yield f"Rounded to {width:g} bits: the inputs of {count:,} layers."
        if self.budgets:
            if self.cut is not None and self.one_shot == AUTO:
                yield f"If the model is pretrained, it is pruned at once after step {self.cut:,} (one_shot). Else:"
            elif self.cut is not None:
                yield f"Pruned at once by {self.one_shot} after step {self.cut:,}."
            first, last = self.pruning_steps[0], self.pruning_steps[-1]
            yield f"{len(self.pruning_steps)} pruning steps, after steps {first:,} to {last:,} of {self.max_steps:,}."
        else:
            what = "stay as the base has them" if any(map(decays_to_base, self.groups)) else "become zero"
            yield f"No target_sparsity: λ_p alone decides how many weights {what}."
        if self.why_no_base is not None:
            yield f"All weights decay to the base, and no delta is written, as {self.why_no_base}."


def preview(
    name: str, settings: DecaySettings, *, max_steps: int = 1000, weight_decay: float = 0.0, all_tensors: bool = False
) -> Preview:
    """Preview a run of the model that :func:`.model_size.on_meta` builds from ``name``; ``weight_decay`` is by L2.

    Raises ValueError if the model does not exist, a rule matches nothing, a target cannot be reached, or a number is
    out of its range.
    """
    if max_steps < 1:
        raise ValueError(f"Invalid max_steps: max_steps={max_steps!r}; it must be at least 1.")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(
            f"Invalid weight_decay: weight_decay={weight_decay!r}; it must be a finite number of at least 0."
        )
    from ..trainer.base_model import base_of
    from ..trainer.few_bits import input_widths_of, widths_of
    from ..trainer.one_shot_cut import cut_at, planned_method

    model: nn.Module = on_meta(name)
    args: Any = SimpleNamespace(weight_decay=weight_decay)
    base = base_of(model, settings) if settings.to_base else None
    groups = param_groups_of(model, args, settings, new=frozenset() if base is None else base.new)
    budgets = plan_target(groups, max_steps, settings)
    for budget in budgets:
        for group, _ in budget.members:
            group["asked_sparsity"] = budget.target
    group_of = {id(param): group for group in groups for param in group["params"]}
    tensors = []
    for key, param in model.named_parameters():
        if id(param) in group_of:
            group = group_of[id(param)]
            decayed, asked = is_decayed(group), group.get("asked_sparsity")
            p_norm = group["p_norm"] if decayed else None
            tensors.append(TensorPreview(clean_name(key), tuple(param.shape), group["rule"], decayed, p_norm, asked))
    schedule, cut = settings.schedule(max_steps), None
    one_shot = planned_method(model, settings.one_shot, budgets) if budgets else OFF
    if one_shot != OFF:
        cut = replace(settings, sparsity_begin=cut_at(settings, max_steps)).schedule(max_steps).begin
    widths, inputs = widths_of(model, settings), input_widths_of(model, settings)
    why = None if base is None or base.tensors is not None else base.why_none
    return Preview(name, groups, tensors, budgets, schedule, max_steps, all_tensors, one_shot, cut, widths, inputs, why)
