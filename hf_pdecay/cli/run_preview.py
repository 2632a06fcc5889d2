"""What a run would do to a model, said before it: which weights decay, by which rule, and how many zeros come of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..names import clean_name
from ..optim.param_groups import is_decayed
from ..optim.units import ELEMENT, n_of_m
from ..rules.table import group_table
from ..target.budgets import Budget
from ..target.control import plan_target
from ..target.pruning import wanted
from ..target.schedule import Schedule
from ..trainer.optimizer import param_groups_of
from ..trainer.settings import DecaySettings
from .model_size import on_meta


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from torch import nn


@dataclass(frozen=True)
class TensorPreview:
    """A trained parameter, and how it decays.

    Args:
        name: Its name in the model.
        shape: Its shape.
        rule: The pattern of the rule that it falls under, ``"default"``, or why it does not decay.
        decayed: Whether it decays by p norm.
        p_norm: p; None where it does not decay.
        target_sparsity: Fraction of its budget that is to be zero, for groups of weights of the groups; None for none.
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
    """What :func:`preview` found; prints as tables.

    Args:
        name: What the model is called in the output.
        groups: Param groups as the optimizer of the run would have them.
        tensors: The trained parameters, shared ones once, in the model's order.
        budgets: The weights that share a target; none where there is no target.
        schedule: When its zeros come.
        max_steps: Optimizer steps of the run.
        all_tensors: Whether each tensor is printed.
    """

    name: str
    groups: Sequence[dict[str, Any]]
    tensors: Sequence[TensorPreview]
    budgets: Sequence[Budget]
    schedule: Schedule
    max_steps: int
    all_tensors: bool = False

    @property
    def parameters(self) -> int:
        """Number of trained weights."""
        return sum(each.numel for each in self.tensors)

    @property
    def decayed_parameters(self) -> int:
        """Number of weights that decay."""
        return sum(each.numel for each in self.tensors if each.decayed)

    @property
    def zeros(self) -> dict[str, tuple[int, int]]:
        """By what decays as one, ``"element"`` or the kind of group, how many are to be zero in the end, of how many.

        Of N:M it is weights that are counted.
        """
        found: dict[str, tuple[int, int]] = {}
        for budget in self.budgets:
            dead, units = found.get(budget.kind, (0, 0))
            found[budget.kind] = dead + wanted(budget, 1.0), units + budget.units
        return found

    @property
    def pruning_steps(self) -> list[int]:
        """The steps after which weights are cut; none without a target."""
        steps = range(self.schedule.begin + 1, self.schedule.end + 1) if self.budgets else ()
        return [step for step in steps if self.schedule.prunes(step)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "model": self.name,
            "parameters": self.parameters,
            "decayed": self.decayed_parameters,
            "zeros": {kind: {"zeros": dead, "of": units} for kind, (dead, units) in self.zeros.items()},
            "max_steps": self.max_steps,
            "pruning_steps": self.pruning_steps,
            "tensors": [
                {
                    "name": each.name,
                    "shape": list(each.shape),
                    "rule": each.rule,
                    "decayed": each.decayed,
                    "p_norm": each.p_norm,
                    "target_sparsity": each.target_sparsity,
                }
                for each in self.tensors
            ],
        }

    def tensor_table(self) -> Table:
        """Return a rich table, a row a tensor."""
        from rich.table import Table

        table = Table(title="Tensors")
        table.add_column("tensor", overflow="fold")
        table.add_column("shape", justify="right")
        table.add_column("rule", overflow="fold")
        for each in self.tensors:
            table.add_row(each.name, " × ".join(map(str, each.shape)) or "-", each.rule)
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the tables and what comes of them."""
        decayed = [each for each in self.tensors if each.decayed]
        yield group_table(self.groups)
        if self.all_tensors:
            yield self.tensor_table()
        yield (
            f"{self.name}: {self.decayed_parameters:,} of {self.parameters:,} trained weights decay "
            f"({self.decayed_parameters / self.parameters:.2%}), in {len(decayed):,} of {len(self.tensors):,} tensors."
        )
        for kind, (dead, units) in self.zeros.items():
            alone = kind == ELEMENT or n_of_m(kind) is not None
            what = "weights" if alone else f"{kind}s"
            by = f", by {kind}" if alone and kind != ELEMENT else ""
            yield f"Zero in the end{by}: {dead:,} of {units:,} {what} ({dead / units:.2%})."
        if self.budgets:
            first, last = self.pruning_steps[0], self.pruning_steps[-1]
            yield f"{len(self.pruning_steps)} pruning steps, after steps {first:,} to {last:,} of {self.max_steps:,}."
        else:
            yield "No target_sparsity: λ_p alone decides how many weights become zero."


def preview(
    name: str,
    settings: DecaySettings,
    *,
    max_steps: int = 1000,
    weight_decay: float = 0.0,
    all_tensors: bool = False,
) -> Preview:
    """Say what a run would do to a model; no weights are loaded.

    Args:
        name: A folder with ``config.json``, that file, or a name on the Hub.
        settings: Of the run.
        max_steps: Optimizer steps of the run.
        weight_decay: L2 decay of the run.
        all_tensors: Whether the output is to list each tensor.

    Raises:
        ValueError: If there is no such model, a rule matches nothing, or a target cannot be reached.
    """
    model: nn.Module = on_meta(name)
    args: Any = SimpleNamespace(weight_decay=weight_decay)
    groups = param_groups_of(model, args, settings)
    budgets = plan_target(groups, max_steps, settings)
    for budget in budgets:
        for group, _ in budget.members:
            group["asked_sparsity"] = budget.target
    group_of = {id(param): group for group in groups for param in group["params"]}
    tensors = [
        TensorPreview(
            clean_name(key),
            tuple(param.shape),
            group_of[id(param)]["rule"],
            is_decayed(group_of[id(param)]),
            group_of[id(param)]["p_norm"] if is_decayed(group_of[id(param)]) else None,
            group_of[id(param)].get("asked_sparsity"),
        )
        for key, param in model.named_parameters()
        if id(param) in group_of
    ]
    return Preview(name, groups, tensors, budgets, settings.schedule(max_steps), max_steps, all_tensors)
