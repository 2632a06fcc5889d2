"""Shrinking a model's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..sparsity.counting import measure_sparsity
from ..storage.folder import ADAPTER_CONFIG, CONFIG, check_out, read_weights, write_json
from ..storage.hub import local_folder
from ..storage.loading import load_whole, unused_note
from ..storage.source import is_ragged, read_source
from .adapter import shrink_adapter
from .card import recount
from .configs import configs_within, with_values
from .model import check_layout, shrink_model
from .report import ShrinkReport


def shrink_folder(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layers: str = "uniform",
    multiple_of: int = 1,
    overwrite: bool = False,
) -> ShrinkReport:
    """Remove the dead neurons and heads from a saved model, and copy the other files of its folder.

    From a LoRA adapter it removes the dead ranks of each layer; the base model is not needed.

    Args:
        model: A folder with ``config.json`` and safetensors, or of an adapter, or a name on the Hub, which is
            downloaded.
        out: The folder to write. It appears when it is whole.
        layers: As for :func:`~hf_pdecay.shrink`.
        multiple_of: As for :func:`~hf_pdecay.shrink`.
        overwrite: Replace ``out`` if it is a model's folder.

    Returns:
        What was removed.

    Raises:
        ValueError: If the weights are not plain safetensors, the architecture is unknown, nothing can be removed, or an
            argument is invalid.
    """
    check_layout(layers, multiple_of)
    check_out(out, overwrite)
    folder = local_folder(model)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
        if multiple_of != 1:
            raise ValueError(f"Invalid multiple_of: multiple_of={multiple_of!r} for an adapter; it is about neurons.")
        return shrink_adapter(folder, out, overwrite=overwrite)
    source = read_source(folder, out, overwrite)
    source.check_plain()
    loaded, unused = load_whole(source)
    report = shrink_model(loaded, layers=layers, multiple_of=multiple_of)
    if unused:
        report.notes.append(unused_note(unused, loaded))
    if not report.shrunk:
        dead = sum(layer.dead for layer in report.layers)
        reason = f"Nothing of {str(folder)!r} can be removed: {dead} of its neurons and heads are dead."
        raise ValueError(" ".join([reason, *report.notes]))
    with source.rewritten() as aside:
        loaded.save_pretrained(str(aside))
        report.left_out = source.copy_along(aside)
        # Other keys of the config stay as they are in the file.
        sizes = {
            f"{path}.quantization_config".lstrip("."): settings
            for path, config in configs_within(loaded.config).items()
            if is_ragged(settings := getattr(config, "quantization_config", None))
        }
        write_json(aside / CONFIG, with_values(source.config, report.config | sizes, loaded.config))
        recount(
            aside,
            report,
            "neurons and heads from the model",
            lambda old: measure_sparsity(
                loaded,
                decayed=[tensor.name for tensor in old.tensors if tensor.decayed],
                near_zero_threshold=old.near_zero_threshold,
            ),
            "" if not sizes else " The model loads after `import hf_pdecay` (`pip install hf-pdecay`).",
        )
        report.bytes = _weights_bytes(folder, source.headers), _weights_bytes(aside, read_weights(aside))
    return report


def _weights_bytes(folder: Path, names: Any) -> int:
    return sum((folder / name).stat().st_size for name in names)
