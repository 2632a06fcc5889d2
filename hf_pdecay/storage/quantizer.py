"""What transformers calls to load a compressed model, by its own extension point for quantized ones.

A compressed model has its tensors under their own names, so that all renaming in transformers works as it does for the
plain one; a ``WeightConverter`` for every name turns a block into its tensor. Once it is loaded the model is an
ordinary one that knows nothing of compression.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .container import FormatError
from .manifest import METHOD, check_settings
from .reader import check_file, checksums_wanted, memory_limit


if TYPE_CHECKING:
    from transformers import PreTrainedModel

# HfQuantizer.get_new_dtype, by which a block comes as the bytes that it is, came in 5.22, which takes tensors of wrong
# shapes where there is a quantizer.
_TRANSFORMERS = "5.23"


class CompressedWeightsConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed model, see `docs/compressed.md`.

    Args:
        **settings: As they stand in ``config.json``.

    Raises:
        FormatError: If they say something else than the format does.
    """

    # By which transformers knows that a loaded model is a plain one.
    dequantize = True

    def __init__(self, **settings: Any) -> None:
        check_settings(settings)
        self.__dict__.update(settings)


class CompressedWeightsQuantizer(HfQuantizer):
    """Checks a compressed model's files before weights are read, and has their blocks decoded."""

    requires_calibration = True

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
        # Where from_pretrained is to divide weights among processes it notes so in the config: it would divide blocks.
        if vars(model.config).get("distributed_config") is not None:
            raise ValueError(
                "A compressed model cannot be loaded in parts, by tp_plan or distributed_config: `hf-pdecay decompress "
                "MODEL OUT` gives a plain one that can."
            )
        shards = check_settings(self.quantization_config.to_dict())
        files = [Path(each) for each in checkpoint_files or []]
        if {each.name for each in files} != shards.keys() or len({each.parent for each in files}) > 1:
            raise FormatError(
                f"The files of weights are {sorted(map(str, files))}, and config.json tells of {sorted(shards)} in one "
                "folder."
            )
        for each in files:
            check_file(each, shards[each.name], checksums_wanted())
        # No tensor of a checkpoint is larger than its whole model, in the widest dtype.
        self._limit = min(8 * sum(each.numel() for each in model.state_dict().values()), memory_limit())
        # By the ids of what loads: what save_pretrained is to revert, the model's own conversions.
        self._converters: dict[int, Any] = {}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if model.all_tied_weights_keys and "disk" in vars(model).get("hf_device_map", {}).values():
            # transformers looks for tied weights that are on disk in the checkpoint, where there are blocks.
            raise ValueError(
                "A compressed model with tied weights cannot be offloaded to disk: `hf-pdecay decompress MODEL OUT` "
                "gives a plain one that can."
            )

    def remove_quantization_config(self, model: Any) -> None:
        """Make the model an ordinary one, which ``save_pretrained`` saves by the conversions that the plain one has."""
        plain = [self._converters[id(each)] for each in model._weight_conversions]
        super().remove_quantization_config(model)
        model._weight_conversions = [each for each in plain if each is not None]

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Have blocks decoded before the model's own conversions, which see tensors, and where there are none."""
        from transformers.core_model_loading import WeightConverter

        from .decoding import decode_first

        found = []
        for each in weight_conversions:
            found.append(decode_first(each, self._limit) if isinstance(each, WeightConverter) else each)
            self._converters[id(found[-1])] = each
        others = self.get_weight_conversions()
        self._converters |= {id(each): None for each in others}
        return found + others

    def get_weight_conversions(self) -> list[Any]:
        """Return the conversion of any tensor for which the model has none."""
        from .decoding import decode_any

        return [decode_any(self._limit)]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Read a block as the bytes that it is; its tensor takes the dtype once it is decoded."""
        # A tensor where files are read whole (disable_mmap), else the library's handle of one.
        stored = param.dtype if isinstance(param, torch.Tensor) else param.get_dtype()
        if stored not in (torch.uint8, "U8"):
            return dtype
        converter.operations[0].dtype = dtype
        return None

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return True: a loaded model is a plain one."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: a loaded model is a plain one."""
        return True


def register() -> None:
    """Enter config and quantizer in transformers' tables."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(CompressedWeightsConfig)
        register_quantizer(METHOD)(CompressedWeightsQuantizer)


def unregister() -> None:
    """Take both out again."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
