"""Finding the groups of weights of a model that live and die together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

from torch import nn

from ..names import clean_name
from ..optim.shards import full_shape
from ..optim.units import Member, Units
from .architectures import Heads, Neurons, Row, rows_of
from .matrices import is_linear, is_transposed, matrix_units


KINDS = ("row", "column", "neuron", "head", "rank")


class Site(NamedTuple):
    """What a member of a coupling is.

    Attributes:
        module: Which of the layer's modules it belongs to.
        part: ``"up0"``, ``"up1"``, ``"down"``, ``"query"``, ``"key"``, ``"value"``, ``"output"`` or ``"position"``.
        bias: Whether it is the bias of the part.
    """

    module: int
    part: str
    bias: bool = False


@dataclass(frozen=True)
class Layer:
    """A coupling, and the modules in which it lies.

    Args:
        units: The units.
        row: The entry of the table; None for rows, columns and ranks.
        modules: The modules of the entry's class, by their clean names.
        sites: What each member is, in the order of ``units.members``.
    """

    units: Units[str]
    row: Row | None = None
    modules: tuple[tuple[str, nn.Module], ...] = ()
    sites: tuple[Site, ...] = ()


def find_units(model: nn.Module, kind: str) -> list[Units[str]]:
    """Find the groups of weights of a model that live and die together.

    Args:
        model: A model, whatever device it is on, the meta device included. Names are without the wrappers of
            ``torch.compile``, DDP and FSDP.
        kind: ``"row"`` or ``"column"`` of each linear layer, convolution and ``nn.MultiheadAttention``: what feeds
            one of its outputs, bias included, or takes one of its inputs; ``"neuron"`` of each feed-forward layer;
            ``"head"`` of each attention layer, with grouped queries a head of keys and values and the queries that
            share it; ``"rank"`` of each LoRA adapter.

    Returns:
        A coupling for each layer, in the model's order.

    Raises:
        ValueError: If there is no such kind, or the model's architecture is not in the table.
    """
    return [layer.units for layer in find_layers(model, kind)]


def find_layers(model: nn.Module, kind: str) -> list[Layer]:
    """Find the same as :func:`find_units`, with the modules."""
    if kind not in KINDS:
        raise ValueError(f"Invalid kind: kind={kind!r}; it must be one of {', '.join(KINDS)}.")
    names = {id(param): clean_name(name) for name, param in model.named_parameters()}
    if kind in ("row", "column"):
        found = [Layer(units) for units in matrix_units(model, kind)]
    elif kind == "rank":
        found = [Layer(each) for each in _ranks(model, names)]
    else:
        found = _declared(model, kind, names)
    if not found:
        raise ValueError(_unknown(model, kind))
    return found


def _ranks(model: nn.Module, names: dict[int, str]) -> Iterator[Units[str]]:
    from ..adapters.factors import lora_factors, lora_names

    for adapter in lora_names(model):
        for each in lora_factors(model, adapter):
            members = Member(names[id(each.a)], 0), Member(names[id(each.b)], 1)
            yield Units("rank", full_shape(each.a)[0], members, clean_name(each.name))


def _declared(model: nn.Module, kind: str, names: dict[int, str]) -> list[Layer]:
    modules = dict(model.named_modules())
    together: dict[tuple[str, int], list[tuple[str, nn.Module]]] = {}
    rows: dict[int, Row] = {}
    for name, module in modules.items():
        row = next((row for row in rows_of(module, kind) if _fits(module, row)), None)
        if row is not None:
            rows[id(row)] = row
            owner = name if row.ancestor is None else _owner(modules, name, row.ancestor)
            together.setdefault((owner, id(row)), []).append((name, module))
    return [_layer(owner, rows[row], found, names) for (owner, row), found in together.items()]


def _owner(modules: dict[str, nn.Module], name: str, ancestor: str) -> str:
    """The name of the nearest module around another one that is of a class."""
    while name:
        name = name.rpartition(".")[0]
        if any(each.__name__ == ancestor for each in type(modules[name]).__mro__):
            return name
    return ""


def _layer(owner: str, row: Row, modules: list[tuple[str, nn.Module]], names: dict[int, str]) -> Layer:
    count = 0
    members: list[Member[str]] = []
    is_what: list[Site] = []
    for index, (name, module) in enumerate(modules):
        shares = _shares(row)
        counting = _Part(module, name, shares["key" if isinstance(row, Heads) else "up0"], False)
        groups = counting.length // (attribute(module, row.dim) if isinstance(row, Heads) else 1)
        if count not in (0, groups):
            raise ValueError(
                f"{clean_name(name)} has {groups} groups of the kind {row.kind} where others that share them with it "
                f"have {count}."
            )
        if not groups:
            raise ValueError(f"{counting.name} has {counting.length} rows, which are less than one {row.kind}.")
        count = groups
        for part, share in shares.items():
            found = _Part(module, name, share, part in ("down", "output"))
            size, rest = divmod(found.length, count)
            if rest:
                raise ValueError(
                    f"{found.name} has {found.length} indices, which {count} groups of the kind {row.kind} cannot "
                    "share equally."
                )
            members.append(Member(names[id(found.linear.weight)], found.dim, size, found.offset))
            is_what.append(Site(index, part))
            if part not in ("down", "output") and found.linear.bias is not None:
                members.append(Member(names[id(found.linear.bias)], 0, size, found.offset))
                is_what.append(Site(index, part, True))
        if isinstance(row, Heads) and row.bias is not None and has(module, row.bias):
            weight = attribute(module, f"{row.bias}.weight")
            members.append(Member(names[id(weight)], 1, full_shape(weight)[1] // count))
            is_what.append(Site(index, "position"))
    found_modules = tuple((clean_name(name), module) for name, module in modules)
    return Layer(Units(row.kind, count, tuple(members), clean_name(owner)), row, found_modules, tuple(is_what))


class _Part:
    """A part of a layer: a linear layer's rows or columns, or an equal share of its rows."""

    def __init__(self, module: nn.Module, name: str, part: str, columns: bool) -> None:
        path, _, share = part.partition(":")
        index, parts = map(int, share.split("/")) if share else (0, 1)
        self.linear = attribute(module, path)
        self.name = clean_name(f"{name}.{path}")
        if not is_linear(self.linear):
            raise ValueError(
                f"{self.name} is a {type(self.linear).__name__}; groups are found in nn.Linear and Conv1D. "
                "If it holds an adapter, merge that first."
            )
        if "weight" not in self.linear._parameters:
            raise ValueError(
                f"{self.name} makes its weight from other parameters, by a parametrization; groups are found in layers "
                "that hold it themselves."
            )
        self.dim = int(columns != is_transposed(self.linear))
        self.length = full_shape(self.linear.weight)[self.dim] // parts
        self.offset = index * self.length


