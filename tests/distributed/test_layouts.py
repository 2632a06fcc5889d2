"""The same run in every layout: alone, DDP, FSDP2, ZeRO; its zeros counted again from disk; resumed, also elsewhere.

``make test-distributed`` runs these and prints their table. Every launch makes several runs, as imports take longest.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests.helpers.launching import launch


pytestmark = pytest.mark.distributed

TARGET = {"target_sparsity": 0.8, "gradient_accumulation_steps": 2}
RULES = {
    "target_sparsity": 0.7,
    "sparsity_budget": "tensor",
    "lp_rules": '{"mlp": {"target_sparsity": 0.9}, "q_proj": "off"}',
    "max_steps": 60,
}
ZEROED = "model.layers.1.self_attn.o_proj.weight"
FIXED = {"p_norm": 0.6, "lambda_p": 0.02, "weight_decay": 0.01, "max_steps": 60, "zeroed": ZEROED}


@dataclass(frozen=True)
class Layout:
    name: str
    engine: str
    processes: int

    @property
    def missing(self) -> bool:
        """Whether what it needs is not installed."""
        return self.engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None


LAYOUTS = [
    Layout("one process", "single", 1),
    Layout("DDP × 2", "ddp", 2),
    Layout("FSDP2 × 2", "fsdp2", 2),
    Layout("FSDP2 × 4", "fsdp2", 4),
    Layout("ZeRO-2 × 2", "zero2", 2),
    Layout("ZeRO-3 × 2", "zero3", 2),
]
ALONE = LAYOUTS[0]


def run_in(folder: Path, layout: Layout, *cases: dict[str, Any]) -> None:
    processes = None if layout.engine == "single" else layout.processes
    words = map(json.dumps, cases)
    launch("tests.distributed.layout_run", folder, layout.engine, *words, processes=processes, timeout=900)


class Run:
    """What a run left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found = json.loads((folder / "found.json").read_text())
        self.report = json.loads((folder / "sparsity.json").read_text())
        self.log = [json.loads(line) for line in (folder / "sparsity.jsonl").read_text().splitlines()]
        self.weights = load_file(folder / "model.safetensors")

    @property
    def counted(self) -> float:
        """Sparsity of the decayed weights, counted again from disk."""
        decayed = [self.weights[each["name"]] for each in self.report["tensors"] if each["decayed"]]
        return sum(int((each == 0).sum()) for each in decayed) / sum(each.numel() for each in decayed)

    def check(self) -> None:
        """Compare what was logged and reported with the file, tensor by tensor."""
        assert self.report["tensors"]
        for each in self.report["tensors"]:
            saved = self.weights[each["name"]]
            assert list(saved.shape) == each["shape"]
            assert int((saved == 0).sum()) == each["zeros"], each["name"]
            assert each["norm"] == pytest.approx(float(saved.double().norm()), rel=1e-5)
        assert self.log[-1]["sparsity"] == self.report["sparsity"] == self.counted
        for name, sparsity in self.log[-1]["layers"].items():
            assert sparsity == float((self.weights[name] == 0).double().mean())


SGD = {
    "optim": "sgd_lp",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.3,
    "target_sparsity": 0.8,
    "max_steps": 60,
}
NAN = {"target_sparsity": 0.8, "max_steps": 60, "nan_at": 10}

CASES = ("target", "resumed", "rules", "fixed", "sgd", "nan")

