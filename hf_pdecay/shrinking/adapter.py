"""Cutting the dead ranks out of a saved LoRA adapter: its files say all that it takes, so no base model is loaded."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..names import natural_key, saved_names
from ..sparsity.counting import SparsityReport, TensorSparsity, count_tensor
from ..storage.container import FormatError, read_header
from ..storage.folder import (
    ADAPTER_CONFIG,
    check_apart,
    copy_along,
    inside,
    read_json,
    settle_files,
    write_json,
    written_folder,
)
from .card import SPARSITY, note_in_card
from .report import LayerCount, ShrinkReport


WEIGHTS = "adapter_model.safetensors"
_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<kind>embedding_)?(?P<which>[AB])(?P<end>\.weight)?")
_PREFIX = "base_model.model."  # what PEFT puts before the name of a layer in the base model


@torch.no_grad()
def shrink_adapter(folder: Path, out: str | os.PathLike[str], *, overwrite: bool = False) -> ShrinkReport:
    """Cut the dead ranks out of a saved LoRA adapter, and copy what else is in its folder.

    Args:
        folder: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: The folder to write. It appears when it is whole.
        overwrite: Replace ``out`` if it is the folder of a model or an adapter.

    Returns:
        What was cut, by layer.

    Raises:
        ValueError: If it is no LoRA adapter in safetensors, all or none of its ranks are dead, or it began with a part
            of the base's weights, which PEFT would take from the base by the number of ranks.
        ImportError: If PEFT is not installed.
    """
    from ..adapters.factors import alive_ranks  # which takes PEFT
    from ..adapters.ranks import alpha_for, changed_settings

    config = _checked_config(folder)
    check_apart(folder, out)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    pairs = _pairs(tensors)
    if not pairs:
        raise ValueError(f"Nothing of {str(folder)!r} can be cut: its {WEIGHTS} has no layer with both A and B.")
    kept = {layer: alive_ranks(tensors[a], tensors[b]).nonzero().flatten() for layer, (a, b) in pairs.items()}
    dead = sum(len(tensors[a]) - len(kept[layer]) for layer, (a, _) in pairs.items())
    if not dead or not any(len(keep) for keep in kept.values()):
        of = f"{sum(len(tensors[a]) for a, _ in pairs.values())} ranks"
        raise ValueError(
            f"Nothing of {str(folder)!r} can be cut: none of its {of} is dead."
            if not dead
            else f"Nothing of {str(folder)!r} would be left: all of its {of} are dead, as they are before training."
        )
    whole = len({name for name in tensors if ".lora_" in name and _FACTOR.fullmatch(name)}) == 2 * len(pairs)
    # DoRA and biases do more than add B A.
    more = bool(config.get("use_dora") or config.get("lora_bias") or config.get("bias", "none") != "none")
    sizes: dict[str, tuple[int, float]] = {}
    report = ShrinkReport(parameters=(_count(tensors), 0))
    gone = []
    for layer, (a, b) in sorted(pairs.items(), key=lambda pair: natural_key(pair[0])):
        name, keep, ranks = layer.removeprefix(_PREFIX), kept[layer], len(tensors[a])
        report.layers.append(LayerCount(name, "rank", ranks, ranks - len(keep), max(len(keep), int(more))))
        if not len(keep) and not more:
            gone.append(name)
            del tensors[a], tensors[b]
            continue
        if not len(keep):
            keep = torch.zeros(1, dtype=torch.long)
        scaling = _scaling(config, name, ranks, folder)
        sizes[name] = len(keep), alpha_for(scaling, len(keep), bool(config.get("use_rslora")))
        tensors[a], tensors[b] = tensors[a][keep].contiguous(), tensors[b][:, keep].contiguous()
    changed = changed_settings(config, sizes, gone, whole)
    report.config = {
        key: changed[key] for key in ("r", "lora_alpha") if key in changed and changed[key] != config.get(key)
    }
    if changed["rank_pattern"]:
        report.notes.append("Layers with other numbers of ranks stand in rank_pattern and alpha_pattern.")
    if gone:
        report.notes.append(f"{len(gone)} layers without ranks have no adapter any more.")
    with written_folder(out, overwrite) as aside:
        save_file(tensors, aside / WEIGHTS, metadata=metadata)
        report.left_out = copy_along(folder, aside, (WEIGHTS, ADAPTER_CONFIG))
        write_json(aside / ADAPTER_CONFIG, config | changed)
        report.parameters = report.parameters[0], _count(tensors)
        if (aside / SPARSITY).is_file():
            _recounted(tensors, SparsityReport.load(aside / SPARSITY)).save(aside / SPARSITY)
        note_in_card(aside, report, "ranks out of the adapter")
        settle_files(aside)
        report.bytes = (folder / WEIGHTS).stat().st_size, (aside / WEIGHTS).stat().st_size
    return report


def _checked_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter whose ranks can be cut, by what it says and by the header of its weights."""
    from ..adapters.ranks import check_start

    config = read_json(inside(folder / ADAPTER_CONFIG, folder))
    if config.get("peft_type") != "LORA" or config.get("target_parameters"):
        where = " on fused parameters" if config.get("target_parameters") else ""
        raise ValueError(
            f"{str(folder)!r} is an adapter of the type {config.get('peft_type')!r}{where}; only ranks of LoRA on "
            "layers are cut."
        )
    check_start(config.get("init_lora_weights"), repr(str(folder)))
    for key in ("rank_pattern", "alpha_pattern"):
        _check_pattern(config.get(key), key, folder)
    _check_excluded(config.get("exclude_modules"), folder)
    if not (folder / WEIGHTS).exists():
        raise FormatError(f"{str(folder)!r} has no {WEIGHTS}; save the adapter as safetensors, which PEFT does.")
    read_header(inside(folder / WEIGHTS, folder))
    return config


