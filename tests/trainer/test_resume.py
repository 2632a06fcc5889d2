"""Runs in processes of their own: killed and resumed, compiled, and on two processes."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_pdecay import SparsityReport

from ..faults.compare import same
from ..helpers.launching import LEAVING
from ..helpers.warm import python


ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def _run(*words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return python(*launcher, "-m", "tests.helpers.tiny_run", *words)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_run_resumes_to_the_very_same_weights(dtype: str, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = _run(str(whole), "--dtype", dtype)
    assert done.returncode == 0, done.stderr[-2000:]
    killed = _run(str(cut), "--dtype", dtype, "--kill_at", "13")
    assert killed.returncode == -signal.SIGKILL
    assert not (cut / "checkpoint-20").exists()
    resumed = _run(str(cut), "--dtype", dtype, "--resume", str(cut / "checkpoint-8"))
    assert resumed.returncode == 0, resumed.stderr[-2000:]

    left, right = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert 0 < sum(int((tensor == 0).sum()) for tensor in left.values())
    states = [torch.load(folder / "checkpoint-20" / "optimizer.pt", weights_only=True) for folder in (whole, cut)]
    assert same(*states)
    for name in ("sparsity.jsonl", "sparsity.json"):
        assert (whole / name).read_text() == (cut / name).read_text()
    assert [json.loads(line)["step"] for line in (cut / "sparsity.jsonl").read_text().splitlines()] == [
        *range(2, 21, 2)
    ]


def test_two_processes_write_one_report(tmp_path: Path) -> None:
    launcher = ("-m", "accelerate.commands.launch", "--main_process_port=0", "--multi_gpu", "--num_processes=2")
    done = _run(str(tmp_path / "out"), "--dtype", "bfloat16", launcher=(*launcher, *LEAVING))
    assert done.returncode == 0, done.stderr[-3000:]
    saved = load_file(tmp_path / "out" / "model.safetensors")
    report = SparsityReport.load(tmp_path / "out" / "sparsity.json")
    for tensor in report.tensors:
        assert tensor.zeros == int((saved[tensor.name] == 0).sum())
    assert 0 < report.sparsity < 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "sparsity.jsonl").read_text().splitlines()]
    assert steps == [*range(2, 21, 2)]
    assert done.stdout.count("Parameter groups") == 1


def test_torch_compile(tmp_path: Path) -> None:
    done = _run(str(tmp_path / "out"), "--torch_compile")
    assert done.returncode == 0, done.stderr[-2000:]
    saved = load_file(tmp_path / "out" / "model.safetensors")
    report = SparsityReport.load(tmp_path / "out" / "sparsity.json")
    assert {tensor.name for tensor in report.tensors} == set(saved)
    assert 0 < report.sparsity < 1
    assert len([tensor for tensor in report.tensors if tensor.decayed]) == 8
