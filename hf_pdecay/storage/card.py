"""What the card of a compressed model says of loading it."""

from __future__ import annotations

from pathlib import Path

from ..sparsity.file_names import CARD_FILE
from .container import settle


_BEGIN, _END = "\n<!-- written by hf-pdecay compress -->\n", "<!-- until here -->\n"
_NOTE = f"""{_BEGIN}
## Loading

The weights of this model are stored without their zeros, by [hf_pdecay](https://pypi.org/project/hf-pdecay/).
`pip install hf-pdecay`, and `import hf_pdecay` before `from_pretrained` of transformers 5.23 or later, which then gives
the model back to the bit. `hf-pdecay decompress` writes the plain folder, which loads anywhere.

{_END}"""


def add_note(folder: Path) -> None:
    """Say in a card, if there is one, how the model is loaded."""
    card = folder / CARD_FILE
    if card.is_file():
        _write(card, card.read_bytes() + _NOTE.encode())


def remove_note(folder: Path) -> None:
    """Give a card back as it was before :func:`add_note`."""
    card = folder / CARD_FILE
    if card.is_file():
        _write(card, card.read_bytes().replace(_NOTE.encode(), b"", 1))


def _write(card: Path, text: bytes) -> None:
    with open(card, "wb") as handle:
        handle.write(text)
        settle(handle)
