"""What to cut: as many groups in every layer as an ordinary config can say, or in each layer what is dead there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ..layers.architectures import Heads, Neurons
from ..layers.finding import Layer, attribute
from ..names import clean_name
from .resize import Cut, shapes_after


@dataclass
class Plan:
    """What is to be cut.

    Attributes:
        cuts: One of each layer.
        config: Values of keys of the model's config that say so.
        notes: Sentences about what cannot be cut.
    """

    cuts: list[Cut] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan_ragged(model: Any, layers: Sequence[Layer], dead: Sequence[Tensor], multiple_of: int = 1) -> Plan:
    """Cut in each layer what is dead there, but for one group; where layers are to be alike, as for a config.

    Args:
        model: The model.
        layers: Its layers.
        dead: Which groups of each are dead.
        multiple_of: The number of neurons that are kept is to be a multiple of it.
    """
    alike = [isinstance(layer.row, Heads) and layer.row.alike for layer in layers]
    pairs = list(zip(layers, dead, strict=True))
    held = [pair for pair, same in zip(pairs, alike, strict=True) if same]
    plan = plan_uniform(model, [layer for layer, _ in held], [gone for _, gone in held], multiple_of)
    for (layer, gone), same in zip(pairs, alike, strict=True):
        if not same:
            plan.cuts.append(Cut(layer, keep_groups(gone, _rounded(layer, int((~gone).sum()), multiple_of))))
    return _ordered(plan, layers)


def plan_uniform(model: Any, layers: Sequence[Layer], dead: Sequence[Tensor], multiple_of: int = 1) -> Plan:
    """Cut as many groups in all layers alike, such that the model's own config says how many are left.

    Layers with more dead groups than the one with the fewest keep some of them. Whether a config says what it should
    is tried: the model is built from it on the meta device.

    Args:
        model: The model.
        layers: Its layers.
        dead: Which groups of each are dead.
        multiple_of: The number of neurons that are kept is to be a multiple of it.
    """
    plan = Plan()
    together: dict[tuple[str, ...], list[int]] = {}
    for place, layer in enumerate(layers):
        together.setdefault(_config_keys(layer), []).append(place)
    for keys, places in together.items():
        chosen = [layers[place] for place in places]
        gone = [dead[place] for place in places]
        cuts, note = _uniform(model, plan, keys, chosen, gone, multiple_of)
        plan.cuts += cuts
        plan.notes += [note] if note else []
    return _ordered(plan, layers)


def _ordered(plan: Plan, layers: Sequence[Layer]) -> Plan:
    order = {id(layer): place for place, layer in enumerate(layers)}
    plan.cuts.sort(key=lambda cut: order[id(cut.layer)])
    return plan


def _uniform(
    model: Any, plan: Plan, keys: tuple[str, ...], layers: Sequence[Layer], dead: Sequence[Tensor], multiple_of: int
) -> tuple[list[Cut], str]:
    """Cuts of the layers of which the same keys of the config tell, and what is to be said of them."""
    whole = [Cut(layer, torch.ones_like(gone)) for layer, gone in zip(layers, dead, strict=True)]
    if not any(bool(gone.any()) for gone in dead):
        return whole, ""
    kind, where = layers[0].units.kind, type(model).__name__
    least = max(_rounded(layer, int((~gone).sum()), multiple_of) for layer, gone in zip(layers, dead, strict=True))
    counts = {layer.units.count for layer in layers}
    if least >= max(counts):
        if multiple_of > 1 and max(int((~gone).sum()) for gone in dead) < max(counts):
            return whole, (
                f"There are dead {kind}s, but no smaller number is a multiple of {multiple_of} (multiple_of, "
                "--multiple-of) and as many as are alive in the fullest layer."
            )
        return whole, (
            f"There are dead {kind}s in some layers only; a config says how many there are in all of them alike, and "
            "the fullest has none to spare: layers='ragged' (--layers ragged) cuts them, or train with "
            "sparsity_budget='tensor'."
        )
    config = None
    for count in range(least, max(counts)) if keys and least <= min(counts) else ():
        cuts = [Cut(layer, keep_groups(gone, count)) for layer, gone in zip(layers, dead, strict=True)]
        values = _config_values(layers[0], count)
        try:
            config = changed_config(model.config, plan.config | values)
            with torch.device("meta"):
                built = type(model)(config)
        except (ValueError, StrictDataclassError):  # by which a config refuses a number of heads
            continue
        wanted = shapes_after(model, [*plan.cuts, *cuts])
        if {clean_name(name): tuple(param.shape) for name, param in built.named_parameters()} != wanted:
            break
        plan.config |= values
        return cuts, ""
    if config is None and keys:
        return whole, (
            f"No config of {where} has fewer {kind}s than now and at least {least}, as are alive in the fullest layer: "
            "layers='ragged' (--layers ragged) cuts them, or train with sparsity_budget='tensor'."
        )
    return whole, (
        f"The config of {where} cannot say that there are fewer {kind}s than now: layers='ragged' (--layers ragged) "
        "cuts them, for a model that loads after import hf_pdecay."
    )


def changed_config(config: Any, values: dict[str, Any]) -> Any:
    """Return a config with other values of some keys, checked as one that is read from a file is."""
    return type(config).from_dict({**copy.deepcopy(config.to_dict()), **values})


def keep_groups(dead: Tensor, count: int) -> Tensor:
    """Return which groups are kept where so many are to be: all that are alive, and the first of the dead."""
    keep = ~dead
    spare = count - int(keep.sum())
    keep[dead.nonzero().flatten()[:spare]] = True
    return keep


def _rounded(layer: Layer, alive: int, multiple_of: int) -> int:
    step = multiple_of if isinstance(layer.row, Neurons) else 1
    return min(-(-max(alive, 1) // step) * step, layer.units.count)


def _config_keys(layer: Layer) -> tuple[str, ...]:
    """The keys of a config that tell of a layer; none where it has none for it."""
    row = layer.row
    return tuple(sorted(row.config.values())) if isinstance(row, Heads) else row.config if row is not None else ()


def _config_values(layer: Layer, count: int) -> dict[str, Any]:
    """What a config says where a layer keeps so many groups."""
    row, module = layer.row, layer.modules[0][1]
    if isinstance(row, Heads):
        sizes = {place.part: member.size for place, member in zip(layer.sites, layer.units.members, strict=True)}
        dim = attribute(module, row.dim)
        values = {
            "heads": count * sizes["query"] // dim,
            "key_heads": count * sizes["key"] // dim,
            "dim": dim,
        }
        return {key: values[what] for what, key in row.config.items()}
    return dict.fromkeys(row.config, count) if row is not None else {}
