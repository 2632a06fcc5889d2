"""Completes modules of other libraries without importing them.

A finder in ``sys.meta_path`` waits for those that are not imported yet.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pkgutil import resolve_name
from types import ModuleType
from typing import Any


# What completes each module, as "module:object", by the module's name.
_completions: dict[str, str] = {}


def install(completions: Mapping[str, str]) -> None:
    """Complete modules, each at once if it is imported, else once it is.

    The values are objects with functions ``register(module)`` and ``unregister(module)``, as ``"module:object"``.
    """
    _completions.update(completions)
    for name in _completions.keys() & sys.modules.keys():
        _complete(name)
    if not sys.modules.keys() >= _completions.keys() and not any(map(_is_ours, sys.meta_path)):
        sys.meta_path.insert(0, _Finder())


def uninstall() -> None:
    """Undo :func:`install`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_ours(finder)]
    for name in _completions.keys() & sys.modules.keys():
        resolve_name(_completions[name]).unregister(sys.modules[name])


def _complete(name: str) -> None:
    resolve_name(_completions[name]).register(sys.modules[name])


def _is_ours(finder: object) -> bool:
    return isinstance(finder, _Finder)


class _Finder(MetaPathFinder):
    """Lets the other finders find the modules, and makes their loaders complete them once they have run."""

    def __init__(self) -> None:
        self._asking: set[str] = set()
        self._before = _completions.keys() & sys.modules.keys()
        self._done: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _completions or fullname in self._asking:
            return None
        self._asking.add(fullname)
        try:
            spec = find_spec(fullname)
        finally:
            self._asking.remove(fullname)
        if spec is None or spec.loader is None:
            return spec
        # The loader's attribute is deleted by the first call, so that inspection sees an ordinary module.
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            run(module)
            # After uninstall there is nothing to complete.
            if self in sys.meta_path:
                _complete(fullname)
                self._done.add(fullname)
                if self._done >= _completions.keys() - self._before:
                    sys.meta_path.remove(self)

        loader.exec_module = exec_module
        return spec
