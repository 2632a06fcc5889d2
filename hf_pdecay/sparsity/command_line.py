"""The command of this process, for the card."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path


_SECRET = re.compile(r"(?:^|[-_])(?:token|password|secret|api[-_]?key)$", re.IGNORECASE)


def command_line() -> str:
    """Return the command of this process, with tokens, passwords and keys replaced by ``***``."""
    prefix, given = _launched_by_run() or ([], sys.argv)
    words, hide = [], False
    for word in given:
        name, equals, _ = word.partition("=")
        secret = word.startswith("-") and bool(_SECRET.search(name))
        words.append("***" if hide else f"{name}=***" if secret and equals else word)
        hide = secret and not equals
    if not prefix and words and words[0].endswith(".py"):
        prefix = ["python"]
    return shlex.join([*prefix, *words])


def _launched_by_run() -> tuple[list[str], list[str]] | None:
    """The command and the words of the script, if ``hf-pdecay run`` runs it."""
    words = sys.orig_argv
    for number, (word, after) in enumerate(zip(words, words[1:], strict=False)):
        module = word == "hf_pdecay" and words[number - 1] == "-m"
        if after == "run" and (module or Path(word).stem == "hf-pdecay"):
            return ["hf-pdecay", "run"], words[number + 2 :]
    return None
