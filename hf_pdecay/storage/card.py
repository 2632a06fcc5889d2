"""The note on loading in the card of a compressed model."""

from __future__ import annotations

import re
from pathlib import Path

from ..sparsity.file_names import CARD_FILE


_BEGIN, _END = "\n<!-- written by hf-pdecay compress -->\n", "<!-- until here -->\n"
_NOTE = f"""{_BEGIN}
## Loading

The weights of this model are stored without their zeros, by [hf_pdecay](https://pypi.org/project/hf-pdecay/).
`pip install hf-pdecay`, and `import hf_pdecay` before `from_pretrained`, which then loads a bit-identical model.
`hf-pdecay decompress` writes the plain folder, which loads anywhere.

{_END}"""
_DELTA_NOTE = f"""{_BEGIN}
## Loading

This is a delta: only the weights that differ from `{{base}}` are stored, by
[hf_pdecay](https://pypi.org/project/hf-pdecay/). `pip install hf-pdecay`, and `import hf_pdecay` before
`from_pretrained`, which then loads the whole, fine-tuned model. `hf-pdecay apply BASE DELTA OUT` writes the plain
folder, which loads anywhere.

{_END}"""
_ANY_NOTE = re.compile(re.escape(_BEGIN.encode()) + rb".*?" + re.escape(_END.encode()), re.DOTALL)


def add_note(folder: Path, base: str | None = None) -> None:
    """Say in a card, if there is one, how the model is loaded; ``base`` is that of a delta."""
    card = folder / CARD_FILE
    if card.is_file():
        note = _NOTE if base is None else _DELTA_NOTE.format(base=base)
        card.write_bytes(card.read_bytes() + note.encode())


def remove_note(folder: Path) -> None:
    """Undo :func:`add_note`."""
    card = folder / CARD_FILE
    if card.is_file():
        card.write_bytes(_ANY_NOTE.sub(b"", card.read_bytes()))