Runs = dict[str, dict[str, Run]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The runs of each layout, by the layout's name and the case's."""
    base = tmp_path_factory.mktemp("layouts")
    found: Runs = {}
    for number, layout in enumerate(each for each in LAYOUTS if not each.missing):
        folder = base / str(number)
        saved = {"save_strategy": "steps", "save_steps": 50}
        resumed = {"resume": str(folder / "target" / "checkpoint-50")}
        run_in(
            folder,
            layout,
            {"name": "target", **TARGET, **saved},
            {"name": "resumed", **TARGET, **resumed},
            {"name": "rules", **RULES},
            {"name": "fixed", **FIXED},
            {"name": "sgd", **SGD},
            {"name": "nan", **NAN},
        )
        found[layout.name] = {name: Run(folder / name) for name in CASES}
    return found


def each_layout(others: bool = False) -> pytest.MarkDecorator:
    chosen = LAYOUTS[1:] if others else LAYOUTS
    params = [
        pytest.param(each, id=each.name, marks=pytest.mark.skipif(each.missing, reason="DeepSpeed is not installed"))
        for each in chosen
    ]
    return pytest.mark.parametrize("layout", params)


@each_layout()
@pytest.mark.parametrize("case", CASES)
def test_what_is_logged_is_what_is_saved(layout: Layout, case: str, runs: Runs) -> None:
    runs[layout.name][case].check()


@each_layout(others=True)
@pytest.mark.parametrize(("case", "zeros"), [("target", 5e-4), ("rules", 5e-4), ("fixed", 5e-3), ("sgd", 5e-4)])
def test_layouts_agree(layout: Layout, case: str, zeros: float, runs: Runs) -> None:
    alone, run = runs[ALONE.name][case], runs[layout.name][case]
    assert run.counted == pytest.approx(alone.counted, abs=zeros)
    assert run.found["eval_loss"] == pytest.approx(alone.found["eval_loss"], abs=1e-3)
    assert [line["step"] for line in run.log] == [line["step"] for line in alone.log]


@each_layout()
def test_targets_are_met(layout: Layout, runs: Runs) -> None:
    of = runs[layout.name]
    assert of["target"].counted == pytest.approx(0.8, abs=1e-3)
    for each in of["rules"].report["tensors"]:
        if "mlp" in each["name"]:
            assert each["zeros"] / (each["shape"][0] * each["shape"][1]) == pytest.approx(0.9, abs=1e-3)
        elif "q_proj" in each["name"]:
            assert not each["decayed"] and each["zeros"] == 0
    assert of["rules"].counted == pytest.approx(0.7, abs=1e-3)


@each_layout()
def test_what_begins_as_zeros_learns(layout: Layout, runs: Runs) -> None:
    alone, run = runs[ALONE.name]["fixed"].weights[ZEROED], runs[layout.name]["fixed"].weights[ZEROED]
    assert int((alone != 0).sum()) > 0
    assert int((run != 0).sum()) > 0


@each_layout()
def test_a_step_with_nan_on_one_process_harms_none(layout: Layout, runs: Runs) -> None:
    run = runs[layout.name]["nan"]
    assert all(each.isfinite().all() for each in run.weights.values())
    assert run.counted == pytest.approx(0.8, abs=1e-3)
    assert run.found["eval_loss"] == pytest.approx(runs[ALONE.name]["nan"].found["eval_loss"], abs=0.05)


def test_tensor_parallel(runs: Runs, tmp_path: Path) -> None:
    run_in(tmp_path, Layout("TP × 2", "tp", 2), {"name": "target", **TARGET}, {"name": "rules", **RULES})
    for name in ("target", "rules"):
        alone, run = runs[ALONE.name][name], Run(tmp_path / name)
        run.check()
        assert "DTensor" in run.found["kinds"]
        assert run.counted == pytest.approx(alone.counted, abs=5e-4)
        assert run.found["eval_loss"] == pytest.approx(alone.found["eval_loss"], abs=1e-3)


def test_ddp_from_a_pruned_model(runs: Runs, tmp_path: Path) -> None:
    case = {"name": "pruned", "target_sparsity": 0.5, "one_shot": "fisher", "max_steps": 60}
    run_in(tmp_path, LAYOUTS[1], case)
    run = Run(tmp_path / "pruned")
    run.check()
    assert run.counted == pytest.approx(0.5, abs=1e-4)
    assert len(set(run.found["sums"])) == 1 < len(run.found["sums"])
    assert run.found["eval_loss"] < runs[ALONE.name]["target"].found["eval_loss"] + 0.3


def test_sharded_runs_do_not_begin_from_a_pruned_model(tmp_path: Path) -> None:
    case = {"name": "pruned", "target_sparsity": 0.5, "one_shot": "fisher", "max_steps": 60}
    with pytest.raises(AssertionError, match="under FSDP, which shards the model; prune it first"):
        run_in(tmp_path, LAYOUTS[2], case)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_deepspeed_in_bfloat16(engine: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    layout = Layout(engine, engine, 2)
    resumed = {"resume": str(tmp_path / "target" / "checkpoint-50")}
    run_in(
        tmp_path,
        layout,
        {"name": "target", **TARGET, "bf16": True, "save_strategy": "steps", "save_steps": 50},
        {"name": "resumed", **TARGET, "bf16": True, **resumed},
        {"name": "nan", **NAN, "bf16": True},
    )
    found = {name: Run(tmp_path / name) for name in ("target", "resumed", "nan")}
    for run in found.values():
        run.check()
        assert run.counted == pytest.approx(0.8, abs=1e-3)
        assert all(each.isfinite().all() for each in run.weights.values())
    assert found["target"].found["eval_loss"] < 1
    for name, each in found["target"].weights.items():
        assert (each == found["resumed"].weights[name]).all()


@pytest.mark.parametrize(
    ("begun", "ended", "complaint"),
    [
        ("FSDP2 × 2", "one process", "was written under FSDP, and this run is on one process or DDP"),
        ("one process", "FSDP2 × 2", "was written on one process or DDP, and this run is under FSDP"),
        ("ZeRO-2 × 2", "DDP × 2", "was written under DeepSpeed, and this run is on one process or DDP"),
    ],
)
def test_checkpoints_of_another_engine_are_refused(
    begun: str, ended: str, complaint: str, runs: Runs, tmp_path: Path
) -> None:
    if begun not in runs:
        pytest.skip("DeepSpeed is not installed")
    layout = next(each for each in LAYOUTS if each.name == ended)
    case = {"name": "moved", **TARGET, "resume": str(runs[begun]["target"].folder / "checkpoint-50")}
    with pytest.raises(AssertionError, match=complaint):
        run_in(tmp_path, layout, case)


def test_settings_that_differ_between_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"p_norm=0\.8 in process 0 and 0\.5 in process 1"):
        run_in(tmp_path, LAYOUTS[1], {"name": "mixed", **TARGET, "differing": {"p_norm": 0.5}})


def test_deepspeed_does_not_divide_anew(runs: Runs, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    case = {"name": "moved", **TARGET, "resume": str(runs["ZeRO-2 × 2"]["target"].folder / "checkpoint-50")}
    with pytest.raises(AssertionError, match="written by 2 processes, and DeepSpeed cannot divide it anew among 1"):
        run_in(tmp_path, Layout("ZeRO-2 × 1", "zero2", 1), case)


@each_layout()
def test_a_resumed_run_is_the_very_same(layout: Layout, runs: Runs) -> None:
    whole, resumed = runs[layout.name]["target"], runs[layout.name]["resumed"]
    assert whole.weights.keys() == resumed.weights.keys()
    assert all((whole.weights[name] == resumed.weights[name]).all() for name in whole.weights)
    assert resumed.log == whole.log[5:]


@pytest.mark.parametrize(
    ("begun", "ended"),
    [("one process", "DDP × 2"), ("DDP × 2", "one process"), ("FSDP2 × 2", "FSDP2 × 4"), ("FSDP2 × 4", "FSDP2 × 2")],
)
def test_resumed_in_another_layout(begun: str, ended: str, runs: Runs, tmp_path: Path) -> None:
    whole = runs[begun]["target"]
    layout = next(each for each in LAYOUTS if each.name == ended)
    run_in(tmp_path, layout, {"name": "moved", **TARGET, "resume": str(whole.folder / "checkpoint-50")})
    moved = Run(tmp_path / "moved")
    moved.check()
    assert moved.counted == pytest.approx(whole.counted, abs=5e-4)
    assert moved.found["eval_loss"] == pytest.approx(whole.found["eval_loss"], abs=1e-3)
    assert [line["step"] for line in moved.log] == [60, 70, 80, 90, 100]


def test_table(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """Print what the README of the project promises: the same loss and the same zeros whatever the layout."""
    lines = [f"{'layout':12} {'loss':>8} {'logged':>9} {'on disk':>9}"]
    for name, of in runs.items():
        run = of["target"]
        with safe_open(run.folder / "model.safetensors", framework="pt") as file:
            assert set(file.keys()) == set(run.weights)
        lines.append(f"{name:12} {run.found['eval_loss']:8.5f} {run.log[-1]['sparsity']:9.4%} {run.counted:9.4%}")
    assert len(lines) > 4
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
