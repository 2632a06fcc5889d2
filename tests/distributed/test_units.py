"""Neurons, heads, rows and blocks that decay as one while FSDP2 and tensor parallelism divide their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .test_layouts import Layout, Run, run_in


pytestmark = pytest.mark.distributed

NEURONS_AND_HEADS = {
    "lp_rules": '{"mlp": {"group": "neuron"}, "attn": {"group": "head"}}',
    "target_sparsity": 0.5,
    "max_steps": 60,
}
ROWS_AND_BLOCKS = {
    "lp_rules": '{"(gate|up)_proj": {"group": "2:4"}, "o_proj": {"group": "row", "target_sparsity": 0.25}}',
    "max_steps": 60,
}
FIXED = {"lp_rules": '{"mlp": {"group": "neuron"}}', "lambda_p": 0.05, "max_steps": 60}
CASES = ("neurons and heads", "resumed", "rows and blocks", "fixed")
ALONE = Layout("one process", "single", 1)
LAYOUTS = [Layout("FSDP2 × 2", "fsdp2", 2), Layout("FSDP2 × 4", "fsdp2", 4), Layout("TP × 2", "tp", 2)]


def train(folder: Path, layout: Layout) -> dict[str, Run]:
    saved = {"save_strategy": "steps", "save_steps": 30} if layout.engine != "tp" else {}
    cases = [
        {"name": "neurons and heads", **NEURONS_AND_HEADS, **saved},
        {"name": "rows and blocks", **ROWS_AND_BLOCKS},
        {"name": "fixed", **FIXED},
    ]
    if saved:
        resume = str(folder / "neurons and heads" / "checkpoint-30")
        cases.insert(1, {"name": "resumed", **NEURONS_AND_HEADS, "resume": resume})
    run_in(folder, layout, *cases)
    return {str(each["name"]): Run(folder / str(each["name"])) for each in cases}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return train(tmp_path_factory.mktemp("alone"), ALONE)


def dead(run: Run) -> dict[str, torch.Tensor]:
    """Dead neurons and heads of each layer, counted in the file."""
    found = {}
    for layer in range(3):
        path = f"model.layers.{layer}."
        mlp, attention = (
            {k: v for k, v in run.weights.items() if k.startswith(path + p)} for p in ("mlp", "self_attn")
        )
        gate, up, down = (mlp[f"{path}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        found[f"{layer} neurons"] = (gate == 0).all(1) & (up == 0).all(1) & (down == 0).all(0)
        q, k, v, o = (attention[f"{path}self_attn.{name}_proj.weight"] for name in "qkvo")
        heads = [(each == 0).view(2, -1, 48).flatten(1).all(1) for each in (q, k, v)]
        found[f"{layer} heads"] = heads[0] & heads[1] & heads[2] & (o == 0).T.reshape(2, -1).all(1)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: each.name)
def test_groups_die_as_on_one_process(layout: Layout, alone: dict[str, Run], tmp_path: Path) -> None:
    runs = train(tmp_path, layout)
    for name, run in runs.items():
        run.check()
        assert "DTensor" in run.found["kinds"]
        assert run.found["eval_loss"] == pytest.approx(alone[name].found["eval_loss"], abs=1e-3)
        assert run.report["units"] == alone[name].report["units"]
        assert run.log[-1]["units"] == alone[name].log[-1]["units"]
    of = dead(runs["neurons and heads"])
    for name, expected in dead(alone["neurons and heads"]).items():
        assert torch.equal(of[name], expected), name
    assert sum(int(each.sum()) for name, each in of.items() if "neurons" in name) == 150
    assert sum(int(each.sum()) for name, each in of.items() if "heads" in name) == 3
    blocks = runs["rows and blocks"].weights
    for name, weights in blocks.items():
        if "gate_proj" in name or "up_proj" in name:
            assert int((weights.view(len(weights), -1, 4) != 0).sum(-1).max()) <= 2
    assert sum(int((each == 0).all(1).sum()) for name, each in blocks.items() if "o_proj" in name) == 36
    if "resumed" in runs:
        whole, resumed = runs["neurons and heads"].weights, runs["resumed"].weights
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
