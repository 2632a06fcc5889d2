"""A Trainer that rounds weights and inputs to few bits as it trains: ``weight_bits`` and ``activation_bits``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..low_bit.grid import Grid, grid_of
from ..low_bit.inputs import (
    CONFIG_KEY,
    exact_inputs,
    round_activations,
    rounded_inputs,
    stated_widths,
    weights_of_rounded_inputs,
)
from ..low_bit.model import RoundedModel
from ..names import clean_name
from ..optim.distributed import is_dtensor
from ..optim.param_groups import is_decayed
from ..optim.unit_kinds import ELEMENT, kind_of
from ..rules.spec import Rule, parse_rules
from ..rules.widths import input_widths, widths_by_name
from ..storage.folder import ADAPTER_CONFIG, CONFIG, read_json
from ..target.budgets import has_target
from ..terminal import get_logger
from .engines import engine_of
from .first_callback import FirstCallback
from .optimizer import param_groups_of
from .settings import DecaySettings


if TYPE_CHECKING:
    from .trainer import PDecayTrainerMixin

    _Base = PDecayTrainerMixin
else:
    _Base = object

logger = get_logger(__name__)

LATENT_FILE = "latent_weights.pt"
"""The file in a checkpoint with the weights that the optimizer steps; beside it the model is rounded."""


def rounds(settings: DecaySettings) -> bool:
    """Whether a run rounds weights or inputs."""
    return any(_asks_for(settings, key) for key in ("weight_bits", "activation_bits"))


def round_model_of(trainer: Any, settings: DecaySettings) -> None:
    """Have a complete Trainer round what its settings name: inputs from now on, and weights as it trains.

    Raises:
        ValueError: If nothing can be rounded, or the run is set up in a way that cannot work.
    """
    _check_run(trainer, settings)
    widths_of(trainer.model, settings)
    round_inputs(trainer.model, settings)
    if isinstance(trainer, RoundingMixin):  # in a search, whose trials may differ in their bits
        return
    same = {name: getattr(type(trainer), name) for name in ("__module__", "__qualname__", "__doc__")}
    trainer.__class__ = type(type(trainer).__name__, (RoundingMixin, type(trainer)), same)
    RoundingCallback(trainer).attach(trainer)
    trainer._control_callback.rounding = trainer


def widths_of(model: nn.Module, settings: DecaySettings) -> dict[str, float]:
    """Return how many bits a run gives to each weight that it rounds, by clean name."""
    asked = _asks_for(settings, "weight_bits")
    return widths_by_name(model, settings.weight_bits, _rules(settings)) if asked else {}


def input_widths_of(model: nn.Module, settings: DecaySettings) -> dict[str, float]:
    """Return how many bits a run gives to the inputs of layers, by the layer's name."""
    asked = _asks_for(settings, "activation_bits")
    return input_widths(model, settings.activation_bits, _rules(settings)) if asked else {}


def round_inputs(model: nn.Module, settings: DecaySettings) -> None:
    """Have a model round the inputs that the settings name; without any, those that its config states."""
    widths = input_widths_of(model, settings)
    if widths:
        round_activations(model, widths)
    else:
        round_stated_inputs(model)


def round_stated_inputs(model: nn.Module) -> None:
    """Have a model round the inputs that its config states, and say so."""
    widths = stated_widths(getattr(getattr(model, "config", None), CONFIG_KEY, None))
    if widths and widths != rounded_inputs(model):
        try:
            round_activations(model, widths)
        except ValueError as error:
            logger.warning("The model was trained with activation_bits, and its inputs are not rounded here: %s", error)
            return
        logger.warning(
            "The model was trained with activation_bits: %d layers round their inputs here too. "
            "hf_pdecay.round_activations(model, {}) would end that.",
            len(widths),
        )


def _asks_for(settings: DecaySettings, key: str) -> bool:
    return getattr(settings, key) is not None or any(rule.bits.get(key) is not None for rule in _rules(settings))


