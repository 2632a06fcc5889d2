"""Loads compressed models in transformers, by its extension point for quantized models.

Blocks keep their tensors' names, so that all renaming in transformers works as for the plain model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version

from .container import FormatError
from .manifest import METHOD, check_settings
from .plain_quantizer import PlainConfig, PlainQuantizer
from .reader import check_file, checksums_wanted, memory_limit


if TYPE_CHECKING:
    from transformers import PreTrainedModel

# HfQuantizer.get_new_dtype, which reads a block as bytes, came in 5.22; that release takes tensors of wrong shapes
# if there is a quantizer.
_TRANSFORMERS = "5.23"


class CompressedWeightsConfig(PlainConfig):
    """``quantization_config`` of a compressed model, see `docs/compressed.md`."""

    check = staticmethod(check_settings)


class CompressedWeightsQuantizer(PlainQuantizer):
    """Checks a compressed model's files before weights are read, and has their blocks decoded."""

    method = METHOD
    config_class = CompressedWeightsConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise ImportError if this transformers cannot load compressed models."""
        if Version(transformers.__version__) < Version(_TRANSFORMERS):
            raise ImportError(
                f"Loading a model compressed by hf_pdecay needs transformers>={_TRANSFORMERS}, and this is "
                f"{transformers.__version__}. Upgrade it, or give the plain model back by `hf-pdecay decompress MODEL "
                "OUT` and load that."
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        # With this in the config, from_pretrained would divide blocks among processes.
        if vars(model.config).get("distributed_config") is not None:
            raise ValueError(
                "A compressed model cannot be loaded in shards by tp_plan or distributed_config: `hf-pdecay decompress "
                "MODEL OUT` writes a plain one that can."
            )
        shards = check_settings(self.quantization_config.to_dict())
        files = [Path(file) for file in checkpoint_files or []]
        if {file.name for file in files} != shards.keys() or len({file.parent for file in files}) > 1:
            raise FormatError(
                f"The files of weights are {sorted(map(str, files))}, and config.json names {sorted(shards)} in one "
                "folder."
            )
        for file in files:
            check_file(file, shards[file.name], checksums_wanted())
        # A tensor of a checkpoint is at most as large as its whole model, in the widest dtype.
        self._limit = min(8 * sum(tensor.numel() for tensor in model.state_dict().values()), memory_limit())
        # The model's own conversions, which save_pretrained reverts, by the ids of those that replace them.
        self._converters: dict[int, Any] = {}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if model.all_tied_weights_keys and "disk" in vars(model).get("hf_device_map", {}).values():
            # transformers reads tied weights that are on disk from the checkpoint, which has blocks.
            raise ValueError(
                "A compressed model with tied weights cannot be offloaded to disk: `hf-pdecay decompress MODEL OUT` "
                "writes a plain one that can."
            )

    def remove_quantization_config(self, model: Any) -> None:
        """Make the model an ordinary one, which ``save_pretrained`` saves by the plain model's conversions."""
        plain = [self._converters[id(converter)] for converter in model._weight_conversions]
        super().remove_quantization_config(model)
        model._weight_conversions = [converter for converter in plain if converter is not None]

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Decode blocks before the model's own conversions, and where the model has none."""
        from transformers.core_model_loading import WeightConverter

        from .conversion import decode_first

        converters = []
        for converter in weight_conversions:
            first = decode_first(converter, self._limit) if isinstance(converter, WeightConverter) else converter
            self._converters[id(first)] = converter
            converters.append(first)
        others = self.get_weight_conversions()
        self._converters |= {id(other): None for other in others}
        return converters + others

    def get_weight_conversions(self) -> list[Any]:
        """Return the conversion of tensors that the model does not convert."""
        from .conversion import decode_any

        return [decode_any(self._limit)]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Read a block as bytes; its tensor gets the dtype once it is decoded."""
        # A tensor if files are read whole (disable_mmap), else the library's handle of one.
        stored = param.dtype if isinstance(param, torch.Tensor) else param.get_dtype()
        if stored not in (torch.uint8, "U8"):
            return dtype
        converter.operations[0].dtype = dtype
        return None
