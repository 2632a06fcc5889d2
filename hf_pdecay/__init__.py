"""Weight decay for any p norm in the Hugging Face Trainer, and what the zeros are good for.

Names are loaded on first use, so that ``import hf_pdecay`` imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__


if TYPE_CHECKING:
    from .arguments import PDecayTrainingArguments
    from .callback import SparsityCallback
    from .inference import to_dense_inference, to_sparse_inference
    from .optim import AdamWLp, LpDecay
    from .plugin import register, unregister
    from .sparsity import SparsityReport, measure_sparsity
    from .trainer import PDecayTrainer, PDecayTrainerMixin

_MODULES = {
    "AdamWLp": "optim",
    "LpDecay": "optim",
    "PDecayTrainer": "trainer",
    "PDecayTrainerMixin": "trainer",
    "PDecayTrainingArguments": "arguments",
    "SparsityCallback": "callback",
    "SparsityReport": "sparsity",
    "measure_sparsity": "sparsity",
    "to_dense_inference": "inference",
    "to_sparse_inference": "inference",
    "register": "plugin",
    "unregister": "plugin",
}

__all__ = [
    "AdamWLp",
    "LpDecay",
    "PDecayTrainer",
    "PDecayTrainerMixin",
    "PDecayTrainingArguments",
    "SparsityCallback",
    "SparsityReport",
    "__version__",
    "measure_sparsity",
    "to_dense_inference",
    "to_sparse_inference",
    "register",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
