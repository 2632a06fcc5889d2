"""Functions that MkDocs calls while it builds the site.

Links that leave docs/ go to the repository, and their targets must exist. The table of settings comes from the class
that defines them; ``python docs/hooks.py`` writes it into the page too, for readers on GitHub.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


_ROOT = Path(__file__).parents[1]
_SETTINGS_PAGE = _ROOT / "docs" / "usage.md"
_TABLE = re.compile(r"(<!-- settings -->\n).*?(<!-- end of settings -->)", re.DOTALL)
_OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)((?:#[^)]*)?)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Turn links such as ``../examples/demo.py``, which GitHub follows, into links to the repository.

    Raises:
        FileNotFoundError: If the file does not exist.
    """

    def to_repository(link: re.Match[str]) -> str:
        path = (_ROOT / "docs" / page.file.src_uri).parent / ".." / link[1]
        if not path.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {link[1]!r}, which is not in the repository.")
        if path.resolve().is_relative_to(_ROOT / "docs"):
            return link[0]
        kind = "tree" if path.is_dir() else "blob"
        return f"]({config.repo_url.rstrip('/')}/{kind}/main/{path.resolve().relative_to(_ROOT.resolve())}{link[2]})"

    return _OUTSIDE.sub(to_repository, with_settings(markdown))


def with_settings(markdown: str) -> str:
    """Put the table of settings between its two marks, if they are there."""
    return _TABLE.sub(lambda match: f"{match[1]}{settings_table()}{match[2]}", markdown)


def settings_table() -> str:
    """Return the table of all settings of the decay in Markdown: name, default and what ``--help`` says."""
    from hf_pdecay.trainer.training_flags import SETTINGS

    names = re.compile(rf'(?<!")\b({"|".join(SETTINGS)})\b(?!")')
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for name, field in SETTINGS.items():
        default = "none" if field.default is None else str(field.default)
        meaning = names.sub(r"`\1`", field.metadata["help"])
        rows.append(f"| `{name}` | {default} | {meaning} |")
    return "".join(f"{row}\n" for row in rows)


if __name__ == "__main__":
    _SETTINGS_PAGE.write_text(with_settings(_SETTINGS_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
