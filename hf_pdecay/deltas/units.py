"""Which neurons and heads of a model a delta changes, counted from its file and the model's config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..layers.finding import find_units
from ..layers.saved_names import NamesInModel
from ..optim.units import Member, unit_size
from ..storage.compressed_file import CompressedFile
from ..storage.untrusted import meta_model


KINDS = ("neuron", "head")


@dataclass(frozen=True)
class UnitChange:
    """What a delta changes in the neurons of a feed-forward layer, or in the heads of an attention layer.

    Args:
        kind: ``"neuron"`` or ``"head"``; with grouped queries that is one of keys and values with its queries.
        layer: Name of the module.
        size: Number of weights in one of them.
        changed: For each its number of weights that are not those of the base.
    """

    kind: str
    layer: str
    size: int
    changed: list[int]


def changes_by_unit(folder: Path, file: CompressedFile) -> list[UnitChange]:
    """Return what a delta changes in each neuron and head, layer by layer; nothing if the architecture is not known.

    Args:
        folder: The folder of the delta, with the model's config.
        file: Its file.
    """
    model = meta_model(folder)
    if model is None:
        return []
    layers = []
    for kind in KINDS:
        try:
            layers += find_units(model, kind)
        except ValueError:  # an architecture that is not in the table, or a layer without such units
            continue
    names, params = NamesInModel(model), dict(model.named_parameters())
    stored = {names(name): name for name in file.header.entries}
    result = []
    for layer in layers:
        changed = np.zeros(layer.count, np.int64)
        for member in layer.members:
            name = stored.get(member.param)
            if name is None or file.form(name)[1] != tuple(params[member.param].shape):
                break  # the file holds it in other pieces
            changed += _in_member(file, name, member, layer.count)
        else:
            result.append(UnitChange(layer.kind, layer.name, unit_size(layer, params), changed.tolist()))
    return result


def _in_member(file: CompressedFile, name: str, member: Member[str], count: int) -> np.ndarray:
    """The number of changed weights of each unit in one tensor."""
    _, shape = file.form(name)
    head = file.head(name)
    if head is not None and head.changes:
        places = file.changes(name)[0] if head.values else np.zeros(0, np.int64)
    else:
        places = np.arange(int(np.prod(shape)))  # all of a tensor that is stored whole
    indices = np.unravel_index(places, shape)
    along = indices[member.dim]
    if member.matrix is not None:
        along = along[indices[0] == member.matrix]
    counts = np.bincount(along, minlength=shape[member.dim])
    span = counts[member.offset : member.offset + count * member.size]
    return span.reshape(count, member.size).sum(1)
