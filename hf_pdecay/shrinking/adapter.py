"""Removes the dead ranks from a saved LoRA adapter; the base model is not needed."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..names import lora_factor, natural_key, saved_names
from ..sparsity.counting import count_tensor
from ..sparsity.report import SparsityReport, TensorSparsity
from ..storage.container import FormatError, Header, read_header
from ..storage.folder import ADAPTER_CONFIG, inside, read_json, write_json
from ..storage.source import Source
from .card import recount
from .report import LayerCount, ShrinkReport


WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what PEFT puts before the name of a layer in the base model


@torch.no_grad()
def shrink_adapter(folder: Path, out: str | os.PathLike[str], *, overwrite: bool = False) -> ShrinkReport:
    """Remove the dead ranks from a saved LoRA adapter, and copy the other files of its folder.

    Raises ValueError if it is not a LoRA adapter in safetensors, all or none of its ranks are dead, or it was
    initialized from the base's weights: PEFT would subtract another number of ranks from the base. Needs PEFT.
    """
    from ..adapters.ranks import Pair, remove_dead_ranks  # imports PEFT

    config, header = _checked_config(folder)
    source = Source(folder, config, {WEIGHTS: header}, out, overwrite)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = _pairs(tensors)
    if not names:
        raise ValueError(f"Nothing of {str(folder)!r} can be removed: its {WEIGHTS} has no layer with both A and B.")
    # DoRA and biases do more than add B A.
    more = bool(config.get("use_dora") or config.get("lora_bias") or config.get("bias", "none") != "none")
    pairs = []
    for saved, (a, b) in names.items():
        layer, ranks = saved.removeprefix(_PREFIX), len(tensors[a])
        pairs.append(Pair(layer, tensors[a], tensors[b], _scaling(config, layer, ranks, folder), more))
    is_whole = sum(lora_factor(name) is not None for name in tensors) == 2 * len(names)
    remaining, changed = remove_dead_ranks(pairs, config, is_whole)
    total, dead = sum(len(pair.a) for pair in pairs), sum(rest.dead for rest in remaining)
    if dead == 0:
        raise ValueError(f"Nothing of {str(folder)!r} can be removed: none of its {total} ranks is dead.")
    if dead == total:
        raise ValueError(
            f"Nothing of {str(folder)!r} would be left: all of its {total} ranks are dead, as they are before training."
        )
    report = ShrinkReport(parameters=(_count(tensors), 0))
    for (a, b), pair, rest in zip(names.values(), pairs, remaining, strict=True):
        report.layers.append(LayerCount(pair.layer, "rank", len(pair.a), rest.dead, len(rest.a)))
        if len(rest.a):
            tensors[a], tensors[b] = rest.a, rest.b
        else:
            del tensors[a], tensors[b]
    report.config = {
        key: changed[key] for key in ("r", "lora_alpha") if key in changed and changed[key] != config.get(key)
    }
    if changed["rank_pattern"]:
        report.notes.append("Layers with other numbers of ranks stand in rank_pattern and alpha_pattern.")
    gone = sum(not len(rest.a) for rest in remaining)
    if gone:
        report.notes.append(f"{gone} layers without ranks have no adapter any more.")
    with source.rewritten() as aside:
        save_file(tensors, aside / WEIGHTS, metadata=metadata)
        report.left_out = source.copy_along(aside)
        write_json(aside / ADAPTER_CONFIG, config | changed)
        report.parameters = report.parameters[0], _count(tensors)
        recount(aside, report, "ranks from the adapter", lambda old: _counted(tensors, old))
        report.bytes = (folder / WEIGHTS).stat().st_size, (aside / WEIGHTS).stat().st_size
    return report


def _checked_config(folder: Path) -> tuple[dict[str, Any], Header]:
    """Return an adapter's config and the header of its weights; raise ValueError if ranks cannot be removed."""
    from ..adapters.ranks import check_start

    config = read_json(inside(folder / ADAPTER_CONFIG, folder))
    if config.get("peft_type") != "LORA" or config.get("target_parameters"):
        where = " on fused parameters" if config.get("target_parameters") else ""
        raise ValueError(
            f"{str(folder)!r} is an adapter of the type {config.get('peft_type')!r}{where}; only ranks of LoRA on "
            "layers can be removed."
        )
    check_start(config.get("init_lora_weights"), repr(str(folder)))
    _check_patterns(config, folder)
    if not (folder / WEIGHTS).exists():
        raise FormatError(f"{str(folder)!r} has no {WEIGHTS}; save the adapter as safetensors, which PEFT does.")
    return config, read_header(inside(folder / WEIGHTS, folder))


def _counted(tensors: Mapping[str, Tensor], old: SparsityReport) -> SparsityReport:
    """Count the zeros of the adapter's file; the run's report has the whole model."""
    decayed = {name: entry.decayed for entry in old.tensors for name in saved_names(entry.name)}
    threshold = old.near_zero_threshold
    return SparsityReport(
        [
            TensorSparsity(name, tuple(tensor.shape), *count_tensor(tensor, threshold), decayed.get(name, False))
            for name, tensor in sorted(tensors.items(), key=lambda item: natural_key(item[0]))
            if tensor.is_floating_point()
        ],
        threshold,
    )


def _check_patterns(config: Mapping[str, Any], folder: Path) -> None:
    """Raise FormatError if a config's patterns of layers are invalid."""

    def refuse(key: str, right: str) -> NoReturn:
        raise FormatError(f"{ADAPTER_CONFIG} of {str(folder)!r} has {key}={config[key]!r}; it must be {right}.")

    for key in ("rank_pattern", "alpha_pattern"):
        patterns = {} if config.get(key) is None else config[key]
        if not isinstance(patterns, dict) or not all(
            isinstance(value, int | float) and _is_expression(pattern) for pattern, value in patterns.items()
        ):
            refuse(key, "an object of numbers by regular expressions")
    excluded = config.get("exclude_modules")
    if isinstance(excluded, list):
        valid = all(isinstance(name, str) for name in excluded)
    else:
        valid = excluded is None or _is_expression(excluded)
    if not valid:
        refuse("exclude_modules", "a list of names or a regular expression")


def _is_expression(pattern: object) -> bool:
    try:
        return isinstance(pattern, str) and bool(re.compile(pattern))
    except (re.error, RecursionError, OverflowError):
        return False


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """The names of A and B of each layer that has both, with the same number of ranks, in natural order."""
    layers: dict[str, dict[str, str]] = {}
    for name in tensors:
        layer, factor = lora_factor(name) or ("", "")
        if layer:
            layers.setdefault(layer, {})[factor] = name
    return {
        layer: (names["A"], names["B"])
        for layer, names in sorted(layers.items(), key=lambda entry: natural_key(entry[0]))
        if len(names) == 2
        and min(tensors[name].ndim for name in names.values()) > 1
        and len(tensors[names["A"]]) == tensors[names["B"]].shape[1] > 0
    }


def _scaling(config: Mapping[str, Any], layer: str, ranks: int, folder: Path) -> float:
    """PEFT multiplies B A of a layer by this factor."""
    from peft.utils.other import get_pattern_key

    patterns: Mapping[str, Any] = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), layer), config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= sys.float_info.max:
        raise FormatError(f"{ADAPTER_CONFIG} of {str(folder)!r} gives {layer} a lora_alpha of {alpha!r}, not a number.")
    return alpha / (math.sqrt(ranks) if config.get("use_rslora") else ranks)


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
