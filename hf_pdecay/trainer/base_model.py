"""The base of a run whose weights decay to it: what it has not, the weights that ``base_from`` names, and the delta."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..deltas.report import is_delta
from ..deltas.writing import write_delta_within
from ..layers.saved_names import NamesInModel
from ..names import clean_name
from ..optim.bases import base_in, decays_to_base, give_bases
from ..optim.distributed import is_dtensor
from ..optim.shards import full_numel, full_shape, group_params
from ..sparsity.report import SparsityReport
from ..storage.container import DTYPES, FormatError
from ..storage.hub import stored_folder
from ..storage.model_tensors import ModelTensors
from ..storage.readers import safe_open
from ..storage.source import quantization_method, read_model
from ..terminal import get_logger
from .engines import engine_of
from .first_callback import FirstCallback
from .settings import DecaySettings


if TYPE_CHECKING:
    from transformers import Trainer

    from .trainer import PDecayTrainerMixin

logger = get_logger(__name__)

DELTA_FOLDER = "delta"
"""The subfolder of a model's folder with its delta."""


@dataclass(frozen=True)
class BaseModel:
    """The files of a base, compared with a model by their headers.

    Args:
        tensors: The tensors in its files; None if they were not found.
        files: By clean name of a trained parameter that the base has, the names of its tensors there.
        new: Clean names of the trained parameters that the base has not, or in another shape.
        why_none: Why the files were not found, as the end of a sentence.
    """

    tensors: ModelTensors | None = None
    files: Mapping[str, list[str]] = field(default_factory=dict)
    new: frozenset[str] = frozenset()
    why_none: str = ""

    def other_dtype(self, model: nn.Module) -> tuple[str, str, str] | None:
        """Return a trained parameter of another dtype than in the base, its dtype, and that in the base."""
        params = {clean_name(name): param for name, param in model.named_parameters()}
        for name, files in self.files.items():
            here = str(params[name].dtype).removeprefix("torch.")
            there = DTYPES[self.tensors.forms[files[0]][0]][1] if self.tensors is not None else here
            if here != there:
                return name, here, there
        return None


def base_of(model: nn.Module, settings: DecaySettings) -> BaseModel:
    """Find the base of a run, and compare its headers with the model; reads no weights.

    Without ``base_from`` it is the folder, or the snapshot of the Hub on this machine, from which the model was loaded.

    Raises:
        ValueError: If ``base_from`` cannot be the base of the model.
    """
    if settings.base_from is not None:
        return _asked_for(model, settings.base_from)
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "")
    if not name:
        return BaseModel(why_none="the model was made from a config, not loaded from a folder")
    folder = stored_folder(name, getattr(config, "_commit_hash", None))
    if folder is None:
        return BaseModel(
            why_none=f"{name!r}, from which the model was made, is not on this machine; base_from names it"
        )
    try:
        tensors = ModelTensors(folder)
    except (FormatError, ValueError, OSError) as error:
        return BaseModel(why_none=f"the base cannot be read: {str(error).rstrip('.')}")
    base = _compared(model, tensors)
    if not base.files:
        return BaseModel(why_none=f"{str(folder)!r} has no tensor of the name and shape of any that is trained")
    return base


def _asked_for(model: nn.Module, name: str) -> BaseModel:
    wrong = f"Invalid base_from: base_from={name!r}"
    try:
        found = read_model(name)
        tensors = ModelTensors(found.folder)
    except (FormatError, ValueError, OSError) as error:
        raise ValueError(f"{wrong} cannot be read as a model in safetensors: {error}") from error
    method = quantization_method(found.config)
    if method is not None:
        raise ValueError(f"{wrong} has weights quantised by {method!r}; name the plain model from which it was made.")
    base = _compared(model, tensors)
    params = {clean_name(key): param for key, param in model.named_parameters() if param.requires_grad}
    if 2 * sum(full_numel(params[key]) for key in base.new) > sum(map(full_numel, params.values())):
        key = max(base.new, key=lambda key: full_numel(params[key]))
        raise ValueError(
            f"{wrong} is the base of another model: it has no {key} of shape {list(full_shape(params[key]))}. Name a "
            f"folder of a {type(model).__name__} with the shapes of this one."
        )
    other = base.other_dtype(model)
    if other is not None:
        raise ValueError(
            f"{wrong} has {other[0]} in {other[2]}, and the model in {other[1]}; load the model with "
            f"dtype=torch.{other[2]}, or convert the base."
        )
    return base


def _compared(model: nn.Module, tensors: ModelTensors) -> BaseModel:
    """Compare names and shapes; several tensors of a file may be one parameter, such as fused experts."""
    name_in_model = NamesInModel(model)
    files: dict[str, list[str]] = {}
    for name in tensors.forms:
        files.setdefault(clean_name(name_in_model(name)), []).append(name)
    known, new = {}, set()
    for name, param in model.named_parameters():
        name = clean_name(name)
        if not param.requires_grad:
            continue
        shape, found = tuple(full_shape(param)), files.get(name, [])
        shapes = [tensors.forms[file][1] for file in found]
        # What has another name in the file may have another form there too, of as many weights.
        converted = found != [name] and sum(map(_numel, shapes)) == _numel(shape)
        if shape in shapes or (found and converted):
            known[name] = found
        else:
            new.add(name)
    return BaseModel(tensors, known, frozenset(new))


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def check_to_base(trainer: Trainer, settings: DecaySettings) -> None:
    """Raise ValueError if the weights of a Trainer's model cannot decay to a base."""
    model: Any = trainer.model
    what = "Invalid decay_to: decay_to='base'"
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{what} with an adapter, which leaves the weights of its base as they are. Train the model itself, or the "
            "adapter with decay_to='zero'."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{what} with a quantised {type(model).__name__}, whose weights are not trained. Load it without a "
            "quantization_config."
        )
    if settings.base_from is not None and engine_of(trainer) == "DeepSpeed":
        raise ValueError(
            f"Invalid base_from: base_from={settings.base_from!r} under DeepSpeed, which steps other tensors than the "
            "model's. Start from the weights of the base, without base_from, or take DDP or FSDP2."
        )


