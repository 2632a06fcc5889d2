"""Loads a compressed folder as a sparse model, without a dense one in between."""

from __future__ import annotations

import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import nn

from ..layers.matrices import Linear, is_transposed
from ..storage.bits import compile_functions
from ..storage.loading import load_whole, unused_note
from ..storage.readers import opened_as
from ..storage.source import read_model
from ..terminal import get_logger
from .base import InferenceLinear
from .bitmask_linear import BitmaskLinear
from .choice import check_settings, kept_dense, linear_layers, output_layer, put_layer, swap_layers
from .kernels import VALUES
from .result import Choice, Choices
from .stored_weight import SparseFile, StoredWeight
from .timing import Timer, likely_form


logger = get_logger(__name__)

_MOST_THREADS = 4


@torch.no_grad()
def load_sparse_inference(
    model: str | os.PathLike[str],
    *,
    rows: int = 1,
    min_sparsity: float = 0.4,
    values: str | None = None,
    head: str | None = None,
    dtype: str = "auto",
) -> Any:
    """Load a model with its linear layers sparse, for inference on a CPU.

    From a folder that :func:`~hf_pdecay.compress` or :func:`~hf_pdecay.save_compressed` wrote, the weights of sparse
    layers go straight into the layers' form, one by one, so the model takes little more memory than its file. All else
    is loaded by ``from_pretrained``. The model is what ``from_pretrained`` and then
    :func:`~hf_pdecay.to_sparse_inference` make, with the same ``min_sparsity``; but for zeros of a matrix with many
    negative ones, which become positive. From a plain folder that is what happens.

    Args:
        model: A folder with ``config.json`` and safetensors, compressed or plain, or its name on the Hub. The class of
            the model is the first in ``architectures`` of its config.
        rows: Typical number of rows that a layer gets at a time: batch size × tokens.
        min_sparsity: The fraction of zeros from which on a layer becomes sparse. Nothing is measured.
        values: The dtype in which weights that are not zero are held, see :func:`~hf_pdecay.to_sparse_inference`.
        head: The same for the output layer.
        dtype: The dtype of the model, as of ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If an argument is out of its range, or the folder holds no whole model of transformers, or is
            damaged (as a ``FormatError``).

    Example:
        >>> compress("out", "small")
        >>> model = load_sparse_inference("small", values="int8", head="int8")
        >>> model.generate(**inputs)
    """
    check_settings(rows, min_sparsity, {"values": values, "head": head})
    held_as, head_as = (None if name is None else VALUES[name] for name in (values, head))
    folder = read_model(model)
    compile_functions()
    with opened_as(lambda file: SparseFile(file, min_sparsity)):
        loaded, unused = load_whole(folder, dtype)
    if unused:
        logger.warning("%s", unused_note(unused, loaded))
    choices = Choices(rows=rows, min_sparsity=min_sparsity)
    head_as = _swap_stored(loaded, choices, held_as, head_as)
    _make_dense(loaded)
    swap_layers(loaded, choices, Timer(rows, None), held_as, head_as)
    logger.log(logging.INFO if choices.swapped else logging.WARNING, "%s", " ".join(choices.sentences()))
    return loaded


def _swap_stored(
    model: nn.Module, choices: Choices, held_as: torch.dtype | None, head_as: torch.dtype | None
) -> torch.dtype | None:
    """Swap the layers whose weight is still in its file; returns ``head_as`` if the output layer is not one of them."""
    owners = Counter(id(param) for _, param in model.named_parameters(remove_duplicate=False))
    output = output_layer(model) if head_as is not None else None

    @torch.no_grad()
    def made(module: Linear) -> tuple[InferenceLinear, float] | None:
        stored, transposed, is_output = cast("StoredWeight", module.weight), is_transposed(module), module is output
        wanted = head_as if is_output else held_as
        weight = stored.packed(transposed)
        form = BitmaskLinear if is_output else likely_form(weight, weight.sparsity, held_as, choices.rows)
        if form.refusal(weight, wanted) is not None:
            return None
        layer = form(weight, module.bias, transposed=transposed, values=form.values_of(wanted))
        layer.trained = stored.requires_grad, module.bias is not None and module.bias.requires_grad
        stored.release()
        return layer, weight.sparsity

    found = [
        each
        for each in linear_layers(model)
        if isinstance(each[3].weight, StoredWeight)
        and not each[3].weight.used
        and not kept_dense(each[3], owners[id(each[3].weight)] > 1)
    ]
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for (parent, key, name, module), done in zip(found, pool.map(made, [each[3] for each in found]), strict=True):
            if done is None:
                continue
            layer, sparsity = done
            choices.append(Choice(name, (layer.out_features, layer.in_features), sparsity, None, True, form=layer.form))
            put_layer(model, parent, key, layer.train(module.training))
            if module is output:
                head_as = None
    return head_as


def _make_dense(model: nn.Module) -> None:
    """Read the weights that are still in their file, such as those of embeddings."""
    dense: dict[int, nn.Parameter] = {}
    for module in model.modules():
        params: dict[str, Any] = module._parameters
        for name, param in list(params.items()):
            if isinstance(param, StoredWeight):
                if id(param) not in dense:
                    dense[id(param)] = nn.Parameter(param.dense(), requires_grad=param.requires_grad)
                setattr(module, name, dense[id(param)])
        for name, buffer in list(module._buffers.items()):
            if isinstance(buffer, StoredWeight):
                module._buffers[name] = buffer.dense()
