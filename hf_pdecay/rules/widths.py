"""How many bits weights and inputs have: ``weight_bits`` and ``activation_bits`` of the run and of rules."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from ..layers.matrices import decayable_parameter_names
from ..layers.parametrized import parametrized
from ..layers.saved_names import names_in_files
from ..low_bit.inputs import input_layers
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
    masked = [layer.name for layer in parametrized(model) if layer.pruned]
    if masked:
        raise ValueError(
            f"Invalid weight_bits: {masked[0]} is under torch.nn.utils.prune, whose mask comes after the rounding; "
            "call prune.remove before training."
        )
    able = roundable(model)
    widths = _chosen(model, width, rules, "weight_bits", able, "no matrix of floats that a layer multiplies by")
    chosen = {name: bits for name, bits in widths.items() if name in able}
    trainable = _trainable(model)
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


def input_widths(model: nn.Module, width: float | None, rules: Sequence[Rule]) -> dict[str, float]:
    """Return the width of the inputs of each layer that a run has round them, by the layer's name.

    The layers are those that multiply by the weights which :func:`widths_by_name` would choose.

    Raises:
        ValueError: If a layer cannot round its inputs, or no layer does.
    """
    able = input_layers(model)
    chosen = _chosen(model, width, rules, "activation_bits", able, "not the weight of a linear layer or convolution")
    inside = next((name for name in chosen if name not in able), None)
    if inside is not None:
        raise ValueError(
            f"Invalid activation_bits: what {inside} multiplies is made inside of its module, as in fused experts and "
            "nn.MultiheadAttention, and cannot be rounded. Leave it out, by "
            f'{{"{inside}": {{"activation_bits": null}}}} in lp_rules.'
        )
    if not chosen:
        raise ValueError(
            "Invalid activation_bits: no layer can round its inputs. It takes linear layers and convolutions whose "
            "weights are trained."
        )
    return {layer: bits for name, bits in chosen.items() for layer in able[name]}


def _chosen(
    model: nn.Module, width: float | None, rules: Sequence[Rule], key: str, able: Collection[str], otherwise: str
) -> dict[str, float]:
    """The widths by name of weight, as the rules and the run say, also for weights that are not able."""
    trainable = _trainable(model)
    default = [name for name in decayable_parameter_names(model) if name in trainable]
    widths: dict[str, float | None] = {}
    find = finder(model, names_in_files(model) if rules else {}, default)
    for rule in rules:
        if key not in rule.bits:
            continue
        bits, found = rule.bits[key], find(rule)
        taken = found & set(default) or {name for name in found if trainable[name].dim() > 1} or found
        for name in sorted(taken):
            if bits is not None and (name not in able or not can_decay(trainable[name])):
                raise ValueError(
                    f"Invalid lp_rules: {rule.text!r} has {key}={bits:g}, and {name} is {otherwise}; leave it out of "
                    "the rule."
                )
            widths.setdefault(name, bits)
    if width is not None:
        for name in default:
            widths.setdefault(name, width)
    return {name: bits for name, bits in widths.items() if bits is not None}


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {clean_name(name): param for name, param in model.named_parameters() if param.requires_grad}


def _is_plain(param: Tensor) -> bool:
    return type(param) in (nn.Parameter, Tensor) or is_dtensor(param)
