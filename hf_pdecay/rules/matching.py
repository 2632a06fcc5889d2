"""Which parameters a pattern means, by their names in the model and in files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .spec import Rule


@dataclass(frozen=True)
class Finder:
    """Finds the parameters that a rule matches.

    Args:
        aliases: By parameter, its name, its other names in the model and the one in files.
        parts: By parameter, the names in files of its parts, if files have it in parts.
        decayed: Names of those that decay by default.
    """

    aliases: Mapping[str, Sequence[str]]
    parts: Mapping[str, Sequence[str]]
    decayed: Sequence[str]

    def __call__(self, rule: Rule) -> set[str]:
        """Return the names of the parameters that a rule matches by any of their names; ValueError if by none."""
        exact = self._exact(rule.text)
        if exact:
            return exact
        found = {name for name, known in self.aliases.items() if any(map(rule.matches, known))}
        for name, parts in self.parts.items():
            matched = [part for part in parts if name not in found and rule.matches(part)]
            if 0 < len(matched) < len(parts):
                other = next(part for part in parts if part not in matched)
                raise ValueError(
                    f"Invalid lp_rules: the pattern {rule.text!r} matches {matched[0]} and not {other}; both are parts "
                    f"of {name}, which a rule takes as a whole. Name that."
                )
            found |= {name} if matched else set()
        if not found:
            raise ValueError(self._no_match(rule.text))
        return found

    def _exact(self, text: str) -> set[str]:
        """The parameters for which a pattern is a whole name, or else those of the module for which it is one."""
        exact = {name for name, known in self.aliases.items() if text in known}
        if exact or "." not in text or not text[-1].isalnum():
            return exact
        return {name for name, known in self.aliases.items() if any(alias.startswith(f"{text}.") for alias in known)}

    def _no_match(self, pattern: str) -> str:
        names = [alias for name in self.decayed or self.aliases for alias in self.aliases[name]]
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
        if not near:
            # A pattern is usually shorter than a name: compare it with what stands between two dots.
            pieces = {piece: name for name in reversed(names) for piece in name.split(".")}
            near = [pieces[piece] for piece in difflib.get_close_matches(pattern, list(pieces), n=3, cutoff=0.5)]
        shown = ", ".join(dict.fromkeys(near or names[:3]))
        what = "weights that decay" if self.decayed else "parameters"
        return (
            f"Invalid lp_rules: the pattern {pattern!r} matches no trainable parameter; "
            f"{f'near matches among the {what}' if near else f'{what} are named like'}: {shown}. "
            "`hf-pdecay preview CONFIG_OR_FOLDER --tensors` lists all names."
        )
