"""What a run would do, said before it, beside what runs do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig
from transformers.pytorch_utils import Conv1D

from hf_pdecay import PDecayTrainer
from hf_pdecay.cli.main import main
from hf_pdecay.cli.run_preview import preview
from hf_pdecay.trainer.settings import DecaySettings

from ..helpers.models import tiny_gpt2


@pytest.fixture
def gpt2(tmp_path: Path) -> str:
    config = tiny_gpt2().config
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


@pytest.fixture
def llama(tmp_path: Path) -> str:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def test_the_zeros_are_those_of_the_run(
    gpt2: str, make_args: Callable[..., Any], tokens: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = {"attn": {"p_norm": 0.6, "target_sparsity": 0.613}}
    trainer = PDecayTrainer(
        model=tiny_gpt2(), args=make_args(max_steps=40, target_sparsity=0.777, lp_rules=rules), train_dataset=tokens
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    words = ["preview", gpt2, "--lp_rules", json.dumps(rules), "--max_steps", "40"]
    words += ["--target_sparsity", "0.777", "--p_norm", f"{trainer.args.p_norm}"]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    decayed = [tensor for tensor in result["tensors"] if tensor["decayed"]]
    saved = load_file(tmp_path / "trained" / "model.safetensors")
    weights = [saved[tensor["name"]] for tensor in decayed]
    assert [list(tensor.shape) for tensor in weights] == [tensor["shape"] for tensor in decayed]
    assert result["decayed"] == sum(tensor.size for tensor in weights)
    assert result["zeros"] == {
        "element": {"zeros": sum((tensor == 0).sum() for tensor in weights), "of": result["decayed"]}
    }
    groups = [group for group in trainer.optimizer.param_groups if group["decayed"]]
    assert {(tensor["rule"], tensor["p_norm"], tensor["target_sparsity"]) for tensor in decayed} == {
        (group["rule"], group["p_norm"], group["asked_sparsity"]) for group in groups
    }
    assert result["pruning_steps"][-1] == 30 and result["pruning_steps"][0] > 4


def test_when_a_run_prunes_at_once(gpt2: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["preview", gpt2, "--target_sparsity", "0.5", "--max_steps", "400"]
    assert main(words) == 0
    assert "If the model is pretrained, it is pruned at once after step 170" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main([*words, "--one_shot", "wanda"]) == 0
    assert "Pruned at once by wanda after step 170." in capsys.readouterr().out
    assert main([*words, "--one_shot", "wanda", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["one_shot"] == {"method": "wanda", "after": 170}
    assert result["pruning_steps"][0] == 170 and result["pruning_steps"][-1] == 300
    assert main([*words, "--one_shot", "off", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["one_shot"] == {"method": "off", "after": None} and result["pruning_steps"][0] < 60


def test_what_decays_by_default(gpt2: str) -> None:
    model = tiny_gpt2()
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and name != "lm_head"
    }
    result = preview(gpt2, DecaySettings())
    assert {tensor.name for tensor in result.tensors if tensor.decayed} == matrices
    assert [tensor.name for tensor in result.tensors] == [name for name, _ in model.named_parameters()]
    assert result.parameters == sum(param.numel() for param in model.parameters())
    assert (result.zeros, result.pruning_steps) == ({}, [])


def test_groups_of_weights(llama: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    rules = json.dumps({"mlp": {"group": "neuron"}, "self_attn": {"group": "2:4"}})
    assert main(["preview", llama, "--target_sparsity", "0.25", "--lp_rules", rules, "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "Zero in the end: 24 of 96 neurons (25.00%)." in out
    assert "Zero in the end, by 2:4: 4,096 of 8,192 weights (50.00%)." in out
    assert "│ model.layers.1.mlp.up_proj.weight" in out and " 48 × 32 │" in out and " mlp │" in out
    assert "pruning steps, after steps" in out and " to 750 of 1,000." in out


def test_what_is_rounded(gpt2: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["preview", gpt2, "--weight_bits", "4", "--lp_rules", '{"attn": {"weight_bits": 2}}']
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "Rounded to 2 bits: 8,192 weights." in out and "Rounded to 4 bits: 16,384 weights." in out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weight_bits"]["transformer.h.0.attn.c_attn.weight"] == 2
    assert main(["preview", gpt2, "--lp_rules", '{"ln_1": {"weight_bits": 2}}']) == 2
    assert "no matrix of floats that a layer multiplies by" in capsys.readouterr().err


def test_settings_by_flags_and_in_optim_args_are_the_same(gpt2: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"target_sparsity": "0.5", "p_norm": "0.6", "sparsity_end": "0.9", "sparsity_budget": "tensor"}
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    assert main(["preview", gpt2, "--json", *flags]) == 0
    by_flags = capsys.readouterr().out
    assert main(["preview", gpt2, "--json", "--optim_args", ",".join(f"{k}={v}" for k, v in given.items())]) == 0
    assert capsys.readouterr().out == by_flags
    assert json.loads(by_flags)["pruning_steps"][-1] == 900


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optim", "adam_lp"], "optim='adam_lp'"),
        (["--lp_rules", '{"mpl": {}}'], "'mpl' matches no trainable parameter"),
        (["--target_sparsity", "0.9", "--p_norm", "2"], "p_norm=2"),
        (["--target_sparsity", "0.9", "--max_steps", "5"], "max_steps"),
        (["--max_steps", "-1"], "max_steps=-1"),
        (["--weight_decay", "nan"], "weight_decay=nan"),
        (["--optim_args", "taget_sparsity=0.9"], "target_sparsity"),
        (["--optim_target_modules", "nothing"], "optim_target_modules"),
    ],
)
def test_what_a_run_would_refuse(words: list[str], said: str, gpt2: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", gpt2, *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["preview", "estimate"])
def test_what_it_says_of_a_missing_model_names_only_flags_that_it_has(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    flags = set(re.findall(r"--[a-z_-]+", capsys.readouterr().out))
    assert main([command, "/there/is/no/model"]) == 2
    said = capsys.readouterr().err
    assert "name a folder with config.json" in said and set(re.findall(r"--[a-z_-]+", said)) <= flags
