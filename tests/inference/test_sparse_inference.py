"""Sparse inference beside dense models and float64 products."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from rich.console import Console
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_pdecay import Choice, Choices
from hf_pdecay.inference import choice, timing
from hf_pdecay.inference.base import InferenceLinear
from hf_pdecay.inference.bitmask_linear import BitmaskLinear
from hf_pdecay.inference.choice import to_dense_inference, to_sparse_inference
from hf_pdecay.inference.experts import ExpertStack

from ..helpers.models import ARCHITECTURES, build


MOE_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 40, "head_dim": 16}),
}


def prune(model: nn.Module, zeros: float = 0.9) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 2:
                param.mul_(torch.rand(param.shape, generator=generator) >= zeros)
    return model.eval()


def sparse_layers(model: nn.Module) -> list[InferenceLinear]:
    return [each for each in model.modules() if isinstance(each, InferenceLinear)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_give_what_they_gave(name: str) -> None:
    model = prune(build(name))
    inputs: dict[str, Tensor] = {"input_ids": torch.randint(1, 64, (3, 12))}
    if name == "vit":
        size, channels = model.config.image_size, model.config.num_channels
        inputs = {"pixel_values": torch.randn(2, channels, size, size)}
    elif name == "t5":
        inputs["decoder_input_ids"] = torch.randint(1, 64, (3, 4))
    with torch.no_grad():
        before = model(**inputs)
        choices = to_sparse_inference(model, min_sparsity=0.8)
        after = model(**inputs)
    assert len(sparse_layers(model)) == sum(each.swapped for each in choices) > 0
    for key, value in before.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            torch.testing.assert_close(after[key], value, rtol=1e-4, atol=1e-5)


def test_gpt2_generates_is_saved_and_goes_back(tmp_path: Path) -> None:
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 60, "bos_token_id": 0, "eos_token_id": None}
    model: Any = prune(tf.GPT2LMHeadModel(tf.GPT2Config(**shape)))
    dense = copy.deepcopy(model)
    choices = to_sparse_inference(model, min_sparsity=0.8)
    assert [each.name for each in choices if not each.swapped] == ["lm_head"]  # tied to the embeddings
    assert len(sparse_layers(model)) == 8
    ids = torch.randint(0, 60, (2, 7))
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == saved_config(dense, tmp_path / "dense")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, found), (other, expected) in zip(loaded.named_parameters(), dense.named_parameters(), strict=True):
        assert name == other and torch.equal(found, expected)
    assert to_dense_inference(model) is model
    assert not sparse_layers(model)
    assert {name: type(each) for name, each in model.named_modules()} == {
        name: type(each) for name, each in dense.named_modules()
    }
    for (name, found), (other, expected) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        assert name == other and torch.equal(found, expected) and found.requires_grad
    model(ids, labels=ids).loss.backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0


def saved_config(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return (folder / "config.json").read_text()


def test_a_pipeline_goes_on_working() -> None:
    config = tf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    model = prune(tf.ViTForImageClassification(config))
    processor = tf.ViTImageProcessor(size={"height": 16, "width": 16})
    from PIL import Image

    image = Image.new("RGB", (20, 20), (200, 30, 90))
    ask = tf.pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    before = ask(image)
    assert to_sparse_inference(model, min_sparsity=0.8) and sparse_layers(model)
    after = ask(image)
    assert [each["label"] for each in after] == [each["label"] for each in before]
    assert [each["score"] for each in after] == pytest.approx([each["score"] for each in before], abs=1e-5)


def test_what_a_swap_would_break_stays() -> None:
    model = nn.ModuleDict(
        {name: nn.Linear(8, 8) for name in ("tied", "other", "hooked", "wide", "dense", "low", "good")}
    )
    with torch.no_grad():
        for name, layer in model.items():
            if name != "dense":
                layer.weight.mul_(torch.rand(8, 8) < 0.1)
    model["other"].weight = model["tied"].weight
    model["hooked"].register_forward_hook(lambda *_: None)
    model["wide"].double()
    model["low"].half()
    model["twice"] = model["more"] = nn.Linear(8, 8)
    model["quantizable"] = nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)
    reasons = {each.name: each.reason for each in to_sparse_inference(model, min_sparsity=0.5)}
    assert {name for name, layer in model.items() if isinstance(layer, InferenceLinear)} == {"low", "good"}
    assert "shared" in reasons["tied"] and "shared" in reasons["other"] and "shared" in reasons["twice"]
    assert "hooks" in reasons["hooked"] and "torch.float64" in reasons["wide"]
    assert "fewer than 50%" in reasons["dense"] and reasons["good"] == ""
    assert "quantizable" not in reasons


def test_the_measurement_decides() -> None:
    """Of 2,048 × 2,048 weights one in 500 is left: no machine multiplies the dense layer faster. None of 4 × 4 is."""
    model = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 2048))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(2048, 2048) < 0.002)
    found = to_sparse_inference(model, rows=32)
    assert [each.swapped for each in found] == [True, False]
    assert found[0].speedup is not None and found[0].speedup > 1 and found[1].speedup is None
    assert found[0].sparsity == pytest.approx(float((model[0].dense_weight() == 0).double().mean()))


def test_training_is_refused_and_inference_with_gradients_enabled_is_not() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4)))
    to_sparse_inference(model[1], min_sparsity=0)
    y = model(torch.randn(3, 8))
    with pytest.raises(RuntimeError, match="A sparse layer has no gradient: call to_dense_inference"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": 0}, "rows=0; it must be a whole number of at least 1"),
        ({"rows": 2.5}, "rows=2.5; it must be a whole number of at least 1"),
        ({"min_sparsity": "90%"}, "min_sparsity='90%'; it must be in"),
        ({"min_sparsity": 1.5}, r"min_sparsity=1.5; it must be in \[0, 1\]"),
        ({"values": "int4"}, "values='int4'; it must be one of float32, bfloat16, float16, int8"),
        ({"head": "float64"}, "head='float64'; it must be one of"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        to_sparse_inference(nn.Linear(2, 2), **options)
    with pytest.raises(ValueError, match="on meta; sparse inference works on a CPU"):
        to_sparse_inference(nn.Sequential(nn.Linear(2, 2, device="meta")))


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), Conv1D(4, 4)])
def test_a_layer_by_itself_is_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="Invalid model: it is a .* give that"):
        to_sparse_inference(layer, min_sparsity=0.0)


@pytest.mark.parametrize("large", [False, True])
def test_layers_of_a_model_beyond_the_caches_are_measured_out_of_them(
    large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they run there: between two calls of a layer the others' weights have taken its place."""
    monkeypatch.setattr(choice, "_CACHE", 4 * 64 * 64 * (3 if large else 4))
    seen = []

    def speedups(dense: nn.Module, layers: list[nn.Module], x: Tensor, others: Tensor | None) -> list[float]:
        seen.append(others)
        return [2.0] * len(layers)

    monkeypatch.setattr(timing, "speedups_of", speedups)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(torch.rand(64, 64) < 0.1)  # type: ignore[operator]
    assert all(each.swapped for each in to_sparse_inference(model))
    assert all((others is not None and others.nbytes == choice._CACHE) == large for others in seen) and seen


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_what_was_frozen_is_frozen_when_it_is_dense_again(kind: type[nn.Module]) -> None:
    model = nn.Sequential(*(kind(8, 8) for _ in range(3)))
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    trained = [param.requires_grad for param in model.parameters()]
    to_sparse_inference(model, min_sparsity=0)
    assert len(sparse_layers(model)) == 3
    to_dense_inference(copy.deepcopy(model))
    assert [param.requires_grad for param in to_dense_inference(model).parameters()] == trained


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.functional.silu])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_encoder_layers_of_torch_are_swapped_too(activation: Any, norm_first: bool) -> None:
    """In evaluation one operation of torch does all of such a layer, with its weights as they are."""
    one = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation=activation, norm_first=norm_first)
    model: Any = prune(nn.ModuleDict({"stack": nn.TransformerEncoder(one, 2), "layer": copy.deepcopy(one)}))
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def run() -> list[Tensor]:
        with torch.no_grad():
            stacked = model["stack"](x, src_key_padding_mask=padding).masked_fill(padding[:, :, None], 0)
            return [stacked, model["layer"](x), model["stack"](x)]

    before, flags = run(), [vars(module).get("use_nested_tensor") for module in model.modules()]
    found = to_sparse_inference(model, min_sparsity=0.5)
    assert len(found) == 6 and all(each.swapped for each in found)
    for after, expected in zip(run(), before, strict=True):
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    to_dense_inference(model)
    assert flags == [vars(module).get("use_nested_tensor") for module in model.modules()]
    assert model["layer"].activation_relu_or_gelu == one.activation_relu_or_gelu
    assert all(torch.equal(after, expected) for after, expected in zip(run(), before, strict=True))


