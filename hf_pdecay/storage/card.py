"""The note on loading in the card of a compressed model."""

from __future__ import annotations

from pathlib import Path

from ..sparsity.file_names import CARD_FILE


_BEGIN, _END = "\n<!-- written by hf-pdecay compress -->\n", "<!-- until here -->\n"
_NOTE = f"""{_BEGIN}
## Loading

The weights of this model are stored without their zeros, by [hf_pdecay](https://pypi.org/project/hf-pdecay/).
`pip install hf-pdecay`, and `import hf_pdecay` before `from_pretrained`, which then loads a bit-identical model.
`hf-pdecay decompress` writes the plain folder, which loads anywhere.

{_END}"""


def add_note(folder: Path) -> None:
    """Say in a card, if there is one, how the model is loaded."""
    card = folder / CARD_FILE
    if card.is_file():
        card.write_bytes(card.read_bytes() + _NOTE.encode())


def remove_note(folder: Path) -> None:
    """Undo :func:`add_note`."""
    card = folder / CARD_FILE
    if card.is_file():
        card.write_bytes(card.read_bytes().replace(_NOTE.encode(), b"", 1))
