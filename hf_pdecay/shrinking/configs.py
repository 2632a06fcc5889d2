"""Configs within configs: which part of a model is described by which, and new values of their keys.

The place of a config within the model's own is a path such as ``"text_config"``, or ``""`` for the model's own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig


def configs_within(config: Any, path: str = "") -> dict[str, Any]:
    """Return a config and those within it, by path."""
    found = {path: config}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig) and not any(value is known for known in found.values()):
            found |= configs_within(value, f"{path}.{name}".lstrip("."))
    return found


def config_paths(model: nn.Module) -> dict[str, str]:
    """Return the path of the config that describes each module, by the module's name.

    A part of a model may have a copy of its config, or of the config of the part around it, as T5's stacks do.
    """
    configs = configs_within(model.config)
    paths: dict[str, str] = {}
    for name, module in model.named_modules():
        around = paths[name.rpartition(".")[0]] if name else ""
        own = getattr(module, "config", None)
        known = [path for path, config in configs.items() if config is own]
        if not known and isinstance(own, PretrainedConfig) and type(own) is not type(configs[around]):
            alike = [path for path, config in configs.items() if type(config) is type(own)]
            known = alike if len(alike) == 1 else [path for path in alike if configs[path] == own]
        paths[name] = known[0] if known else around
    return paths


def set_values(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Set keys, given with their paths, in a model's config and in all copies of it that its modules have."""
    configs = configs_within(model.config)
    paths = config_paths(model)
    for key, value in values.items():
        path, _, name = key.rpartition(".")
        setattr(configs[path], name, value)
        for module_name, module in model.named_modules():
            own = getattr(module, "config", None)
            if paths[module_name] == path and type(own) is type(configs[path]):
                setattr(own, name, value)


def with_values(config: Mapping[str, Any], values: Mapping[str, Any], whole: Any) -> dict[str, Any]:
    """Return a config as it is in a file, with keys set that are given with their paths.

    ``whole`` is the config as an object, from which a config within it is taken that the file does not have.
    """
    changed = copy.deepcopy(dict(config))
    configs = configs_within(whole)
    for key, value in values.items():
        path, _, name = key.rpartition(".")
        at, place = changed, ""
        for part in path.split(".") if path else ():
            place = f"{place}.{part}".lstrip(".")
            if not isinstance(at.get(part), dict):
                at[part] = configs[place].to_dict()
            at = at[part]
        at[name] = value
    return changed


def rebuilt(config: Any, values: Mapping[str, Any]) -> Any:
    """Return a config with other values of some keys, checked as if it were read from a file."""
    return type(config).from_dict(with_values(config.to_dict(), values, config))