def say_no_delta(base: BaseModel, model: nn.Module) -> None:
    """Warn, before a run, of what will keep it from writing a delta."""
    if base.tensors is None:
        logger.warning("No delta will be written beside the model, as %s.", base.why_none)
    elif (other := base.other_dtype(model)) is not None:
        logger.warning(
            "No delta will be written beside the model: it is trained in %s, and its base, %r, is in %s. Load the "
            "model with dtype='auto', and it will be.",
            *(other[1], str(base.tensors.folder), other[2]),
        )


class BaseCallback(FirstCallback):
    """Says whether a run will write a delta, and gives its optimizer the weights of ``base_from``.

    Args:
        trainer: A Trainer whose weights decay to a base.
    """

    def __init__(self, trainer: PDecayTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give them; those that a checkpoint has brought stay."""
        base, optimizer = self._trainer._base, kwargs["optimizer"]
        if base is None:
            return
        if state.is_world_process_zero:
            say_no_delta(base, kwargs["model"])
            if state.global_step == 0 and any(base_in(entries) is not None for entries in optimizer.state.values()):
                logger.warning("The weights decay to the base that they had in the train() before this one.")
        if self._trainer._settings.base_from is None:
            return
        able = {
            id(param)
            for group, params in zip(optimizer.param_groups, group_params(optimizer), strict=True)
            if decays_to_base(group)
            for param in params
        }
        params = {clean_name(name): param for name, param in kwargs["model"].named_parameters() if id(param) in able}
        wanted = {name: param for name, param in params.items() if name in base.files}
        give_bases(optimizer, {wanted[name]: weight for name, weight in _weights(base, wanted, kwargs["model"])})


def _weights(base: BaseModel, params: Mapping[str, Tensor], model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights of a base by name, each where its parameter is; memory-mapped on a CPU."""
    if base.tensors is None:
        return
    where = {name: file for file, header in base.tensors.headers.items() for name in header.entries}
    forms, converted = base.tensors.forms, []
    for name, param in params.items():
        same = next((file for file in base.files[name] if forms[file][1] == tuple(full_shape(param))), None)
        if same is None:
            converted.append(name)
            continue
        with safe_open(base.tensors.folder / where[same], framework="pt") as handle:
            yield name, _placed(handle.get_tensor(same), param)
    if converted:
        other = type(model).from_pretrained(base.tensors.folder, config=model.config, dtype=model.dtype)
        weights = dict(other.named_parameters())
        for name in converted:
            yield name, _placed(weights[name].detach(), params[name])


def _placed(weight: Tensor, param: Any) -> Tensor:
    if is_dtensor(param):
        from torch.distributed.tensor import distribute_tensor

        # Each process has read all of it, so none sends it.
        return distribute_tensor(
            weight.to(param.to_local().device), param.device_mesh, param.placements, src_data_rank=None
        )
    return weight.to(param.device)


def write_run_delta(folder: Path, base: BaseModel, report: SparsityReport) -> None:
    """Write the delta of a model that a run has saved into a subfolder, and say how large it is, or why there is none.

    A delta that is there is replaced, or removed.
    """
    out, reason = folder / DELTA_FOLDER, base.why_none
    where = None if base.tensors is None else base.tensors.folder
    if where is not None and os.path.samefile(folder, where):
        reason = f"the model was saved into the folder of its base, {str(folder)!r}"
    elif where is not None:
        try:
            delta = write_delta_within(where, folder, DELTA_FOLDER)
        except (ValueError, OSError) as error:  # of files that the run has not made, or a full disk
            reason = str(error).rstrip(".")
    if reason:
        if is_delta(out):
            shutil.rmtree(out, ignore_errors=True)
        logger.warning("No delta was written beside the model in %r, as %s.", str(folder), reason)
        return
    logger.warning(
        "%r has the weights that differ from %s, %s of %s (%.2f%%), in %.2f MB, %.2f%% of the model's bytes.",
        str(out),
        repr(str(where)) if delta.revision is None else f"{delta.base} (revision {delta.revision})",
        f"{delta.changed:,}",
        f"{delta.weights:,}",
        100 * delta.changed / max(delta.weights, 1),
        delta.size / 1e6,
        100 * delta.size / max(delta.dense, 1),
    )
    known = {name for names in base.files.values() for name in names}
    changed = sum(
        tensor.changed
        for tensor in delta.tensors
        if base.tensors is not None and base.tensors.own_name(tensor.name) in known
    )
    counts = [] if report.delta is None else report.delta.tensors
    here = sum(tensor.parameters - tensor.zeros for tensor in counts if tensor.name in base.files)
    if changed > here:
        logger.warning(
            "This run has changed %s of these weights: it did not start from the weights in %r, and the delta has all "
            "that differs from them.",
            *(f"{here:,}", str(where)),
        )
