"""A model that is loaded from a folder, changed in memory without training, and saved as another folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..checks import check_choice
from ..sparsity.card_text import add_note, add_section, set_sparsity
from ..sparsity.counting import measure_sparsity
from ..sparsity.file_names import CARD_FILE, CODES_FILE, REPORT_FILE
from ..storage.casting import cast_config
from ..storage.folder import CONFIG, write_json
from ..storage.loading import class_of, load_whole, unused_note
from ..storage.source import read_source
from .calibration import calibration_rows
from .model import check_config, context_of
from .quantization_report import QuantizationReport
from .report import OneShotReport


DTYPES = ("auto", "float32", "bfloat16", "float16")
_LONGEST = 2048  # tokens in a row, unless asked for
_HEADING = "## Sparsity\n\n"

Write = Callable[[Path, Any], tuple[list[str], Mapping[str, Any]]]


@dataclass(frozen=True)
class Calibration:
    """How a model is run and saved, and which rows it sees; the fields are arguments of ``prune_folder``."""

    rows: int = 128
    row_length: int | None = None
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    overwrite: bool = False


class Rewriting:
    """Loads a model and saves what was made of it; as a context it explains a lack of memory.

    The arguments are those of :func:`~hf_pdecay.prune_folder`, by the same names.

    Raises:
        ValueError: If an argument is invalid, or the model is quantized.
    """

    def __init__(self, model: str | os.PathLike[str], out: str | os.PathLike[str], calibration: Calibration) -> None:
        check_choice("dtype", calibration.dtype, DTYPES)
        self._device = _device(calibration.device)
        self._asked = calibration
        self.source = read_source(model, out, calibration.overwrite)
        self.source.check_unquantized(ragged=True)
        self._model: Any = None
        self._unused: list[str] = []

    def __enter__(self) -> Rewriting:
        """Return the object."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Say what helps if memory was too small."""
        if isinstance(error, torch.OutOfMemoryError):
            reason = str(error).partition(". ")[0]
            raise ValueError(
                f"The model and what one block needs do not fit on {self._device} ({reason}); give fewer rows, "
                "dtype='bfloat16', or device='cpu' (--rows, --dtype, --device)."
            ) from error

    def rows(self, texts: Sequence[str]) -> torch.Tensor:
        """Return calibration rows, as the model and its tokenizer take them; raise ValueError if they cannot."""
        asked, row_length = self._asked, self._asked.row_length
        cls = class_of(self.source)
        config = cls.config_class.from_pretrained(self.source.folder)
        check_config(config, cls.__name__)
        tokenizer = _tokenizer(self.source.folder)
        limits = [limit for limit in (context_of(config), tokenizer.model_max_length) if limit is not None]
        longest = min(limits)
        if row_length is not None and row_length > longest:
            raise ValueError(
                f"Invalid row_length: row_length={row_length}; the model or its tokenizer takes at most {longest} "
                "tokens."
            )
        length = min(longest, _LONGEST) if row_length is None else row_length
        return calibration_rows(texts, tokenizer, rows=asked.rows, row_length=length, seed=asked.seed)

    def load(self) -> Any:
        """Return the model, on its device."""
        loaded, self._unused = load_whole(self.source, self._asked.dtype)
        self._model = loaded.to(self._device)
        return self._model

    def save(
        self,
        report: OneShotReport | QuantizationReport,
        names: Sequence[str],
        note: str,
        codes: Mapping[str, Any] | None = None,
        write: Write | None = None,
    ) -> None:
        """Write the folder.

        Args:
            report: What was done; gets what is left to say.
            names: The parameters that were changed, whose zeros count as those of the model.
            note: What the model's card says of it, if there is one.
            codes: What the file of codes says; None removes what the model had.
            write: Writes the weights, if not as plain ones, and returns what is left to say and what the config gets.
        """
        source, dtype = self.source, self._asked.dtype
        if self._unused:
            report.notes.append(unused_note(self._unused, self._model))
        with source.rewritten() as aside:
            more: Mapping[str, Any] = {}
            if write is None:
                self._model.save_pretrained(str(aside))
            else:
                notes, more = write(aside, self._model)
                report.notes += notes
            report.left_out = source.copy_along(aside)
            # Keys of the config that the class does not know stay as they are in the file.
            config = source.config if dtype == "auto" else cast_config(source.config, dtype)
            write_json(aside / CONFIG, {**config, **more})
            sparsity = measure_sparsity(self._model, decayed=names)
            sparsity.save(aside / REPORT_FILE)
            (aside / CODES_FILE).unlink(missing_ok=True)
            if codes is not None:
                write_json(aside / CODES_FILE, dict(codes))
            _note(aside / CARD_FILE, note, sparsity.sparsity)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    patterns = ("tokenizer*", "vocab*", "*.model", "spiece*")
    if any(any(folder.glob(pattern)) for pattern in patterns):
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"The tokenizer of {str(folder)!r} cannot be loaded ({reason}).") from error
    raise ValueError(f"{str(folder)!r} has no tokenizer, which the text needs; save the model's tokenizer there.")


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"Invalid device: device={device!r} is not here ({reason}).") from error
    return place


def _note(card: Path, note: str, sparsity: float) -> None:
    """Say in a card, if there is one, what was done, and how sparse the model is."""
    if not card.is_file():
        return
    text = set_sparsity(card.read_text(encoding="utf-8"), sparsity)
    if _HEADING in text:
        text = add_note(text, f"{note}\nThe counts below are those of the model before.")
    else:
        text = add_section(text, f"{_HEADING}{note}")
    card.write_text(text, encoding="utf-8")
