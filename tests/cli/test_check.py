"""`hf-pdecay check`: places of zeros before and after, counted again here, in the formats that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_pdecay import ZeroComparison, check_zeros, compress
from hf_pdecay.cli.main import main

from ..helpers.models import build
from ..helpers.warm import python


def sparse(model: Any, folder: Path) -> Path:
    """Save a model with half of the weights of its matrices zero, and one row wholly."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() > 1 and "layers" in name:
                param[torch.rand(param.shape, generator=generator) < 0.5] = 0
                param[..., 1, :] = 0
    model.save_pretrained(folder)
    return folder


def wide_llama() -> Any:
    """Rows that blocks of 32 and 128 divide."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = tf.LlamaConfig(**sizes, **tokens, num_key_value_heads=2, tie_word_embeddings=True)
    return tf.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse(wide_llama(), tmp_path_factory.mktemp("check") / "before")


def changed(before: Path, after: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy with other tensors."""
    shutil.copytree(before, after)
    tensors = load_file(before / "model.safetensors")
    change(tensors)
    save_file(tensors, after / "model.safetensors", metadata={"format": "pt"})
    return after


def as_json(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> Any:
    capsys.readouterr()
    assert main(["check", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def zeros_of(folder: Path) -> int:
    return sum(int((tensor == 0).sum()) for tensor in load_file(folder / "model.safetensors").values())


DOWN, UP = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"


def damage(tensors: dict[str, Tensor]) -> None:
    down, up = tensors[DOWN].view(-1), tensors[UP].view(-1)
    zeros, others = (down == 0).nonzero().view(-1), (down != 0).nonzero().view(-1)
    down[zeros[:7]], down[zeros[7]], down[others[:3]] = 0.25, -0.5, 0
    down[zeros[8:10]] = -0.0  # a zero too
    values, gaps = (up != 0).nonzero().view(-1), (up == 0).nonzero().view(-1)
    up[values[:2]], up[values[2]], up[gaps[0]] = torch.nan, torch.inf, torch.nan


@pytest.mark.slow
def test_the_command_as_a_process(before: Path, tmp_path: Path) -> None:
    after = changed(before, tmp_path / "after", damage)
    done = python("-m", "hf_pdecay", "check", before, after, COLUMNS="100")
    assert done.returncode == 1, done.stderr
    assert DOWN in done.stdout and "9 of" in done.stdout and "up to 0.5" in done.stdout
    assert "4 weights became NaN or infinite" in done.stdout and "model.layers.0.mlp.down" not in done.stdout
    done = python("-m", "hf_pdecay", "check", before, before)
    assert done.returncode == 0 and f"All {zeros_of(before):,} zeros are kept." in done.stdout
    done = python("-m", "hf_pdecay", "check", before, tmp_path / "nowhere")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_what_changed_by_tensor(before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = changed(before, tmp_path / "after", damage)
    result = as_json(capsys, 1, before, after)
    tensors = {tensor["name"]: tensor for tensor in result["tensors"]}
    assert set(tensors) == set(load_file(before / "model.safetensors"))
    found = [tensors[DOWN][key] for key in ("filled", "added", "non_finite", "largest")]
    assert found == [8, 3, 0, 0.5]
    assert [tensors[UP][key] for key in ("filled", "added", "non_finite", "largest")] == [1, 0, 4, 0]
    assert (result["filled"], result["added"], result["non_finite"]) == (9, 3, 4)
    assert result["zeros"] == zeros_of(before) and result["kept"] == 1 - 9 / zeros_of(before)


def test_compressed_files_single_files_and_shards(before: Path, tmp_path: Path) -> None:
    compress(before, tmp_path / "packed")
    model = tf.LlamaForCausalLM.from_pretrained(before)
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    after = changed(before, tmp_path / "after", damage)
    for one in (before, tmp_path / "packed", tmp_path / "shards", before / "model.safetensors"):
        assert not check_zeros(one, tmp_path / "packed").is_damaged
        assert check_zeros(one, after / "model.safetensors").filled == 9


def test_a_narrower_dtype_makes_zeros(before: Path, tmp_path: Path) -> None:
    def narrow(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = (tensor * 1e-7).half()

    result = check_zeros(before, changed(before, tmp_path / "half", narrow))
    assert not result.is_damaged and result.added > 1000


def test_names_with_and_without_a_prefix_and_shared_tensors(before: Path, tmp_path: Path) -> None:
    model = tf.LlamaForCausalLM.from_pretrained(before)
    model.model.save_pretrained(tmp_path / "base")
    result = check_zeros(before, tmp_path / "base")
    assert result.zeros == zeros_of(before) and not result.is_damaged

    def untie(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    twice = changed(before, tmp_path / "twice", untie)
    assert check_zeros(twice, before).zeros == check_zeros(before, twice).zeros


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "t5", "vit"])
def test_a_model_in_memory_whose_files_have_other_names(name: str, tmp_path: Path) -> None:
    model = build(name)
    with torch.no_grad():
        for param in model.parameters():
            param[torch.rand(param.shape) < 0.3] = 0
    model.save_pretrained(tmp_path)
    result = check_zeros(tmp_path, model)
    assert not result.is_damaged and result.zeros == zeros_of(tmp_path)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1)
    assert check_zeros(tmp_path, model).filled == result.zeros


def quantized(before: Path, after: Path, config: Any) -> Path:
    tf.LlamaForCausalLM.from_pretrained(before, quantization_config=config).save_pretrained(after)
    return after


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits: int, before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    config = tf.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    result = as_json(capsys, 0, before, quantized(before, tmp_path / "after", config))
    assert result["method"] == "bitsandbytes" and result["zeros"] == zeros_of(before) and result["added"]


@pytest.mark.skipif(tf.__version__.startswith("4"), reason="transformers 4 cannot load what torchao 0.18 saves")
def test_torchao(before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ao = pytest.importorskip("torchao.quantization")
    result = as_json(
        capsys, 0, before, quantized(before, tmp_path / "int8", tf.TorchAoConfig(ao.Int8WeightOnlyConfig()))
    )
    assert result["method"] == "torchao" and result["zeros"] == zeros_of(before) and result["added"]
    float8 = tf.TorchAoConfig(ao.Float8WeightOnlyConfig())
    result = as_json(capsys, 1, before, quantized(before, tmp_path / "float8", float8))
    rows = {name: t for name, t in load_file(before / "model.safetensors").items() if "layers" in name and t.dim() > 1}
    assert result["non_finite"] == result["filled"] == sum(tensor.shape[1] for tensor in rows.values())


def test_compressed_tensors(before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # type: ignore[import-not-found]

    filled = 5

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            weight = tensors.pop(name)
            scale = weight.abs().amax(1, keepdim=True).clamp_(min=1e-6) / 7
            codes = (weight / scale).round().to(torch.int8)
            if name == DOWN:
                codes.view(-1)[(weight.view(-1) == 0).nonzero()[:filled]] = 1
            tensors[f"{name}_packed"] = pack_to_int32(codes, 4)
            tensors[f"{name}_scale"], tensors[f"{name}_shape"] = scale, torch.tensor(weight.shape)

    after = changed(before, tmp_path / "after", pack)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    config = json.loads((after / "config.json").read_text()) | {"quantization_config": settings}
    (after / "config.json").write_text(json.dumps(config))
    result = as_json(capsys, 1, before, after)
    assert result["method"] == "compressed-tensors" and result["filled"] == filled
    assert result["zeros"] == zeros_of(before)


def write_gguf(before: Path, file: Path, kind: str) -> Path:
    """Llama as a GGUF file, by the names of llama.cpp and its order of the rows of queries and keys."""
    gguf = pytest.importorskip("gguf")
    config = tf.AutoConfig.from_pretrained(before)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in load_file(before / "model.safetensors").items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        array, own = tensor.float().numpy(), names.get_name(name, try_suffixes=(".weight",))
        if "_proj" in name:
            dtype = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(own, gguf.quants.quantize(array, dtype), raw_dtype=dtype)
        else:
            writer.add_tensor(own, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_gguf(before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = as_json(capsys, 0, before, write_gguf(before, tmp_path / "q8_0.gguf", "Q8_0"))
    assert result["method"] == "gguf" and result["zeros"] == zeros_of(before)
    assert as_json(capsys, 0, before, tmp_path)["zeros"] == zeros_of(before)  # the only one in a folder
    result = as_json(capsys, 1, before, write_gguf(before, tmp_path / "q4_1.gguf", "Q4_1"))
    assert result["kept"] < 0.9 and result["non_finite"] == 0
    capsys.readouterr()
    assert main(["check", str(before), str(tmp_path)]) == 2
    assert "has 2 files of .gguf" in capsys.readouterr().err


def test_quanto_in_memory(before: Path) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = tf.LlamaForCausalLM.from_pretrained(before)
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    assert check_zeros(before, model).kept < 0.5


class Packed(nn.Module):
    """A layer that keeps its weight as codes, as HQQ's does."""

    def __init__(self, weight: Tensor, known: bool) -> None:
        super().__init__()
        self.scale = weight.abs().amax() / 7
        self.codes = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        if known:
            self.dequantize = lambda: self.codes * self.scale


@pytest.mark.parametrize("known", [True, False])
def test_layers_that_dequantize_themselves_and_others(known: bool, before: Path) -> None:
    model = tf.LlamaForCausalLM.from_pretrained(before)
    mlp = model.model.layers[1].mlp
    mlp.down_proj = Packed(mlp.down_proj.weight.detach(), known)
    if known:
        result = check_zeros(before, model)
        assert not result.is_damaged and [tensor.name for tensor in result.tensors if tensor.added] == [DOWN]
        return
    with pytest.raises(ValueError, match=rf"{DOWN}, .* is missing or packed"):
        check_zeros(before, model)


def test_no_zeros_and_the_api(before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = changed(before, tmp_path / "dense", lambda tensors: [t.masked_fill_(t == 0, 1) for t in tensors.values()])
    assert check_zeros(dense, dense) == ZeroComparison(check_zeros(dense, dense).tensors) and not main(
        ["check", str(dense), str(dense)]
    )
    assert "There were no zeros before." in capsys.readouterr().out


def test_bad_input(before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(one: object, two: object) -> str:
        capsys.readouterr()
        assert main(["check", str(one), str(two)]) == 2
        return capsys.readouterr().err

    other = tmp_path / "other"
    build("gpt2").save_pretrained(other)
    assert "no tensors of the same names and shapes" in said(before, other)
    fewer = changed(before, tmp_path / "fewer", lambda tensors: tensors.pop(DOWN))
    assert DOWN in said(before, fewer) and "is missing" in said(before, fewer)
    cut = changed(before, tmp_path / "cut", lambda tensors: tensors.update({UP: tensors[UP][:-1].clone()}))
    assert "has the shape (255, 128)" in said(before, cut)
    broken = tmp_path / "broken"
    shutil.copytree(before, broken)
    (broken / "model.safetensors").write_bytes((before / "model.safetensors").read_bytes()[:-9])
    assert "cut short" in said(before, broken) and "cut short" in said(broken, before)
    pickled = tmp_path / "model.bin"
    pickled.write_bytes(b"x")
    assert "must end in .safetensors" in said(before, pickled)
    (tmp_path / "empty.gguf").write_bytes(b"GGUF")
    assert "cannot be loaded" in said(before, tmp_path / "empty.gguf")
    gptq = tmp_path / "gptq"
    shutil.copytree(before, gptq)
    config = json.loads((gptq / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4}
    (gptq / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    assert f"{str(gptq)!r} is quantized by 'gptq'" in said(gptq, before)
    assert "cannot be loaded" in said(before, gptq)
