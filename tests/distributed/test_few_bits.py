"""Runs that round weights, on one process, under DDP and FSDP2; resumed, and loaded by plain ``from_pretrained``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from hf_pdecay import round_activations

from .layout_run import data
from .test_layouts import LAYOUTS, Run, run_in


pytestmark = pytest.mark.distributed

BITS = {"weight_bits": 4, "activation_bits": 8, "target_sparsity": 0.6, "max_steps": 60}


def _loss_of(folder: Path) -> float:
    model = round_activations(LlamaForCausalLM.from_pretrained(folder).eval())
    rows = torch.tensor(data().select(range(64))["input_ids"])
    with torch.no_grad():
        losses = [float(model(input_ids=part, labels=part).loss) for part in rows.split(8)]
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("few_bits")
    found = {}
    for layout in LAYOUTS[:3]:
        found[layout.engine] = folder = base / layout.engine
        resume = str(folder / "whole" / "checkpoint-40")
        saved = {"save_strategy": "steps", "save_steps": 40}
        run_in(folder, layout, {"name": "whole", **BITS, **saved}, {"name": "resumed", **BITS, "resume": resume})
    return found


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2"])
def test_what_is_saved_is_rounded_and_was_evaluated(engine: str, folders: dict[str, Path]) -> None:
    run, alone = Run(folders[engine] / "whole"), Run(folders["single"] / "whole")
    run.check()
    assert run.counted == pytest.approx(0.6, abs=1e-3)
    assert run.found["eval_loss"] == pytest.approx(_loss_of(run.folder), abs=1e-5)
    assert run.found["eval_loss"] == pytest.approx(alone.found["eval_loss"], abs=0.02)
    for name, weight in run.weights.items():
        if "proj" in name:
            assert max(len(row.unique()) for row in weight) <= 15  # of one block
    assert json.loads((run.folder / "sparsity.json").read_text())["sparsity"] == run.counted


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2"])
def test_a_resumed_run_ends_bit_identical(engine: str, folders: dict[str, Path]) -> None:
    whole, resumed = (load_file(folders[engine] / name / "model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
