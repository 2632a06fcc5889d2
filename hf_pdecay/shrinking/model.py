"""Shrinking a model that is in memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from ..layers.finding import Layer, find_layers
from .dead import dead_groups
from .planning import Plan, plan_ragged, plan_uniform
from .report import LayerCount, ShrinkReport
from .resize import Cut, resize, shapes_after
from .sizes import METHOD, make_settings


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)

logger = logging.getLogger(__name__)

KINDS = ("neuron", "head")
LAYOUTS = ("uniform", "ragged")


def shrink(model: Model, *, layers: str = "uniform", multiple_of: int = 1) -> Model:
    """Cut the dead neurons and heads out of a model, in place.

    A group is dead if its zeros alone keep it from contributing: the columns that it has in the layer's last projection
    are all zero, or the rows before it. What is left computes the same, up to the order of sums. An optimizer made
    before holds the old weights.

    Args:
        model: A model of transformers, of an architecture that :mod:`hf_pdecay.layers` knows.
        layers: ``"uniform"``: all layers keep equally many, as the config then says, so that what ``save_pretrained``
            writes loads anywhere; dead groups that are too many in a layer stay. ``"ragged"``: each layer keeps what is
            alive in it, which loads after ``import hf_pdecay``.
        multiple_of: The number of neurons that a layer keeps is to be a multiple of it, such as 64 for a GPU.

    Returns:
        The same model.

    Raises:
        ValueError: If the architecture is not known, this process holds shards of weights only, or an argument is
            wrong.
    """
    report = shrink_model(model, layers=layers, multiple_of=multiple_of)
    logger.info(
        "Cut %d neurons and %d heads: %d parameters are left of %d.",
        report.removed("neuron"),
        report.removed("head"),
        report.parameters[1],
        report.parameters[0],
    )
    for note in report.notes:
        logger.warning("%s", note)
    return model


def shrink_model(model: Any, *, layers: str = "uniform", multiple_of: int = 1) -> ShrinkReport:
    """:func:`shrink` that returns the report."""
    check_layout(layers, multiple_of)
    _check_model(model)
    found = layers_of(model)
    plan, report = planned(model, found, dead_groups(model, found), layers, multiple_of)
    resize(model, plan.cuts)
    for config in configs_of(model):
        for key, value in plan.config.items():
            setattr(config, key, value)
    before = getattr(model.config, "quantization_config", None)
    if layers == "ragged" or (isinstance(before, dict) and before.get("quant_method") == METHOD):
        note_sizes(model, plan.cuts)
    report.parameters = report.parameters[0], count_parameters(model)
    return report


def check_layout(layers: str, multiple_of: int) -> None:
    """Raise ValueError if the arguments of a shrinking are wrong."""
    if layers not in LAYOUTS:
        raise ValueError(f"Invalid layers: layers={layers!r}; it must be one of {', '.join(LAYOUTS)}.")
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
    """Return the layers of a model that have neurons or heads, in its order.

    Raises:
        ValueError: If neither is known of its architecture.
    """
    found: list[Layer] = []
    errors: list[ValueError] = []
    for kind in KINDS:
        try:
            found += find_layers(model, kind)
        except ValueError as error:
            errors.append(error)
    if errors and not found:
        raise errors[0]
    order = {name: place for place, name in enumerate(name for name, _ in model.named_modules())}
    return sorted(found, key=lambda layer: order.get(layer.units.name, 0))


def planned(
    model: Any, found: Sequence[Layer], dead: Sequence[Tensor], layers: str, multiple_of: int
) -> tuple[Plan, ShrinkReport]:
    """Plan what to cut, and say so in a report with the parameters that there are before and would be after."""
    plan = (plan_uniform if layers == "uniform" else plan_ragged)(model, found, dead, multiple_of)
    counts = [
        LayerCount(each.units.name, each.units.kind, each.units.count, int(gone.sum()), cut.kept)
        for each, gone, cut in zip(found, dead, plan.cuts, strict=True)
    ]
    after = sum(math.prod(shape) for shape in shapes_after(model, plan.cuts).values())
    return plan, ShrinkReport(counts, (count_parameters(model), after), config=plan.config, notes=plan.notes)


def note_sizes(model: Any, cuts: Sequence[Cut]) -> None:
    """Put what the layers have kept into the config, by which the model is loaded again."""
    sizes: dict[str, dict[str, int]] = {}
    for cut in cuts:
        sizes.setdefault(cut.layer.units.name, {})[cut.layer.units.kind] = cut.kept
    model.config.quantization_config = make_settings(sizes)


def configs_of(model: Any) -> list[Any]:
    """Return the model's config and those of its class that its modules hold apart from it, as encoder and decoder."""
    found = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if type(config) is type(model.config):
            found[id(config)] = config
    return list(found.values())


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights of a model, shared ones once."""
    return sum(param.numel() for param in model.parameters())
