"""Compressed folders loaded straight into sparse layers, beside the same models loaded dense and swapped."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_pdecay
from hf_pdecay import FormatError, compress, load_sparse_inference, to_sparse_inference
from hf_pdecay.inference import stored_weight
from hf_pdecay.inference.base import InferenceLinear
from hf_pdecay.inference.kernels import library
from hf_pdecay.inference.stored_weight import StoredWeight
from hf_pdecay.storage.compressed_file import CompressedFile

from ..helpers.models import ARCHITECTURES, build
from ..helpers.storage_models import bits, files_of, saved, sparsified, weights


def inputs_of(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.randn(2, model.config.num_channels, size, size).to(model.dtype)}
    inputs = {"input_ids": torch.randint(1, 64, (3, 12))}
    return inputs | ({"decoder_input_ids": torch.randint(1, 64, (3, 4))} if model.config.is_encoder_decoder else {})


def sparse_layers(model: nn.Module) -> dict[str, InferenceLinear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, InferenceLinear)}


def assert_same(found: Any, expected: Any) -> None:
    """The same layers of the same forms, the same state and exactly the same results."""
    forms = ({name: each.form for name, each in sparse_layers(model).items()} for model in (found, expected))
    assert next(forms) == next(forms)
    one, other = dict(found.state_dict()), dict(expected.state_dict())
    for model, state in ((found, one), (expected, other)):
        state |= {name: each for name, each in model.named_buffers() if not is_part(name)}
    assert one.keys() == other.keys()
    assert not [name for name in one if bits(one[name]) != bits(other[name])]
    assert not found.training
    with torch.no_grad():
        results, wanted = (model(**inputs_of(model)) for model in (found, expected))
    for key, value in wanted.items():
        if isinstance(value, Tensor):
            assert torch.equal(results[key], value), key


def is_part(name: str) -> bool:
    return name.rpartition(".")[2] in ("masks", "starts", "values", "scales", "shifts", "columns", "_empty")


def densely(folder: Path, cls: Any, dtype: str = "auto", **kwargs: Any) -> Any:
    model = cls.from_pretrained(folder, dtype=dtype).eval()
    to_sparse_inference(model, **{"rows": 1, "min_sparsity": 0.4, **kwargs})
    return model


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_as_dense_and_then_swapped(tmp_path: Path, name: str, zstd: bool) -> None:
    model = saved(name, tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small", zstd=zstd)
    found = load_sparse_inference(tmp_path / "small")
    assert type(found) is type(model) and sparse_layers(found)
    assert_same(found, densely(tmp_path / "plain", type(model)))
    if found.can_generate():
        assert (
            found.generation_config.to_dict()
            == type(model).from_pretrained(tmp_path / "plain").generation_config.to_dict()
        )


@pytest.mark.parametrize("zeros", [0.5, 0.7, 0.999])
@pytest.mark.parametrize("values", [None, "int8", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_and_values(tmp_path: Path, dtype: str, values: str | None, zeros: float) -> None:
    for name in ("llama", "gpt2"):
        model = sparsified(build(name), zeros).to(getattr(torch, dtype))
        model.save_pretrained(tmp_path / f"{name} plain")
        compress(tmp_path / f"{name} plain", tmp_path / name)
        for rows in (1, 512):
            found = load_sparse_inference(tmp_path / name, values=values, rows=rows)
            assert found.dtype == getattr(torch, dtype)
            assert_same(found, densely(tmp_path / f"{name} plain", type(model), values=values, rows=rows))


def test_another_dtype_than_the_file(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    found = load_sparse_inference(tmp_path / "small", dtype="bfloat16", values="float16")
    assert_same(found, densely(tmp_path / "plain", type(model), dtype="bfloat16", values="float16"))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_heads(tmp_path: Path, name: str) -> None:
    """GPT-2's is tied to its embeddings, Llama's is its own."""
    model = saved(name, tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    found = load_sparse_inference(tmp_path / "small", head="int8")
    assert found.get_output_embeddings().values.dtype == torch.int8
    assert_same(found, densely(tmp_path / "plain", type(model), head="int8"))


def test_shards_and_a_plain_folder(tmp_path: Path) -> None:
    model = saved("bert", tmp_path / "plain", max_shard_size="20KB")
    compress(tmp_path / "plain", tmp_path / "small")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 2
    expected = densely(tmp_path / "plain", type(model))
    for folder in ("small", "plain"):
        assert_same(load_sparse_inference(tmp_path / folder), expected)


def test_it_saves_an_ordinary_folder(tmp_path: Path) -> None:
    for name in ("gpt2", "mixtral"):
        model = saved(name, tmp_path / name / "plain")
        compress(tmp_path / name / "plain", tmp_path / name / "small")
        load_sparse_inference(tmp_path / name / "small").save_pretrained(tmp_path / name / "again")
        type(model).from_pretrained(tmp_path / name / "plain").save_pretrained(tmp_path / name / "plain again")
        assert files_of(tmp_path / name / "again") == files_of(tmp_path / name / "plain again")
    found = hf_pdecay.to_dense_inference(load_sparse_inference(tmp_path / "gpt2" / "small"))
    assert all(param.requires_grad and type(param) is nn.Parameter for param in found.parameters())


def test_few_zeros_and_odd_sizes(tmp_path: Path) -> None:
    """Rows that end within a byte or a word; a row, a layer and a column without values; signs of zeros."""
    shape = {"hidden_size": 36, "intermediate_size": 203, "num_attention_heads": 3, "vocab_size": 65}
    torch.manual_seed(0)
    model: Any = tf.BertForSequenceClassification(tf.BertConfig(num_hidden_layers=2, num_labels=3, **shape))
    sparsified(model, 0.6)
    layers = [each for each in model.modules() if isinstance(each, nn.Linear)]
    with torch.no_grad():
        layers[0].weight[::2] *= -1.0
        layers[1].weight.zero_()
        layers[2].weight[3] = 0
        layers[3].weight[:, 5] = 0
        layers[4].weight.copy_(torch.rand_like(layers[4].weight))
        for layer in layers[5:]:
            layer.weight.copy_(torch.where(layer.weight == 0, -0.0, layer.weight))
    model.save_pretrained(tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    found, expected = load_sparse_inference(tmp_path / "small"), densely(tmp_path / "plain", type(model))
    # A negative zero is a value where there are few, and becomes positive where there are many.
    for left in (found, expected):
        for layer in sparse_layers(left).values():
            layer.load_state_dict({key: tensor + 0.0 for key, tensor in layer.state_dict().items()})
    assert_same(found, expected)


def test_no_dense_weight_is_made(tmp_path: Path) -> None:
    get_tensor = CompressedFile.get_tensor
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 32}
    torch.manual_seed(0)
    for model in (
        tf.LlamaForCausalLM(tf.LlamaConfig(num_hidden_layers=1, **wide)),
        tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=1, n_embd=256, n_head=4, vocab_size=32, n_positions=16)),
    ):
        for layer in model.model.layers if hasattr(model, "model") else model.transformer.h:
            sparsified(layer, 0.8)
        folder = tmp_path / model.config.model_type
        hf_pdecay.save_compressed(model, folder)
        with mock.patch.object(CompressedFile, "get_tensor", autospec=True) as read, Watch() as watch:
            read.side_effect = get_tensor
            found = load_sparse_inference(folder)
        inside = {f"{name}.weight" for name in sparse_layers(found)}
        assert len(inside) >= 4 and not inside & {call.args[1] for call in read.call_args_list}
        assert watch.largest < 256 * 256 * 4


class Watch(TorchDispatchMode):
    """The bytes of the largest float tensor that an operation writes on the CPU.

    The oldest transformers makes empty ones on their way to the meta device.
    """

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            return result
        if isinstance(result, Tensor) and type(result) is not StoredWeight and result.is_floating_point():
            self.largest = max(self.largest, result.nbytes if result.is_cpu else 0)
        return result


def test_what_computes_with_a_stored_weight_gets_the_dense_one(tmp_path: Path) -> None:
    model = saved("gpt2", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    name = "transformer.h.0.mlp.c_fc.weight"
    expected = weights(tmp_path / "plain")[name]

    def stored() -> StoredWeight:
        file = CompressedFile(tmp_path / "small" / "model.safetensors")
        found = stored_weight.SparseFile(file, 0.4).get_slice(name)[...]
        assert type(found) is StoredWeight
        return found

    assert torch.equal(torch.stack([stored(), stored()]), torch.stack([expected, expected]))
    assert type(stored().to(torch.bfloat16)) is StoredWeight and not stored().contiguous().used
    changed = nn.Parameter(stored())
    with torch.no_grad():
        changed[2].fill_(3)
        changed.detach().mul_(2)
    assert torch.equal(changed.detach(), torch.cat([expected[:2], torch.full((1, 128), 3.0), expected[3:]]) * 2)
    assert copy.deepcopy(model.transformer.h[0].mlp.c_fc.weight.detach()).equal(stored().dense())


def test_damage_and_wrong_arguments(tmp_path: Path) -> None:
    saved("bert", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5000])
    with pytest.raises(FormatError, match="not a whole file of safetensors"):
        load_sparse_inference(tmp_path / "small")
    place = len(whole) * 2 // 3
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(FormatError, match="its checksum differs"):
        load_sparse_inference(tmp_path / "small")
    file.write_bytes(whole)
    for wrong, message in (
        ({"rows": 0}, "Invalid rows"),
        ({"min_sparsity": 40}, "Invalid min_sparsity"),
        ({"values": "int4"}, "Invalid values"),
        ({"head": "wide"}, "Invalid head"),
    ):
        with pytest.raises(ValueError, match=message):
            load_sparse_inference(tmp_path / "small", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not a folder here"):
        load_sparse_inference(tmp_path / "nothing")


def test_a_model_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    model = saved("bert", tmp_path / "plain")
    state = {name: each for name, each in model.state_dict().items() if "layer.1.output.dense.weight" not in name}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    compress(tmp_path / "part", tmp_path / "small")
    with pytest.raises(FormatError, match=r"layer\.1\.output\.dense\.weight is missing from its weights"):
        load_sparse_inference(tmp_path / "small")


# What is imported is so before memory is looked at; the peak then starts anew (Linux).
MEMORY = """
import sys
from pathlib import Path
import torch
import transformers as tf
import hf_pdecay.inference.loading
from hf_pdecay import load_sparse_inference

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])

