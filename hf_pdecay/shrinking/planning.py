"""Plans what to remove: the same number of units in all layers, as a config can say, or what is dead in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ..layers.architectures import Heads, Neurons
from ..layers.finding import Layer, attribute
from ..names import clean_name
from .configs import config_paths, rebuilt
from .resize import Removal, shapes_after


@dataclass
class Plan:
    """What to remove from each layer, the new values of the config, and notes about what cannot be removed."""

    removals: list[Removal] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan_ragged(model: Any, layers: Sequence[Layer], dead: Sequence[Tensor], multiple_of: int = 1) -> Plan:
    """Keep the living units of each layer, and at least one; layers that must be alike are planned uniformly."""
    alike = [isinstance(layer.row, Heads) and layer.row.alike for layer in layers]
    pairs = list(zip(layers, dead, strict=True))
    held = [pair for pair, same in zip(pairs, alike, strict=True) if same]
    plan = plan_uniform(model, [layer for layer, _ in held], [gone for _, gone in held], multiple_of)
    for (layer, gone), same in zip(pairs, alike, strict=True):
        if not same:
            plan.removals.append(Removal(layer, kept_units(gone, _rounded(layer, int((~gone).sum()), multiple_of))))
    return _ordered(plan, layers)


def plan_uniform(model: Any, layers: Sequence[Layer], dead: Sequence[Tensor], multiple_of: int = 1) -> Plan:
    """Keep the same number of units in all layers of a config, the model's own or one within it, which then has it.

    Layers with more dead units than the fullest layer keep some of them. Each layer keeps a multiple of ``multiple_of``
    neurons. The new config is tried: the model is built from it on the meta device.
    """
    plan = Plan()
    together: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    paths = config_paths(model)
    modules = {clean_name(name): path for name, path in paths.items()}
    for number, layer in enumerate(layers):
        together.setdefault((modules[layer.modules[0][0]], _config_keys(layer)), []).append(number)
    for (path, keys), numbers in together.items():
        chosen = [layers[number] for number in numbers]
        gone = [dead[number] for number in numbers]
        removals, note = _uniform(model, plan, path, keys, chosen, gone, multiple_of)
        plan.removals += removals
        plan.notes += [note] if note and note not in plan.notes else []
    return _ordered(plan, layers)


def _ordered(plan: Plan, layers: Sequence[Layer]) -> Plan:
    order = {id(layer): number for number, layer in enumerate(layers)}
    plan.removals.sort(key=lambda removal: order[id(removal.layer)])
    return plan


def _uniform(
    model: Any,
    plan: Plan,
    path: str,
    keys: tuple[str, ...],
    layers: Sequence[Layer],
    dead: Sequence[Tensor],
    multiple_of: int,
) -> tuple[list[Removal], str]:
    """Plan the layers that share keys of the config at a path; returns a note if nothing can be removed."""
    whole = [Removal(layer, torch.ones_like(gone)) for layer, gone in zip(layers, dead, strict=True)]
    if not any(bool(gone.any()) for gone in dead):
        return whole, ""
    kind, where = layers[0].units.kind, type(model).__name__
    least = max(_rounded(layer, int((~gone).sum()), multiple_of) for layer, gone in zip(layers, dead, strict=True))
    counts = {layer.units.count for layer in layers}
    if least >= max(counts):
        if multiple_of > 1 and max(int((~gone).sum()) for gone in dead) < max(counts):
            return whole, (
                f"There are dead {kind}s, but the next smaller multiple of {multiple_of} (multiple_of, --multiple-of) "
                "is less than the number alive in the fullest layer."
            )
        return whole, (
            f"Only some layers have dead {kind}s, and a config has one number for all layers: layers='ragged' "
            "(--layers ragged) removes them, or train with sparsity_budget='tensor'."
        )
    config = None
    for count in range(least, max(counts)) if keys and least <= min(counts) else ():
        removals = [Removal(layer, kept_units(gone, count)) for layer, gone in zip(layers, dead, strict=True)]
        values = {f"{path}.{key}".lstrip("."): value for key, value in _config_values(layers[0], count).items()}
        try:
            config = rebuilt(model.config, plan.config | values)
            with torch.device("meta"):
                built = type(model)(config)
        except (ValueError, StrictDataclassError):  # a config refuses some numbers of heads
            continue
        wanted = shapes_after(model, [*plan.removals, *removals])
        if {clean_name(name): tuple(param.shape) for name, param in built.named_parameters()} != wanted:
            break
        plan.config |= values
        return removals, ""
    if config is None and keys:
        return whole, (
            f"No config of {where} has fewer {kind}s than now and the {least} that are alive in the fullest layer: "
            "layers='ragged' (--layers ragged) removes them, or train with sparsity_budget='tensor'."
        )
    return whole, (
        f"The config of {where} cannot express fewer {kind}s than now: layers='ragged' (--layers ragged) removes them, "
        "for a model that loads after import hf_pdecay."
    )


def kept_units(dead: Tensor, count: int) -> Tensor:
    """Return which units a layer keeps if it keeps ``count``: all that are alive, and the first dead ones."""
    keep = ~dead
    spare = count - int(keep.sum())
    keep[dead.nonzero().flatten()[:spare]] = True
    return keep


def _rounded(layer: Layer, alive: int, multiple_of: int) -> int:
    step = multiple_of if isinstance(layer.row, Neurons) else 1
    return min(-(-max(alive, 1) // step) * step, layer.units.count)


def _config_keys(layer: Layer) -> tuple[str, ...]:
    """The keys of a config that hold a layer's size, if there are any."""
    row = layer.row
    return tuple(sorted(row.config.values())) if isinstance(row, Heads) else row.config if row is not None else ()


def _config_values(layer: Layer, count: int) -> dict[str, Any]:
    """The values of a config whose layers keep ``count`` units."""
    row, module = layer.row, layer.modules[0][1]
    if isinstance(row, Heads):
        sizes = {site.part: member.size for site, member in zip(layer.sites, layer.units.members, strict=True)}
        dim = attribute(module, row.dim)
        values = {"heads": count * sizes["query"] // dim, "key_heads": count * sizes["key"] // dim, "dim": dim}
        return {key: values[quantity] for quantity, key in row.config.items()}
    return dict.fromkeys(row.config, count) if row is not None else {}