class ReadsWeight(nn.Module):
    """Computes with a layer's weight itself, as Mamba's mixers and WavLM's attention do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.layer.weight
        return weight @ x if weight.shape == (8, 16) else weight.t() @ x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_who_computes_with_a_weight_gets_the_dense_one(kind: type[nn.Module], dtype: torch.dtype) -> None:
    model: Any = prune(ReadsWeight(nn.Linear(16, 8) if kind is nn.Linear else Conv1D(8, 16))).to(dtype)
    x = torch.randn(2, 16, 3, dtype=dtype)
    with torch.no_grad():
        before, weight = model(x), model.layer.weight.clone()
        assert to_sparse_inference(model, min_sparsity=0.5)[0].swapped
        torch.testing.assert_close(model(x), before)
        seen = model.layer.weight
        assert (seen.shape, seen.dtype, seen.device) == (weight.shape, dtype, weight.device)
        assert torch.equal(seen, weight)
        for change in (
            lambda: seen.mul_(2),
            lambda: seen.data.mul_(2),
            lambda: seen.__setitem__(0, 0),
            lambda: setattr(seen, "data", weight),  # as adapters do that are merged
        ):
            with pytest.raises(RuntimeError, match="to_dense_inference"):
                change()


def test_a_trace_which_would_keep_a_result_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    to_sparse_inference(model, min_sparsity=0)
    with pytest.raises(RuntimeError, match=r"cannot be traced or exported: call to_dense_inference\(model\) first"):
        torch.jit.trace(model, torch.randn(2, 8))
    if hasattr(torch.compiler, "is_exporting"):
        with pytest.raises(RuntimeError, match="cannot be traced or exported"):
            torch.export.export(model, (torch.randn(2, 8),))


def half_zeros(*sizes: int) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(64, size) for size in sizes))
    for layer in model:
        layer.weight.data.view(-1)[::2] = 0  # type: ignore[operator, union-attr]
    return model


@pytest.mark.parametrize(("zeros", "expected"), [(0.5, 0.8), (0.2, 0.8), (0.85, 0.9), (0.999, None)])
def test_a_model_that_stays_dense_says_from_which_sparsity_it_would_not(
    zeros: float, expected: float | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a machine on which layers are faster sparse from 75% zeros if they have 100 rows or more, and never else."""
    tried = []

    def speedups(dense: nn.Module, layers: list[Any], x: Tensor, others: Tensor | None) -> list[float]:
        tried.append(sparsity := layers[0].sparsity)
        fast = layers[0].out_features >= 100 and sparsity > 0.75 and abs(sparsity - zeros) > 0.01
        return [0.4] * (len(layers) - 1) + [2.0 if fast else 0.5]

    monkeypatch.setattr(timing, "speedups_of", speedups)
    model = nn.Sequential(nn.Linear(64, 200), Conv1D(32, 200), nn.Linear(32, 200, dtype=torch.float64))
    for layer in model[:2]:
        weight = layer.weight.data  # type: ignore[union-attr]
        weight.view(-1)[torch.randperm(weight.numel())[: round(zeros * weight.numel())]] = 0  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        found = to_sparse_inference(model, rows=7)
    assert found.swapped == 0 and found.swapped_from == {(200, 64): expected, (32, 200): None}
    assert len(tried) <= 2 + 2 * 3
    words = "none up to 99%" if expected is None else f"{expected:.0%}"
    for said in (caplog.text, " ".join(str(found).split())):
        assert f"Nothing was swapped. With rows=7, layers would be faster sparse from: 200 × 64 {words}" in said
        assert "32 × 200 none up to 99%." in said and "Dense, 1 layer: it has torch.float64" in said


