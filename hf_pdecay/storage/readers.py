"""Lets transformers and accelerate read compressed files as they read plain ones.

Their modules call ``safe_open``, ``load_file`` and ``load`` of the safetensors library; here these names get functions
that decode compressed files, and leave others to the library. So a model, or a part of one, is loaded from a compressed
folder by the same code as from the plain one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from threading import Lock
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch as library

from .compressed_file import CompressedFile, checksums_wanted, is_compressed_file


_TORCH = ("pt", "torch", "pytorch")
# What is made of each compressed file that is opened.
_view: ContextVar[Callable[[CompressedFile], Any] | None] = ContextVar("_view", default=None)

# Two threads must not check the same file.
_opening = Lock()


@contextmanager
def opened_as(view: Callable[[CompressedFile], Any]) -> Iterator[None]:
    """Let ``safe_open`` return ``view(file)`` for each compressed file, in this thread."""
    token = _view.set(view)
    try:
        yield
    finally:
        _view.reset(token)


def safe_open(filename: str | os.PathLike[str], framework: str = "pt", device: Any = "cpu", **kwargs: Any) -> Any:
    """Open a file as ``safetensors.safe_open`` does, compressed or plain."""
    if framework in _TORCH and is_compressed_file(filename):
        found = os.stat(filename)
        version = found.st_ino, found.st_size, found.st_mtime_ns
        with _opening:
            file = _opened(os.fspath(filename), device, kwargs.get("backend"), checksums_wanted(), *version).again()
        view = _view.get()
        return file if view is None else view(file)
    return safetensors.safe_open(filename, framework=framework, device=device, **kwargs)


@lru_cache(maxsize=256)
def _opened(file: str, device: Any, backend: str | None, *version: int) -> CompressedFile:
    """Open a file and check it, once: from the disk, offloaded tensors are read in every forward pass."""
    if backend in (None, "mmap"):
        return CompressedFile(file, device)
    return CompressedFile(file, device, in_place=False)


def load_file(filename: str | os.PathLike[str], device: Any = "cpu", **kwargs: Any) -> dict[str, Any]:
    """Read all tensors of a file as ``safetensors.torch.load_file`` does, compressed or plain."""
    if is_compressed_file(filename):
        return CompressedFile(filename, device).get_tensors()
    return library.load_file(filename, device=device, **kwargs)


def load(data: bytes) -> dict[str, Any]:
    """Read all tensors of a file's bytes as ``safetensors.torch.load`` does, compressed or plain."""
    return CompressedFile(data).get_tensors() if is_compressed_file(data) else library.load(data)


_OURS = ((safetensors.safe_open, safe_open), (library.load_file, load_file), (library.load, load))


def register(module: ModuleType) -> None:
    """Let a module read compressed files."""
    _replace(module, {theirs: ours for theirs, ours in _OURS})


def unregister(module: ModuleType) -> None:
    """Undo :func:`register`."""
    _replace(module, {ours: theirs for theirs, ours in _OURS})


def _replace(module: ModuleType, new: dict[Any, Any]) -> None:
    for name, value in list(vars(module).items()):
        if callable(value) and getattr(value, "__hash__", None) is not None and value in new:
            setattr(module, name, new[value])
