"""The factors of LoRA adapters, layer by layer, and their live ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..optim.unit_operations import alive_here
from ..optim.units import Member
from ..terminal import get_logger


logger = get_logger(__name__)

# Values of `init_lora_weights` that change the base begin with these.
_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Where a layer has its factors.
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


class LoraFactors(NamedTuple):
    """The factors A (rank, …) and B (outputs, rank, …) of an adapter on a layer of PEFT, with its name in the base."""

    name: str
    layer: Any
    a: Tensor
    b: Tensor


def lora_names(model: nn.Module) -> list[str]:
    """Return the names of the LoRA adapters of a model, in the model's order."""
    return list(dict.fromkeys(name for _, layer in lora_layers(model) for name in layer.r))


def lora_factors(model: nn.Module, adapter_name: str = "default") -> Iterator[LoraFactors]:
    """Yield the factors of a LoRA adapter by layer; skips layers without a pair, such as fused experts or AdaLoRA."""
    for name, layer in lora_layers(model):
        if adapter_name in layer.lora_A and isinstance(layer.lora_A[adapter_name], nn.Module):
            a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        elif adapter_name in layer.lora_embedding_A:
            a, b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        else:
            continue
        if a.shape[0] == layer.r[adapter_name] == b.shape[1]:
            yield LoraFactors(name, layer, a, b)


def alive_ranks(a: Tensor, b: Tensor) -> Tensor:
    """Return for A (rank, …) and B (outputs, rank, …) which ranks add something: row and column are both non-zero."""
    return alive_here(a, Member(0, 0), len(a)) & alive_here(b, Member(1, 1), len(a))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and the module of each layer with LoRA."""
    for name, layer in (model.get_base_model() if isinstance(model, PeftModel) else model).named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer


def named_factors(model: nn.Module, adapter_name: str) -> list[LoraFactors]:
    """Return :func:`lora_factors` as a list; raise ValueError if it is empty."""
    factors = list(lora_factors(model, adapter_name))
    if not factors:
        names = sorted(name for name in lora_names(model) if any(lora_factors(model, name)))
        raise ValueError(
            f"Invalid adapter_name: adapter_name={adapter_name!r}; the model has "
            f"{'the LoRA adapters ' + ', '.join(names) if names else 'no LoRA adapter of pairs A and B'}."
        )
    return factors


def takes_from_base(start: object) -> bool:
    """Whether a value of ``init_lora_weights`` takes initial values from the base, which PEFT changes to make up."""
    return isinstance(start, str) and start.lower().startswith(_FROM_BASE)


def warn_of_changed_base(model: Any) -> None:
    """Warn of each adapter that has changed the base when PEFT made or loaded it, which erases exact zeros."""
    for adapter_name, config in model.peft_config.items():
        start = getattr(config, "init_lora_weights", None)
        if not takes_from_base(start):
            continue
        bases = [layer.get_base_layer().weight for _, layer in lora_layers(model) if adapter_name in layer.r]
        whole = [base for base in bases if type(base.data) is Tensor and base.is_floating_point()]
        zeros, count = sum(int((base == 0).sum()) for base in whole), sum(base.numel() for base in whole)
        logger.warning(
            "The adapter %r has init_lora_weights=%r, which changes the weights of the base that it is on%s. If the "
            "base was sparse, its zeros are lost there: load the base again and give the adapter "
            "init_lora_weights=True, which keeps them, as 'gaussian', 'orthogonal' and 'eva' do.",
            adapter_name,
            start,
            f"; {zeros / count:.1%} of them are zero now" if count else "",
        )


def warn_of_sparse_factors(model: nn.Module, params: Iterable[Tensor]) -> None:
    """Warn if some of these parameters, which decay weight by weight to zeros, are the A or B of LoRA."""
    decayed = {id(param) for param in params}
    found = [
        any(id(param) in decayed for factors in _FACTORS for param in getattr(layer, factors).parameters())
        for _, layer in lora_layers(model)
    ]
    if any(found):
        logger.warning(
            "A and B of LoRA decay weight by weight in %d layers. Zeros there make nothing smaller or faster, as B A "
            'stays dense. Let whole ranks die, by the rule {"lora_": {"group": "rank"}} in lp_rules, and '
            'target_sparsity is the fraction of dead ranks; or leave them out, by {"lora_": "off"}.',
            sum(found),
        )


def check_model(peft_model: Any, function: str) -> None:
    """Raise ValueError, which names the function, unless a model has an adapter on layers that is not merged."""
    if not isinstance(peft_model, PeftModel) or not hasattr(peft_model.base_model, "merge_and_unload"):
        raise ValueError(
            f"{function} takes a PeftModel with an adapter on layers, such as LoRA, not {type(peft_model).__name__}"
            f"{' with prompts, which cannot be merged' if isinstance(peft_model, PeftModel) else ''}."
        )
    for name, module in peft_model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(f"{function}: the adapter on {name!r} is merged already; call unmerge_adapter() first.")


def is_plain(weight: Any) -> bool:
    """Whether a weight is in floating point and not quantised."""
    return weight.is_floating_point() and weight.element_size() > 1 and type(weight.data) is Tensor
