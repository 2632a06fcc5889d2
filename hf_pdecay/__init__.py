"""Weight decay for any p norm in the Hugging Face Trainer, and what the zeros are good for.

Names are loaded on first use, so that ``import hf_pdecay`` imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .storage.hook import install


if TYPE_CHECKING:
    from .arguments import PDecayTrainingArguments
    from .callback import SparsityCallback
    from .optim import AdamWLp
    from .sparsity import SparsityReport, measure_sparsity
    from .storage import compress, decompress, push_to_hub, save_compressed
    from .trainer import PDecayTrainer, PDecayTrainerMixin

_MODULES = {
    "AdamWLp": "optim",
    "PDecayTrainer": "trainer",
    "PDecayTrainerMixin": "trainer",
    "PDecayTrainingArguments": "arguments",
    "SparsityCallback": "callback",
    "SparsityReport": "sparsity",
    "compress": "storage",
    "decompress": "storage",
    "measure_sparsity": "sparsity",
    "push_to_hub": "storage",
    "save_compressed": "storage",
}

__all__ = [
    "AdamWLp",
    "PDecayTrainer",
    "PDecayTrainerMixin",
    "PDecayTrainingArguments",
    "SparsityCallback",
    "SparsityReport",
    "__version__",
    "compress",
    "decompress",
    "measure_sparsity",
    "push_to_hub",
    "save_compressed",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


# From here on transformers, whenever it is imported, loads what `compress` writes.
install()
