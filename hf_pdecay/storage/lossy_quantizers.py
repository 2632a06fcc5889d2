"""Warns before transformers quantises a model with zeros in a way that loses them.

As a completion of `transformers.quantizers.base` it sees every `quantization_config` given to `from_pretrained`.
What is said of each quantiser comes from `benchmarks/zeros_survive.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from ..sparsity.file_names import REPORT_FILE
from ..sparsity.report import SparsityReport
from ..terminal import get_logger
from .container import DTYPES, FormatError
from .folder import read_weights
from .readers import safe_open


logger = get_logger(__name__)

WORTH_KEEPING = 0.05
"""Fraction of zeros from which a model counts as sparse."""

_LOOKED_AT, _LARGEST = 3, 1 << 26  # tensors of a model that no run has reported on, and weights in them
_FILLS, _NAN = "fills zeros in", "turns rows of zeros, such as dead neurons, into NaN"
_INSTEAD = "`hf-pdecay quantize`, bitsandbytes' nf4 and torchao's IntxWeightOnlyConfig keep every zero"
_INSTEAD_OF_FLOAT8 = "int8 keeps every zero, and `hf-pdecay shrink` removes dead neurons"


def what_is_lost(settings: Any) -> str | None:
    """Return what a quantiser does to zeros, and what to use instead; None if nothing is known against it.

    Args:
        settings: A quantization config of transformers, or the ``quantization_config`` of a ``config.json``.
    """
    if not isinstance(settings, Mapping):
        settings = settings.to_dict() if hasattr(settings, "to_dict") else {}
    method = settings.get("quant_method")
    method, kind = str(getattr(method, "value", method)), ""
    if method == "quanto":
        kind = str(settings.get("weights"))
        if kind in ("int4", "int2"):
            return f"quanto's {kind} {_FILLS}; its int8 keeps them. {_INSTEAD}"
    elif method == "torchao":
        kind = str(settings.get("quant_type")).lower()
    elif method == "gptq":
        return (
            f"GPTQ {_FILLS}, as it spreads the error of each column over all later ones: llm-compressor's left 93% of "
            "those of a language model, and 59% in one tensor. `hf-pdecay quantize --data` is GPTQ that keeps them"
        )
    elif method == "hqq":
        return f"HQQ {_FILLS}. {_INSTEAD}"
    return f"{method}'s float8 {_NAN}; {_INSTEAD_OF_FLOAT8}" if "float8" in kind else None


def share_of_zeros(folder: Path) -> float | None:
    """Return the fraction of zeros in the matrices of a saved model, by its report or in some of them; else None."""
    try:
        if (folder / REPORT_FILE).is_file():
            report = SparsityReport.load(folder / REPORT_FILE)
            return report.sparsity if report.delta is None else report.model_sparsity
        shares: list[float] = []
        for file, header in read_weights(folder).items():
            with safe_open(folder / file) as handle:
                for name in header.entries:
                    form = handle.get_slice(name)
                    shape = form.get_shape()
                    if "embed" in name or len(shape) != 2 or shape[0] * shape[1] > _LARGEST:
                        continue
                    if not DTYPES[form.get_dtype()][1].startswith(("float", "bfloat")):
                        continue
                    shares.append(float((handle.get_tensor(name) == 0).float().mean()))
                    if len(shares) == _LOOKED_AT:
                        return max(shares)
        return max(shares, default=None)
    except (FormatError, ValueError, OSError, KeyError):
        return None


def warn_before(quantizer: Any, model: Any) -> None:
    """Warn if a quantiser of transformers is about to lose the zeros of a model that it has loaded from a folder."""
    if quantizer.pre_quantized or (lost := what_is_lost(quantizer.quantization_config)) is None:
        return
    folder = Path(str(getattr(model.config, "_name_or_path", "") or ""))
    share = share_of_zeros(folder) if folder.is_dir() else None
    if share is not None and share >= WORTH_KEEPING:
        logger.warning(
            "%s has %.0f%% zeros, and %s. `hf-pdecay check` says which zeros are kept; see docs/quantisation.md.",
            *(folder, 100 * share, lost),
        )


def register(module: ModuleType) -> None:
    """Have the quantisers of transformers, whose base is in a module, warn."""
    original = module.HfQuantizer.preprocess_model

    @wraps(original)
    def preprocess_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        warn_before(self, model)
        return original(self, model, *args, **kwargs)

    preprocess_model.is_ours = True  # type: ignore[attr-defined]
    if not hasattr(original, "is_ours"):
        module.HfQuantizer.preprocess_model = preprocess_model


def unregister(module: ModuleType) -> None:
    """Undo :func:`register`."""
    current = module.HfQuantizer.preprocess_model
    if hasattr(current, "is_ours"):
        module.HfQuantizer.preprocess_model = current.__wrapped__