def test_the_sparsity_that_is_named_is_measured() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024))
    assert to_sparse_inference(model, rows=32).swapped_from[1024, 1024] is not None  # 99% zeros are faster anywhere
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (nn.Sequential(nn.ReLU()), {}, "Nothing was swapped: the model has no dense linear layers."),
        (nn.Sequential(nn.Linear(4, 4).double()), {}, "Nothing was swapped. Dense, 1 layer: it has torch.float64"),
        (half_zeros(4), {"min_sparsity": 0.9}, "min_sparsity=0.9, and no layer has more than 50.0% zeros."),
        (half_zeros(4, 64).append(nn.Linear(4, 4)), {"min_sparsity": 0.4}, "2 of 3 linear layers are sparse now."),
    ],
)
def test_what_was_swapped_is_said(model: nn.Module, options: dict[str, Any], words: str) -> None:
    assert words in " ".join(str(to_sparse_inference(model, **options)).split())


@pytest.mark.parametrize("length", [4, 30, 45, 60, 80])
@pytest.mark.parametrize("width", [80, 120])
def test_the_result_is_a_list_and_prints_as_a_table(length: int, width: int) -> None:
    names = [("[red]" + "a.b:bug:_" * 10)[:length], "b"]
    found = Choices(
        [
            Choice(names[0], (151936, 16384), 0.9, 12.5, True, form="bitmask"),
            Choice(names[1], (8, 8), 0.2, None, False, "too few"),
        ]
    )
    assert isinstance(found, list) and [each.name for each in found] == names
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(found)
    for text in (capture.get(), str(found)):
        lines = text.splitlines()
        assert max(map(len, lines)) <= width and any(line.startswith(names[0]) for line in lines)
        assert all(each in text for each in ("151936 × 16384", "90.0%", "12.50", "bitmask", "Dense, 1 layer: too few."))
    record = json.loads(json.dumps(found.to_dict()))
    assert record["layers"][0]["shape"] == [151936, 16384] and record["swapped"] == 1
    assert pickle.loads(pickle.dumps(found)).to_dict() == found.to_dict()


