"""Builds models from untrusted configs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.modules.module import register_module_parameter_registration_hook

from .container import FormatError
from .folder import CONFIG, read_weights


# What models raise for wrong configs, besides ValueError: no heads to divide by, a key of another model, a missing
# package for the attention that is named.
_ERRORS = (
    *(OSError, RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, ImportError),
    StrictDataclassError,
)

# How often a model may register a parameter for each tensor in its files: tied ones are made before they are tied.
_REGISTERED = 8
# How many tensors a model may have if its files cannot be counted; a forged config asks for more.
_MOST_TENSORS = 1 << 15


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn any error that a wrong config causes into a ValueError that begins with ``what``; ValueErrors pass."""
    try:
        yield
    except _ERRORS as error:
        raise ValueError(f"{what} ({type(error).__name__}: {str(error).strip()})") from error


def auto_config(source: str | os.PathLike[str]) -> Any:
    """Return the config of a folder or of a name on the Hub; raise ValueError if transformers cannot read it."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(source)
    except (ValueError, *_ERRORS) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{str(source)!r} has no config that can be read ({reason})") from error


def model_class(architectures: object) -> Any:
    """Return the transformers class that ``architectures`` of a config names first; None if there is none."""
    import transformers

    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    if not isinstance(name, str):
        raise ValueError(f"The config has architectures={architectures!r}; it must be a list of names of classes")
    known: Any = getattr(transformers, name, None)
    is_model = isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)
    return known if is_model and known.config_class is not None else None


def on_meta(make: Callable[[Any], Any], config: Any, source: str | os.PathLike[str]) -> Any:
    """Build a model on the meta device, by ``make`` (its class or an auto class's ``from_config``) from its config.

    Even without weights, a model of as many layers as a forged config may ask for takes hours and all of the memory. So
    building stops with a FormatError as soon as the model has many times the tensors that the files of ``source`` hold.
    Raises ValueError if the config is wrong.
    """
    stored = _stored_tensors(Path(source))
    left = _REGISTERED * ((_MOST_TENSORS if stored is None else stored) + 1)

    def count(module: torch.nn.Module, name: str, param: Any) -> None:
        nonlocal left
        left -= param is not None
        if left < 0:
            there = "any model has" if stored is None else f"the {stored:,} that its files have"
            raise FormatError(f"{str(source)!r} is not a whole model: its config has many more tensors than {there}.")

    handle = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), explained(f"No model can be built from the config of {str(source)!r}"):
            return make(config)
    finally:
        handle.remove()


def meta_model(folder: Path) -> Any:
    """The model of a folder without weights; None if its config names no class of transformers."""
    if not (folder / CONFIG).is_file():
        return None
    try:
        config = auto_config(folder)
        known = model_class(config.architectures)
        return None if known is None else on_meta(known, config, folder)
    except ValueError:
        return None  # a config of another release, or an invalid one


def _stored_tensors(folder: Path) -> int | None:
    """The number of tensors in the files of a model, or None if they cannot be counted."""
    try:
        return sum(len(header.entries) for header in read_weights(folder).values())
    except FormatError:
        return None
