"""Registers our quantizers in transformers without importing it.

If transformers is not imported yet, a finder in ``sys.meta_path`` waits for the module with its tables of quantizers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pkgutil import resolve_name
from types import ModuleType
from typing import Any


# The module of transformers that has the tables.
TABLES = "transformers.quantizers.auto"
# The installed quantizers, as "module:class"; in the order in which they were installed.
_quantizers: dict[str, None] = {}


def install(*quantizers: str) -> None:
    """Let ``from_pretrained`` load our folders: at once if transformers is imported, else once it is.

    The quantizers are classes with ``register`` and ``unregister``, as ``"module:class"``. Without any, those of
    earlier calls are installed again.
    """
    _quantizers.update(dict.fromkeys(quantizers))
    if TABLES in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def uninstall() -> None:
    """Undo :func:`install`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    if TABLES in sys.modules:
        for name in _quantizers:
            resolve_name(name).unregister()


def _register() -> None:
    for name in _quantizers:
        resolve_name(name).register()


class _Finder(MetaPathFinder):
    """Lets the other finders find the module, and makes its loader register our quantizers once it has run."""

    _asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLES or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return spec
        # The loader's attribute is deleted by the first call, so that inspection sees an ordinary module.
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            run(module)
            # After uninstall there is nothing to register.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        loader.exec_module = exec_module
        return spec
