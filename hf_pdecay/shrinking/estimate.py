"""What shrinking a saved model would give, from its config and one look at each of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..optim.unit_operations import alive_here
from .dead import dead
from .model import layers_of, planned


@dataclass(frozen=True)
class ShrinkEstimate:
    """What ``hf-pdecay shrink`` would leave of a model.

    Args:
        neurons: Number of neurons and of dead ones.
        heads: Number of heads and of dead ones; with grouped queries of those of keys and values.
        parameters: Number of weights.
        uniform: How many of them are left with equally many groups in each layer.
        ragged: How many are left with what is alive in each layer.
    """

    neurons: tuple[int, int]
    heads: tuple[int, int]
    parameters: int
    uniform: int
    ragged: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON types."""
        return {
            "neurons": {"groups": self.neurons[0], "dead": self.neurons[1]},
            "heads": {"groups": self.heads[0], "dead": self.heads[1]},
            "parameters": self.parameters,
            "uniform_parameters": self.uniform,
            "ragged_parameters": self.ragged,
        }

    def __str__(self) -> str:
        """Return a sentence with the command, or none where nothing is dead."""
        return self.sentence("MODEL")

    def sentence(self, model: str) -> str:
        """Return a sentence with the command for a folder, or none where nothing is dead."""
        if not self.neurons[1] and not self.heads[1]:
            return ""
        found = " and ".join(
            f"{dead:,} of {groups:,} {what}"
            for what, (groups, dead) in (("neurons", self.neurons), ("heads", self.heads))
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
        return f"{found} are dead: {', '.join(left)}." if left else ""


class Estimator:
    """Looks at a model's tensors one by one.

    Args:
        model: The model, on the meta device.

    Raises:
        ValueError: If its architecture is not known.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = layers_of(model)
        self._zeros: list[list[Tensor | None]] = [[None] * len(each.units.members) for each in self.layers]
        self._where: dict[str, list[tuple[int, int]]] = {}
        for place, layer in enumerate(self.layers):
            for index, member in enumerate(layer.units.members):
                self._where.setdefault(member.param, []).append((place, index))
        self._shapes = {name: param.shape for name, param in model.named_parameters()}

    def see(self, name: str, tensor: Tensor) -> None:
        """Look at a tensor."""
        if name in self._where and tensor.shape == self._shapes[name]:
            for place, index in self._where[name]:
                found = self.layers[place].units
                self._zeros[place][index] = ~alive_here(tensor, found.members[index], found.count).cpu()

    def estimate(self) -> ShrinkEstimate | None:
        """Return what was found; None where tensors of the model have not been seen under its parameters' names."""
        gone = []
        for layer, zeros in zip(self.layers, self._zeros, strict=True):
            seen = [each for each in zeros if each is not None]
            if len(seen) < len(zeros):
                return None
            gone.append(dead(layer, seen))
        totals = {"neuron": (0, 0), "head": (0, 0)}
        for layer, each in zip(self.layers, gone, strict=True):
            groups, count = totals[layer.units.kind]
            totals[layer.units.kind] = groups + layer.units.count, count + int(each.sum())
        before, uniform = planned(self.model, self.layers, gone, "uniform", 1)[1].parameters
        ragged = planned(self.model, self.layers, gone, "ragged", 1)[1].parameters[1]
        return ShrinkEstimate(totals["neuron"], totals["head"], before, uniform, ragged)
