"""Pruning whole models in one go: exact counts, what stays dense, and that a run may go on with the zeros."""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import hf_pdecay
from hf_pdecay import decayable_parameter_names, prune_one_shot

from ..helpers.models import build


def rows_of(count: int = 12, length: int = 16) -> torch.Tensor:
    return torch.randint(1, 64, (count, length), generator=torch.Generator().manual_seed(1))


def zeros_of(model: nn.Module, names: list[str]) -> int:
    params = dict(model.named_parameters())
    return sum(int((params[name] == 0).sum()) for name in names)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "qwen3", "modernbert"])
def test_exactly_as_many_zeros_as_asked(name: str, method: str) -> None:
    model: Any = build(name)
    before = copy.deepcopy(model)
    report = prune_one_shot(model, rows_of(), method=method, sparsity=0.37)
    pruned = [tensor for block in report.blocks for tensor in block.tensors]
    assert set(pruned) | set(report.dense) == set(decayable_parameter_names(model))
    params, old = dict(model.named_parameters()), dict(before.named_parameters())
    weights = sum(params[each].numel() for each in pruned)
    assert report.zeros == zeros_of(model, pruned) == round(0.37 * weights)
    assert not any(bool(((param == 0) & param.signbit()).any()) for param in params.values())
    assert all(torch.equal(param, old[each]) for each, param in params.items() if each not in pruned)
    assert all(param.isfinite().all() for param in params.values())
    assert hf_pdecay.measure_sparsity(model, decayed=pruned).sparsity == pytest.approx(report.sparsity)


