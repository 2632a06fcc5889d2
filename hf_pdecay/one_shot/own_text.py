"""Rows of text that a language model writes itself, which stand for what it knows beside the rows of a task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .model import calibrating, context_of


_TEXTS, _LENGTH = 32, 256  # that are written at a time, and the tokens of each


@torch.no_grad()
def own_rows(model: Any, rows: int, length: int, seed: int = 0) -> Tensor:
    """Return rows of tokens that a causal language model draws from its own predictions, one text after the other.

    Each text begins with a token drawn from the whole vocabulary (https://huggingface.co/papers/2305.17888). The random
    numbers of the caller go on as if nothing had been drawn.

    Args:
        model: A causal language model of transformers.
        rows: Number of rows.
        length: Tokens of each.
        seed: For what is drawn.

    Returns:
        Token ids of shape (rows, length), on the CPU.
    """
    from transformers import GenerationConfig

    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = min(_LENGTH, length, context_of(getattr(model, "config", None)) or _LENGTH)
    drawing = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=tokens - 1, min_new_tokens=tokens - 1
    )
    drawing.pad_token_id = 0  # nothing is padded; without it generate warns
    texts: list[Tensor] = []
    devices = [device] if device.type == "cuda" else []
    with calibrating(model), torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        while len(texts) * _TEXTS * tokens < rows * length:
            first = torch.randint(vocabulary, (_TEXTS, 1)).to(device)
            drawn = model.generate(first, attention_mask=torch.ones_like(first), generation_config=drawing)
            texts.append(drawn[:, :tokens].cpu())
    return torch.cat(texts).flatten()[: rows * length].view(rows, length)
