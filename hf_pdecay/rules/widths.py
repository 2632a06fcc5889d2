"""How many bits each weight has: ``weight_bits`` of the run and of rules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers.matrices import decayable_parameter_names
from ..layers.parametrized import parametrized
from ..layers.saved_names import names_in_files
from ..low_bit.layers import roundable
from ..names import clean_name
from ..optim.distributed import is_dtensor
from ..optim.param_groups import can_decay
from .assign import finder
from .spec import Rule


def widths_by_name(model: nn.Module, width: float | None, rules: Sequence[Rule]) -> dict[str, float]:
    """Return the width of each weight that a run rounds, by clean name; shared ones are listed once.

    The run's width is that of the trained matrices that decay by default, which leaves out embeddings and heads. The
    first rule that sets a width and takes a weight wins; a rule takes others only if it matches none of these.

    Args:
        model: The model, wrapped or not.
        width: The run's width; None for none.
        rules: The rules; those without a width are passed over.

    Raises:
        ValueError: If a rule takes a weight that cannot be rounded, or no weight can be.
    """
    trainable = {clean_name(name): param for name, param in model.named_parameters() if param.requires_grad}
    able = roundable(model)
    default = [name for name in decayable_parameter_names(model) if name in trainable]
    masked = [layer.name for layer in parametrized(model) if layer.pruned]
    if masked:
        raise ValueError(
            f"Invalid weight_bits: {masked[0]} is under torch.nn.utils.prune, whose mask comes after the rounding; "
            "call prune.remove before training."
        )
    widths: dict[str, float | None] = {}
    find = finder(model, names_in_files(model) if rules else {}, default)
    for rule in rules:
        if not rule.sets_width:
            continue
        found = find(rule)
        taken = found & set(default) or {name for name in found if trainable[name].dim() > 1} or found
        for name in sorted(taken):
            if name not in able or not can_decay(trainable[name]):
                raise ValueError(
                    f"Invalid lp_rules: {rule.text!r} has weight_bits={rule.weight_bits:g}, and {name} is no matrix of "
                    "floats that a layer multiplies by; leave it out of the rule."
                )
            widths.setdefault(name, rule.weight_bits)
    if width is not None:
        for name in default:
            if name in able:
                widths.setdefault(name, width)
    chosen = {name: bits for name, bits in widths.items() if bits is not None}
    for name in chosen:
        if not _is_plain(trainable[name]):
            raise ValueError(
                f"Invalid weight_bits: {name} is a {type(trainable[name]).__name__}, so the model is quantised "
                "already; load it without a quantization_config."
            )
    if not chosen:
        raise ValueError(
            "Invalid weight_bits: no weight can be rounded. It takes trained matrices of floats; a model that is "
            "quantised already is loaded without a quantization_config."
        )
    return chosen


def _is_plain(param: Tensor) -> bool:
    return type(param) in (nn.Parameter, Tensor) or is_dtensor(param)
