"""Finding the units of a model: weights that live and die together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..checks import check_choice
from ..names import clean_name
from ..optim.shards import full_shape
from ..optim.unit_kinds import UNIT_KINDS
from ..optim.units import Member, Units
from .architectures import Heads, Neurons, Row, rows_of
from .matrices import is_linear, is_transposed, matrices_of, matrix_units


class Site(NamedTuple):
    """What a member of a layer's units is: its module's index in the layer, its part, and whether it is the bias.

    The part is ``"up0"``, ``"up1"``, ``"down"``, ``"query"``, ``"key"``, ``"value"``, ``"output"`` or ``"position"``.
    """

    module: int
    part: str
    bias: bool = False


@dataclass(frozen=True)
class Layer:
    """The units of a layer, and the modules in which they lie.

    Args:
        row: The entry of the table; None for rows, columns, ranks and the neurons of fused experts.
        modules: The modules of the entry's class, by their clean names.
        sites: What each member is, in the order of ``units.members``; empty without a row.
    """

    units: Units[str]
    row: Row | None = None
    modules: tuple[tuple[str, nn.Module], ...] = ()
    sites: tuple[Site, ...] = ()


def find_units(model: nn.Module, kind: str) -> list[Units[str]]:
    """Find the units of each layer of a model, in its order: weights that live and die together.

    Args:
        model: A model on any device, the meta device included. Names leave out the wrappers of ``torch.compile``, DDP
            and FSDP.
        kind: ``"row"`` or ``"column"`` of each linear layer, convolution and ``nn.MultiheadAttention``: what feeds
            one of its outputs, bias included, or takes one of its inputs; ``"neuron"`` of each feed-forward layer and
            fused expert;
            ``"head"`` of each attention layer, with grouped queries a head of keys and values and the queries that
            share it; ``"rank"`` of each LoRA adapter.

    Raises:
        ValueError: If the kind is unknown, the model's architecture is not in the table, or it has no such units.
    """
    return [layer.units for layer in find_layers(model, kind)]


def find_layers(model: nn.Module, kind: str) -> list[Layer]:
    """Find what :func:`find_units` finds, with the modules."""
    check_choice("kind", kind, UNIT_KINDS)
    names = {id(param): clean_name(name) for name, param in model.named_parameters()}
    if kind in ("row", "column"):
        layers = [Layer(units) for units in matrix_units(model, kind)]
    elif kind == "rank":
        layers = [Layer(units) for units in _ranks(model, names)]
    else:
        layers = _declared(model, kind, names)
        layers += [Layer(units) for units in _neurons_of_experts(model, names)] if kind == "neuron" else []
    if not layers:
        raise ValueError(_unknown(model, kind))
    return layers


def _ranks(model: nn.Module, names: dict[int, str]) -> Iterator[Units[str]]:
    from ..adapters.factors import lora_factors, lora_names

    for adapter in lora_names(model):
        for factors in lora_factors(model, adapter):
            members = Member(names[id(factors.a)], 0), Member(names[id(factors.b)], 1)
            yield Units("rank", full_shape(factors.a)[0], members, clean_name(factors.name))


def _neurons_of_experts(model: nn.Module, names: dict[int, str]) -> Iterator[Units[str]]:
    """The neurons of each fused expert whose module has the parameters of transformers' experts."""
    for name, module in model.named_modules():
        stacks = {id(matrix.weight): matrix for matrix in matrices_of(module) if matrix.stacked}
        parts = {key: stacks.get(id(param)) for key, param in module.named_parameters(recurse=False)}
        ups = [matrix for key in ("gate_up_proj", "gate_proj", "up_proj") if (matrix := parts.get(key)) is not None]
        down = parts.get("down_proj")
        if down is None or down.transposed is None or not ups or any(up.transposed is None for up in ups):
            continue
        experts, count = full_shape(down.weight)[0], full_shape(down.weight)[down.dim("column")]
        sides: list[tuple[Tensor, int, int, int]] = []
        for up in ups:
            times = full_shape(up.weight)[up.dim("row")] // count
            # Gate and up projection of a fused one stand one after the other, or their outputs take turns.
            one_by_one = times == 1 or getattr(module, "is_concatenated", type(module).__name__ != "GptOssExperts")
            for size, offset in [(1, place * count) for place in range(times)] if one_by_one else [(times, 0)]:
                sides.append((up.weight, up.dim("row"), size, offset))
                sides += [(up.bias, 1, size, offset)] if up.bias is not None else []
        sides.append((down.weight, down.dim("column"), 1, 0))
        for expert in range(experts):
            members = (Member(names[id(param)], dim, size, offset, expert) for param, dim, size, offset in sides)
            yield Units("neuron", count, tuple(members), clean_name(f"{name}[{expert}]"))


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
    return [_layer(owner, rows[row], members, names) for (owner, row), members in together.items()]


