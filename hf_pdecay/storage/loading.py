"""Loads the model of a folder as the class that its config names, whole or not at all."""

from __future__ import annotations

import math
from typing import Any

from .container import FormatError
from .folder import CONFIG
from .manifest import is_compressed
from .quantized import dense_config, nested_method
from .source import RAGGED, ModelFolder, quantization_method
from .untrusted import explained, model_class, on_meta


def class_of(source: ModelFolder) -> Any:
    """Return the class of transformers that a model's config names; raise ValueError if there is none."""
    import transformers

    names = source.config.get("architectures")
    cls = model_class(names)
    if cls is None:
        raise ValueError(
            f"{CONFIG} of {str(source.folder)!r} names {names!r} in architectures; the first must be a model of "
            f"transformers {transformers.__version__}."
        )
    return cls


def load_whole(source: ModelFolder, dtype: str = "auto") -> tuple[Any, list[str]]:
    """Load a model, in evaluation mode; a quantized one with plain weights where transformers can.

    Returns:
        The model, and the sorted names of the tensors in the files that it does not use.

    Raises:
        ValueError: If the config names no class of transformers, or the files are not those of a whole model.
    """
    folder, cls = str(source.folder), class_of(source)
    name = cls.__name__
    with explained(f"{folder!r} cannot be loaded as a {name}"):
        # Compressed files and a config of ragged layers have other sizes than the model.
        plain = not any(map(is_compressed, source.headers.values()))
        quantized = nested_method(source.config) is not None
        if plain and not quantized and quantization_method(source.config) != RAGGED:
            _check_whole(source, cls)
        options = {"config": dense_config(cls, folder)} if quantized else {}
        model, info = cls.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    if info["missing_keys"]:
        raise FormatError(f"{folder!r} is not a whole {name}: {min(info['missing_keys'])} is missing from its weights.")
    return model.eval(), sorted(info["unexpected_keys"])


def unused_note(unused: list[str], model: Any) -> str:
    """Say that tensors of the files were left out."""
    others = " and others" if len(unused) > 1 else ""
    return (
        f"{len(unused)} tensors of the files were left out, as {type(model).__name__} has none of these names: "
        f"{unused[0]}{others}."
    )


def _check_whole(source: ModelFolder, cls: Any) -> None:
    """Raise FormatError if the config describes more weights than there are: transformers would make any number."""
    folder = str(source.folder)
    model = on_meta(cls, cls.config_class.from_pretrained(folder), folder)
    wanted = sum(param.numel() for param in model.parameters())
    stored = sum(math.prod(entry.shape) for header in source.headers.values() for entry in header.entries.values())
    if wanted > stored:
        raise FormatError(
            f"{folder!r} is not a whole {cls.__name__}: its config describes {wanted:,} weights, and its files have "
            f"{stored:,}."
        )