torch.set_num_threads(1)
small, *folders = sys.argv[1:]
load_sparse_inference(small)  # what every first load takes, of whatever size
for folder in folders:
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    model = load_sparse_inference(folder)
    total = sum(tensor.float().sum() for tensor in (*model.parameters(), *model.buffers()))
    print(kilobytes("VmHWM") - before)
    del model
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_that_of_the_file(tmp_path: Path) -> None:
    """At most 1.2 times the file, where its bytes are used in place, and transposed; 1.3 times unpacked by zstd."""
    if library() is None:
        pytest.skip("needs a C++ compiler")
    torch.manual_seed(0)
    tiny = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
    models: dict[str, Any] = {
        "tiny": tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=64, **tiny)),
        "llama": tf.LlamaForCausalLM(
            tf.LlamaConfig(num_hidden_layers=6, hidden_size=1024, intermediate_size=4096, vocab_size=64)
        ),
        "gpt2": tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=8, n_embd=1024, n_head=8, vocab_size=64, n_positions=16)),
    }
    for name, model in models.items():
        hf_pdecay.save_compressed(sparsified(model, 0.6), tmp_path / name, zstd=False)
    hf_pdecay.save_compressed(models["llama"], tmp_path / "zstd")
    names = ["llama", "gpt2", "zstd"]
    words = [sys.executable, "-c", MEMORY, *(str(tmp_path / each) for each in ("tiny", *names))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    for name, size in zip(names, map(int, done.stdout.split()), strict=True):
        file = tmp_path / ("llama" if name == "zstd" else name) / "model.safetensors"
        # Of zstd, each thread has a matrix twice.
        assert 0.7 < size * 1024 / file.stat().st_size < (1.3 if name == "zstd" else 1.2), name


def test_models_loaded_twice_do_not_share_weights(tmp_path: Path) -> None:
    """Both use the pages of one file, copy-on-write."""
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 2048}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(num_hidden_layers=1, **wide))
    sparsified(model.model.layers, 0.6)
    hf_pdecay.save_compressed(model, tmp_path / "small")
    before = files_of(tmp_path / "small")
    for load in (load_sparse_inference, type(model).from_pretrained):
        one, other = load(tmp_path / "small"), load(tmp_path / "small")
        for tensor in (*one.parameters(), *one.buffers()):
            tensor.data.zero_()
        assert_same(other, load(tmp_path / "small"))
        assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    assert files_of(tmp_path / "small") == before


def test_a_model_is_saved_into_its_own_folder(tmp_path: Path) -> None:
    """Whose file it uses in place."""
    saved("llama", tmp_path / "plain")
    hf_pdecay.compress(tmp_path / "plain", tmp_path / "small")
    expected = weights(tmp_path / "plain")
    load_sparse_inference(tmp_path / "small").save_pretrained(tmp_path / "small")
    found = weights(tmp_path / "small")
    assert found.keys() == expected.keys() and all(bits(found[name]) == bits(expected[name]) for name in found)
