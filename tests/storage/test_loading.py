"""Compressed models through plain from_pretrained, as if they had never been compressed."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers as tf
from packaging.version import Version
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import hf_pdecay
from hf_pdecay import compress, save_compressed
from hf_pdecay.storage import hook, readers
from hf_pdecay.storage.container import FormatError

from ..helpers.models import ARCHITECTURES
from ..helpers.storage_models import bits, files_of, same_state, saved, sparsified
from ..helpers.warm import python
from .test_hostile import with_huge_tensor


newer = pytest.mark.skipif(Version(tf.__version__) < Version("5"), reason="transformers 4 cannot, plain or not")


@pytest.fixture
def gpt2(tmp_path: Path) -> tuple[Any, Path, Path]:
    """A sparse GPT-2, its plain folder and its compressed one."""
    model = saved("gpt2", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    return model, tmp_path / "plain", tmp_path / "small"


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_comes_back_to_the_bit(tmp_path: Path, name: str, zstd: bool) -> None:
    model = saved(name, tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small", zstd=zstd)
    found, info = type(model).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values()), info
    assert same_state(found, model)
    # And is an ordinary model from there on, with the model's own conversions (Mixtral's experts) to revert.
    found.save_pretrained(tmp_path / "again")
    type(model).from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "plain_again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "plain_again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", ["gpt2", "t5", "mixtral"])
def test_models_saved_in_other_dtypes(tmp_path: Path, name: str, dtype: str) -> None:
    model = saved(name, tmp_path / "plain").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    for kwargs in ({}, {"dtype": "auto"}, {"dtype": torch.float32}, {"dtype": "float16"}):
        found, expected = (type(model).from_pretrained(tmp_path / each, **kwargs) for each in ("small", "plain"))
        assert same_state(found, expected), kwargs


class Odd(tf.PreTrainedModel):
    """Parameters and buffers of dtypes that go with no model's, some of them not saved."""

    config_class = tf.BertConfig
    base_model_prefix = "odd"

    def __init__(self, config: tf.BertConfig) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(8, 24))
        self.scalar = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("ids", torch.zeros(1, 64, dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(5, 5, dtype=torch.bool))
        self.register_buffer("bytes", torch.zeros(33, dtype=torch.uint8))
        self.register_buffer("passing", torch.ones(3), persistent=False)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        if module is self:
            self.passing = torch.ones(3)


def test_buffers_and_odd_dtypes(tmp_path: Path) -> None:
    model = Odd(tf.BertConfig())
    with torch.no_grad():
        model.weight[0, 3], model.weight[1, 1], model.scalar[()] = -0.0, float("nan"), -0.0
        model.ids[0, ::20] = torch.tensor([1, -7, 2**60, 5])
        model.mask[2] = True
        model.bytes[::8] = 200
    save_compressed(model, tmp_path / "small")
    found, info = Odd.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values()), info
    assert same_state(found, model)
    assert bits(found.passing) == bits(model.passing)


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
IMAGES = {"image_size": 32, "patch_size": 8}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def composite(kind: str) -> Any:
    """A model that is made of others."""
    if kind == "clip":
        text, vision = SMALL | TOKENS | {"projection_dim": 16}, SMALL | IMAGES | {"projection_dim": 16}
        return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    if kind == "llava":
        vision = SMALL | IMAGES | {"model_type": "clip_vision_model"}
        text = SMALL | {"model_type": "llama", "num_key_value_heads": 2}
        return tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
        )
    bert = tf.BertConfig(**SMALL)
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(bert, tf.BertConfig(**SMALL))
    return tf.EncoderDecoderModel(config)


def same_loading(cls: Any, folder: Path, **kwargs: Any) -> None:
    """Loaded from the compressed folder a model is as from the plain one, new weights and reports included."""
    found = []
    for name in ("plain", "small"):
        torch.manual_seed(0)
        found.append(cls.from_pretrained(folder / name, output_loading_info=True, **kwargs))
    (expected, expected_info), (model, info) = found
    assert info == expected_info
    assert same_state(model, expected)