def _owner(modules: dict[str, nn.Module], name: str, ancestor: str) -> str:
    """The name of the nearest module of a class around another module."""
    while name:
        name = name.rpartition(".")[0]
        if any(base.__name__ == ancestor for base in type(modules[name]).__mro__):
            return name
    return ""


def _layer(owner: str, row: Row, modules: list[tuple[str, nn.Module]], names: dict[int, str]) -> Layer:
    count = 0
    members: list[Member[str]] = []
    sites: list[Site] = []
    for index, (name, module) in enumerate(modules):
        shares = _shares(row)
        counting = _Part(module, name, shares["key" if isinstance(row, Heads) else "up0"], False)
        here = counting.length // (attribute(module, row.dim) if isinstance(row, Heads) else 1)
        if count not in (0, here):
            raise ValueError(f"{clean_name(name)} has {here} {row.kind}s, but layers that share them have {count}.")
        if not here:
            raise ValueError(f"{counting.name} has {counting.length} rows, fewer than one {row.kind}.")
        count = here
        for part, share in shares.items():
            side = _Part(module, name, share, part in ("down", "output"))
            size, rest = divmod(side.length, count)
            if rest:
                raise ValueError(f"{side.name} has {side.length} indices, not divisible by its {count} {row.kind}s.")
            members.append(Member(names[id(side.linear.weight)], side.dim, size, side.offset))
            sites.append(Site(index, part))
            if part not in ("down", "output") and side.linear.bias is not None:
                members.append(Member(names[id(side.linear.bias)], 0, size, side.offset))
                sites.append(Site(index, part, True))
        if isinstance(row, Heads) and row.bias is not None and has(module, row.bias):
            weight = attribute(module, f"{row.bias}.weight")
            members.append(Member(names[id(weight)], 1, full_shape(weight)[1] // count))
            sites.append(Site(index, "position"))
    named = tuple((clean_name(name), module) for name, module in modules)
    return Layer(Units(row.kind, count, tuple(members), clean_name(owner)), row, named, tuple(sites))


class _Part:
    """A part of a layer: a linear layer's rows or columns, or an equal share of its rows."""

    def __init__(self, module: nn.Module, name: str, part: str, columns: bool) -> None:
        path, _, share = part.partition(":")
        index, parts = map(int, share.split("/")) if share else (0, 1)
        self.linear = attribute(module, path)
        self.name = clean_name(f"{name}.{path}")
        if not is_linear(self.linear):
            raise ValueError(
                f"{self.name} is a {type(self.linear).__name__}; units are found in nn.Linear and Conv1D. "
                "If it holds an adapter, merge that first."
            )
        if "weight" not in self.linear._parameters:
            raise ValueError(
                f"{self.name} computes its weight from other parameters by a parametrization; units are found only in "
                "layers that hold their weight."
            )
        self.dim = int(columns != is_transposed(self.linear))
        self.length = full_shape(self.linear.weight)[self.dim] // parts
        self.offset = index * self.length


def attribute(module: nn.Module, path: str) -> Any:
    """Return what is at a path of attributes from a module."""
    return reduce(getattr, path.split("."), module)


def has(module: nn.Module, path: str) -> bool:
    """Whether there is something at a path of attributes from a module."""
    value: Any = module
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def _shares(row: Row) -> dict[str, str]:
    if isinstance(row, Neurons):
        return {f"up{place}": part for place, part in enumerate(row.up)} | {"down": row.down}
    return {"query": row.query, "key": row.key, "value": row.value, "output": row.output}


def _fits(module: nn.Module, row: Row) -> bool:
    """Whether a module has the parts of a row; releases of transformers differ in them."""
    more = row.activation if isinstance(row, Neurons) else row.dim
    return all(has(module, path.partition(":")[0]) for path in (*_shares(row).values(), more))


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
        f"hf_pdecay does not know where the {kind}s of {type(model).__name__} lie. Call "
        f"hf_pdecay.add_architecture(Class, {'Neurons' if kind == 'neuron' else 'Heads'}(...)) for the class "
        f"of the module that holds them; its linear layers are in: {', '.join(owners)}."
    )
