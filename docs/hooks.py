"""What MkDocs calls while it builds the site: links that leave docs/ go to the repository, and must lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


_ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)((?:#[^)]*)?)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Turn links such as ``../examples/demo.py``, which GitHub follows, into links to the repository.

    Raises:
        FileNotFoundError: If there is no such file.
    """

    def to_repository(link: re.Match[str]) -> str:
        path = (_ROOT / "docs" / page.file.src_uri).parent / ".." / link[1]
        if not path.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {link[1]!r}, which is not in the repository.")
        if path.resolve().is_relative_to(_ROOT / "docs"):
            return link[0]
        kind = "tree" if path.is_dir() else "blob"
        return f"]({config.repo_url.rstrip('/')}/{kind}/main/{path.resolve().relative_to(_ROOT.resolve())}{link[2]})"

    return _OUTSIDE.sub(to_repository, markdown)