@pytest.mark.parametrize("mismatched", [False, True])
@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("clip", [tf.CLIPModel, tf.CLIPVisionModel, tf.CLIPTextModel, tf.CLIPVisionModelWithProjection]),
        ("llava", [tf.LlavaForConditionalGeneration, tf.AutoModel, tf.CLIPVisionModel, tf.LlamaForCausalLM]),
        ("encoder-decoder", [tf.EncoderDecoderModel, tf.BertModel]),
        ("t5", [tf.T5ForConditionalGeneration, tf.T5EncoderModel, tf.T5Model, tf.AutoModelForSequenceClassification]),
        ("bert", [tf.BertModel, tf.AutoModel, tf.AutoModelForMaskedLM, tf.BertForTokenClassification]),
        ("bert-classifier", [tf.BertModel, tf.AutoModelForMaskedLM, tf.AutoModelForSequenceClassification]),
        ("vit", [tf.AutoModel, tf.AutoModelForImageClassification]),
        ("mixtral", [tf.AutoModel, tf.AutoModelForCausalLM, tf.AutoModelForSequenceClassification]),
        ("gpt2", [tf.AutoModel, tf.AutoModelForCausalLM, tf.AutoModelForQuestionAnswering]),
    ],
)
def test_parts_heads_and_bases(tmp_path: Path, name: str, classes: list[Any], mismatched: bool) -> None:
    """Any class that loads the plain folder, in whole or in part, with or without wrong sizes."""
    if name in ("clip", "llava", "encoder-decoder"):
        sparsified(composite(name)).save_pretrained(tmp_path / "plain")  # type: ignore[operator]
    else:
        saved(name, tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small", max_shard_size="20KB")
    for cls in classes:
        same_loading(cls, tmp_path, ignore_mismatched_sizes=mismatched)


def test_ways_of_loading(tmp_path: Path) -> None:
    """With a config of one's own, other names, a dtype, sizes that really differ, from a subfolder."""
    saved("bert", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    config = tf.AutoConfig.from_pretrained(tmp_path / "plain")
    own = type(config)(**config.to_dict())
    wide = type(config)(**(config.to_dict() | {"vocab_size": config.vocab_size + 8}))
    same_loading(tf.AutoModelForMaskedLM, tmp_path, config=own)
    same_loading(tf.AutoModelForMaskedLM, tmp_path, config=wide, ignore_mismatched_sizes=True)
    same_loading(tf.BertModel, tmp_path, key_mapping={r"^bert\.encoder": "encoder"})
    for dtype in ("auto", "bfloat16", torch.float64):
        same_loading(tf.AutoModel, tmp_path, dtype=dtype)
    same_loading(tf.AutoModel, tmp_path, device_map="cpu", low_cpu_mem_usage=True)
    with pytest.raises(OSError, match=r"pytorch_model\.bin"):
        tf.AutoModel.from_pretrained(tmp_path / "small", use_safetensors=False)
    (tmp_path / "above").mkdir()
    (tmp_path / "small").rename(tmp_path / "above" / "small")
    found = tf.AutoModelForMaskedLM.from_pretrained(tmp_path / "above", subfolder="small")
    assert same_state(found, tf.AutoModelForMaskedLM.from_pretrained(tmp_path / "plain"))


def test_accelerate_reads_compressed_folders(gpt2: tuple[Any, Path, Path]) -> None:
    import accelerate

    model = tf.AutoModelForCausalLM.from_config(gpt2[0].config)
    accelerate.load_checkpoint_and_dispatch(model, str(gpt2[2]))
    model.tie_weights()
    assert same_state(model, gpt2[0])


def test_a_head_of_another_size_is_made_anew(tmp_path: Path) -> None:
    saved("bert-classifier", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    kwargs: dict[str, Any] = {"num_labels": 5, "ignore_mismatched_sizes": True, "output_loading_info": True}
    cls = tf.AutoModelForSequenceClassification
    found, info = cls.from_pretrained(tmp_path / "small", **kwargs)
    expected, expected_info = cls.from_pretrained(tmp_path / "plain", **kwargs)
    assert info == expected_info
    assert len(info["mismatched_keys"]) == 2
    assert same_state(found.bert, expected.bert)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_sharded_with_a_device_map(tmp_path: Path, device_map: Any) -> None:
    model = saved("llama", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small", max_shard_size="2KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 3
    found = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map=device_map, low_cpu_mem_usage=True)
    assert same_state(found, model)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_offloaded_to_disk(tmp_path: Path, name: str) -> None:
    model = saved(name, tmp_path / "plain").eval()
    compress(tmp_path / "plain", tmp_path / "small")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    found = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, model(tokens).logits)


@newer
def test_tied_weights_on_disk(tmp_path: Path) -> None:
    model = saved("qwen3", tmp_path / "plain").eval()
    compress(tmp_path / "plain", tmp_path / "small")
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    found = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", device_map={**places, "lm_head": "disk"}, offload_folder=str(tmp_path / "offload")
    )
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, model(tokens).logits)


@newer
def test_files_read_whole(gpt2: tuple[Any, Path, Path]) -> None:
    assert same_state(tf.AutoModelForCausalLM.from_pretrained(gpt2[2], disable_mmap=True), gpt2[0])