def test_figures_stand_beside_the_names_of_bert() -> None:
    name = "bert.encoder.layer.11.attention.output.dense"
    lines = str(Choices([Choice(name, (3072, 768), 0.9, 12.5, True, form="csr")])).splitlines()
    assert any(line.split() == [name, "3072", "×", "768", "90.0%", "12.50", "csr"] for line in lines)


@pytest.mark.parametrize("values", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_values_and_head_in_fewer_bytes(name: str, values: str, tmp_path: Path) -> None:
    """A tied head is swapped alone: the embeddings, and what is saved, keep their weights."""
    model: Any = prune(build(name), 0.5)
    dense = copy.deepcopy(model)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    ids = torch.randint(1, 64, (3, 12))
    found = to_sparse_inference(model, min_sparsity=0.4, values=values, head="int8")
    layers = sparse_layers(model)
    assert len(layers) == len(found) and all(each.swapped for each in found)
    own = model.get_output_embeddings()
    assert isinstance(own, BitmaskLinear) and own.values.dtype == torch.int8
    assert {each.values.dtype for each in layers if each is not own} == {getattr(torch, values)}
    with torch.no_grad():
        expected, got = dense(ids).logits, model(ids).logits
    assert float((got - expected).norm() / expected.norm()) < 0.02
    assert model.get_input_embeddings() is embeddings
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, embeddings.weight)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    copied = to_dense_inference(copy.deepcopy(model))
    assert (copied.get_output_embeddings().weight is copied.get_input_embeddings().weight) == tied
    to_dense_inference(model)
    if tied:
        assert model.get_output_embeddings().weight is embeddings.weight
    for (key, param), (_, before) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        assert bool(((param != 0) <= (before != 0)).all()), key
        torch.testing.assert_close(param, before, rtol=2**-7, atol=float(before.abs().max()) / 200)


