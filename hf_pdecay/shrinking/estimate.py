"""Estimates what shrinking a saved model would leave, from its config and one look at each tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..optim.unit_operations import alive_here
from .dead import dead
from .model import layers_of, planned


@dataclass(frozen=True)
class ShrinkEstimate:
    """What ``hf-pdecay shrink`` would leave of a model; with grouped queries, heads are those of keys and values."""

    neurons: tuple[int, int]  # the number of all and of dead ones
    heads: tuple[int, int]
    parameters: int
    uniform: int  # the number of parameters left if each layer keeps the same number of units
    ragged: int  # and if each layer keeps its living units

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON types."""
        return {
            "neurons": {"units": self.neurons[0], "dead": self.neurons[1]},
            "heads": {"units": self.heads[0], "dead": self.heads[1]},
            "parameters": self.parameters,
            "uniform_parameters": self.uniform,
            "ragged_parameters": self.ragged,
        }

    def __str__(self) -> str:
        """Return :meth:`sentence` for ``MODEL``."""
        return self.sentence("MODEL")

    def sentence(self, model: str) -> str:
        """Return a sentence with the command for a folder, or an empty string if nothing is dead."""
        if not self.neurons[1] and not self.heads[1]:
            return ""
        dead_units = " and ".join(
            f"{dead:,} of {units:,} {what}"
            for what, (units, dead) in (("neurons", self.neurons), ("heads", self.heads))
            if dead
        )
        left = []
        if self.uniform < self.parameters:
            left.append(f"hf-pdecay shrink {model} OUT leaves {self.uniform / self.parameters:.1%} of the parameters")
        if self.ragged < self.uniform:
            share = f"{self.ragged / self.parameters:.1%}"
            left.append(
                f"with --layers ragged {share}"
                if left
                else f"hf-pdecay shrink {model} OUT --layers ragged leaves {share} of the parameters"
            )
        return f"{dead_units} are dead: {', '.join(left)}." if left else ""


class Estimator:
    """Looks at the tensors of a model on the meta device, and estimates what shrinking would leave.

    Raises ValueError if the architecture is unknown.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = layers_of(model)
        self._zeros: list[list[Tensor | None]] = [[None] * len(layer.units.members) for layer in self.layers]
        self._where: dict[str, list[tuple[int, int]]] = {}
        for number, layer in enumerate(self.layers):
            for index, member in enumerate(layer.units.members):
                self._where.setdefault(member.param, []).append((number, index))
        self._shapes = {name: param.shape for name, param in model.named_parameters()}

    def see(self, name: str, tensor: Tensor) -> None:
        """Look at a tensor."""
        if name in self._where and tensor.shape == self._shapes[name]:
            for number, index in self._where[name]:
                units = self.layers[number].units
                self._zeros[number][index] = ~alive_here(tensor, units.members[index], units.count).cpu()

    def estimate(self) -> ShrinkEstimate | None:
        """Return the estimate; None if some parameters of the model have not been seen under their names."""
        gone = []
        for layer, zeros in zip(self.layers, self._zeros, strict=True):
            seen = [zero for zero in zeros if zero is not None]
            if len(seen) < len(zeros):
                return None
            gone.append(dead(layer, seen))
        totals = {"neuron": (0, 0), "head": (0, 0)}
        for layer, dead_units in zip(self.layers, gone, strict=True):
            units, count = totals[layer.units.kind]
            totals[layer.units.kind] = units + layer.units.count, count + int(dead_units.sum())
        before, uniform = planned(self.model, self.layers, gone, "uniform", 1)[1].parameters
        ragged = planned(self.model, self.layers, gone, "ragged", 1)[1].parameters[1]
        return ShrinkEstimate(totals["neuron"], totals["head"], before, uniform, ragged)
