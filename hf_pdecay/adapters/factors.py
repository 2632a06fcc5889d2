"""The factors of LoRA, layer by layer, and which of their ranks are alive."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class LoraFactors(NamedTuple):
    """The two factors of an adapter on one layer.

    Attributes:
        name: Name of the layer in the base model.
        layer: PEFT's layer.
        a: A, of shape (rank, …).
        b: B, of shape (outputs, rank, …).
    """

    name: str
    layer: Any
    a: Tensor
    b: Tensor

    @property
    def norms(self) -> tuple[Tensor, Tensor]:
        """Euclidean norms of the rows of A and of the columns of B, in float32 at least, each of shape (rank,)."""
        a, b = self.a.detach().flatten(1), self.b.detach().movedim(1, 0).flatten(1)
        dtype = torch.promote_types(a.dtype, torch.float32)
        return torch.linalg.vector_norm(a, dim=1, dtype=dtype), torch.linalg.vector_norm(b, dim=1, dtype=dtype)

    @property
    def size(self) -> int:
        """Number of weights of one rank, in A and B together."""
        return (self.a.numel() + self.b.numel()) // self.a.shape[0]


def lora_names(model: nn.Module) -> list[str]:
    """Return the names of the LoRA adapters of a model, in the order in which they come."""
    return list(dict.fromkeys(name for _, layer in lora_layers(model) for name in layer.r))


def lora_factors(model: nn.Module, adapter_name: str = "default") -> Iterator[LoraFactors]:
    """Yield the factors of a LoRA adapter, layer by layer.

    Layers whose factors are no pair of A (rank, …) and B (outputs, rank, …), as on fused experts or of AdaLoRA, are
    left out.

    Args:
        model: A PEFT model, or any module that holds LoRA layers.
        adapter_name: Which adapter.
    """
    for name, layer in lora_layers(model):
        if adapter_name in layer.lora_A and isinstance(layer.lora_A[adapter_name], nn.Module):
            a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        elif adapter_name in layer.lora_embedding_A:
            a, b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        else:
            continue
        if a.shape[0] == layer.r[adapter_name] == b.shape[1]:
            yield LoraFactors(name, layer, a, b)


def alive(factors: LoraFactors) -> Tensor:
    """Return which ranks add something, as booleans of shape (rank,)."""
    return alive_ranks(factors.a.detach(), factors.b.detach())


def alive_ranks(a: Tensor, b: Tensor) -> Tensor:
    """Return for A (rank, …) and B (outputs, rank, …) which ranks add something: neither row nor column is zero."""
    return (a != 0).flatten(1).any(1) & (b != 0).movedim(1, 0).flatten(1).any(1)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and the module of each layer with LoRA."""
    for name, layer in (model.get_base_model() if isinstance(model, PeftModel) else model).named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer


def named_factors(model: nn.Module, adapter_name: str) -> list[LoraFactors]:
    """Return :func:`lora_factors` as a list; raise ValueError, with the names that there are, if it is empty."""
    found = list(lora_factors(model, adapter_name))
    if not found:
        there = sorted({name for _, layer in lora_layers(model) for name in layer.r if any(lora_factors(model, name))})
        raise ValueError(
            f"Invalid adapter_name: adapter_name={adapter_name!r}; the model has "
            f"{'the LoRA adapters ' + ', '.join(there) if there else 'no LoRA adapter of pairs A and B'}."
        )
    return found


def check_model(peft_model: Any, what: str) -> None:
    """Raise ValueError, in the name of a function, if a model has no adapters on layers or merged ones."""
    if not isinstance(peft_model, PeftModel) or not hasattr(peft_model.base_model, "merge_and_unload"):
        raise ValueError(
            f"{what} takes a PeftModel with an adapter on layers, such as LoRA, not {type(peft_model).__name__}"
            f"{' with prompts, which cannot be merged' if isinstance(peft_model, PeftModel) else ''}."
        )
    merged = next(
        (name for name, each in peft_model.named_modules() if isinstance(each, BaseTunerLayer) and each.merged), None
    )
    if merged is not None:
        raise ValueError(f"{what}: the adapter on {merged!r} is merged already; call unmerge_adapter() first.")
