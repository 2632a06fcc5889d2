"""Base of our quantizers, which make transformers load our folders as ordinary models."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


class PlainConfig(QuantizationConfigMixin):
    """``quantization_config`` of a folder whose model is an ordinary one once it is loaded; checks its settings."""

    # Tells transformers that a loaded model is not quantized.
    dequantize = True

    @staticmethod
    def check(settings: object) -> object:
        """Raise ValueError if the settings do not follow the format."""
        raise NotImplementedError

    def __init__(self, **settings: Any) -> None:
        type(self).check(settings)
        self.__dict__.update(settings)


class PlainQuantizer(HfQuantizer):
    """Loads a folder as an ordinary model, which can be trained and saved."""

    requires_calibration = True
    method: ClassVar[str]
    config_class: ClassVar[type[PlainConfig]]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return True."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True."""
        return True

    @classmethod
    def register(cls) -> None:
        """Enter the config and the quantizer in transformers' tables."""
        if cls.method not in auto.AUTO_QUANTIZER_MAPPING:
            auto.register_quantization_config(cls.method)(cls.config_class)
            auto.register_quantizer(cls.method)(cls)

    @classmethod
    def unregister(cls) -> None:
        """Remove both from the tables."""
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(cls.method, None)
        auto.AUTO_QUANTIZER_MAPPING.pop(cls.method, None)
