"""int8 values that are the codes of the weights: nothing is rounded again, from memory and from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hf_pdecay
from hf_pdecay import BitmaskLinear, quantize_one_shot, round_to_nearest, to_dense_inference, to_sparse_inference
from hf_pdecay.inference import bitmask_linear
from hf_pdecay.low_bit.grid import grid_of
from hf_pdecay.low_bit.transform import Layout, round_blocks


def sparse_weight(out: int, size: int, zeros: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, size, generator=generator) * 0.02
    return weight.masked_fill_(torch.rand(out, size, generator=generator) < zeros, 0)


def bound(x: Tensor, weight: Tensor) -> Tensor:
    """How far a product may be off if x is rounded to 16 bits, with one scale for each row, and sums are in float32."""
    step = x.abs().amax(1, keepdim=True) / 32767
    return (step / 2 + 1e-5 * x.abs().amax(1, keepdim=True)) * weight.abs().sum(1) + 1e-6


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("block", [64, 128, 256, 512, 320])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_the_values(
    bits: int, block: int, zeros: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of 320 is a whole row here."""
    if not compiled:
        monkeypatch.setattr(bitmask_linear, "library", lambda: None)
    size = 320 if block == 320 else 650
    weight, bias = round_to_nearest(sparse_weight(37, size, zeros), bits=bits, block=block), torch.randn(37)
    layer = BitmaskLinear(weight, bias, values=torch.int8)
    assert layer._block == {64: 1, 128: 2}.get(block, 4)
    assert torch.equal(layer.dense_weight(), weight)
    assert not (layer.dense_weight().signbit() & (layer.dense_weight() == 0)).any()
    for rows in (1, 3, 6, 16, 33, 70):
        x = torch.randn(rows, size)
        assert ((layer(x) - (x @ weight.T + bias)).abs() <= bound(x, weight)).all()


def test_the_layer_rounds_again_where_codes_do_not_fit() -> None:
    weight = round_to_nearest(sparse_weight(32, 320, 0.5), bits=4, block=32)
    layer = BitmaskLinear(weight, values=torch.int8)
    assert layer._block == 4 and not torch.equal(layer.dense_weight(), weight)
    assert torch.allclose(layer.dense_weight(), weight, atol=float(weight.abs().max()) / 254)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_a_run_and_in_other_dtypes(dtype: torch.dtype) -> None:
    weight = round_blocks(sparse_weight(48, 300, 0.9).to(dtype), Layout(48, 300, 1), grid_of(4, sparse=True))
    layer = BitmaskLinear(weight, values=torch.int8)
    assert layer._block == 2 and torch.equal(layer.dense_weight(), weight)
    assert layer(torch.randn(2, 300, dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_from_memory_and_from_a_file(name: str, zstd: bool, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 64}
    if name == "llama":
        sizes |= {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
        model: Any = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, tie_word_embeddings=True))
    else:
        model = tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=2, n_embd=256, n_head=4, n_positions=32, **sizes))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D) and "lm_head" not in str(module):
                module.weight.mul_(torch.rand(module.weight.shape) >= 0.6).add_(0.0)
    quantize_one_shot(model.eval(), bits=8)
    ids = torch.randint(0, 64, (1, 24))
    expected = model(input_ids=ids).logits
    hf_pdecay.save_compressed(model, tmp_path / "small", zstd=zstd)
    loaded = hf_pdecay.load_sparse_inference(tmp_path / "small", values="int8")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    to_sparse_inference(model, min_sparsity=0.3, values="int8")
    for sparse in (loaded, model):
        layers = {key: module for key, module in sparse.named_modules() if isinstance(module, BitmaskLinear)}
        assert len(layers) >= 8 and all(layer._block == 2 for key, layer in layers.items() if key != "lm_head")
        state = sparse.state_dict()
        assert all(torch.equal(state[key], value) for key, value in before.items() if key != "lm_head.weight")
        assert (sparse(input_ids=ids).logits - expected).abs().max() < 1e-3 * expected.abs().max()
        state = to_dense_inference(sparse).state_dict()
        assert all(torch.equal(state[key], value) for key, value in before.items() if key != "lm_head.weight")
