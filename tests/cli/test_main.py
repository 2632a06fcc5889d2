"""The command line, as a function and as a process."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_pdecay
from hf_pdecay import AdamWLp, __version__
from hf_pdecay.cli.main import build_parser, main

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


@pytest.mark.parametrize("words", [["pipeline"], ["--gpus"], ["estimate", "--gpus", "many"]])
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


def _commands() -> dict[str, argparse.ArgumentParser]:
    parser = build_parser()
    return next(dict(action.choices) for action in parser._actions if isinstance(action.choices, dict))


def test_alone_it_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("usage: hf-pdecay") and not printed.err
    assert all(command in printed.out for command in _commands())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reprot", "x"], "did you mean report?"),
        (["compres"], "did you mean compress?"),
        (["pipeline"], "choose from run, preview"),
        (["estimate", "--parameters", "8e9", "--layuot", "ddp"], "did you mean --layout?"),
        (["preview", "x", "--target_sparisty=0.9"], "did you mean --target_sparsity?"),
        (["run", "--target_sparisty", "0.9", "x.py"], "arguments come after its name"),
        (["--versoin"], "did you mean --version?"),
    ],
)
def test_what_was_meant(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", list(_commands()))
def test_help_texts(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parser = _commands()[command]
    text = parser.format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert all(action.help for action in parser._actions)
    description, example = (" ".join(part.split()) for part in (str(parser.description), str(parser.epilog)))
    assert description in " ".join(text.split())
    first, second = str(parser.epilog).splitlines()
    assert f"{first}\n{second}\n" in text and example.startswith(f"example: hf-pdecay {command}")
    build_parser().parse_args(second.split()[1:])  # its flags exist


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_pdecay.cli.report.report", interrupt)
    assert main(["report", "x"]) == 130
    assert capsys.readouterr().err == "hf-pdecay: interrupted\n"


@pytest.mark.parametrize("words", ["estimate --parameters 8e9", "estimate --parameters 8e9 --json", "--help", ""])
def test_a_reader_that_has_enough(words: str) -> None:
    code = (
        "import os, sys; from hf_pdecay.cli.main import main\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1); sys.exit(main(sys.argv[1:]))"
    )
    done = python("-c", code, *words.split())
    assert done.returncode in (0, 1) and not done.stderr  # argparse passes over it if nothing is buffered


def test_json_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a library prints while a command works."""
    model = tiny_gpt2()
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight[:, :8] = 0
            block.mlp.c_fc.bias[:8] = 0
    model.save_pretrained(tmp_path / "model")
    line = {"trial": "run-0", "loss": 1.0, "sparsity": 0.5, "params": {"p_norm": 0.8}}
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search.jsonl").write_text(json.dumps(line) + "\n")
    for words, module, name in (
        (["compress", "model", "packed"], "hf_pdecay.storage.writer", "compress"),
        (["decompress", "packed", "plain"], "hf_pdecay.storage.reader", "decompress"),
        (["shrink", "model", "smaller"], "hf_pdecay.shrinking.folder", "shrink_folder"),
        (["report", "model"], "hf_pdecay.cli.report", "report"),
        (["report", "search"], "hf_pdecay.cli.report", "report"),
        (["env"], "hf_pdecay.cli.env", "describe"),
    ):
        stock = getattr(importlib.import_module(module), name)

        def noisy(*args: Any, stock: Any = stock, **kwargs: Any) -> Any:
            sys.stdout.write("Setting accelerator to CPU\n")
            return stock(*args, **kwargs)

        monkeypatch.setattr(f"{module}.{name}", noisy)
        folders = [str(tmp_path / word) for word in words[1:]]
        capsys.readouterr()
        assert main([words[0], *folders, "--json"]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out), words
        assert "Setting accelerator" in printed.err