def attribute(module: nn.Module, path: str) -> Any:
    """Return what is at a path of attributes from a module."""
    return reduce(getattr, path.split("."), module)


def has(module: nn.Module, path: str) -> bool:
    """Whether there is something at a path of attributes from a module."""
    found: Any = module
    for each in path.split("."):
        if not hasattr(found, each):
            return False
        found = getattr(found, each)
    return True


def _shares(row: Row) -> dict[str, str]:
    if isinstance(row, Neurons):
        return {f"up{place}": part for place, part in enumerate(row.up)} | {"down": row.down}
    return {"query": row.query, "key": row.key, "value": row.value, "output": row.output}


def _fits(module: nn.Module, row: Row) -> bool:
    """Whether a module has the parts of a row; releases of transformers differ in them."""
    more = row.activation if isinstance(row, Neurons) else row.dim
    return all(has(module, each.partition(":")[0]) for each in (*_shares(row).values(), more))


def _unknown(model: nn.Module, kind: str) -> str:
    if kind in ("row", "column"):
        return f"{type(model).__name__} has no linear layer and no convolution, so it has no {kind}s."
    if kind == "rank":
        return f"{type(model).__name__} has no LoRA adapter, so it has no ranks."
    owners = {
        f"{type(module).__module__}.{type(module).__qualname__}": None
        for module in model.modules()
        if any(map(is_linear, module.children()))
    }
    return (
        f"{type(model).__name__} is of an architecture of which hf_pdecay does not know where the groups of the kind "
        f"{kind} lie. Say so for the class of the module that holds them, with hf_pdecay.add_architecture(Class, "
        f"{'Neurons' if kind == 'neuron' else 'Heads'}(...)); its linear layers are in: {', '.join(owners)}."
    )
