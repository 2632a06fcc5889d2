"""Weight decay for any p norm in the Hugging Face Trainer, and what the zeros are good for.

Everything public is imported from here; where it lies in the package may change. Names are loaded on first use, so that
``import hf_pdecay`` imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .storage.hook import install


if TYPE_CHECKING:
    from .adapters.merging import mask_adapters as mask_adapters
    from .adapters.merging import merge_keep_zeros as merge_keep_zeros
    from .adapters.ranks import LayerRanks as LayerRanks
    from .adapters.ranks import RankSparsity as RankSparsity
    from .adapters.ranks import rank_sparsity as rank_sparsity
    from .adapters.ranks import shrink_ranks as shrink_ranks
    from .cli.folder_report import FolderReport as FolderReport
    from .cli.folder_report import report_folder as report_folder
    from .cli.report import report as report
    from .cli.search_report import SearchReport as SearchReport
    from .inference.choice import Choice as Choice
    from .inference.choice import to_dense_inference as to_dense_inference
    from .inference.choice import to_sparse_inference as to_sparse_inference
    from .inference.semi_structured import SemiStructuredLinear as SemiStructuredLinear
    from .inference.sparse_linear import SparseLinear as SparseLinear
    from .layers.architectures import Heads as Heads
    from .layers.architectures import Neurons as Neurons
    from .layers.architectures import add_architecture as add_architecture
    from .layers.finding import find_units as find_units
    from .layers.matrices import decayable_parameter_names as decayable_parameter_names
    from .measurements import load_measurement as load_measurement
    from .measurements.hooks import causal_lm_hooks as causal_lm_hooks
    from .measurements.hooks import classification_hooks as classification_hooks
    from .optim.adamw_lp import AdamWLp as AdamWLp
    from .optim.lp_decay import LpDecay as LpDecay
    from .optim.named import make_optimizer as make_optimizer
    from .optim.shards import group_params as group_params
    from .optim.shards import settle as settle
    from .optim.units import Member as Member
    from .optim.units import Units as Units
    from .rules.assign import build_param_groups as build_param_groups
    from .rules.assign import decayed_parameter_names as decayed_parameter_names
    from .rules.spec import load_rules as load_rules
    from .shrinking.folder import shrink_folder as shrink_folder
    from .shrinking.model import shrink as shrink
    from .shrinking.report import LayerCount as LayerCount
    from .shrinking.report import ShrinkReport as ShrinkReport
    from .sparsity.counting import measure_sparsity as measure_sparsity
    from .sparsity.history import read_history as read_history
    from .sparsity.picture import plot_sparsity as plot_sparsity
    from .sparsity.report import SparsityReport as SparsityReport
    from .sparsity.report import TensorSparsity as TensorSparsity
    from .sparsity.report import UnitSparsity as UnitSparsity
    from .storage.container import FormatError as FormatError
    from .storage.hub import push_to_hub as push_to_hub
    from .storage.reader import decompress as decompress
    from .storage.report import StorageReport as StorageReport
    from .storage.writer import compress as compress
    from .storage.writer import save_compressed as save_compressed
    from .target.control import SparsityControl as SparsityControl
    from .target.schedule import Schedule as Schedule
    from .target.settings import Target as Target
    from .trainer.arguments import PDecayTrainingArguments as PDecayTrainingArguments
    from .trainer.checkpoints import newest_whole as newest_whole
    from .trainer.pareto import pareto_front as pareto_front
    from .trainer.pareto import plot_pareto as plot_pareto
    from .trainer.pareto import read_trials as read_trials
    from .trainer.register import register as register
    from .trainer.register import unregister as unregister
    from .trainer.resume_checks import check_checkpoint as check_checkpoint
    from .trainer.resume_checks import check_optimizer_state as check_optimizer_state
    from .trainer.search import DIRECTIONS as DIRECTIONS
    from .trainer.search import loss_and_sparsity as loss_and_sparsity
    from .trainer.search import optuna_space as optuna_space
    from .trainer.search import ray_space as ray_space
    from .trainer.sparsity_callback import SparsityCallback as SparsityCallback
    from .trainer.trainer import PDecayTrainer as PDecayTrainer
    from .trainer.trainer import PDecayTrainerMixin as PDecayTrainerMixin

# The module that defines each public name.
_MODULES = {
    "mask_adapters": "adapters.merging",
    "merge_keep_zeros": "adapters.merging",
    "LayerRanks": "adapters.ranks",
    "RankSparsity": "adapters.ranks",
    "rank_sparsity": "adapters.ranks",
    "shrink_ranks": "adapters.ranks",
    "FolderReport": "cli.folder_report",
    "SearchReport": "cli.search_report",
    "report": "cli.report",
    "report_folder": "cli.folder_report",
    "Choice": "inference.choice",
    "to_dense_inference": "inference.choice",
    "to_sparse_inference": "inference.choice",
    "SemiStructuredLinear": "inference.semi_structured",
    "SparseLinear": "inference.sparse_linear",
    "Heads": "layers.architectures",
    "Neurons": "layers.architectures",
    "add_architecture": "layers.architectures",
    "find_units": "layers.finding",
    "decayable_parameter_names": "layers.matrices",
    "load_measurement": "measurements",
    "causal_lm_hooks": "measurements.hooks",
    "classification_hooks": "measurements.hooks",
    "AdamWLp": "optim.adamw_lp",
    "LpDecay": "optim.lp_decay",
    "make_optimizer": "optim.named",
    "group_params": "optim.shards",
    "settle": "optim.shards",
    "Member": "optim.units",
    "Units": "optim.units",
    "build_param_groups": "rules.assign",
    "decayed_parameter_names": "rules.assign",
    "load_rules": "rules.spec",
    "shrink_folder": "shrinking.folder",
    "shrink": "shrinking.model",
    "LayerCount": "shrinking.report",
    "ShrinkReport": "shrinking.report",
    "SparsityReport": "sparsity.report",
    "TensorSparsity": "sparsity.report",
    "measure_sparsity": "sparsity.counting",
    "UnitSparsity": "sparsity.report",
    "read_history": "sparsity.history",
    "plot_sparsity": "sparsity.picture",
    "FormatError": "storage.container",
    "push_to_hub": "storage.hub",
    "decompress": "storage.reader",
    "StorageReport": "storage.report",
    "compress": "storage.writer",
    "save_compressed": "storage.writer",
    "SparsityControl": "target.control",
    "Schedule": "target.schedule",
    "Target": "target.settings",
    "PDecayTrainingArguments": "trainer.arguments",
    "newest_whole": "trainer.checkpoints",
    "pareto_front": "trainer.pareto",
    "plot_pareto": "trainer.pareto",
    "read_trials": "trainer.pareto",
    "register": "trainer.register",
    "unregister": "trainer.register",
    "check_checkpoint": "trainer.resume_checks",
    "check_optimizer_state": "trainer.resume_checks",
    "DIRECTIONS": "trainer.search",
    "loss_and_sparsity": "trainer.search",
    "optuna_space": "trainer.search",
    "ray_space": "trainer.search",
    "SparsityCallback": "trainer.sparsity_callback",
    "PDecayTrainer": "trainer.trainer",
    "PDecayTrainerMixin": "trainer.trainer",
}

# Names of modules that import PEFT are left out, so that `from hf_pdecay import *` does not import it.
__all__ = ["__version__", *(name for name, module in _MODULES.items() if not module.startswith("adapters."))]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})


# From here on transformers, whenever it is imported, loads what `compress` and `shrink_folder` write.
install(
    "hf_pdecay.storage.quantizer:CompressedWeightsQuantizer",
    "hf_pdecay.shrinking.quantizer:ShrunkQuantizer",
)
