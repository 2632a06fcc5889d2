"""Shrinking a model's folder."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from ..sparsity.counting import SparsityReport, measure_sparsity
from ..sparsity.file_names import REPORT_FILE
from ..storage.container import FormatError, Header
from ..storage.folder import (
    ADAPTER_CONFIG,
    CONFIG,
    check_apart,
    check_target,
    copy_along,
    read_config,
    read_weights,
    settle_files,
    write_json,
    written_folder,
)
from ..storage.hub import local_folder
from ..storage.manifest import METHOD as COMPRESSED
from ..storage.untrusted import explained, model_class, on_meta
from .adapter import shrink_adapter
from .card import note_in_card
from .model import check_layout, count_parameters, shrink_model
from .report import ShrinkReport
from .sizes import METHOD


def shrink_folder(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layers: str = "uniform",
    multiple_of: int = 1,
    overwrite: bool = False,
) -> ShrinkReport:
    """Cut the dead neurons and heads out of a saved model, and copy what else is in its folder.

    Of a LoRA adapter it cuts the dead ranks, layer by layer and without its base model, see :mod:`.adapter`.

    Args:
        model: A folder with ``config.json`` and safetensors, or of an adapter, or a name on the Hub, which is
            downloaded.
        out: The folder to write. It appears when it is whole.
        layers: See :func:`~hf_pdecay.shrinking.shrink`.
        multiple_of: See :func:`~hf_pdecay.shrinking.shrink`.
        overwrite: Replace ``out`` if it is a model's folder.

    Returns:
        What was cut.

    Raises:
        ValueError: If the model's weights are not plain safetensors, its architecture is not known, there is nothing to
            cut, or an argument is wrong.
    """
    check_layout(layers, multiple_of)
    check_target(out, overwrite)
    folder = local_folder(model)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
        if multiple_of != 1:
            raise ValueError(f"Invalid multiple_of: multiple_of={multiple_of!r} for an adapter; it is about neurons.")
        return shrink_adapter(folder, out, overwrite=overwrite)
    config = read_config(folder)
    settings = config.get("quantization_config")
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        what = "Shrink the model that it was made of" if method == METHOD else "Give the plain model back first"
        how = ", as `hf-pdecay decompress` does" if method == COMPRESSED else ""
        raise FormatError(
            f"{str(folder)!r} has a quantization_config: its weights are compressed, quantized or shrunk already "
            f"(quant_method {method!r}). {what}{how}."
        )
    headers = read_weights(folder)
    check_apart(folder, out)
    loaded, unused = _load(folder, config, headers)
    report = shrink_model(loaded, layers=layers, multiple_of=multiple_of)
    if unused:
        report.notes.append(
            f"{len(unused)} tensors of the files are none of {type(loaded).__name__} and were left out: {unused[0]}"
            f"{' and others' if len(unused) > 1 else ''}."
        )
    if not report.shrunk:
        found = sum(each.dead for each in report.layers)
        raise ValueError(
            " ".join(
                [f"Nothing of {str(folder)!r} can be cut: {found} of its neurons and heads are dead.", *report.notes]
            )
        )
    with written_folder(out, overwrite) as aside:
        loaded.save_pretrained(str(aside))
        report.left_out = copy_along(folder, aside, headers)
        # The config as it was, so that what else is in it reads as before.
        settings = getattr(loaded.config, "quantization_config", None)
        more = {} if settings is None else {"quantization_config": settings}
        write_json(aside / CONFIG, config | report.config | more)
        if (aside / REPORT_FILE).is_file():
            old = SparsityReport.load(aside / REPORT_FILE)
            decayed = [each.name for each in old.tensors if each.decayed]
            threshold = old.near_zero_threshold
            measure_sparsity(loaded, decayed=decayed, near_zero_threshold=threshold).save(aside / REPORT_FILE)
        loading = "" if settings is None else " The model loads after `import hf_pdecay` (`pip install hf-pdecay`)."
        note_in_card(aside, report, "neurons and heads from the model", loading)
        settle_files(aside)
        report.bytes = _weights_bytes(folder, headers), _weights_bytes(aside, read_weights(aside))
    return report


def _load(folder: Path, config: dict[str, Any], headers: dict[str, Header]) -> tuple[Any, list[str]]:
    """The model of a folder, by the class of transformers that its config names, and what this does not take."""
    import transformers

    cls = model_class(config.get("architectures"))
    if cls is None:
        names = config.get("architectures")
        raise ValueError(
            f"{CONFIG} of {str(folder)!r} names {names!r} in architectures; the first must be a model of transformers "
            f"{transformers.__version__}."
        )
    name, source = cls.__name__, str(folder)
    with explained(f"{source!r} cannot be loaded as a {name}"):
        wanted = count_parameters(on_meta(cls, cls.config_class.from_pretrained(source), folder))
        there = sum(math.prod(entry.shape) for header in headers.values() for entry in header.entries.values())
        # transformers would make missing weights, at any size that a forged config gives.
        if wanted > there:
            raise FormatError(
                f"{source!r} is not a whole {name}: its config describes {wanted:,} weights, and its files have "
                f"{there:,}."
            )
        model, info = cls.from_pretrained(
            source, dtype="auto", use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    if info["missing_keys"]:
        raise FormatError(f"{source!r} is not a whole {name}: {min(info['missing_keys'])} is missing from its weights.")
    return model.eval(), sorted(info["unexpected_keys"])


def _weights_bytes(folder: Path, names: Any) -> int:
    return sum((folder / name).stat().st_size for name in names)
