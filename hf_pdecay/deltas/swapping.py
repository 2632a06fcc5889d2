"""Putting the changes of a delta into a loaded model and taking them out again, in place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..layers.saved_names import NamesInModel
from ..storage.container import DTYPES, FormatError
from ..storage.manifest import Base, sha256
from .report import read_delta


class _Change(NamedTuple):
    """New values of a tensor: at some places (int64, of the flat tensor), or everywhere if these are None."""

    places: Tensor | None
    values: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Delta:
    """The changes of a delta in memory, as :func:`load_delta` returns them.

    Args:
        folder: The folder of the delta.
        base: What it says of its base.
    """

    folder: Path
    base: Base
    changes: dict[str, _Change] = field(repr=False)

    def to(self, device: torch.device | str) -> Delta:
        """Return the delta with its changes on a device, such as that of the model."""
        moved = {
            name: _Change(None if places is None else places.to(device), values.to(device), shape)
            for name, (places, values, shape) in self.changes.items()
        }
        return Delta(self.folder, self.base, moved)


class _Swapped(NamedTuple):
    """What a swap has replaced: flat tensors of the model, places in them, and the values before."""

    folder: Path
    parts: list[tuple[Tensor, Tensor | None, Tensor]]


# The names in models by those in files.
_names: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()
_swapped: WeakKeyDictionary[nn.Module, _Swapped] = WeakKeyDictionary()
# Tensors whose checksum was that of a base: the version of each at that time, by name and checksum.
_compared: WeakKeyDictionary[nn.Module, dict[tuple[str, str], int]] = WeakKeyDictionary()


def load_delta(delta: str | os.PathLike[str]) -> Delta:
    """Read the changes of a delta into memory, for :func:`swap`; its base is not needed.

    Args:
        delta: A folder that :func:`write_delta` wrote, or its name on the Hub.

    Raises:
        ValueError: If it is not a delta, or is damaged (as a ``FormatError``).
    """
    folder, file, base = read_delta(delta)
    changes = {}
    for name in file.offset_keys():
        dtype, shape = file.form(name)
        kind = getattr(torch, DTYPES[dtype][1])
        if name not in base.sha256:
            changes[name] = _Change(None, file.get_tensor(name).clone(), shape)
            continue
        places, values = file.changes(name)
        if places.size:
            bits = torch.from_numpy(values.copy().view("u1"))
            changes[name] = _Change(torch.from_numpy(places), bits.view(kind), shape)
    return Delta(folder, base, changes)


@torch.no_grad()
def swap(model: nn.Module, delta: Delta | str | os.PathLike[str]) -> None:
    """Give a loaded base the changed weights of a delta, in place; :func:`unswap` takes them out again.

    The values before are kept until then. Give a :class:`Delta` of :func:`load_delta` to swap again and again: a folder
    is read each time.

    Args:
        model: The base, as ``from_pretrained`` loads it. In another dtype than the delta's, the new values are rounded
            to it.
        delta: The delta, or its folder.

    Raises:
        ValueError: If a delta is in the model already, or the model is not the delta's base: it has no such tensor, in
            one piece and this shape, or, in the delta's dtype, other weights by its checksums. Nothing is changed then.
    """
    if model in _swapped:
        raise ValueError(f"Invalid model: it has the delta of {str(_swapped[model].folder)!r}; call unswap first.")
    given = delta if isinstance(delta, Delta) else load_delta(delta)
    pairs = list(_pairs(model, given))
    parts: list[tuple[Tensor, Tensor | None, Tensor]] = []
    for name, flat, (places, values, _) in pairs:
        _compare(model, name, flat, values.dtype, given)
        here = None if places is None else places.to(flat.device)
        parts.append((flat, here, flat.clone() if here is None else flat[here]))
    for (flat, places, _), (_, _, change) in zip(parts, pairs, strict=True):
        values = change.values.to(flat.device, flat.dtype)
        if places is None:
            flat.copy_(values.view(-1))
        else:
            flat[places] = values
    _swapped[model] = _Swapped(given.folder, parts)


@torch.no_grad()
def unswap(model: nn.Module) -> None:
    """Give a model the weights back that it had before :func:`swap`; others, if trained since, stay.

    Raises:
        ValueError: If :func:`swap` has put nothing into the model.
    """
    if model not in _swapped:
        raise ValueError("Invalid model: there is no delta in it; call swap first.")
    for flat, places, before in _swapped.pop(model).parts:
        if places is None:
            flat.copy_(before)
        else:
            flat[places] = before
    known = _compared.get(model, {})
    tensors = dict(_tensors(model))
    for name, checksum in known:
        known[name, checksum] = tensors[name]._version if name in tensors else -1


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _pairs(model: nn.Module, delta: Delta) -> Iterator[tuple[str, Tensor, _Change]]:
    """The model's flat tensors with the changes of each, by the name in the delta; ValueError if one does not fit."""
    tensors: dict[str, Any] = dict(_tensors(model))
    names = _names.setdefault(model, {})
    if not delta.changes.keys() <= names.keys():
        in_model = NamesInModel(model)
        names.update((name, in_model(name)) for name in delta.changes)
    for name, change in delta.changes.items():
        own = names[name]
        tensor = tensors.get(own)
        if tensor is None or tuple(tensor.shape) != change.shape:
            there = f"no {own}" if tensor is None else f"{own} of shape {list(tensor.shape)}"
            raise FormatError(
                f"The delta of {str(delta.folder)!r} cannot be swapped into this {type(model).__name__}: it changes "
                f"{name}, of shape {list(change.shape)}, and the model has {there}. Load the delta by from_pretrained."
            )
        if not tensor.is_contiguous() or type(tensor.data) is not Tensor or tensor.is_meta:
            raise FormatError(
                f"The delta of {str(delta.folder)!r} cannot be swapped into {own}: it must be an ordinary, contiguous "
                "tensor on a device. Load the delta by from_pretrained."
            )
        yield own, tensor.detach().view(-1), change


def _compare(model: nn.Module, name: str, flat: Tensor, dtype: torch.dtype, delta: Delta) -> None:
    """Compare a tensor with the checksum of the base's, unless that was done and it has not changed since."""
    checksum = delta.base.sha256.get(name)
    if checksum is None or flat.dtype != dtype:
        return
    known = _compared.setdefault(model, {})
    if known.get((name, checksum)) == flat._version:
        return
    if sha256(flat.cpu().view(torch.uint8).numpy().data) != checksum:
        raise FormatError(
            f"The model is not the base of the delta of {str(delta.folder)!r}, {delta.base.name}: {name} has another "
            "checksum."
        )
    known[name, checksum] = flat._version