def _rules(settings: DecaySettings) -> list[Rule]:
    return parse_rules(settings.lp_rules if isinstance(settings.lp_rules, dict) else {})


def grids_of(model: nn.Module, args: TrainingArguments, settings: DecaySettings) -> dict[str, Grid]:
    """Return the codes of each weight that a run rounds; those of weights that become zero have no offset."""
    sparse = {
        id(param)
        for group in param_groups_of(model, args, settings)
        if is_decayed(group)
        and (group["lambda_p"] > 0 or group["keep_zeros"] or has_target(group, settings.target_sparsity))
        for param in group["params"]
    }
    # A number of zeros is asked for of single weights; a pattern and dead units are what they are with more of them.
    exact = {
        id(param)
        for group in param_groups_of(model, args, settings)
        if is_decayed(group) and kind_of(group) == ELEMENT and has_target(group, settings.target_sparsity)
        for param in group["params"]
    }
    grids = {}
    params = {clean_name(name): id(param) for name, param in model.named_parameters()}
    for name, width in widths_of(model, settings).items():
        grids[name] = grid_of(width, sparse=params[name] in sparse, exact=params[name] in exact)
    return grids


class RoundingMixin(_Base):
    """What a Trainer that rounds does otherwise; :func:`round_weights_of` puts it before the Trainer's class."""

    if TYPE_CHECKING:
        model: nn.Module

    _rounded: RoundedModel | None = None  # while it trains

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; however that ends, the model is rounded then."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.end_rounding()

    def begin_rounding(self) -> None:
        """Round weights and inputs in every forward pass from here on."""
        if self._rounded is None and rounds(self._settings):
            round_inputs(self.model, self._settings)
            grids = grids_of(self.model, self.args, self._settings)
            self._rounded = RoundedModel(self.model, grids, weights_of_rounded_inputs(self.model))

    def end_rounding(self) -> None:
        """Make the rounded weights those of the model."""
        if self._rounded is not None:
            self._rounded.end()
            self._rounded = None

    def note_zeros(self, *, made: bool) -> None:
        """Tell the rounding whether the run has made all zeros of its target, from where on no others may appear."""
        if self._rounded is not None:
            self._rounded.exact = made

    def vanishing(self) -> dict[int, Tensor]:
        """Return by the ids of parameters which of their weights here are rounded to 0 and are not 0."""
        return {} if self._rounded is None else {id(param): marks for param, marks in self._rounded.vanishing()}

    def widths(self) -> dict[str, float]:
        """Return how many bits each weight is rounded to, by clean name."""
        return {} if self._rounded is None else widths_of(self.model, self._settings)

    @contextmanager
    def without_rounding(self) -> Iterator[None]:
        """Have the model compute with the weights that the optimizer steps, and their inputs as they are."""
        with ExitStack() as stack:
            if self._rounded is not None:
                stack.enter_context(self._rounded.latent_alone())
            stack.enter_context(exact_inputs(self.model))
            yield

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a model, which is not rounded yet."""
        self.end_rounding()
        model: nn.Module = super().call_model_init(trial)
        return model

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the model that would be saved now."""
        if self._rounded is None:
            return super().evaluation_loop(*args, **kwargs)
        with self._rounded.rounded():
            return super().evaluation_loop(*args, **kwargs)

    def _saved_weights(self) -> Iterable[tuple[str, Tensor]]:
        return () if self._rounded is None else self._rounded.rounded_weights()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the rounded model, and in a checkpoint the weights from which a resumed run goes on."""
        if self._rounded is None:
            super().save_model(output_dir, _internal_call)
            return
        with self._rounded.rounded():
            super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir and not self.args.save_only_model and self.args.should_save:
            # Under FSDP the shards that are saved beside the optimizer's are the latent weights.
            latent = {} if engine_of(self) else self._rounded.parameters()
            weights = {name: param.detach() for name, param in latent.items()}
            widths = widths_of(self.model, self._settings)
            inputs = rounded_inputs(self.model)
            torch.save({"widths": widths, "inputs": inputs, "weights": weights}, Path(output_dir) / LATENT_FILE)

    def _check_checkpoint(self, folder: str | bool | None, *, warn: bool = False) -> None:
        super()._check_checkpoint(folder, warn=warn)
        if isinstance(folder, str) and Path(folder).is_dir():
            check_widths(Path(folder), widths_of(self.model, self._settings), rounded_inputs(self.model))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        saved = _latent_in(Path(resume_from_checkpoint))
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                if saved is not None and clean_name(name) in saved["weights"]:
                    param.copy_(saved["weights"][clean_name(name)])

    def _load_best_model(self) -> None:
        if self._rounded is not None:  # what is loaded is rounded
            self._rounded.let_go()
            self._rounded = None
        super()._load_best_model()


class RoundingCallback(FirstCallback):
    """Begins and ends the rounding of a Trainer's model, before the other callbacks look at it."""

    def __init__(self, trainer: RoundingMixin) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin."""
        self._trainer.begin_rounding()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that what is rounded is used through its layer."""
        rounded = self._trainer._rounded
        name = None if rounded is None else rounded.find_bypassed()
        if name is not None:
            raise ValueError(
                f"Invalid weight_bits: the model uses {name} without calling its layer, so neither it nor its input "
                f'can be rounded. Leave it out, by {{"{name}": {{"weight_bits": null, "activation_bits": null}}}} in '
                "lp_rules."
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End."""
        self._trainer.end_rounding()


def check_widths(folder: Path, weights: Mapping[str, float], inputs: Mapping[str, float]) -> None:
    """Raise ValueError if a checkpoint to resume from was trained with other widths of weights or of inputs."""
    saved: Mapping[str, Any] = _latent_in(folder) or {}
    if not saved and not (folder / "scheduler.pt").is_file():
        return  # the model alone
    saved_inputs = saved["inputs"] if "inputs" in saved else _stated_in(folder)
    parts: list[tuple[str, str, Mapping[str, float], Mapping[str, float]]] = [
        ("weight_bits", "", saved.get("widths", {}), weights),
        ("activation_bits", "the input of ", inputs if saved_inputs is None else saved_inputs, inputs),
    ]
    for setting, what, theirs, ours in parts:
        name = next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)
        if name is None:
            continue
        before, now = (f"{each[name]:g} bits" if name in each else "not rounded" for each in (theirs, ours))
        raise ValueError(
            f"Invalid {setting}: in the run of {str(folder)!r} {what}{name} is {before}, and in this one {now}. Give "
            f"the same {setting} and rules, or start another run from the weights in there."
        )


def _stated_in(folder: Path) -> Mapping[str, float] | None:
    """The widths of inputs that the config in a checkpoint states; None for one of adapters, which has no config."""
    if (folder / ADAPTER_CONFIG).is_file():
        return None
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return stated_widths(config.get(CONFIG_KEY))


def _latent_in(folder: Path) -> dict[str, Any] | None:
    file = folder / LATENT_FILE
    if not file.is_file():
        return None
    saved: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return saved


def _check_run(trainer: Any, settings: DecaySettings) -> None:
    """Raise ValueError for what rounding cannot be part of."""
    key = next(key for key in ("weight_bits", "activation_bits") if _asks_for(settings, key))
    what = f"Invalid {key}: {'weights' if key == 'weight_bits' else 'inputs'} are rounded"
    if engine_of(trainer) == "DeepSpeed":
        raise ValueError(f"{what} under DeepSpeed, which steps other tensors than the model's; take DDP or FSDP2.")
    if hasattr(trainer.model, "peft_config"):
        raise ValueError(
            f"{what} beside adapters, which are trained in their place. Train the model itself with {key}, and an "
            "adapter on the rounded model after that, without."
        )
    if any(is_dtensor(param) for param in trainer.model.parameters()):
        raise ValueError(f"{what} with tensor parallelism, which divides their blocks; take DDP or FSDP2.")