def _recounted(tensors: Mapping[str, Tensor], old: SparsityReport) -> SparsityReport:
    """What is in the adapter's file now, where the report of the run has the whole model."""
    decayed = {name: each.decayed for each in old.tensors for name in saved_names(each.name)}
    return SparsityReport(
        [
            TensorSparsity(
                name, tuple(each.shape), *count_tensor(each, old.near_zero_threshold), decayed.get(name, False)
            )
            for name, each in sorted(tensors.items(), key=lambda pair: natural_key(pair[0]))
            if each.is_floating_point()
        ],
        old.near_zero_threshold,
    )


def _check_pattern(patterns: Any, key: str, folder: Path) -> None:
    """Raise FormatError if what a config says of single layers are no numbers by regular expressions."""
    try:
        wrong = patterns is not None and not all(
            isinstance(value, int | float) and re.compile(pattern) for pattern, value in patterns.items()
        )
    except (AttributeError, re.error, RecursionError, OverflowError):
        wrong = True
    if wrong:
        raise FormatError(f"{ADAPTER_CONFIG} of {str(folder)!r} has no numbers by names of layers in {key}.")


def _check_excluded(excluded: Any, folder: Path) -> None:
    """Raise FormatError if the layers that a config leaves out are neither a regular expression nor a list of names."""
    try:
        right = excluded is None or (
            bool(re.compile(excluded))
            if isinstance(excluded, str)
            else isinstance(excluded, list) and all(isinstance(name, str) for name in excluded)
        )
    except (re.error, RecursionError, OverflowError):
        right = False
    if not right:
        raise FormatError(
            f"{ADAPTER_CONFIG} of {str(folder)!r} has neither names nor a regular expression in exclude_modules."
        )


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """The names of A and B of each layer that has both, with as many ranks."""
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = _FACTOR.fullmatch(name)
        if match is not None:
            found.setdefault(match["layer"], {})[match["which"]] = name
    return {
        layer: (both["A"], both["B"])
        for layer, both in found.items()
        if len(both) == 2
        and min(tensors[name].ndim for name in both.values()) > 1
        and len(tensors[both["A"]]) == tensors[both["B"]].shape[1] > 0
    }


def _scaling(config: Mapping[str, Any], layer: str, ranks: int, folder: Path) -> float:
    """What PEFT multiplies B A of a layer by."""
    from peft.utils.other import get_pattern_key

    patterns: Mapping[str, Any] = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), layer), config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= sys.float_info.max:
        raise FormatError(f"{ADAPTER_CONFIG} of {str(folder)!r} gives {layer} a lora_alpha of {alpha!r}, no number.")
    return alpha / (math.sqrt(ranks) if config.get("use_rslora") else ranks)


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