def test_training_goes_on_from_a_compressed_model(
    gpt2: tuple[Any, Path, Path], make_args: Callable[..., Any], tokens: Any, tmp_path: Path
) -> None:
    """By the stock Trainer, and with the same losses and weights as from the plain model."""
    ended = []
    for folder in gpt2[1:]:
        model = tf.AutoModelForCausalLM.from_pretrained(folder)
        args = tf.TrainingArguments(
            str(tmp_path / "out"), use_cpu=True, report_to="none", max_steps=3, save_strategy="no", disable_tqdm=True
        )
        trainer = tf.Trainer(model=model, args=args, train_dataset=tokens)
        trainer.train()
        trainer.save_model(str(tmp_path / f"out_of_{folder.name}"))
        ended.append(model)
    assert same_state(*ended)
    assert not same_state(ended[0], gpt2[0])
    left, right = (files_of(tmp_path / f"out_of_{folder.name}") for folder in gpt2[1:])
    assert left.pop("training_args.bin") and right.pop("training_args.bin")
    assert left == right


def test_pipelines(tmp_path: Path) -> None:
    model = saved("vit", tmp_path / "plain").eval()
    tf.ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False, do_resize=False).save_pretrained(
        tmp_path / "plain"
    )
    compress(tmp_path / "plain", tmp_path / "small")
    pipe = tf.pipeline("image-classification", model=str(tmp_path / "small"))
    assert same_state(pipe.model, model)


class TestDamage:
    def test_a_flipped_bit(self, gpt2: tuple[Any, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        file = gpt2[2] / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-40] ^= 1
        file.write_bytes(data)
        with pytest.raises(
            FormatError, match=r"'transformer.* is damaged: its checksum differs.*Download the model again\."
        ):
            tf.AutoModelForCausalLM.from_pretrained(gpt2[2])
        monkeypatch.setenv("HF_PDECAY_VERIFY_CHECKSUMS", "0")
        assert not same_state(tf.AutoModelForCausalLM.from_pretrained(gpt2[2]), gpt2[0])

    @pytest.mark.parametrize("zstd", [False, True])
    def test_a_tensor_far_larger_than_the_model(self, tmp_path: Path, zstd: bool) -> None:
        with_huge_tensor(tmp_path / "small", zstd)
        tracemalloc.start()
        try:
            with pytest.raises(FormatError, match="is a tensor of 4398046511104 bytes; at most"):
                tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
            assert tracemalloc.get_traced_memory()[1] < 20_000_000
        finally:
            tracemalloc.stop()


def test_a_new_model_from_the_config_of_a_compressed_one(gpt2: tuple[Any, Path, Path], tmp_path: Path) -> None:
    config = tf.AutoConfig.from_pretrained(gpt2[2])
    new = tf.AutoModelForCausalLM.from_config(config)
    new.save_pretrained(tmp_path / "new")
    assert same_state(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "new"), new)


def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """In a process that has imported nothing."""
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import hf_pdecay; from transformers import AutoModelForCausalLM",
        "import transformers; import hf_pdecay; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import hf_pdecay",
        "import hf_pdecay; import transformers.quantizers.auto; from transformers import AutoModelForCausalLM",
    ],
)
def test_imports_in_any_order(gpt2: tuple[Any, Path, Path], imports: str) -> None:
    code = f"""
import sys
{imports}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
from hf_pdecay.storage.hook import _Finder
module = sys.modules["transformers.quantizers.auto"]
assert not any(isinstance(finder, _Finder) for finder in sys.meta_path)
import inspect
assert "AUTO_QUANTIZER_MAPPING = {{" in inspect.getsource(module)
assert "exec_module" not in vars(module.__spec__.loader)
print(sum(param.abs().double().sum().item() for param in model.parameters()))
"""
    done = run(code, str(gpt2[2]))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == sum(each.abs().double().sum().item() for each in gpt2[0].parameters())


