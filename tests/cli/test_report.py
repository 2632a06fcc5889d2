"""The report of a folder: real models, adapters and searches, counted again from their files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.numpy import load_file
from safetensors.torch import save_file

from hf_pdecay import PDecayTrainer, compress, measure_sparsity
from hf_pdecay.cli.folder_report import report_folder
from hf_pdecay.cli.main import main
from hf_pdecay.cli.model_size import from_pretrained
from hf_pdecay.shrinking.folder import shrink_folder
from hf_pdecay.storage.container import read_header

from ..helpers.models import ARCHITECTURES, build, tiny_gpt2


def as_json(capsys: pytest.CaptureFixture[str], folder: Path) -> Any:
    capsys.readouterr()
    assert main(["report", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_and_its_checkpoints(
    make_args: Callable[..., Any], tokens: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    args = make_args(max_steps=20, save_strategy="steps", save_steps=10, target_sparsity=0.7, lp_rules={"mlp": "off"})
    trainer = PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=tokens)
    trainer.train()
    out = Path(args.output_dir)
    newest = as_json(capsys, out)  # there are checkpoints only
    assert newest["folder"] == str(out / "checkpoint-20")
    trainer.save_model()
    result = as_json(capsys, out)
    arrays = load_file(out / "model.safetensors")
    decayed = {name: array for name, array in arrays.items() if ".attn.c_" in name and name.endswith("weight")}
    assert {tensor["name"] for tensor in result["tensors"] if tensor["decayed"]} == set(decayed)
    zeros = sum(int((array == 0).sum()) for array in decayed.values())
    assert result["decayed"]["zeros"] == newest["decayed"]["zeros"] == zeros
    assert result["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert result["model"]["parameters"] == sum(array.size for array in arrays.values())
    (out / "sparsity.json").unlink()  # then all that decays by default counts
    assert as_json(capsys, out)["decayed"]["tensors"] == 2 * len(decayed)
    assert main(["report", str(out)]) == 0
    assert "decayed weights" in capsys.readouterr().out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_that_no_run_of_ours_has_written(name: str, tmp_path: Path) -> None:
    model = build(name)
    with torch.no_grad():
        for param in model.parameters():
            param[torch.rand(param.shape, generator=torch.Generator().manual_seed(param.numel())) < 0.3] = 0
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    result, expected = report_folder(tmp_path).sparsity, measure_sparsity(model)
    assert result.model.zeros == expected.model.zeros
    # Also where experts are fused in memory and not in the file, and a router has another name there.
    assert result.decayed.parameters == expected.decayed.parameters
    assert result.decayed.zeros == expected.decayed.zeros


@pytest.mark.parametrize("name", ["vit", "mixtral", "llama"])
def test_what_a_run_let_decay_whatever_the_names_in_the_file(name: str, tmp_path: Path) -> None:
    model = build(name)
    decayed = [tensor.name for tensor in measure_sparsity(model).tensors if tensor.decayed and ".0." in tensor.name]
    with torch.no_grad():
        for number, (own, param) in enumerate(model.named_parameters()):
            param[torch.rand(param.shape) < (0.5 if own in decayed else 0.1 + number / 1000)] = 0
    model.save_pretrained(tmp_path)
    expected = measure_sparsity(model, decayed=decayed)
    expected.save(tmp_path / "sparsity.json")
    result = report_folder(tmp_path).sparsity
    assert result.decayed.parameters == expected.decayed.parameters > 0
    assert result.decayed.zeros == expected.decayed.zeros and result.model.zeros == expected.model.zeros


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_what_shrinking_would_give(name: str, tmp_path: Path) -> None:
    model = build(name)
    # ViT's as transformers 5 has them, and 4.
    first, second = (r"fc1|intermediate", r"fc2|\d\.output") if name == "vit" else ("up_proj", "down_proj")
    with torch.no_grad():
        for own, param in model.named_parameters():
            if re.search(first, own):
                param[: len(param) // 2] = 0
            elif re.search(second, own) and param.ndim > 1:
                param[:, : param.shape[1] // 2] = 0
    model.save_pretrained(tmp_path / "model")
    result = report_folder(tmp_path / "model").shrunk
    assert result is not None
    shrink_folder(tmp_path / "model", tmp_path / "small")
    left = sum(array.size for array in load_file(tmp_path / "small" / "model.safetensors").values())
    assert result.uniform == left < result.parameters


def test_a_config_that_tells_of_far_more_than_the_files_hold(tmp_path: Path) -> None:
    """Building that model would take hours, even without weights."""
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 10**9}))
    assert report_folder(tmp_path).sparsity.model.parameters == sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize("zstd", [False, True])
def test_a_compressed_model_is_counted_as_what_it_is(zstd: bool, tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        for param in model.parameters():
            param[torch.rand(param.shape) < 0.8] = 0
    model.save_pretrained(tmp_path / "plain")
    compress(tmp_path / "plain", tmp_path / "small", zstd=zstd)
    plain, small = report_folder(tmp_path / "plain"), report_folder(tmp_path / "small")
    assert small.sparsity.to_dict() == plain.sparsity.to_dict()
    assert small.stored == plain.stored
    assert small.packed == (tmp_path / "small/model.safetensors").stat().st_size < plain.stored
    said = " ".join(str(part) for part in small.__rich_console__(None, None) if isinstance(part, str))  # type: ignore[arg-type]
    assert f"The folder is compressed: {small.packed / plain.stored:.1%}" in said and "hf-pdecay compress" not in said


def test_it_says_what_the_zeros_are_good_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".mlp." in name:
                param.mul_(torch.rand(param.shape) < 0.1)
    model.save_pretrained(tmp_path / "model")
    result = as_json(capsys, tmp_path / "model")
    assert result["bytes"] == sum(
        array.nbytes for array in load_file(tmp_path / "model" / "model.safetensors").values()
    )
    compress(tmp_path / "model", tmp_path / "small", zstd=False)
    # Heads, names and checksums come on top, which weigh in a model of 25,000 weights.
    written = sum(entry.size for entry in read_header(tmp_path / "small" / "model.safetensors").entries.values())
    assert result["compressed_bytes"] < written < result["compressed_bytes"] + 100 * len(result["tensors"])
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["report", str(tmp_path / "model")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    share = result["compressed_bytes"] / result["bytes"]
    assert f"hf-pdecay compress {tmp_path / 'model'} OUT stores it in about {share:.1%}" in said
    assert "hf_pdecay.to_sparse_inference(model) measures which layers are faster sparse on a CPU" in said
    assert "likely 6 for 1 row (from 40% zeros)" in said and "of 14 tensors." in said
    weights = [param for name, param in model.named_parameters() if ".mlp." in name]
    left = sum(int(param.count_nonzero()) for param in weights) / sum(param.numel() for param in weights)
    assert (
        f"{1 / 32 + left:.0%} in float32, {1 / 32 + left / 2:.0%} in bfloat16, {1 / 32 + left / 4:.0%} in int8" in said
    )


@pytest.mark.usefixtures("lora_beside_torchao")
def test_an_adapter(
    make_args: Callable[..., Any], tokens: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, target_modules="all-linear"))
    args = make_args(max_steps=20, lp_rules={"lora_": {"group": "rank", "target_sparsity": 0.25}})
    trainer = PDecayTrainer(model=model, args=args, train_dataset=tokens)
    trainer.train()
    trainer.save_model()
    result = as_json(capsys, Path(args.output_dir))
    assert len(result["ranks"]) == 14
    assert sum(layer["ranks"] for layer in result["ranks"].values()) == 56
    assert sum(layer["dead"] for layer in result["ranks"].values()) == 14
    assert result["decayed"]["tensors"] == 28
    assert main(["report", args.output_dir]) == 0
    assert "14 of 56 ranks in 14 layers are dead" in " ".join(capsys.readouterr().out.split())
    (Path(args.output_dir) / "sparsity.json").unlink()
    assert as_json(capsys, Path(args.output_dir))["decayed"]["tensors"] == 28


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_weights_of_one_byte(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = torch.tensor([[0.0, -0.0, 1.5, 0.25], [0.0, 2.0, 0.0, 0.0]]).to(dtype)
    save_file({"layer.weight": weights}, tmp_path / "model.safetensors")
    result = report_folder(tmp_path)
    assert [(tensor.name, tensor.zeros) for tensor in result.sparsity.tensors] == [("layer.weight", 5)]
    assert (result.stored, result.compressed) == (8, 1 + 3), "a bitmask, and the values that are not zero"


def test_codes_without_a_sign(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", minversion="0.8")  # 0.5 does not know their dtype
    save_file({"layer.codes": torch.tensor([0, 3, 0, 60000], dtype=torch.uint16)}, tmp_path / "model.safetensors")
    result = report_folder(tmp_path)
    assert result.sparsity.tensors == []
    assert (result.stored, result.compressed) == (8, 1 + 2 * 2)


def test_counts_of_a_run_that_are_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    expected = as_json(capsys, tmp_path)
    (tmp_path / "sparsity.json").write_text('{"tensors": [')
    assert as_json(capsys, tmp_path) == expected
    assert f"{str(tmp_path / 'sparsity.json')!r} cannot be read" in caplog.text and len(caplog.records) == 1


def test_a_search(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    points = [(2.0, 0.1), (2.1, 0.5), (2.05, 0.6), (3.0, 0.9)]
    lines = [
        {"trial": f"run-{number}", "loss": loss, "sparsity": sparsity, "params": {"p_norm": 0.5 + number / 10}}
        for number, (loss, sparsity) in enumerate(points)
    ]
    (tmp_path / "search.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [{**lines[0], "loss": 9}, *lines])
    )
    result = as_json(capsys, tmp_path)
    assert [trial["front"] for trial in result["trials"]] == [True, False, True, True]
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "3 of 4 trials" in out and "60.00%" in out and "50.00%" not in out


def test_what_cannot_be_reported_is_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("bert").save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    (tmp_path / "empty").mkdir()
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search.jsonl").write_text("")
    wrong = {
        "nowhere": "does not exist",
        "model/model.safetensors": "is a file; name the folder",
        "empty": "holds no model",
        "model": "cut short",
        "search": "no trial",
    }
    capsys.readouterr()
    for folder, said in wrong.items():
        assert main(["report", str(tmp_path / folder)]) == 2
        printed = capsys.readouterr()
        assert said in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_files_that_from_pretrained_does_not_read_are_not_counted(tmp_path: Path) -> None:
    model = build("llama")
    expected = measure_sparsity(model).model
    for folder, size in (("shards", "20KB"), ("whole", "5GB")):
        model.save_pretrained(tmp_path / folder, max_shard_size=size)
    stale = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(stale) > 1
    for file in stale:
        (tmp_path / "whole" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "shards" / "consolidated.safetensors").write_bytes((tmp_path / "whole/model.safetensors").read_bytes())
    for folder in ("shards", "whole"):
        result = report_folder(tmp_path / folder)
        assert result.sparsity.model == expected and result.stored == 4 * expected.parameters
    stale[0].unlink()
    with pytest.raises(ValueError, match=f"{stale[0].name} of its model.safetensors.index.json is missing"):
        report_folder(tmp_path / "shards")


def test_a_buffer_does_not_decay(tmp_path: Path) -> None:
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = tf.BartConfig(vocab_size=64, d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes)
    model = tf.BartForConditionalGeneration(config)  # which saves a bias of its logits, of two dimensions
    model.save_pretrained(tmp_path)
    result = report_folder(tmp_path).sparsity
    assert result.decayed == measure_sparsity(model).decayed
    assert result.model.parameters == measure_sparsity(model).model.parameters + 64


@pytest.mark.parametrize("config", [{"model_type": "gpt2", "n_head": 0}, {"model_type": "bert"}])
def test_a_config_of_which_no_model_can_be_made(config: dict[str, Any], tmp_path: Path) -> None:
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    assert report_folder(tmp_path).sparsity.model.parameters == sum(param.numel() for param in model.parameters())


def test_json_of_a_model_with_nan_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a.weight": torch.full((2, 2), torch.nan), "b.weight": torch.eye(2)}, tmp_path / "model.safetensors")
    assert main(["report", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert [tensor["norm"] for tensor in result["tensors"]] == [None, pytest.approx(2**0.5)]


def test_a_compressed_model_is_listed_in_the_order_of_the_plain_one(tmp_path: Path) -> None:
    build("gpt2").config.save_pretrained(tmp_path / "plain")
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    tensors = {f"h.{number}.weight": torch.eye(16).to(dtypes[number % 3]) for number in range(12)}
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    compress(tmp_path / "plain", tmp_path / "small")
    for folder in ("plain", "small"):
        assert [tensor.name for tensor in report_folder(tmp_path / folder).sparsity.tensors] == list(tensors)


def test_a_folder_is_named_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a [v2] :bug:"  # which rich would take for a style and a picture
    model = build("llama")
    with torch.no_grad():
        model.get_parameter("lm_head.weight").zero_()
    model.save_pretrained(folder)
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    assert "a[v2]:bug:" in re.sub(r"\s", "", capsys.readouterr().out)


def test_a_model_shrunk_layer_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither command takes it, so the report names neither; and what it takes to train is what is left of it."""
    model = build("llama")
    with torch.no_grad():
        for number, name in enumerate(("model.layers.0", "model.layers.1")):
            model.get_parameter(f"{name}.mlp.down_proj.weight")[:, : 20 + number] = 0
            model.get_parameter(f"{name}.mlp.up_proj.weight")[:-1] = 0
    model.save_pretrained(tmp_path / "model")
    left = shrink_folder(tmp_path / "model", tmp_path / "small", layers="ragged").parameters[1]
    result = report_folder(tmp_path / "small")
    assert result.sparsity.model.parameters == left and result.shrunk is None and result.compressed == result.stored
    assert main(["report", str(tmp_path / "small")]) == 0
    assert "hf-pdecay" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="name the plain model, from which it was made"):
        shrink_folder(tmp_path / "small", tmp_path / "smaller")
    assert from_pretrained(str(tmp_path / "small")).parameters == left
