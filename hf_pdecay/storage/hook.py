"""Teaches transformers to load compressed models, and shrunk ones whose layers differ, without importing it.

``import hf_pdecay`` calls :func:`install`. If transformers has not been imported by then, a finder waits at the front
of ``sys.meta_path`` for the module that has transformers' tables of quantizers, and adds ours once that module has run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


# The module of transformers that has the tables.
TABLES = "transformers.quantizers.auto"
# Those that enter something in them; by name, as shrinking lies above storage.
_QUANTIZERS = ("hf_pdecay.storage.quantizer", "hf_pdecay.shrinking.quantizer")


def install() -> None:
    """Let ``from_pretrained`` load what this package writes: at once if transformers is there, else once it comes."""
    if TABLES in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def uninstall() -> None:
    """Undo :func:`install`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    if TABLES in sys.modules:
        for name in _QUANTIZERS:
            import_module(name).unregister()


def _register() -> None:
    for name in _QUANTIZERS:
        import_module(name).register()


class _Finder(MetaPathFinder):
    """Lets the other finders find the module, and has its loader call back once it has run."""

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
        # An attribute of this one loader, which goes away with the first call: inspection sees an ordinary module.
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            run(module)
            # A finder that uninstall has taken away has nothing to add.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        loader.exec_module = exec_module
        return spec