def test_a_model_without_a_head_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid head: Sequential has no linear output layer"):
        to_sparse_inference(half_zeros(4), head="int8")
    tied = nn.ModuleDict({"table": nn.Embedding(9, 64), "head": nn.Linear(64, 9, bias=False)})
    tied["head"].weight = tied["table"].weight
    assert to_sparse_inference(tied, head="int8").swapped == 1
    bad = nn.ModuleDict({"table": nn.Embedding(9, 64), "head": nn.Linear(64, 9, bias=False)})
    bad["head"].weight = bad["table"].weight
    bad["head"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="head cannot be swapped: it has NaN or infinite weights"):
        to_sparse_inference(bad, head="int8")


def test_the_time_of_the_whole_model_is_said() -> None:
    model = prune(build("llama"), 0.5)
    found = to_sparse_inference(model, min_sparsity=0.4, rows=2)
    assert found.seconds is not None and min(found.seconds) > 0
    before, after = found.seconds
    assert f"before: {before / after:.2f} times" in str(found)
    assert found.to_dict()["seconds"] == {"before": before, "after": after}
    assert to_sparse_inference(prune(build("vit"), 0.5), min_sparsity=0.4).seconds is None
    assert to_sparse_inference(prune(build("llama"), 0.5).train(), min_sparsity=0.4).seconds is None
    longer = model.config.max_position_embeddings + 1
    assert to_sparse_inference(to_dense_inference(model), min_sparsity=0.4, rows=longer).swapped


def test_layers_that_int8_cannot_hold_stay_dense() -> None:
    model = half_zeros(64, 64)
    model[0].weight.data[3, 3] = float("inf")  # type: ignore[operator, union-attr]
    found = to_sparse_inference(model, min_sparsity=0.4, values="int8")
    assert [each.swapped for each in found] == [False, True]
    assert found[0].reason == "it has NaN or infinite weights, which int8 cannot hold"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_fused_experts_are_swapped(name: str, tmp_path: Path) -> None:
    """One tensor holds the matrices of all experts, GPT-OSS's transposed and with biases; so has a state dict."""
    if not hasattr(tf, MOE_CONFIGS[name][0]) or int(tf.__version__.split(".")[0]) < 5:
        pytest.skip("experts are not fused in this version of transformers")
    cls, options = MOE_CONFIGS[name]
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    config = getattr(tf, cls)(hidden_size=32, intermediate_size=48, num_experts_per_tok=2, **shape, **options)
    model: Any = tf.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 3:
                param.normal_(generator=generator).mul_(torch.rand(param.shape, generator=generator) >= 0.6)
    dense, ids = copy.deepcopy(model), torch.randint(1, 64, (3, 12))
    before = model.config._experts_implementation
    found = to_sparse_inference(model, min_sparsity=0.4)
    swapped = [each.name for each in found if each.swapped]
    assert len(swapped) == 4 and all("experts)" in each for each in swapped)
    stacks = [each for each in model.modules() if isinstance(each, ExpertStack)]
    calls = []
    for stack in stacks:
        for layer in stack.layers:
            layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    assert len(stacks) == 4 and len(calls) >= 8
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    state = dense.state_dict()
    assert set(model.state_dict()) == set(state)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    model.load_state_dict(state)
    half = copy.deepcopy(model).bfloat16()
    assert half(ids).logits.dtype == torch.bfloat16
    to_dense_inference(model)
    assert model.config._experts_implementation == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(ids).logits, dense(ids).logits)


def test_a_stack_that_is_used_otherwise_is_dense_there() -> None:
    whole = torch.randn(3, 4, 6) * (torch.rand(3, 4, 6) > 0.5)
    stack = ExpertStack([BitmaskLinear(matrix) for matrix in whole], trained=True, implementation=None)
    assert stack.shape == whole.shape and stack.dtype == whole.dtype and torch.equal(stack[1:], whole[1:])
    assert torch.equal(stack[torch.tensor([2, 0])], whole[[2, 0]])
    x = torch.randn(5, 6)
    torch.testing.assert_close(x @ stack[1].t(), x @ whole[1].t())
    torch.testing.assert_close(nn.functional.linear(x, stack[0], torch.ones(4)), x @ whole[0].t() + 1)
    torch.testing.assert_close(torch.einsum("ni,oi->no", torch.ones(1, 6), stack[2]), torch.ones(1, 6) @ whole[2].t())
