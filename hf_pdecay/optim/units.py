"""The units that decay together in a param group, and where they lie in its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from .param_groups import Entries
from .unit_kinds import ELEMENT, kind_of, n_of_m


Key = TypeVar("Key", str, int)
# Of a parameter, or of a matrix in it: the dimension and the spans of its units.
_Taken = dict[tuple[int, int | None], tuple[int, list[tuple[int, int]]]]


@dataclass(frozen=True)
class Member(Generic[Key]):
    """Where the units of a layer lie in one parameter.

    Unit u has the indices from ``offset + u * size`` up to ``offset + (u + 1) * size`` of dimension ``dim``. In a
    stack, such as fused experts, it has them in one matrix.

    Args:
        param: Clean name of the parameter in its model, or its index in a param group.
        dim: Dimension along which the units lie.
        size: Number of consecutive indices that belong to one unit.
        offset: Index at which the first unit begins.
        matrix: Index along dimension 0 of the matrix in a stack, or of its biases; None for the whole parameter.
    """

    param: Key
    dim: int
    size: int = 1
    offset: int = 0
    matrix: int | None = None


@dataclass(frozen=True)
class Units(Generic[Key]):
    """The units of one kind in one layer, and where they lie.

    A unit may lie in several parameters: a neuron is a row of the up and gate projections, an entry of their biases and
    a column of the down projection.

    Args:
        kind: ``"row"``, ``"column"``, ``"neuron"``, ``"head"``, ``"rank"`` or N:M.
        count: Number of units.
        members: The parameters that the units lie in; two members may be parts of the same parameter.
        name: Clean name of the module that the units belong to, for messages.
    """

    kind: str
    count: int
    members: tuple[Member[Key], ...]
    name: str = ""


def units_of(group: Mapping[str, Any]) -> list[Units[int]]:
    """Return the units of a param group; by default rows lie along dimension 0, columns and N:M blocks along 1."""
    kind, given = kind_of(group), group.get("units")
    if given is not None:
        units = []
        for layer in given:
            members = [
                Member(m["param"], m["dim"], m.get("size", 1), m.get("offset", 0), m.get("matrix"))
                for m in layer["members"]
            ]
            units.append(Units(kind, layer["count"], tuple(members), layer.get("name", "")))
        return units
    dim = 0 if kind == "row" else 1
    return [Units(kind, param.shape[dim], (Member(index, dim),)) for index, param in enumerate(group["params"])]


def is_still(layer: Units[int], entries: Entries) -> bool:
    """Whether a target leaves the units of a layer alone, given what its group has noted of each parameter."""
    for member in layer.members:
        entry = entries[member.param]
        if entry is True or (member.matrix is not None and isinstance(entry, list) and member.matrix in entry):
            return True
    return False


def check_units(group: Mapping[str, Any]) -> None:
    """Raise a ValueError if the kind is unknown, or the units are missing or do not fit the parameters."""
    kind, params = kind_of(group), group["params"]
    blocks = n_of_m(kind)
    if kind == ELEMENT:
        return
    if group.get("units") is None:
        if kind not in ("row", "column") and blocks is None:
            raise ValueError(
                f"Invalid units: group={kind!r} without units, which say where in the parameters each {kind} "
                "lies; lp_rules find them in known models."
            )
        least = 1 if kind == "row" else 2
        for param in params:
            if param.dim() < least:
                raise ValueError(
                    f"Invalid group: group={kind!r} on a parameter of shape {tuple(param.shape)}; it takes at least "
                    f"{least} dimensions."
                )
    try:
        units = units_of(group)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Invalid units: units={group.get('units')!r}; it must be a list of "
            '{"count": 4, "name": "layer", "members": [{"param": 0, "dim": 0, "size": 1, "offset": 0}]}.'
        ) from error
    taken: _Taken = {}
    for layer in units:
        if layer.members and layer.count == 0:
            raise ValueError(
                f"Invalid group: group={kind!r} on {layer.name or 'a parameter'}, which is empty along that dimension; "
                "leave it out."
            )
        if not layer.members or not _whole(layer.count, 1):
            raise ValueError(f"Invalid units: {layer!r} needs at least one unit and one member.")
        for member in layer.members:
            _check_member(layer, member, params, taken)


def _check_member(layer: Units[int], member: Member[int], params: Sequence[Tensor], taken: _Taken) -> None:
    where = f"{layer.name or 'a layer'}: {member!r}"
    if not _whole(member.param, 0) or member.param >= len(params):
        raise ValueError(f"Invalid units: {where} names parameter {member.param!r} of {len(params)}.")
    shape = tuple(params[member.param].shape)
    whole = _whole(member.dim, 0) and _whole(member.size, 1) and _whole(member.offset, 0)
    if not whole or member.dim >= len(shape):
        raise ValueError(f"Invalid units: {where} does not fit a parameter of shape {shape}.")
    matrix = member.matrix
    if matrix is not None and not (_whole(matrix, 0) and matrix < shape[0] and member.dim > 0):
        raise ValueError(f"Invalid units: {where} names no matrix of a parameter of shape {shape}.")
    end = member.offset + layer.count * member.size
    if end > shape[member.dim]:
        raise ValueError(
            f"Invalid units: {where} with {layer.count} units reaches index {end} of dimension {member.dim} of a "
            f"parameter of shape {shape}."
        )
    dim, spans = taken.setdefault((member.param, matrix), (member.dim, []))
    in_whole = matrix is not None and (member.param, None) in taken
    if in_whole or dim != member.dim or any(start < end and member.offset < stop for start, stop in spans):
        raise ValueError(f"Invalid units: {where} has weights that belong to another unit of this kind.")
    spans.append((member.offset, end))
    blocks = n_of_m(layer.kind)
    if blocks is not None and shape[member.dim] % blocks[1]:
        raise ValueError(
            f"Invalid group: group={layer.kind!r} on {layer.name or 'a parameter'} of shape {shape}; its "
            f"dimension {member.dim} is not divisible by {blocks[1]}."
        )


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def unit_size(units: Units[Any], params: Sequence[Tensor] | Mapping[str, Tensor]) -> int:
    """Return the number of weights of one unit, from the parameters by index, or by name."""
    tensors: Any = params
    return sum(_share(tensors[member.param], member) for member in units.members)


def _share(param: Tensor, member: Member[Any]) -> int:
    """The number of weights that one unit has in a parameter."""
    return param.numel() // (1 if member.matrix is None else param.shape[0]) // param.shape[member.dim] * member.size
