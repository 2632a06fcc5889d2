"""LoRA adapters on tiny models, with ranks that are dead."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn


def lora(model: nn.Module, **settings: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", **settings}))


def sparse(model: nn.Module, fraction: float = 0.5) -> nn.Module:
    """The model with the smallest weights of each matrix at zero."""
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim > 1:
                param[param.abs() < param.abs().flatten().quantile(fraction)] = 0
    return model


def fill(model: Any, seed: int = 2) -> Any:
    """Random values for all that an adapter trains, B included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.add_(torch.randn(param.shape, generator=generator) * 0.1)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(24).reshape(2, 12)).logits


def kill(model: Any) -> dict[str, int]:
    """Zero some ranks, by A, by B or by both; return how many are left by layer."""
    left = {}
    with torch.no_grad():
        for number, (name, layer) in enumerate(model.get_base_model().named_modules()):
            if not hasattr(layer, "lora_A") or not layer.r:
                continue
            embedding = "default" in layer.lora_embedding_A
            a = layer.lora_embedding_A["default"] if embedding else layer.lora_A["default"].weight
            b = layer.lora_embedding_B["default"] if embedding else layer.lora_B["default"].weight
            dead = [r for r in range(len(a)) if (number + r) % 3 == 0] if len(left) != 1 else list(range(len(a)))
            for r in dead:
                if r % 2:
                    a[r] = 0
                else:
                    b[:, r] = 0
            left[name] = len(a) - len(dead)
    return left
