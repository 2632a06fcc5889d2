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
import torch
import transformers as tf
from packaging.version import Version
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import hf_pdecay
from hf_pdecay import compress, save_compressed
from hf_pdecay.storage import hook
from hf_pdecay.storage.container import FormatError

from ..helpers.models import ARCHITECTURES
from ..helpers.storage_models import bits, files_of, same_state, saved, sparsified
from ..helpers.warm import python
from .test_hostile import edit_json, with_huge_tensor


LOADS = Version(tf.__version__) >= Version("5.23")
loads = pytest.mark.skipif(not LOADS, reason="loading needs transformers 5.23")


@pytest.fixture
def gpt2(tmp_path: Path) -> tuple[Any, Path, Path]:
    """A sparse GPT-2, its plain folder and its compressed one."""
    model = saved("gpt2", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    return model, tmp_path / "plain", tmp_path / "small"


@pytest.mark.skipif(LOADS, reason="this transformers can load")
def test_an_older_transformers_is_told_which_is_needed(gpt2: tuple[Any, Path, Path]) -> None:
    with pytest.raises(ImportError, match=r"needs transformers>=5\.23, and this is .*hf-pdecay decompress MODEL OUT"):
        tf.AutoModelForCausalLM.from_pretrained(gpt2[2])


@loads
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


@loads
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


@loads
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


@loads
@pytest.mark.parametrize(
    "cls",
    [tf.AutoModel, tf.AutoModelForMaskedLM, tf.AutoModelForSequenceClassification, tf.AutoModelForTokenClassification],
)
def test_heads_and_bases_of_a_masked_lm(tmp_path: Path, cls: Any) -> None:
    saved("bert", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    found, info = cls.from_pretrained(tmp_path / "small", output_loading_info=True)
    expected, expected_info = cls.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert info == expected_info
    new = {name for name in expected.state_dict() if name in info["missing_keys"]}
    left, right = found.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    assert all(bits(left[name]) == bits(right[name]) for name in left.keys() - new)


@loads
def test_a_head_of_another_size_is_made_anew(tmp_path: Path) -> None:
    saved("bert-classifier", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    kwargs: dict[str, Any] = {"num_labels": 5, "ignore_mismatched_sizes": True, "output_loading_info": True}
    cls = tf.AutoModelForSequenceClassification
    found, info = cls.from_pretrained(tmp_path / "small", **kwargs)
    expected, expected_info = cls.from_pretrained(tmp_path / "plain", **kwargs)
    assert info == expected_info
    assert {key[0] for key in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert same_state(found.bert, expected.bert)


@loads
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_sharded_with_a_device_map(tmp_path: Path, device_map: Any) -> None:
    model = saved("llama", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small", max_shard_size="2KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 3
    found = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map=device_map, low_cpu_mem_usage=True)
    assert same_state(found, model)


@loads
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


@loads
def test_tied_weights_on_disk_are_refused(tmp_path: Path) -> None:
    saved("qwen3", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    with pytest.raises(ValueError, match="tied weights cannot be offloaded to disk.*hf-pdecay decompress"):
        tf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "small", device_map={**places, "lm_head": "disk"}, offload_folder=str(tmp_path / "offload")
        )


@loads
def test_files_read_whole(gpt2: tuple[Any, Path, Path]) -> None:
    assert same_state(tf.AutoModelForCausalLM.from_pretrained(gpt2[2], disable_mmap=True), gpt2[0])


@loads
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


@loads
def test_pipelines(tmp_path: Path) -> None:
    model = saved("vit", tmp_path / "plain").eval()
    tf.ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False, do_resize=False).save_pretrained(
        tmp_path / "plain"
    )
    compress(tmp_path / "plain", tmp_path / "small")
    pipe = tf.pipeline("image-classification", model=str(tmp_path / "small"))
    assert same_state(pipe.model, model)


class TestDamage:
    @loads
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

    @loads
    @pytest.mark.parametrize("zstd", [False, True])
    def test_a_tensor_far_larger_than_the_model(
        self, tmp_path: Path, zstd: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with_huge_tensor(tmp_path / "small", zstd)
        monkeypatch.setattr(tf.utils.logging.get_logger("transformers"), "propagate", True)
        tracemalloc.start()
        try:
            with pytest.raises(RuntimeError, match="issues during automatic conversion of the weights"):
                tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
            assert tracemalloc.get_traced_memory()[1] < 20_000_000
        finally:
            tracemalloc.stop()
        assert "is a tensor of 4398046511104 bytes; at most" in caplog.text

    @loads
    def test_a_config_that_names_code(self, gpt2: tuple[Any, Path, Path]) -> None:
        edit_json(gpt2[2] / "config.json", lambda config: config["quantization_config"].update(module="os"))
        with pytest.raises(FormatError, match="'module', which this format lacks"):
            tf.AutoModelForCausalLM.from_pretrained(gpt2[2])

    @loads
    def test_other_files_than_the_config_tells_of(self, tmp_path: Path) -> None:
        saved("gpt2", tmp_path / "plain")
        compress(tmp_path / "plain", tmp_path / "small", max_shard_size="8KB")
        index = tmp_path / "small" / "model.safetensors.index.json"
        names = sorted(each.name for each in (tmp_path / "small").glob("*.safetensors"))
        (tmp_path / names[0]).write_bytes((tmp_path / "small" / names[0]).read_bytes())

        def lead_out(value: dict[str, Any]) -> None:
            placed = value["weight_map"]
            placed.update({key: f"../{name}" for key, name in placed.items() if name == names[0]})

        edit_json(index, lead_out)
        with pytest.raises(FormatError, match="config.json names .* in one folder"):
            tf.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


@loads
def test_a_new_model_from_the_config_of_a_compressed_one(gpt2: tuple[Any, Path, Path], tmp_path: Path) -> None:
    config = tf.AutoConfig.from_pretrained(gpt2[2])
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "new")
    with pytest.raises(FormatError, match="its weights are plain. .* delete quantization_config from its config.json"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    edit_json(tmp_path / "new" / "config.json", lambda value: value.pop("quantization_config"))
    tf.AutoModelForCausalLM.from_pretrained(tmp_path / "new")


def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """In a process that has imported nothing."""
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


@loads
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
from hf_pdecay.storage.hook import TABLES, _Finder
module = sys.modules[TABLES]
assert not any(isinstance(finder, _Finder) for finder in sys.meta_path)
import inspect
assert "AUTO_QUANTIZER_MAPPING = {{" in inspect.getsource(module)
assert "exec_module" not in vars(module.__spec__.loader)
print(sum(param.abs().double().sum().item() for param in model.parameters()))
"""
    done = run(code, str(gpt2[2]))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == sum(each.abs().double().sum().item() for each in gpt2[0].parameters())


@loads
@pytest.mark.slow
def test_without_this_package_loading_fails_clearly_and_a_decompressed_model_loads(
    gpt2: tuple[Any, Path, Path],
) -> None:
    """It must not give a model of weights made anew, with warnings alone."""
    code = """
import sys
sys.modules["hf_pdecay"] = None
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("loaded")
"""
    done = python("-c", code, gpt2[2])
    assert done.returncode == 1
    assert "Unknown quantization type, got hf_pdecay" in done.stderr
    assert "RuntimeError: You set `ignore_mismatched_sizes` to `False`, thus raising an error." in done.stderr
    hf_pdecay.decompress(gpt2[2], gpt2[2].parent / "back")
    assert python("-c", code, gpt2[2].parent / "back").stdout.split()[-1:] == ["loaded"]


def test_the_hook_can_be_undone_and_done_again() -> None:
    before = list(sys.meta_path)
    assert "hf_pdecay" in AUTO_QUANTIZER_MAPPING
    try:
        hook.uninstall()
        assert "hf_pdecay" not in AUTO_QUANTIZER_MAPPING and "hf_pdecay" not in AUTO_QUANTIZATION_CONFIG_MAPPING
    finally:
        hook.install()
        hook.install()
    assert "hf_pdecay" in AUTO_QUANTIZER_MAPPING and "hf_pdecay" in AUTO_QUANTIZATION_CONFIG_MAPPING
    assert sys.meta_path == before


@pytest.mark.slow
def test_a_hook_that_is_undone_before_transformers_comes() -> None:
    code = """
import sys
before = list(sys.meta_path)
import hf_pdecay
from hf_pdecay.storage import hook
hook.install()
assert len(sys.meta_path) == len(before) + 1
assert "torch" not in sys.modules and "transformers" not in sys.modules
hook.uninstall()
assert sys.meta_path == before
import transformers.quantizers.auto as tables
assert "hf_pdecay" not in tables.AUTO_QUANTIZER_MAPPING
hook.install()
assert "hf_pdecay" in tables.AUTO_QUANTIZER_MAPPING
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@loads
@pytest.mark.slow
def test_tensor_parallel_loading_is_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small")
    code = """
import sys, hf_pdecay
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
"""
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = python("-c", code, tmp_path / "small", **env)
    assert "cannot be loaded in shards by tp_plan or distributed_config" in done.stderr, done.stderr


@loads
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


@loads
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


@loads
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
