"""Shrinks a model in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from ..checks import check_choice
from ..layers.finding import Layer, find_layers
from ..names import clean_name
from ..storage.source import is_ragged
from ..terminal import get_logger
from .configs import config_paths, configs_within, set_values
from .dead import dead_units_of
from .planning import Plan, plan_ragged, plan_uniform
from .ragged_config import make_settings
from .report import LayerCount, ShrinkReport
from .resize import Removal, resize, shapes_after


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)

logger = get_logger(__name__)

_FUSED = (
    "The neurons of fused experts in {} cannot be removed: one parameter holds all experts, and each expert has dead "
    "neurons of its own. Store the model with `hf-pdecay compress`."
)

KINDS = ("neuron", "head")
LAYOUTS = ("uniform", "ragged")


def shrink(model: Model, *, layers: str = "uniform", multiple_of: int = 1) -> Model:
    """Remove the dead neurons and heads from a model, in place.

    A unit is dead if its zeros alone keep it from contributing: its columns in the layer's last projection are all
    zero, or its rows before it. The smaller model computes the same, up to the order of sums. An optimizer that exists
    already keeps the old weights.

    Args:
        model: A model of transformers, with an architecture that :mod:`hf_pdecay.layers` knows.
        layers: ``"uniform"``: all layers keep the same number, which the config then has, so that the saved model loads
            anywhere; layers with more dead units keep some of them. ``"ragged"``: each layer keeps its living units;
            the saved model loads after ``import hf_pdecay``.
        multiple_of: Each layer keeps a multiple of this number of neurons, such as 64 for a GPU.

    Returns:
        The same model.

    Raises:
        ValueError: If the architecture is unknown, weights are sharded, or an argument is invalid.
    """
    report = shrink_model(model, layers=layers, multiple_of=multiple_of)
    removed, (before, left) = tuple(map(report.removed, KINDS)), report.parameters
    logger.info("Removed %d neurons and %d heads: %d parameters are left of %d.", *removed, left, before)
    for note in report.notes:
        logger.warning("%s", note)
    return model


def shrink_model(model: Any, *, layers: str = "uniform", multiple_of: int = 1) -> ShrinkReport:
    """:func:`shrink` that returns the report."""
    check_layout(layers, multiple_of)
    _check_model(model)
    unit_layers = layers_of(model)
    plan, report = planned(model, unit_layers, dead_units_of(model, unit_layers), layers, multiple_of)
    resize(model, plan.removals)
    set_values(model, plan.config)
    if layers == "ragged" or is_ragged(getattr(model.config, "quantization_config", None)):
        note_sizes(model, plan.removals)
    report.parameters = report.parameters[0], count_parameters(model)
    return report


def check_layout(layers: str, multiple_of: int) -> None:
    """Raise ValueError if an argument is invalid."""
    check_choice("layers", layers, LAYOUTS)
    if type(multiple_of) is not int or multiple_of < 1:
        raise ValueError(f"Invalid multiple_of: multiple_of={multiple_of!r}; it must be a whole number of at least 1.")


def _check_model(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"shrink takes a model of transformers, not {type(model).__name__}; take it out of what wraps it, and "
            "merge adapters first."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"shrink takes plain weights, and this {type(model).__name__} is quantized.")


def layers_of(model: nn.Module) -> list[Layer]:
    """Return the layers whose neurons or heads can be removed, in the model's order; ValueError if there is none."""
    found: list[Layer] = []
    errors: list[ValueError] = []
    for kind in KINDS:
        try:
            found += find_layers(model, kind)
        except ValueError as error:
            errors.append(error)
    layers = [layer for layer in found if layer.row is not None]
    if not layers:
        raise ValueError(_FUSED.format(type(model).__name__)) if found else errors[0]
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return sorted(layers, key=lambda layer: order.get(layer.units.name, 0))


def planned(
    model: Any, layers: Sequence[Layer], dead: Sequence[Tensor], layout: str, multiple_of: int
) -> tuple[Plan, ShrinkReport]:
    """Plan what to remove, and return a report with the number of parameters before and after."""
    plan = (plan_uniform if layout == "uniform" else plan_ragged)(model, layers, dead, multiple_of)
    counts = [
        LayerCount(layer.units.name, layer.units.kind, layer.units.count, int(gone.sum()), removal.kept)
        for layer, gone, removal in zip(layers, dead, plan.removals, strict=True)
    ]
    after = sum(math.prod(shape) for shape in shapes_after(model, plan.removals).values())
    return plan, ShrinkReport(counts, (count_parameters(model), after), config=plan.config, notes=plan.notes)


def note_sizes(model: Any, removals: Sequence[Removal]) -> None:
    """Put the sizes of the layers into the config, so that the model can be loaded again.

    A config within the config gets those of its part, which transformers may load alone.
    """
    paths = {clean_name(name): path for name, path in config_paths(model).items()}
    sizes: dict[str, dict[str, dict[str, int]]] = {}
    for removal in removals:
        units = removal.layer.units
        for path in {"", paths[removal.layer.modules[0][0]]}:
            sizes.setdefault(path, {}).setdefault(units.name, {})[units.kind] = removal.kept
    configs = configs_within(model.config)
    for path, layers in sizes.items():
        configs[path].quantization_config = make_settings(layers)


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights of a model, shared ones once."""
    return sum(param.numel() for param in model.parameters())