@pytest.mark.slow
def test_without_this_package_nothing_loads_and_a_decompressed_model_does(tmp_path: Path) -> None:
    """It must not give a model of weights made anew, whatever is asked for."""
    code = """
import sys
sys.modules["hf_pdecay"] = None
import accelerate, safetensors.torch, transformers as tf
folder, failed = sys.argv[1], 0
ways = {
    "part": lambda **kwargs: tf.CLIPVisionModel.from_pretrained(folder, **kwargs),
    "class": lambda **kwargs: tf.CLIPModel.from_pretrained(folder, **kwargs),
    "auto": lambda **kwargs: tf.AutoModel.from_pretrained(folder, **kwargs),
    "own config": lambda **kwargs: tf.CLIPModel.from_pretrained(folder, config=tf.CLIPConfig(), **kwargs),
    "whole files": lambda **kwargs: tf.AutoModel.from_pretrained(folder, device_map="cpu", **kwargs),
    "pipeline": lambda **kwargs: tf.pipeline("feature-extraction", model=folder, model_kwargs=kwargs),
}
for name, load in ways.items():
    for ignored in (False, True):
        try:
            load(ignore_mismatched_sizes=ignored)
            print("loaded", name, ignored)
        except Exception as error:
            # Older releases of safetensors do not say which part of the header they do not know.
            if "Error while deserializing header" not in str(error):
                print("other", name, ignored, repr(error))
try:
    safetensors.torch.load_file(folder + "/model.safetensors")
    print("read")
except Exception as error:
    print(error)
"""
    sparsified(composite("clip")).save_pretrained(tmp_path / "plain")  # type: ignore[operator]
    compress(tmp_path / "plain", tmp_path / "small")
    done = python("-c", code, tmp_path / "small")
    assert done.stdout.startswith("Error while deserializing header"), done.stdout + done.stderr
    assert "unknown variant `hf_pdecay`" in done.stdout or "InvalidHeaderDeserialization" in done.stdout
    hf_pdecay.decompress(tmp_path / "small", tmp_path / "back")
    words = [line.split()[0] for line in python("-c", code, tmp_path / "back").stdout.splitlines()]
    assert words.count("loaded") >= 8 and words[-1] == "read"


def test_the_hook_can_be_undone_and_done_again() -> None:
    before = list(sys.meta_path)
    method = "hf_pdecay_shrunk"
    assert method in AUTO_QUANTIZER_MAPPING
    try:
        hook.uninstall()
        assert method not in AUTO_QUANTIZER_MAPPING and method not in AUTO_QUANTIZATION_CONFIG_MAPPING
        assert tf.modeling_utils.safe_open is safetensors.safe_open
    finally:
        hook.install({})
        hook.install({})
    assert method in AUTO_QUANTIZER_MAPPING and method in AUTO_QUANTIZATION_CONFIG_MAPPING
    assert tf.modeling_utils.safe_open is readers.safe_open
    assert sys.meta_path == before


@pytest.mark.slow
def test_a_hook_that_is_undone_before_transformers_comes() -> None:
    code = """
import sys
before = list(sys.meta_path)
import hf_pdecay
from hf_pdecay.storage import hook
hook.install({})
assert len(sys.meta_path) == len(before) + 1
assert "torch" not in sys.modules and "transformers" not in sys.modules
hook.uninstall()
assert sys.meta_path == before
import transformers.quantizers.auto as tables
assert "hf_pdecay_shrunk" not in tables.AUTO_QUANTIZER_MAPPING
hook.install({})
assert "hf_pdecay_shrunk" in tables.AUTO_QUANTIZER_MAPPING
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_tensor_parallel_loading(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    code = """
import sys, hf_pdecay, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
params = [param.full_tensor() if hasattr(param, "full_tensor") else param for param in model.parameters()]
print(sum(param.abs().double().sum().item() for param in params))
"""
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = python("-c", code, tmp_path / "small", **env)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == sum(each.abs().double().sum().item() for each in model.parameters())


def test_an_unsparse_model_needs_nothing_of_ours(tmp_path: Path) -> None:
    """Tensors without a smaller encoding are stored plainly."""
    sparsified(model := saved("llama", tmp_path / "plain"), 0.0)
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
    report = save_compressed(model, tmp_path / "small")
    assert list(report.encodings) == ["dense"]
    assert same_state(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small"), model)


@pytest.mark.usefixtures("lora_beside_torchao")
def test_adapters_on_a_compressed_model(tmp_path: Path) -> None:
    """LoRA saves the name of its base, which is loaded with it."""
    import peft

    saved("llama", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small"), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected = adapted(tokens).logits
        found = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(found(tokens).logits, expected)


def test_a_name_on_the_hub(gpt2: tuple[Any, Path, Path], tmp_path: Path) -> None:
    """From the Hub's cache, as a download leaves it: links to files that are named by their checksums."""
    repo = tmp_path / "cache" / "models--me--small"
    snapshot = repo / "snapshots" / ("1" * 40)
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("1" * 40)
    for number, file in enumerate(sorted(gpt2[2].iterdir())):
        (repo / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    found = tf.AutoModelForCausalLM.from_pretrained("me/small", cache_dir=tmp_path / "cache", local_files_only=True)
    assert same_state(found, gpt2[0])
