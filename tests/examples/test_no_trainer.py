"""examples/no_trainer.py: a bare Accelerate loop, alone, on two processes, stopped and resumed."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_pdecay import AdamWLp
from hf_pdecay.target.control import SparsityControl

from ..helpers.launching import LEAVING
from ..helpers.warm import python


ROOT = Path(__file__).parents[2]
# Port 0 is any that is free: tests run beside one another.
ACCELERATE = ("-m", "accelerate.commands.launch", "--main_process_port=0")
CPU_DDP = (*ACCELERATE, "--config_file", "examples/accelerate_configs/cpu_ddp.yaml", *LEAVING)
STEPS = 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    text = "".join(f"{n} squared is {n * n}.\n" for n in range(400))
    (folder / "text.txt").write_text(text)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 256, "attn_pdrop": 0.0}
    config = {"model_type": "gpt2", **shape, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    return [f"--train_file={folder}/text.txt", f"--config_name={folder}"]


def run(
    inputs: list[str], out: Path, *options: str, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [*launcher, "examples/no_trainer.py", *inputs, f"--output_dir={out}", "--cpu=true"]
    command += [
        f"--max_steps={STEPS}",
        "--batch_size=8",
        "--logging_steps=5",
        "--warmup_steps=2",
        "--learning_rate=0.01",
    ]
    return python(*command, *options)


def log_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, float]]:
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step"')]


def zeros(folder: Path) -> float:
    saved = load_file(folder / "model.safetensors")
    matrices = [matrix for name, matrix in saved.items() if name.endswith(("attn.weight", "proj.weight", "fc.weight"))]
    return sum(int((matrix == 0).sum()) for matrix in matrices) / sum(matrix.numel() for matrix in matrices)


@pytest.mark.slow
def test_one_process_and_two_make_the_same_model_stopped_or_not(inputs: list[str], tmp_path: Path) -> None:
    asked = ("--target_sparsity=0.8", "--gradient_accumulation_steps=2", "--save_steps=10")
    alone = log_of(run(inputs, tmp_path / "alone", *asked))
    both = log_of(run(inputs, tmp_path / "both", *asked, launcher=CPU_DDP))
    assert [line["step"] for line in alone] == [line["step"] for line in both] == [5, 10, 15, 20, 20]
    for one, two in zip(alone, both, strict=True):
        for name in one.keys() - {"loss"}:  # it is that of a micro-batch, which two processes divide differently
            assert two[name] == pytest.approx(one[name], rel=1e-3), name
    for name, log in (("alone", alone), ("both", both)):
        assert zeros(tmp_path / name) == pytest.approx(0.8, abs=1e-3)
        assert log[-2]["sparsity"] == zeros(tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "both").eval()
    text = (Path(inputs[0].split("=")[1])).read_bytes()
    held_out = torch.tensor(list(text[int(len(text) * 0.9) :]))
    blocks = held_out[: len(held_out) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        scores = model(blocks).logits[:, :-1].double().log_softmax(-1)
    loss = -scores.gather(-1, blocks[:, 1:, None]).mean()
    assert both[-1]["eval_loss"] == pytest.approx(float(loss), rel=1e-5)

    for name, begun, launcher in (
        ("again", "alone", ()),
        ("both again", "both", CPU_DDP),
        ("fewer", "both", ()),
        ("more", "alone", CPU_DDP),
    ):
        checkpoint = f"--resume_from_checkpoint={tmp_path / begun / 'step-10'}"
        log = log_of(run(inputs, tmp_path / name, *asked, checkpoint, launcher=launcher))
        assert [line["step"] for line in log] == [15, 20, 20]
        assert zeros(tmp_path / name) == pytest.approx(0.8, abs=1e-3)
        assert log[-1]["eval_loss"] == pytest.approx(alone[-1]["eval_loss"], rel=1e-3)
        if name.endswith("again"):
            whole, resumed = (load_file(tmp_path / folder / "model.safetensors") for folder in (begun, name))
            assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--batch_size=9", "--gradient_accumulation_steps=2"], "--batch_size 9 must be a multiple of 2"),
        (["--target_sparsity=1.5"], "target_sparsity=1.5; it must be at least 0 and below 1"),
        (["--resume_from_checkpoint=nowhere"], "'nowhere' is not a checkpoint"),
        (["--max_steps=0"], "--max_steps 0 must be at least 1"),
    ],
)
def test_complaints(inputs: list[str], options: list[str], complaint: str, tmp_path: Path) -> None:
    done = run(inputs, tmp_path / "out", *options)
    assert done.returncode == 2
    assert complaint in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("when", ["prepared", "loaded", "loaded from a run without", "wrapped"])
def test_control_follows_the_optimizer_to_new_param_groups(when: str) -> None:
    """Accelerator.prepare and load_state_dict replace the groups; a control that held the old ones would do nothing."""
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(20, 20)
    optimizer = AdamWLp([{"params": [model.weight], "decayed": True}], lr=0.01)  # type: ignore[list-item]
    before = optimizer.param_groups
    without = copy.deepcopy(optimizer.state_dict())
    accelerator = Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model, optimizer) if when == "wrapped" else (model, optimizer)
    control = SparsityControl(prepared, STEPS, target_sparsity=0.75, p_norm_begin=1.5)
    if when == "prepared":
        model, prepared = accelerator.prepare(model, optimizer)
    elif when == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    elif when == "loaded from a run without":
        optimizer.load_state_dict(without)
    assert optimizer.param_groups is not before
    for step in range(1, STEPS + 1):
        prepared.zero_grad()
        model(torch.ones(1, 20)).square().sum().backward()
        control.before_step(step)
        prepared.step()
        control.after_step(step)
    assert int((model.weight == 0).sum()) == 300
    assert optimizer.param_groups[0]["asked_sparsity"] == 0.75
    assert optimizer.param_groups[0]["p_norm"] == optimizer.param_groups[0]["p_norm_end"]