def _keep(names: dict[nn.Module, str], inputs: dict[str, torch.Tensor], layer: nn.Module, args: Any) -> None:
    inputs[names[layer]] = args[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_blocks_one_at_a_time_give_what_whole_passes_give(name: str) -> None:
    """Each block's matrices are pruned from inputs of the whole model whose earlier blocks are pruned."""
    model: Any = build(name).double().eval()
    slow, rows = copy.deepcopy(model), rows_of()
    report = prune_one_shot(model, rows, method="wanda", sparsity=0.5)
    for block in report.blocks:
        inputs: dict[str, torch.Tensor] = {}
        layers = {slow.get_submodule(each.removesuffix(".weight")): each for each in block.tensors}
        keep = partial(_keep, layers, inputs)
        handles = [layer.register_forward_pre_hook(keep) for layer in layers]
        with torch.no_grad():
            slow(rows)
        for handle in handles:
            handle.remove()
        for layer, each in layers.items():
            weight = layer.weight.detach()
            pruned = hf_pdecay.wanda(weight if isinstance(layer, nn.Linear) else weight.T, inputs[each], sparsity=0.5)
            weight.copy_(pruned if isinstance(layer, nn.Linear) else pruned.T)
    for (each, param), other in zip(model.named_parameters(), slow.parameters(), strict=True):
        assert torch.equal(param, other), each


def test_the_error_of_the_first_block_is_that_of_its_outputs() -> None:
    model: Any = build("llama")
    dense, rows, outputs = copy.deepcopy(model).eval(), rows_of(), []
    report = prune_one_shot(model, rows, method="magnitude", sparsity=0.5)
    for each in (model.eval(), dense):
        handle = each.model.layers[0].register_forward_hook(lambda *args: outputs.append(args[2].double()))
        with torch.no_grad():
            each(rows)
        handle.remove()
    pruned, whole = outputs
    wanted = float(((pruned - whole).norm(dim=-1) / whole.norm(dim=-1)).mean())
    assert report.blocks[0].error == pytest.approx(wanted, rel=1e-5)


def test_experts_are_pruned_each_by_its_own_tokens() -> None:
    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(
        **{"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64},
        **{"num_experts": 4, "num_experts_per_tok": 1, "decoder_sparse_step": 1},
    )
    model: Any = tf.Qwen3MoeForCausalLM(config)
    before = copy.deepcopy(model)
    report = prune_one_shot(model, rows_of(40), method="sparsegpt", sparsity=0.5)
    weights = sum(dict(model.named_parameters())[name].numel() for name in decayable_parameter_names(model))
    assert not report.dense and report.zeros == round(0.5 * weights)
    assert report.unseen == []
    implementations = [getattr(each.config, "_experts_implementation", None) for each in (model, before)]
    assert implementations[0] == implementations[1]
    smaller = copy.deepcopy(before)
    prune_one_shot(smaller, rows_of(40), method="magnitude", sparsity=0.5)
    rows = rows_of(40)
    with torch.no_grad():
        errors = [float((each.eval()(rows).logits - before.eval()(rows).logits).norm()) for each in (model, smaller)]
    assert errors[0] < errors[1]
    # An expert that no token reaches.
    lonely = copy.deepcopy(before)
    with torch.no_grad():
        for layer in lonely.model.layers:
            layer.mlp.gate.weight[2:] = 0
            layer.mlp.gate.weight[0] = -layer.mlp.gate.weight[1]
    report = prune_one_shot(lonely, rows_of(40), sparsity=0.5)
    assert report.zeros == round(0.5 * weights) and report.unseen
    assert all(re.search(r"\[[23]\]|experts\.[23]\.", name) for name in report.unseen)


def test_a_shared_block_is_pruned_from_all_its_calls() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    model: Any = tf.AlbertForMaskedLM(tf.AlbertConfig(**sizes, intermediate_size=48, vocab_size=64))
    seen: list[torch.Tensor] = []
    layer = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    handle = layer.ffn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(rows_of())
    handle.remove()
    assert len(seen) == 3
    wanted = hf_pdecay.wanda(layer.ffn.weight.detach(), torch.cat(seen), sparsity=0.5)
    report = prune_one_shot(model, rows_of(), method="wanda", sparsity=0.5)
    assert len(report.blocks) == 1 and torch.equal(layer.ffn.weight, wanted)


def test_blocks_that_need_more_than_hidden_states_and_lists_of_lists() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    # The last layers take the keys and values of earlier ones.
    shared = tf.Gemma3nTextConfig(
        **sizes,
        **{"intermediate_size": [48] * 4, "num_hidden_layers": 4, "vocab_size": 64, "vocab_size_per_layer_input": 64},
        **{"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 2},
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        pad_token_id=0,
    )
    nested = tf.FunnelConfig(vocab_size=64, block_sizes=[1, 2], d_model=32, n_head=4, d_head=8, d_inner=48)
    for model, blocks in ((tf.Gemma3nForCausalLM(shared), 4), (tf.FunnelForMaskedLM(nested), 3)):
        dense, smaller = copy.deepcopy(model).eval(), copy.deepcopy(model)
        report = prune_one_shot(model, rows_of(), sparsity=0.5)
        assert len(report.blocks) == blocks and report.zeros == round(0.5 * report.weights)
        prune_one_shot(smaller, rows_of(), method="magnitude", sparsity=0.5)
        with torch.no_grad():
            errors = [(each.eval()(rows_of())[0] - dense(rows_of())[0]).norm() for each in (model, smaller)]
        assert errors[0] < errors[1]


def test_a_weight_on_the_left_of_a_product_is_seen() -> None:
    torch.manual_seed(0)
    config = tf.FalconMambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    report = prune_one_shot(tf.FalconMambaForCausalLM(config), rows_of(), sparsity=0.5)
    assert not report.unseen and all(name.endswith("conv1d.weight") for name in report.dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model: Any = build("llama").to(dtype)
    report = prune_one_shot(model, rows_of(), sparsity=0.6)
    assert {param.dtype for param in model.parameters()} == {dtype}
    assert report.zeros == round(0.6 * report.weights) == zeros_of(model, decayable_parameter_names(model))


def test_zeros_that_are_there_stay() -> None:
    model: Any = build("llama")
    prune_one_shot(model, rows_of(), method="magnitude", sparsity=0.3)
    zeros = {name: param == 0 for name, param in model.named_parameters()}
    report = prune_one_shot(model, rows_of(), sparsity=0.5)
    assert report.zeros == round(0.5 * report.weights)
    assert all(bool((param == 0)[zeros[name]].all()) for name, param in model.named_parameters())
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"q_proj.weight has .* already, and .* were asked for"):
        prune_one_shot(model, rows_of(), sparsity=0.4)
    assert all(map(torch.equal, model.parameters(), before.parameters()))


def test_the_model_is_left_in_its_modes_and_with_its_methods() -> None:
    model: Any = build("gpt2").train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    prune_one_shot(model, rows_of(), method="wanda", pattern="2:4")
    assert [module.training for module in model.modules()] == modes
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(param.requires_grad for param in model.parameters())
    logits = model(rows_of()).logits
    logits.sum().backward()


def test_what_cannot_be_pruned_is_said_before_anything_is_changed() -> None:
    rows = rows_of()
    broken: Any = build("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    huge: Any = build("gpt2")
    with torch.no_grad():
        huge.transformer.h[0].mlp.c_fc.weight.mul_(1e30)
        huge.transformer.h[0].mlp.c_proj.weight.mul_(1e30)
    cases: list[tuple[Any, torch.Tensor, dict[str, Any], str]] = [
        (build("llama"), rows, {"sparsity": 0.5, "method": "obs"}, "method='obs'"),
        (build("llama"), rows, {"sparsity": 50}, "Was 0.5 meant"),
        (build("llama"), rows.float(), {"sparsity": 0.5}, "torch.float32"),
        (build("llama"), rows[0], {"sparsity": 0.5}, "token ids, int64"),
        (build("llama"), rows + 60, {"sparsity": 0.5}, "the model knows 64"),
        (build("gpt2"), rows_of(2, 33), {"sparsity": 0.5}, "33 tokens, and the model takes at most 32"),
        (build("t5"), rows, {"sparsity": 0.5}, "T5ForConditionalGeneration is an encoder-decoder"),
        (build("vit"), rows, {"sparsity": 0.5}, "ViTForImageClassification cannot run rows"),
        (build("gpt2"), rows, {"pattern": "2:3"}, "32 inputs are not divisible by 3"),
        (nn.Sequential(nn.Linear(4, 4)), rows, {"sparsity": 0.5}, "no nn.ModuleList"),
        (broken, rows, {"sparsity": 0.5}, "NaN or infinite"),
        (huge, rows, {"sparsity": 0.5}, "NaN or infinite hidden states on the first row"),
    ]
    for model, given_rows, options, said in cases:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=said):
            prune_one_shot(model, given_rows, **options)
        after = model.state_dict()
        assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items())
        assert not any("forward" in vars(module) for module in model.modules())
