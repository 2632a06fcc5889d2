"""The comparison of two models' zeros, read and dequantized tensor by tensor."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.saved_names import NamesInModel
from ..sparsity.comparison import TensorComparison, ZeroComparison, compare_tensor
from ..storage.folder import CONFIG, read_config
from ..storage.loading import class_of, load_whole
from ..storage.quantized import dense_tensors, load_gguf, nested_method
from ..storage.source import read_model
from ..storage.untrusted import meta_model
from .folder_tensors import model_folder, opened, read_tensors, weight_files


_GGUF, _SAFETENSORS = ".gguf", ".safetensors"


@torch.no_grad()
def check_zeros(before: str | os.PathLike[str], after: str | os.PathLike[str] | nn.Module) -> ZeroComparison:
    """Compare the places of zeros in two models: before and after a quantiser or another tool.

    Plain and compressed files are read one tensor at a time. A quantized model is loaded by transformers, dequantized
    on loading where transformers offers that, else one weight at a time.

    Args:
        before: A folder of a model, an adapter or a run, or a file, in safetensors, plain or compressed.
        after: The same; a folder with a ``quantization_config`` that transformers can load here; a ``.gguf`` file or a
            folder with one; or a model in memory.

    Returns:
        Counts of each tensor of floating-point numbers.

    Raises:
        ValueError: If a model cannot be read, ``before`` is quantized, or a tensor with zeros has no counterpart of
            its shape.
    """
    source = _files_of(Path(before), "before")
    folder = source[0].parent
    config = read_config(folder) if (folder / CONFIG).is_file() else {}
    if (method := nested_method(config)) is not None:
        raise ValueError(f"Invalid before: {str(before)!r} is quantized by {method!r}; name the model before that.")
    model = meta_model(folder)
    loaded, method = (after, _method_of(after)) if isinstance(after, nn.Module) else _loaded(Path(after), folder)
    if loaded is not None:
        where, pieces = type(loaded).__name__ if loaded is after else str(after), _pieces(loaded, model)
    else:
        where, files = str(after), _files_of(Path(str(after)), "after")
        pieces = read_tensors(files, "Comparing")
        model = model or meta_model(files[0].parent)
    in_model = NamesInModel(model or loaded)
    with ExitStack() as stack:
        files_before = [stack.enter_context(opened(path)) for path in source]
        stored = {name: file for file in files_before for name in file.keys()}  # noqa: SIM118
        return ZeroComparison(_compared(stored, pieces, in_model, where), method)


def _compared(
    before: dict[str, Any], pieces: Iterator[tuple[str, Tensor]], in_model: Callable[[str], str], where: str
) -> list[TensorComparison]:
    """Compare each tensor before with its counterpart after; raise ValueError if one with zeros has none."""
    by_own = defaultdict(list)
    for name in before:
        by_own[in_model(name)].append(name)
    compared: dict[str, TensorComparison] = {}
    shapes: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for name, after in pieces:
        own = in_model(name)
        shapes[own].add(tuple(after.shape))
        for twin in [name] if name in before else by_own[own]:
            if twin not in compared and after.is_floating_point():
                tensor = before[twin].get_tensor(twin)
                if tensor.is_floating_point() and tensor.shape == after.shape:
                    compared[twin] = compare_tensor(twin, tensor, after.to("cpu"))
    if not compared:
        raise ValueError(f"Invalid after: {where!r} and the model before have no tensors of the same names and shapes.")
    for name in [name for name in before if name not in compared]:
        tensor = before[name].get_tensor(name)
        twins = [twin for twin in by_own[in_model(name)] if twin in compared]
        if twins and tuple(tensor.shape) in shapes[in_model(name)]:
            continue  # a shared parameter that the files before have twice
        if tensor.is_floating_point() and not bool((tensor != 0).all()):
            there = sorted(shapes[in_model(name)])
            what = f"has the shape {there[0]}" if there else "is missing or packed in a way that cannot be read"
            raise ValueError(
                f"Invalid after: in {where!r} {name}, of shape {tuple(tensor.shape)} and with zeros, {what}; name the "
                "same model, in a format that transformers can load here."
            )
    return list(compared.values())


def _files_of(path: Path, argument: str) -> list[Path]:
    """The files of weights of a folder, or the file itself."""
    if path.suffix == _SAFETENSORS and path.is_file():
        return [path]
    if path.is_file():
        raise ValueError(f"Invalid {argument}: the file {str(path)!r} must end in {_SAFETENSORS}; or name a folder.")
    return weight_files(model_folder(path))


def _loaded(after: Path, before: Path) -> tuple[nn.Module | None, str | None]:
    """Load what is quantized, and say how it is; None for plain or compressed files."""
    import transformers

    found = sorted(after.glob(f"*{_GGUF}")) if after.is_dir() and not any(after.glob(f"*{_SAFETENSORS}")) else [after]
    if len(found) > 1:
        raise ValueError(f"Invalid after: {str(after)!r} has {len(found)} files of {_GGUF}; name one of them.")
    if found and found[0].suffix == _GGUF and found[0].is_file():
        if not (before / CONFIG).is_file():
            return load_gguf(found[0], transformers.AutoModelForCausalLM), "gguf"
        cls = class_of(read_model(before))
        try:
            return load_gguf(found[0], cls), "gguf"
        except ValueError:  # of some kinds of models transformers does not read all sizes
            return load_gguf(found[0], cls, cls.config_class.from_pretrained(before)), "gguf"
    if not (after / CONFIG).is_file():
        return None, None
    method = nested_method(read_config(after))
    return (None if method is None else load_whole(read_model(after))[0]), method


def _method_of(model: Any) -> str | None:
    """How a loaded model is quantized; None if it does not say."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    method = getattr(settings, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _pieces(model: nn.Module, plain: Any) -> Iterator[tuple[str, Tensor]]:
    """Give the dense tensors of a model as files have them: fused experts in pieces, for example."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 saves what there is
        yield from dense_tensors(model)
        return
    for name, tensor in dense_tensors(model):
        try:
            saved = {name: tensor} if plain is None else revert_weight_conversion(plain, {name: tensor})
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError):
            saved = {name: tensor}  # one that a file has as a part of another
        yield from saved.items()
