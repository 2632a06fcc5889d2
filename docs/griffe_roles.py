"""Rewrites docstrings for the site: Sphinx roles become code, and headings of parameters are removed."""

from __future__ import annotations

import re
from typing import Any

import griffe


_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`~?\.*([^`]+)`")
_HEADING = re.compile(r"^\s*> Parameters that control .*\n\n?", re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrites each docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            text = _HEADING.sub("", obj.docstring.value)
            obj.docstring.value = _ROLE.sub(lambda role: f"`{role[1].removeprefix('hf_pdecay.')}`", text)
