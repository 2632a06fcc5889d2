"""Weight decay for any p norm in the Hugging Face Trainer, and uses of the zeros.

Import every public name from here; its module may change. Names are loaded on first use, so ``import hf_pdecay``
imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .storage.hook import install


if TYPE_CHECKING:
    # isort: off (the names of a module share a line; `as` exports them for type checkers)
    from .adapters.masking import mask_adapters as mask_adapters
    from .adapters.ranks import LayerRanks as LayerRanks
    from .adapters.ranks import RankSparsity as RankSparsity
    from .adapters.ranks import rank_sparsity as rank_sparsity
    from .adapters.ranks import shrink_ranks as shrink_ranks
    from .cli.folder_report import FolderReport as FolderReport
    from .cli.folder_report import report_folder as report_folder
    from .cli.report import report as report
    from .cli.search_report import SearchReport as SearchReport
    from .cli.zero_check import check_zeros as check_zeros
    from .deltas.merging import MergeReport as MergeReport
    from .deltas.merging import merge_deltas as merge_deltas
    from .deltas.report import DeltaReport as DeltaReport
    from .deltas.report import TensorChange as TensorChange
    from .deltas.report import plot_delta as plot_delta
    from .deltas.report import report_delta as report_delta
    from .deltas.swapping import Delta as Delta
    from .deltas.swapping import load_delta as load_delta
    from .deltas.swapping import swap as swap
    from .deltas.swapping import unswap as unswap
    from .deltas.writing import write_delta as write_delta
    from .inference.bitmask_linear import BitmaskLinear as BitmaskLinear
    from .inference.choice import to_dense_inference as to_dense_inference
    from .inference.choice import to_sparse_inference as to_sparse_inference
    from .inference.loading import load_sparse_inference as load_sparse_inference
    from .inference.result import Choice as Choice
    from .inference.result import Choices as Choices
    from .inference.semi_structured import SemiStructuredLinear as SemiStructuredLinear
    from .inference.sparse_linear import SparseLinear as SparseLinear
    from .layers.architectures import Heads as Heads
    from .layers.architectures import Neurons as Neurons
    from .layers.architectures import add_architecture as add_architecture
    from .layers.finding import find_units as find_units
    from .layers.matrices import decayable_parameter_names as decayable_parameter_names
    from .low_bit.inputs import round_activations as round_activations
    from .measurements import load_measurement as load_measurement
    from .measurements.hooks import causal_lm_hooks as causal_lm_hooks
    from .measurements.hooks import classification_hooks as classification_hooks
    from .merging.keep_zeros import merge_keep_zeros as merge_keep_zeros
    from .one_shot.calibration import calibration_rows as calibration_rows
    from .one_shot.folder import prune_folder as prune_folder
    from .one_shot.folder import quantize_folder as quantize_folder
    from .one_shot.gptq import gptq as gptq
    from .one_shot.gptq import round_to_nearest as round_to_nearest
    from .one_shot.model import prune_one_shot as prune_one_shot
    from .one_shot.quantization_report import BlockQuantization as BlockQuantization
    from .one_shot.quantization_report import QuantizationReport as QuantizationReport
    from .one_shot.quantizing import quantize_one_shot as quantize_one_shot
    from .one_shot.report import BlockPruning as BlockPruning
    from .one_shot.report import OneShotReport as OneShotReport
    from .one_shot.sparsegpt import sparsegpt as sparsegpt
    from .one_shot.wanda import wanda as wanda
    from .optim.adamw_lp import AdamWLp as AdamWLp
    from .optim.lp_decay import LpDecay as LpDecay
    from .optim.optimizer_names import make_optimizer as make_optimizer
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
    from .sparsity.comparison import TensorComparison as TensorComparison
    from .sparsity.comparison import ZeroComparison as ZeroComparison
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
    # isort: on

# The public names that each module defines.
_NAMES = {
    "adapters.masking": ("mask_adapters",),
    "adapters.ranks": ("LayerRanks", "RankSparsity", "rank_sparsity", "shrink_ranks"),
    "cli.folder_report": ("FolderReport", "report_folder"),
    "cli.report": ("report",),
    "cli.search_report": ("SearchReport",),
    "cli.zero_check": ("check_zeros",),
    "deltas.merging": ("MergeReport", "merge_deltas"),
    "deltas.report": ("DeltaReport", "TensorChange", "plot_delta", "report_delta"),
    "deltas.swapping": ("Delta", "load_delta", "swap", "unswap"),
    "deltas.writing": ("write_delta",),
    "inference.bitmask_linear": ("BitmaskLinear",),
    "inference.choice": ("to_dense_inference", "to_sparse_inference"),
    "inference.loading": ("load_sparse_inference",),
    "inference.result": ("Choice", "Choices"),
    "inference.semi_structured": ("SemiStructuredLinear",),
    "inference.sparse_linear": ("SparseLinear",),
    "layers.architectures": ("Heads", "Neurons", "add_architecture"),
    "layers.finding": ("find_units",),
    "layers.matrices": ("decayable_parameter_names",),
    "low_bit.inputs": ("round_activations",),
    "measurements": ("load_measurement",),
    "measurements.hooks": ("causal_lm_hooks", "classification_hooks"),
    "merging.keep_zeros": ("merge_keep_zeros",),
    "one_shot.calibration": ("calibration_rows",),
    "one_shot.folder": ("prune_folder", "quantize_folder"),
    "one_shot.gptq": ("gptq", "round_to_nearest"),
    "one_shot.model": ("prune_one_shot",),
    "one_shot.quantization_report": ("BlockQuantization", "QuantizationReport"),
    "one_shot.quantizing": ("quantize_one_shot",),
    "one_shot.report": ("BlockPruning", "OneShotReport"),
    "one_shot.sparsegpt": ("sparsegpt",),
    "one_shot.wanda": ("wanda",),
    "optim.adamw_lp": ("AdamWLp",),
    "optim.lp_decay": ("LpDecay",),
    "optim.optimizer_names": ("make_optimizer",),
    "optim.shards": ("group_params", "settle"),
    "optim.units": ("Member", "Units"),
    "rules.assign": ("build_param_groups", "decayed_parameter_names"),
    "rules.spec": ("load_rules",),
    "shrinking.folder": ("shrink_folder",),
    "shrinking.model": ("shrink",),
    "shrinking.report": ("LayerCount", "ShrinkReport"),
    "sparsity.comparison": ("TensorComparison", "ZeroComparison"),
    "sparsity.counting": ("measure_sparsity",),
    "sparsity.history": ("read_history",),
    "sparsity.picture": ("plot_sparsity",),
    "sparsity.report": ("SparsityReport", "TensorSparsity", "UnitSparsity"),
    "storage.container": ("FormatError",),
    "storage.hub": ("push_to_hub",),
    "storage.reader": ("decompress",),
    "storage.report": ("StorageReport",),
    "storage.writer": ("compress", "save_compressed"),
    "target.control": ("SparsityControl",),
    "target.schedule": ("Schedule",),
    "target.settings": ("Target",),
    "trainer.arguments": ("PDecayTrainingArguments",),
    "trainer.checkpoints": ("newest_whole",),
    "trainer.pareto": ("pareto_front", "plot_pareto", "read_trials"),
    "trainer.register": ("register", "unregister"),
    "trainer.resume_checks": ("check_checkpoint", "check_optimizer_state"),
    "trainer.search": ("DIRECTIONS", "loss_and_sparsity", "optuna_space", "ray_space"),
    "trainer.sparsity_callback": ("SparsityCallback",),
    "trainer.trainer": ("PDecayTrainer", "PDecayTrainerMixin"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

# Without the adapters, so that `from hf_pdecay import *` does not import PEFT.
__all__ = [
    "__version__",
    *(name for name, module in _MODULES.items() if not module.startswith(("adapters.", "merging."))),
]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})


# From here on transformers, whenever it is imported, loads what `compress` and `shrink_folder` write.
_READERS = (
    *("transformers.modeling_utils", "transformers.integrations.accelerate"),
    "transformers.quantizers.quantizer_torchao",
    *("accelerate.utils.modeling", "accelerate.utils.offload"),
)
install(
    {
        **dict.fromkeys(_READERS, "hf_pdecay.storage.readers"),
        "transformers.quantizers.auto": "hf_pdecay.shrinking.quantizer:ShrunkQuantizer",
        "transformers.quantizers.base": "hf_pdecay.storage.lossy_quantizers",
    }
)
