"""The command line, as a function and as a process."""

from __future__ import annotations

import json
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_pdecay
from hf_pdecay import AdamWLp, __version__
from hf_pdecay.cli.main import main

from ..helpers.models import tiny_gpt2
from ..helpers.warm import python


@pytest.fixture
def folder(tmp_path: Path) -> str:
    model = tiny_gpt2()
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_folder_as_json(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", folder, "--json", "--gpus", "4", "--max_steps", "200"]) == 0
    result = json.loads(capsys.readouterr().out)
    parameters = sum(param.numel() for param in tiny_gpt2().parameters())
    assert (result["parameters"], result["gpus"], result["max_steps"]) == (parameters, 4, 200)
    assert list(result["layouts"]) == ["single", "ddp", "fsdp2", "zero2", "zero3"]
    assert result["layouts"]["single"]["memory"]["total"] == 16 * parameters
    assert result["layouts"]["single"]["gpus"] == 1
    assert result["layouts"]["zero3"]["added"]["pruning"]["all_reduces"] == 7


def test_a_number_of_parameters_as_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["estimate", "--parameters", "8e9", "--layout", "fsdp2"]) == 0
    out = capsys.readouterr().out
    assert "8,000,000,000" in out and "assumed" in out
    row = next(line for line in out.splitlines() if "fsdp2" in line and "14.90" in line)
    assert row.split("│")[2].strip() == "8"
    assert "zero3 " not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layout", "pipeline", "--parameters", "1e6"], "layout='pipeline'"),
        (["--gpus", "0", "--parameters", "1e6"], "gpus=0"),
        (["--moments", "8bit", "--layout", "fsdp2", "--parameters", "1e6"], "moments='8bit' under layout='fsdp2'"),
        (["--parameters", "-1"], "parameters=-1"),
        (["--parameters", "nan"], "parameters=nan"),
        ([], "one of the two"),
        (["somewhere", "--parameters", "1e6"], "one of the two"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *words]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and not printed.out
    assert printed.err.startswith("hf-pdecay estimate: ") and printed.err.count("\n") == 1


def test_a_folder_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(tmp_path)]) == 2
    assert repr(str(tmp_path)) in capsys.readouterr().err


def test_a_config_that_is_no_causal_lm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert main(["estimate", str(tmp_path)]) == 2
    assert "'vit'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"n_head": 0}, "ZeroDivisionError"),
        ({"n_head": 7}, "divisible by num_heads"),
        ({"n_head": "x"}, "n_head" if metadata.version("transformers") >= "5" else "TypeError"),  # 4 checks no types
        ({"activation_function": "none such"}, "none such"),
        ({"vocab_size": -3}, "negative dimension"),
        ({"model_type": "bert"}, "AttributeError"),
        ({"architectures": [3]}, "architectures=[3]"),
    ],
)
def test_a_config_that_is_wrong(
    config: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **config}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert main(["estimate", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and "Invalid model" in printed.err and not printed.out


def test_what_the_system_refuses_is_said_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "pareto.png")

    monkeypatch.setattr("hf_pdecay.cli.report.report", refuse)
    assert main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "hf-pdecay report: [Errno 13] Permission denied: 'pareto.png'\n"


@pytest.mark.parametrize("words", [[], ["pipeline"], ["estimate", "--gpus", "many"]])
def test_what_argparse_refuses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert hf_pdecay.__version__ in capsys.readouterr().out


@pytest.mark.slow
def test_processes(folder: str) -> None:
    command = ["-m", "hf_pdecay", "estimate"]
    good = python(*command, folder, "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["decayed"] > 0
    bad = python(*command, folder, "--gpus", "-3")
    assert bad.returncode == 2
    assert "gpus=-3" in bad.stderr and "Traceback" not in bad.stderr


def test_env_says_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object) -> None:
        raise AssertionError("env asked a network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    assert main(["env"]) == 0
    said = dict(line.removeprefix("- ").split(": ", 1) for line in capsys.readouterr().out.splitlines())
    for name in ("torch", "transformers", "accelerate", "datasets", "safetensors"):
        assert said[name] == metadata.version(name)
    assert said["hf-pdecay"] == __version__ and said["python"] == platform.python_version()
    assert {"peft", "trl", "deepspeed", "torchao", "triton", "bitsandbytes", "platform"} <= said.keys()
    assert f"{torch.get_num_threads()} threads" in said["devices"]
    optimizer = AdamWLp([torch.nn.Parameter(torch.ones(1 << 16))])
    assert said["backend auto on cpu"] == "{}, as {}".format(*optimizer.backends["cpu"])
    compiler = said["C++ compiler"].partition(" (")[0]
    assert compiler == "none found" or shutil.which(compiler)


def test_env_without_a_compiler_and_packages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none(*args: object) -> str:
        raise InvalidCxxCompiler

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    monkeypatch.setattr(metadata, "version", missing)
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert "- C++ compiler: none found\n" in said and "- trl: not installed\n" in said
