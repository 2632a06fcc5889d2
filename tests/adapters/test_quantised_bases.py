"""Merging into quantised bases: the scales are those of the base, the zeros stay, the rest is as near as codes are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor


peft = pytest.importorskip("peft")

from hf_pdecay import check_zeros, merge_keep_zeros, quantize_folder  # noqa: E402
from hf_pdecay.storage.codes import find_codes  # noqa: E402
from hf_pdecay.storage.quantized import dense_tensors  # noqa: E402

from ..helpers.adapter_models import fill, logits, lora, sparse  # noqa: E402
from ..helpers.storage_models import weights  # noqa: E402


pytestmark = pytest.mark.usefixtures("lora_beside_torchao")
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, tie_word_embeddings=False)
    path = tmp_path_factory.mktemp("quantised") / "dense"
    sparse(tf.LlamaForCausalLM(config)).save_pretrained(path)
    return path


def config_of(kind: str) -> Any:
    if kind.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
        if kind == "bnb int8":
            return tf.BitsAndBytesConfig(load_in_8bit=True)
        options = {"bnb_4bit_quant_type": kind.split()[1], "bnb_4bit_use_double_quant": "double" in kind}
        return tf.BitsAndBytesConfig(load_in_4bit=True, **options)
    if int(tf.__version__.split(".")[0]) < 5 or peft.__version__.startswith("0.18."):
        pytest.skip("these releases of transformers and PEFT do not know torchao 0.18")
    ao = pytest.importorskip("torchao.quantization")
    if kind == "torchao int8":
        return tf.TorchAoConfig(ao.Int8WeightOnlyConfig())
    return tf.TorchAoConfig(ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)))


KINDS = ["bnb nf4", "bnb nf4 double", "bnb fp4", "bnb int8", "torchao int8", "torchao int4"]


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_stays_quantised_and_keeps_its_zeros(kind: str, used: bool, folder: Path) -> None:
    base = tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config_of(kind))
    if used:
        logits(base)  # bitsandbytes moves its scales at the first call, and may repack weights
    before = {name: tensor.clone() for name, tensor in dense_tensors(base)}
    model = fill(lora(base, target_modules=["up_proj", "q_proj"]))
    changes = {name: layer.get_delta_weight("default").clone() for name, layer in layers(model).items()}
    dropped: dict[str, float] = {}
    merged = merge_keep_zeros(model, dropped=dropped)
    assert type(merged.model.layers[0].mlp.up_proj) is type(base.model.layers[0].mlp.up_proj)
    after = dict(dense_tensors(merged))
    assert set(after) == set(before) and set(dropped) == set(changes)
    for name, tensor in after.items():
        old = before[name]
        if name not in changes:
            assert torch.equal(tensor, old), name
            continue
        wanted = (old + changes[name]).masked_fill(old == 0, 0)
        assert bool((tensor[old == 0] == 0).all()) and not torch.equal(tensor, old)
        # Some weights lie beyond the largest code; the others are at most half of the widest gap off.
        largest = old.abs().amax(1, keepdim=True)
        off, inside = (tensor - wanted).abs() / largest, wanted.abs() <= 0.5 * largest
        assert float(off[inside].mean()) < 0.13 and abs(dropped[name] - lost(old, changes[name])) < 1e-5
    assert bool(logits(merged).isfinite().all())
    assert not check_zeros(folder, merged).is_damaged


def layers(model: Any) -> dict[str, Any]:
    found = model.get_base_model().named_modules()
    return {f"{name}.weight": layer for name, layer in found if getattr(layer, "r", None)}


def lost(base: Tensor, change: Tensor) -> float:
    return float(change[base == 0].norm() / change.norm())


def test_four_bits_after_a_call_are_those_before(folder: Path) -> None:
    base = tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config_of("bnb nf4"))
    before = {name: tensor.clone() for name, tensor in dense_tensors(base)}
    logits(base)  # a CPU with AVX512-BF16 has another order of codes then, and scales in bfloat16
    for _ in range(2):
        for name, tensor in dense_tensors(base):
            torch.testing.assert_close(tensor, before[name], rtol=2**-8, atol=0)
        base.state_dict()  # takes back a part of that


def test_no_change_changes_nothing(folder: Path) -> None:
    for kind in KINDS[:4]:
        base = tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config_of(kind))
        before = {name: tensor.clone() for name, tensor in dense_tensors(base)}
        merged = merge_keep_zeros(lora(base))  # B is zero
        assert all(torch.equal(tensor, before[name]) for name, tensor in dense_tensors(merged)), kind


@pytest.mark.parametrize("bits", [8, 4, 1.58])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_quantize_has_written_keeps_its_scales(name: str, bits: float, folder: Path, tmp_path: Path) -> None:
    if name == "gpt2":
        folder = tmp_path / "dense"
        sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 64}
        sparse(tf.GPT2LMHeadModel(tf.GPT2Config(**sizes))).save_pretrained(folder)
    quantize_folder(folder, tmp_path / "few", bits=bits, block=32)
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "few")
    before = {key: param.detach().clone() for key, param in base.named_parameters()}
    targets = ["c_attn", "c_proj"] if name == "gpt2" else ["up_proj"]
    model = fill(lora(base, target_modules=targets, fan_in_fan_out=name == "gpt2"))
    changed = list(layers(model))
    merged = merge_keep_zeros(model)
    merged.save_pretrained(tmp_path / "merged")
    assert not check_zeros(tmp_path / "few", tmp_path / "merged").is_damaged
    for key, tensor in weights(tmp_path / "merged").items():
        own = key if key in before else f"transformer.{key}"
        if own not in changed:
            assert torch.equal(tensor, before[own])
            continue
        new, old = (tensor.T, before[own].T) if name == "gpt2" else (tensor, before[own])
        _, scales = find_codes(old, bits, 32)
        steps = new / scales.repeat_interleave(32, 1)
        assert torch.equal(steps, steps.round()) and not torch.equal(new, old)
        find_codes(new, bits, 32)


def test_codes_that_the_base_does_not_have(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantize_folder(folder, tmp_path / "few", bits=8, block=32)
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "few", dtype=torch.bfloat16)
    merged = merge_keep_zeros(fill(lora(base, target_modules=["up_proj"])))
    assert "has no codes of 8 bits in blocks of 32" in caplog.text
    assert bool((merged.get_parameter(UP) != 0).any())


def test_what_cannot_be_merged(folder: Path) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    base = tf.AutoModelForCausalLM.from_pretrained(folder)
    quanto.quantize(base, weights=quanto.qint8)
    quanto.freeze(base)
    with pytest.raises(ValueError, match=r"quantised as QLinear of .*bitsandbytes' nf4, fp4 and int8, torchao's"):
        merge_keep_zeros(lora(base, target_modules=["up_proj"]))


def test_biases_of_an_adapter(folder: Path) -> None:
    base = tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config_of("bnb nf4"))
    model = lora(base, target_modules=["up_proj"], bias="lora_only")
    assert merge_keep_zeros(model) is base
