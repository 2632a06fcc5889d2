"""The frozen model that a run learns from: a copy of its own weights, another model, or the base below adapters."""

from __future__ import annotations

import copy
import inspect
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.utils import cached_file

from ..low_bit.inputs import round_activations
from ..storage.folder import CONFIG
from ..storage.hub import local_folder
from ..storage.untrusted import auto_config, on_meta
from .settings import DecaySettings
from .teacher_cache import TeacherCache, files_digest


if TYPE_CHECKING:
    from transformers import Trainer

SELF = "self"

# Weights of a tensor that its checksum is of.
_SAMPLED = 256

# Classes of transformers' that hold the classes for one kind of output each.
_AUTO_CLASSES = (
    *("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"),
    *("AutoModelForTokenClassification", "AutoModelForQuestionAnswering", "AutoModelForMultipleChoice"),
    *("AutoModelForImageClassification", "AutoModelForAudioClassification", "AutoModelForVideoClassification"),
    *("AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq"),
)


@dataclass(frozen=True)
class Teacher:
    """A frozen model.

    Args:
        call: Calls it without gradients.
        config: Its config; None for a model without one.
        digest: A checksum of samples of its weights.
    """

    call: Callable[..., Any]
    config: Any
    digest: str


def make_teacher(
    trainer: Trainer, model: nn.Module, settings: DecaySettings, cache: TeacherCache | None = None
) -> Teacher:
    """Return the teacher that settings ask for; ValueError if it does not fit the model, the memory or the cache.

    One whose answers are in the cache is not loaded before a row is missing there.
    """
    name = str(settings.teacher)
    if name == SELF and hasattr(model, "peft_config"):
        _check_adapters(model)
        of_adapters = {id(param) for module in model.modules() for param in _of_adapters(module)}
        frozen = [param for param in model.parameters() if id(param) not in of_adapters]
        digest = _digest(frozen)
        if cache is not None:
            cache.admit(name, digest, None)
        return Teacher(_base_of(model), getattr(model, "config", None), digest)
    files: str | None = None
    if name == SELF:
        config: Any = getattr(model, "config", None)
        load: Callable[[], nn.Module] = partial(_frozen_copy, trainer, model, settings.teacher_dtype)
    else:
        config, load, kind = _loader(trainer, plain(model), settings)
        files = files_digest(local_folder(name), kind) if cache is not None else None
    known = None if cache is None else cache.digest_for(files)

    @once
    def loaded() -> tuple[Callable[..., Any], str]:
        teacher: nn.Module = load().requires_grad_(False).eval()
        own: Any = getattr(teacher, "config", None)
        if getattr(own, "use_cache", None):
            own.use_cache = False
        if trainer.is_fsdp_enabled:
            from .sharded_teacher import sharded

            # Of the weights in the first process: Accelerate may load them nowhere else.
            first = trainer.args.process_index == 0
            (digest,) = broadcast_object_list([_digest(teacher.parameters()) if first else ""])
            return sharded(trainer, teacher), digest
        teacher.to(trainer.args.device)
        digest = _digest(teacher.parameters())
        if cache is not None:
            cache.admit(name, digest, files)
        return torch.no_grad()(teacher), digest

    def call(**inputs: Any) -> Any:
        return loaded()[0](**inputs)

    return Teacher(call, config, loaded()[1] if known is None else known)


def _digest(params: Iterable[nn.Parameter]) -> str:
    checksum = 0
    for param in params:
        flat = param.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]
        checksum = zlib.crc32(sample.float().cpu().numpy().tobytes(), checksum)
    return f"{checksum:08x}"


def plain(model: nn.Module) -> nn.Module:
    """Return the model of transformers' inside of one with adapters, or the model itself."""
    inner: nn.Module = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    return inner


def accepts(model: nn.Module, name: str, *, by_name: bool = False) -> bool:
    """Whether a model's ``forward`` takes an argument, by its name or, unless ``by_name``, among any others."""
    parameters = inspect.signature(plain(model).forward).parameters
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return name in parameters or (any_name and not by_name)


