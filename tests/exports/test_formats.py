"""Quantised models in the formats of other runtimes: the same codes and scales, read here and by their own readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors import safe_open
from torch import Tensor

from hf_pdecay import PDecayTrainer, check_zeros, decayable_parameter_names, quantize_folder
from hf_pdecay.cli.main import main
from hf_pdecay.exports import formats
from hf_pdecay.exports.gguf_file import blocks_of
from hf_pdecay.one_shot.grid import Grid
from hf_pdecay.one_shot.quantizing import quantize_model
from hf_pdecay.storage.codes import find_codes

from ..helpers.models import build
from ..helpers.storage_models import weights


SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-biased": lambda: tf.LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
    "mistral": lambda: tf.MistralConfig(**SIZES),
    "qwen2": lambda: tf.Qwen2Config(**SIZES),
    "qwen3": lambda: tf.Qwen3Config(**SIZES, head_dim=64),
    "gpt2": lambda: tf.GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=64, vocab_size=64),
    "starcoder2": lambda: tf.Starcoder2Config(**SIZES),
}


def sparse(model: Any, folder: Path) -> Path:
    """Save a model with half of the weights of its matrices zero."""
    generator = torch.Generator().manual_seed(0)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for param in params.values():
            param.add_(torch.randn(param.shape, generator=generator) * 0.05)
        for name in decayable_parameter_names(model):
            params[name][torch.rand(params[name].shape, generator=generator) < 0.5] = 0
            params[name][1] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return sparse(tf.LlamaForCausalLM(CAUSAL["llama"]()), tmp_path_factory.mktemp("formats") / "dense")


def stored(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def logits(model: Any) -> Tensor:
    rows = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: Tensor = model.eval()(rows).logits
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [8, 4])
def test_pack_quantized_holds_the_codes(bits: int, dtype: str, dense: Path, tmp_path: Path) -> None:
    quantize_folder(dense, tmp_path / "plain", bits=bits, block=64, dtype=dtype)
    report = quantize_folder(dense, tmp_path / "out", bits=bits, block=64, dtype=dtype, format="pack-quantized")
    plain, (packed, _) = weights(tmp_path / "plain"), stored(tmp_path / "out")
    names = [name for block in report.blocks for name in block.tensors]
    assert len(names) == 14 and not report.notes and not (tmp_path / "out" / "codes.json").exists()
    for name, weight in plain.items():
        if name not in names:
            assert torch.equal(packed[name], weight)
            continue
        words = packed[f"{name}_packed"].numpy().view(np.uint32)
        fields = [(words >> np.uint32(bits * place)) & np.uint32(2**bits - 1) for place in range(32 // bits)]
        codes = np.stack(fields, -1).reshape(weight.shape).astype(np.int64) - 2 ** (bits - 1)
        scales = packed[f"{name}_scale"]
        assert scales.dtype == weight.dtype and packed[f"{name}_shape"].tolist() == list(weight.shape)
        back = torch.from_numpy(codes) * scales.double().repeat_interleave(64, 1)
        assert torch.equal(back, weight.double()), name
        assert bool((weights(dense)[name] != 0).logical_or(back == 0).all())
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    group = said["config_groups"]["group_0"]
    assert said["quant_method"] == "compressed-tensors" and said["ignore"] == ["lm_head"]
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (bits, 64)
    assert set(packed) == {
        *(name for name in plain if name not in names),
        *(f"{name}_{part}" for name in names for part in ("packed", "scale", "shape")),
    }


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("form", "package"), [("pack-quantized", "compressed_tensors"), ("torchao", "torchao")])
def test_transformers_reads_it(form: str, package: str, bits: int, dense: Path, tmp_path: Path) -> None:
    pytest.importorskip(package)
    if int(tf.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 reads older releases of these packages")
    quantize_folder(dense, tmp_path / "plain", bits=bits, block=64)
    quantize_folder(dense, tmp_path / "out", bits=bits, block=64, format=form)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if form == "torchao":
        assert type(model.model.layers[0].mlp.up_proj.weight.data).__name__ == "IntxUnpackedToInt8Tensor"
        assert type(model.lm_head.weight.data) is Tensor
    assert torch.equal(logits(model), logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")))
    result = check_zeros(dense, tmp_path / "out")
    assert not result.is_damaged and result.zeros > 100_000 and result.method in (form, "compressed-tensors")


def test_blocks_of_gguf() -> None:
    generator = np.random.default_rng(0)
    scales = torch.from_numpy(generator.normal(0, 1, (5, 3)).astype(np.float16)).float()
    for bits in (8, 4):
        codes = generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 96)).astype(np.int8)
        data = blocks_of(torch.from_numpy(codes), scales, bits).numpy()
        size = 2 + 32 * bits // 8
        assert data.shape == (5, 3 * size) and data.dtype == np.uint8
        for row in range(5):
            for block in range(3):
                part = data[row, block * size : (block + 1) * size]
                assert part[:2].view(np.float16)[0] == scales[row, block].item()
                if bits == 8:
                    back = part[2:].view(np.int8).tolist()
                else:
                    back = [int(byte & 15) - 8 for byte in part[2:]] + [int(byte >> 4) - 8 for byte in part[2:]]
                assert back == codes[row, 32 * block : 32 * block + 32].tolist()


@pytest.mark.parametrize("name", list(CAUSAL))
@pytest.mark.parametrize("bits", [8, 4])
def test_gguf_is_read_by_transformers(bits: int, name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    torch.manual_seed(0)
    folder = sparse(tf.AutoModelForCausalLM.from_config(CAUSAL[name]()), tmp_path / "dense")
    report = quantize_folder(folder, tmp_path / "out", bits=bits, format="gguf")
    assert report.block == 32 and "tokenizer" in report.notes[0]
    plain = tf.AutoModelForCausalLM.from_pretrained(folder)
    quantize_model(plain, None, Grid(bits, 32, torch.float16))
    config = None if name == "mistral" else tf.AutoConfig.from_pretrained(folder)
    file = "model-Q8_0.gguf" if bits == 8 else "model-Q4_0.gguf"
    options = {"gguf_file": file, "dtype": torch.float32, **({} if config is None else {"config": config})}
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)), logits(plain))
    result = check_zeros(folder, tmp_path / "out")
    assert not result.is_damaged and result.method == "gguf" and result.zeros > 100_000


def test_scales_of_gguf_are_numbers_of_float16() -> None:
    model = build("llama")
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1e-4)
    quantize_model(model, None, Grid(4, 32, torch.float16))
    _, scales = find_codes(model.model.layers[0].mlp.up_proj.weight.detach(), 4, 32)
    assert torch.equal(scales.half().float(), scales) and bool((scales != 0).all())


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_of_a_run_with_few_bits_stay(bits: int, make_args: Any, tokens: Any, tmp_path: Path) -> None:
    args = make_args(optim="adamw_lp", weight_bits=bits, target_sparsity=0.5, max_steps=20)
    torch.manual_seed(0)
    trainer = PDecayTrainer(model=tf.LlamaForCausalLM(CAUSAL["llama"]()), args=args, train_dataset=tokens)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    report = quantize_folder(tmp_path / "trained", tmp_path / "packed", bits=bits, block=128, format="pack-quantized")
    assert len(report.coded) == 14 and report.new_zeros == 0
    trained, (packed, _) = weights(tmp_path / "trained"), stored(tmp_path / "packed")
    for name in report.coded:
        codes, scales = find_codes(trained[name], bits, 128)
        assert torch.equal(packed[f"{name}_scale"], scales)
        assert torch.equal(codes * scales.repeat_interleave(128, 1), trained[name])
    again = quantize_folder(tmp_path / "trained", tmp_path / "again", bits=bits)
    assert again.coded == report.coded
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights(tmp_path / "again").items())
    pytest.importorskip("gguf")
    assert quantize_folder(tmp_path / "trained", tmp_path / "gguf", bits=bits, format="gguf").coded == report.coded
    assert not check_zeros(tmp_path / "trained", tmp_path / "gguf").added


def test_shards(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = tf.PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        tf.PreTrainedModel, "save_pretrained", lambda self, folder: save(self, folder, max_shard_size="300KB")
    )
    quantize_folder(dense, tmp_path / "out", block=64, format="pack-quantized")
    placed = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(placed.values())) > 1 and len(placed) == 7 + 14 * 3
    for file in set(placed.values()):
        with safe_open(tmp_path / "out" / file, framework="pt") as handle:
            assert all(placed[name] == file for name in handle.keys())  # noqa: SIM118


def test_layers_of_other_kinds_stay_plain(tmp_path: Path) -> None:
    folder = sparse(build("mixtral"), tmp_path / "dense")
    report = quantize_folder(folder, tmp_path / "out", block=16, format="pack-quantized")
    packed, _ = stored(tmp_path / "out")
    assert any(name.endswith("q_proj.weight_packed") for name in packed)
    fused = int(tf.__version__.split(".")[0]) >= 5  # before, each expert has linear layers
    assert any("experts" in note for note in report.notes) == fused
    assert any("experts" in name and name.endswith("weight") for name in packed) == fused


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("llama", ["--format", "awq"], "format='awq'"),
        ("llama", ["--format", "gguf", "--bits", "3"], "bits=3"),
        ("llama", ["--format", "gguf", "--block", "64"], "block=64"),
        ("llama", ["--format", "pack-quantized", "--block", "96"], "does not divide the 128 inputs"),
        ("gpt2", ["--format", "pack-quantized"], "no matrices in nn.Linear"),
        ("bert", ["--format", "gguf"], "of the kind 'bert'"),
    ],
)
def test_bad_input(
    name: str, words: list[str], said: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda package: object())
    model = tf.AutoModelForCausalLM.from_config(CAUSAL[name]()) if name in CAUSAL else build(name)
    model.save_pretrained(tmp_path / "dense")
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_llama_cpp_computes_otherwise_and_what_is_missing(
    dense: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((dense / "config.json").read_text())
    model = tmp_path / "model"
    model.mkdir()
    words = ["quantize", str(model), str(tmp_path / "out"), "--format", "gguf"]
    monkeypatch.setattr(formats, "find_spec", lambda package: None)
    assert main(words) == 2 and "pip install gguf" in capsys.readouterr().err
    monkeypatch.setattr(formats, "find_spec", lambda package: object())
    (model / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes())
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    for change, said in (
        ({"hidden_act": "relu"}, "'relu'"),
        ({"rope_parameters": rope, "rope_scaling": rope}, "'yarn'"),
    ):
        (model / "config.json").write_text(json.dumps(config | change))
        assert main(words) == 2 and said in capsys.readouterr().err
    (model / "config.json").write_text(json.dumps(config))
    tokenizer = {"model": {"type": "WordLevel", "vocab": {}}, "pre_tokenizer": {"type": "Whitespace"}}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(words) == 2
    assert "a WordLevel with the steps Whitespace" in capsys.readouterr().err
