"""Weight decay for any p norm in the Hugging Face Trainer, and what the zeros are good for.

Names are loaded on first use, so that ``import hf_pdecay`` imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .storage.hook import install


if TYPE_CHECKING:
    from .adapters import cut_ranks as cut_ranks
    from .adapters import mask_adapters as mask_adapters
    from .adapters import merge_keep_zeros as merge_keep_zeros
    from .adapters import rank_sparsity as rank_sparsity
    from .arguments import PDecayTrainingArguments
    from .callback import SparsityCallback
    from .inference import to_dense_inference, to_sparse_inference
    from .optim import AdamWLp, LpDecay
    from .plugin import register, unregister
    from .rank_decay import RankDecayCallback as RankDecayCallback
    from .sparsity import SparsityReport, measure_sparsity
    from .storage import compress, decompress, push_to_hub, save_compressed
    from .trainer import PDecayTrainer, PDecayTrainerMixin

_MODULES = {
    "AdamWLp": "optim",
    "LpDecay": "optim",
    "PDecayTrainer": "trainer",
    "PDecayTrainerMixin": "trainer",
    "PDecayTrainingArguments": "arguments",
    "RankDecayCallback": "rank_decay",
    "SparsityCallback": "callback",
    "SparsityReport": "sparsity",
    "cut_ranks": "adapters",
    "mask_adapters": "adapters",
    "measure_sparsity": "sparsity",
    "to_dense_inference": "inference",
    "to_sparse_inference": "inference",
    "register": "plugin",
    "unregister": "plugin",
    "merge_keep_zeros": "adapters",
    "rank_sparsity": "adapters",
    "compress": "storage",
    "decompress": "storage",
    "push_to_hub": "storage",
    "save_compressed": "storage",
}

# Without the names that take PEFT, so that `from hf_pdecay import *` does not.
__all__ = [
    "AdamWLp",
    "LpDecay",
    "PDecayTrainer",
    "PDecayTrainerMixin",
    "PDecayTrainingArguments",
    "SparsityCallback",
    "SparsityReport",
    "__version__",
    "compress",
    "decompress",
    "measure_sparsity",
    "to_dense_inference",
    "to_sparse_inference",
    "register",
    "unregister",
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
    return sorted({*__all__, *_MODULES})


# From here on transformers, whenever it is imported, loads what `compress` writes.
install()