def _frozen_copy(trainer: Trainer, model: nn.Module, dtype: str | None) -> nn.Module:
    if not all(param.is_floating_point() for param in model.parameters()):
        raise ValueError(
            "Invalid teacher: teacher='self' with a quantized model, whose weights cannot be copied; give the folder "
            "or name of the model in full precision, or train adapters."
        )
    to = None if dtype is None else getattr(torch, dtype)
    stored = _stored(trainer, model)
    frozen: dict[int, torch.Tensor] = {}
    copied = []
    for name, param in model.named_parameters():
        same = stored.get(name)
        if same is None or same.dtype != (to or param.dtype) or not torch.equal(param.detach().to(same.dtype), same):
            copied.append(param)
        else:
            frozen[id(param)] = same
    _check_memory(trainer, SELF, sum(param.numel() * (to or param.dtype).itemsize for param in copied))
    frozen |= {id(param): _cast(param, to) for param in copied}
    # Copies that the memo holds are taken as they are, so no second one in the model's own type is ever made.
    memo = {key: nn.Parameter(each, requires_grad=False) for key, each in frozen.items()}
    return round_activations(copy.deepcopy(model, memo), {})


def _stored(trainer: Trainer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the folder that a model says it was loaded from, by name; none of what a CPU cannot use in place.

    They are mapped from the files: they take memory that the system can take back, and processes share it.
    """
    name: Any = getattr(model, "name_or_path", "")
    if trainer.args.device.type != "cpu" or not name:
        return {}
    try:
        folder = Path(cached_file(name, CONFIG, local_files_only=True) or "").parent
        if folder.resolve() == Path(trainer.args.output_dir or ".").resolve():  # where the run may write over them
            return {}
        return {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}
    except (OSError, ValueError, SafetensorError):
        return {}


def _cast(param: nn.Parameter, dtype: torch.dtype | None) -> torch.Tensor:
    return param.detach().to(param.dtype if dtype is None else dtype, copy=True)


def _loader(trainer: Trainer, model: nn.Module, settings: DecaySettings) -> tuple[Any, Callable[[], nn.Module], str]:
    """The config of the teacher that settings name, a function that loads it, and as what; ValueError for no fit."""
    name = str(settings.teacher)
    try:
        config = auto_config(name)
    except ValueError as error:
        raise ValueError(
            f"Invalid teacher: teacher={name!r} is neither 'self' nor a model that can be read: {error}"
        ) from error
    kind = _class_for(model, config)
    if kind is None:
        raise ValueError(
            f"Invalid teacher: teacher={name!r} is a {type(config).__name__} and the model a {type(model).__name__}; "
            "name a model that has the same kind of output."
        )
    check_fit(trainer, model, config, name, settings)
    dtype = settings.teacher_dtype or str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")
    to = getattr(torch, dtype)
    build = getattr(kind, "_from_config", None) or kind.from_config
    shell = on_meta(build, copy.deepcopy(config), name)
    _check_memory(trainer, name, sum(param.numel() for param in shell.parameters()) * to.itemsize)
    if trainer.processing_class is not None:
        _check_tokenizer(trainer.processing_class, name)

    def load() -> nn.Module:
        loaded: nn.Module
        loaded, found = kind.from_pretrained(name, dtype=to, output_loading_info=True)
        missing = sorted(found["missing_keys"])
        if missing:
            raise ValueError(
                f"Invalid teacher: teacher={name!r} has no weights for {missing[0]} of a {type(loaded).__name__}, "
                "which would be random; name a model that was trained with the same kind of output."
            )
        return loaded

    return config, load, f"{kind.__name__} {dtype}"


def _class_for(model: nn.Module, config: Any) -> Any:
    """The class that loads a teacher with the kind of output that a model has."""
    if isinstance(config, getattr(type(model), "config_class", None) or ()):
        return type(model)
    import transformers

    for name in _AUTO_CLASSES:
        auto = getattr(transformers, name, None)
        mapping = getattr(auto, "_model_mapping", {})
        own = type(getattr(model, "config", None))
        classes = mapping[own] if own in mapping else ()
        if isinstance(model, classes) and type(config) in mapping:
            return auto
    return None


def check_fit(trainer: Trainer, model: nn.Module, config: Any, name: str, settings: DecaySettings) -> None:
    """Raise ValueError if a teacher, of which this is the config, has other classes or hidden states than a model."""
    ours = getattr(model, "config", None)
    labels, theirs = getattr(ours, "num_labels", None), getattr(config, "num_labels", None)
    if "Classification" in type(model).__name__ and settings.teacher_logits and labels != theirs:
        raise ValueError(
            f"Invalid teacher: teacher={name!r} has {theirs} labels and the model {labels}; name a model that was "
            "trained on the same task, or set teacher_logits=0."
        )
    if settings.teacher_hidden and not same_hidden(ours, config):
        raise ValueError(
            f"Invalid teacher_hidden: teacher_hidden={settings.teacher_hidden!r} with teacher={name!r}, which has "
            f"{_shape(config)} and the model {_shape(ours)}; set teacher_hidden=0."
        )
    sizes = [getattr(each.get_text_config(), "vocab_size", None) if each else None for each in (ours, config)]
    if settings.teacher_logits and None not in sizes and sizes[0] != sizes[1] and trainer.processing_class is None:
        raise ValueError(
            f"Invalid teacher: teacher={name!r} has a vocabulary of {sizes[1]} tokens and the model one of {sizes[0]}; "
            "give the Trainer the tokenizer as processing_class to compare the two, or name a model with the same one."
        )


def same_hidden(ours: Any, theirs: Any) -> bool:
    """Whether two configs have as many layers, as wide."""
    return ours is not None and theirs is not None and _sizes(ours) == _sizes(theirs)


def _sizes(config: Any) -> tuple[Any, ...]:
    text = config.get_text_config()
    names = ("num_hidden_layers", "hidden_size", "num_decoder_layers", "hidden_sizes", "depths", "embed_dim")
    return tuple(getattr(text, name, None) for name in names)


def _shape(config: Any) -> str:
    layers, width, *_ = _sizes(config)
    return f"{layers} layers of width {width}"


def _check_tokenizer(ours: Any, name: str) -> None:
    """Raise ValueError if the teacher has a tokenizer that gives other numbers to tokens."""
    from transformers import AutoTokenizer

    ours = getattr(ours, "tokenizer", ours)  # of a processor
    if not hasattr(ours, "get_vocab"):
        return
    try:
        tokens = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError, ImportError, AttributeError, KeyError):
        return  # a folder without a tokenizer
    vocabulary = ours.get_vocab()
    other = next((token for token in vocabulary if token in tokens and tokens[token] != vocabulary[token]), None)
    missing = [token for token in vocabulary if token not in tokens]
    if other is None and len(missing) <= len(vocabulary) // 100:  # tokens that were added for fine-tuning
        return
    token = missing[0] if other is None else other
    raise ValueError(
        f"Invalid teacher: teacher={name!r} has another tokenizer than the model: {token!r} is token "
        f"{vocabulary[token]} here and {tokens.get(token, 'none')} there. Name a teacher with the model's tokenizer."
    )


def _check_memory(trainer: Trainer, name: str, size: int) -> None:
    device = trainer.args.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if device.type == "cuda" and trainer.is_fsdp_enabled:
        size //= trainer.args.world_size
    if size > free:
        raise ValueError(
            f"Invalid teacher: teacher={name!r} takes {size / 2**30:.1f} GiB of memory on {device}, where "
            f"{free / 2**30:.1f} GiB are free; take teacher_dtype=bfloat16, or a smaller teacher."
        )


def _check_adapters(model: nn.Module) -> None:
    """Raise ValueError if the model without its adapters is not what it was before training, or has other tokens."""
    kinds: Mapping[str, Any] = model.peft_config  # type: ignore[assignment]
    if any(getattr(config, "is_prompt_learning", False) for config in kinds.values()):
        raise ValueError(
            "Invalid teacher: teacher='self' with tokens of a learned prompt, which the teacher would not have; take "
            "another kind of adapter, or name a teacher."
        )
    own = {id(param) for module in model.modules() for param in _of_adapters(module)}
    trained = [name for name, param in model.named_parameters() if param.requires_grad and id(param) not in own]
    if trained:
        raise ValueError(
            f"Invalid teacher: teacher='self' is the model without its adapters, and {trained[0]} below them is "
            "trained too; freeze it, or name a teacher."
        )


def _of_adapters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that ``disable_adapter`` leaves out."""
    for name in getattr(module, "adapter_layer_names", ()):
        part = getattr(module, name, None)
        if isinstance(part, nn.Module):
            yield from part.parameters()
    for name in ("modules_to_save", "trainable_tokens_delta"):
        part = getattr(module, name, None)
        if isinstance(part, nn.Module):
            yield from part.parameters()


def _base_of(model: nn.Module) -> Callable[..., Any]:
    """Return a function that calls a model without its adapters, as it is in evaluation."""

    @torch.no_grad()
    def call(**inputs: Any) -> Any:
        with _evaluating(model), model.disable_adapter():  # type: ignore[operator]
            return model(**inputs)

    return call


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards all is as before, also what ``disable_adapter`` changes."""
    training = [module for module in model.modules() if module.training]
    trained = [(param, param.requires_grad) for param in model.parameters()]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for param, was in trained:
            param.requires_grad_(was)
