"""The arithmetic of `hf-pdecay estimate` beside models, optimizers, shards and messages that are real."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_pdecay import AdamWLp, measure_sparsity
from hf_pdecay.cli import training_estimate as est
from hf_pdecay.cli.model_size import ModelSize, TensorSize, from_parameters, from_pretrained, of_model
from hf_pdecay.cli.training_estimate import Setup, added_by, estimate, memory_of
from hf_pdecay.optim.shards import Ranked
from hf_pdecay.rules.assign import build_param_groups
from hf_pdecay.target import cost
from hf_pdecay.target import ranking as selection
from hf_pdecay.target.control import SparsityControl
from hf_pdecay.target.ranking import Ranking, prune_least

from ..helpers.launching import launch
from ..helpers.models import ARCHITECTURES, build, tiny_gpt2


ROOT = Path(__file__).parents[2]


def nbytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e-3)
    optimizer.step()
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer, *names: str) -> int:
    return sum(nbytes(state[name]) for state in optimizer.state.values() for name in names)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_folder_gives_the_sizes_of_the_real_model(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    size = from_pretrained(str(tmp_path))
    assert size.parameters == sum(param.numel() for param in model.parameters())
    assert size.decayed_parameters == measure_sparsity(model).decayed.parameters
    assert len(size.tensors) == len(list(model.parameters()))


def test_without_architectures_it_is_a_causal_lm(tmp_path: Path) -> None:
    model = tiny_gpt2()
    values = {key: value for key, value in model.config.to_dict().items() if key != "architectures"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    sizes = [from_pretrained(str(path)) for path in (tmp_path, tmp_path / "config.json")]
    assert [size.parameters for size in sizes] == [model.num_parameters()] * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moments", [None, "float32", "bfloat16"])
def test_memory_of_one_process_is_that_of_a_real_step(dtype: str, moments: str | None) -> None:
    model = tiny_gpt2().to(getattr(torch, dtype))
    ours = stepped(model, AdamWLp(build_param_groups(model, p_norm=0.8, lambda_p=0.1), lr=1e-3, moments=moments))
    result = memory_of(of_model(model), "single", Setup(dtype=dtype, moments=moments))
    assert result.weights == sum(map(nbytes, model.parameters()))
    assert result.gradients == sum(nbytes(param.grad) for param in model.parameters())
    assert result.moments == state_bytes(ours, "exp_avg", "exp_avg_sq")
    assert (result.master, result.buckets) == (0, 0)
    assert result.total == result.weights + result.gradients + result.moments


def test_nothing_stays_that_adamw_does_not_keep() -> None:
    model = tiny_gpt2()
    theirs = stepped(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    names = ("step", "exp_avg", "exp_avg_sq")
    expected = state_bytes(theirs, *names)
    ours = stepped(model, AdamWLp(build_param_groups(model, p_norm=0.8, lambda_p=0.1), lr=1e-3))
    assert state_bytes(ours, *names) == expected
    # But for a byte for each tensor.
    others = {key for state in ours.state.values() for key in state} - set(names)
    assert others == {"dormant"}
    assert all(nbytes(state["dormant"]) == 1 for state in ours.state.values())


def test_8bit_moments_are_as_torchao_stores_them() -> None:
    pytest.importorskip("torchao")
    model = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 43, bias=False), nn.Linear(43, 7))
    ours = stepped(model, AdamWLp(model.parameters(), lr=1e-3, moments="8bit"))
    result = memory_of(of_model(model), "single", Setup(moments="8bit"))
    assert result.moments == state_bytes(ours, "exp_avg", "exp_avg_sq")
    assert result.moments < 8 * sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize("gpus", [1, 2, 3, 7, 8])
def test_fsdp2_holds_rows_and_zero3_holds_pieces(gpus: int) -> None:
    shapes = [(10, 7), (3, 5, 2), (13,), (1, 129), ()]
    size = ModelSize("made", [TensorSize(shape, True) for shape in shapes])
    # torch's own way to part rows; the first process has the first chunk.
    rows = sum(torch.empty(shape or (1,)).chunk(gpus)[0].numel() for shape in shapes)
    pieces = sum(math.ceil(math.prod(shape) / gpus) for shape in shapes)
    setup = Setup(gpus=gpus)
    assert memory_of(size, "fsdp2", setup) == est.Memory(4 * rows, 4 * rows, 8 * rows, 0, 0)
    assert memory_of(size, "zero3", setup) == est.Memory(2 * pieces, 2 * pieces, 8 * pieces, 4 * pieces, 0)


@pytest.mark.parametrize(
    ("layout", "setup", "bytes_per_parameter"),
    [
        ("ddp", Setup(), (4, 4, 8, 0, 4)),
        ("ddp", Setup(dtype="bfloat16"), (2, 2, 4, 0, 2)),
        ("fsdp2", Setup(dtype="bfloat16"), (0.5, 0.5, 1, 0, 0)),
        ("fsdp2", Setup(dtype="bfloat16", mixed_precision="no"), (0.25, 0.25, 0.5, 0, 0)),
        ("fsdp2", Setup(moments="bfloat16"), (0.5, 0.5, 0.5, 0, 0)),
        ("zero2", Setup(), (2, 0.25, 1, 0.5, 0)),
        ("zero2", Setup(mixed_precision="no"), (4, 0.5, 1, 0.5, 0)),
        ("zero3", Setup(mixed_precision="no"), (0.5, 0.5, 1, 0, 0)),
        ("zero3", Setup(moments="bfloat16"), (0.25, 0.25, 0.5, 0.5, 0)),
    ],
)
def test_bytes_per_parameter(layout: str, setup: Setup, bytes_per_parameter: tuple[float, ...]) -> None:
    size = from_parameters(3 * 300 * 8)
    result = memory_of(size, layout, setup)
    parts = (result.weights, result.gradients, result.moments, result.master, result.buckets)
    assert [value / size.parameters for value in parts] == list(bytes_per_parameter)


def test_all_layouts_leave_out_what_cannot_be() -> None:
    result = estimate(from_parameters(1000), Setup(moments="8bit"))
    assert list(result.memory) == ["single", "ddp"] == list(result.added)
    assert list(result.left_out) == ["fsdp2", "zero2", "zero3"]
    json.dumps(result.to_dict())


def test_whole_tensors_need_no_communication() -> None:
    for layout in ("single", "ddp"):
        added = added_by(from_parameters(1e9), layout, 8)
        parts = added.step, added.pruning, added.ties, added.lambda_p, added.log
        assert [traffic.all_reduces for traffic in parts] == [0] * 5


@pytest.mark.parametrize("max_steps", [20, 100, 1000, 4321])
def test_cuts_are_those_of_a_run(max_steps: int) -> None:
    param = nn.Parameter(torch.ones(4))
    control = SparsityControl(AdamWLp([param], lambda_p=1.0), max_steps, target_sparsity=0.5)
    result = estimate(from_parameters(9), Setup(max_steps=max_steps))
    assert result.pruning_steps == sum(control.schedule.prunes(step) for step in range(max_steps + 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_temporaries_of_a_cut_are_bounded_as_stated(
    dtype: torch.dtype, fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from memory import PeakMemory

    monkeypatch.setattr(selection, "CPU_CHUNK", 1 << 14)
    monkeypatch.setattr(cost, "DEVICE_CHUNK", 1 << 14)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(1 << 19, generator=generator).to(dtype) for _ in range(4)]
    tensors = [Ranked(weight, torch.rand(weight.shape, generator=generator).to(dtype)) for weight in weights]
    with PeakMemory() as memory:
        prune_least(tensors, Ranking(tensors).least(round(fraction * (1 << 21))))
    size = ModelSize("made", [TensorSize(tuple(weight.shape), True) for weight in weights])
    # Beside what is stated for large models stands the sample, and a copy of it that is sorted with its places.
    stated = added_by(size, "single", 1).pruning_bytes + 6 * 4 * selection.SAMPLE
    assert stated / 20 < memory.peak <= stated


@pytest.mark.parametrize(
    ("build_it", "words"),
    [
        (lambda: Setup(gpus=0), "gpus=0"),
        (lambda: Setup(max_steps=0), "max_steps=0"),
        (lambda: Setup(mixed_precision="fp8"), "mixed_precision='fp8'"),
        (lambda: Setup(dtype="int8"), "dtype='int8'"),
        (lambda: Setup(moments="4bit"), "moments='4bit'"),
        (lambda: from_parameters(0), "parameters=0"),
        (lambda: from_parameters(math.inf), "parameters=inf"),
        (lambda: estimate(from_parameters(9), Setup(), "fsdp3"), "layout='fsdp3'"),
        (lambda: estimate(from_parameters(9), Setup(moments="8bit"), "zero2"), "moments='8bit' under"),
        (
            lambda: estimate(from_parameters(9), Setup(dtype="bfloat16", mixed_precision="no"), "zero3"),
            "dtype='bfloat16' without",
        ),
    ],
)
def test_what_is_wrong_is_named(build_it: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_it()


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes sent in a run under FSDP2."""
    folder = tmp_path_factory.mktemp("traffic")
    launch("tests.helpers.traffic_run", folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["few weights", "more than the sample has"])
def test_communication_is_that_of_real_processes(traffic: list[dict[str, Any]], case: str) -> None:
    for rank in traffic:
        result, said = rank[case]["found"], rank[case]["said"]
        expected = {
            key: [value["all_reduces"], value["bytes"]] for key, value in said.items() if isinstance(value, dict)
        }
        assert len(result["pruning"]) == rank[case]["pruning_steps"] > 3
        assert result["pruning"] == [expected["pruning"]] * len(result["pruning"])
        assert rank[case]["tied"] == [a + b for a, b in zip(expected["pruning"], expected["ties"], strict=True)]
        assert set(map(tuple, result["no pruning"])) == {(0, 0)}
        assert result["log"] == [expected["log"]] * len(result["log"])
        # The first step also looks which tensors are wholly zero; the bias of the norm is, until the second step.
        calls, sent = expected["step"]
        assert result["step"][1] == [calls + 1, sent + 4]
        assert result["step"][2:] == [expected["step"]] * (len(result["step"]) - 2)
        setting = {step: traffic for step, traffic in enumerate(result["lambda_p"], 1) if traffic[0]}
        # At the first step of the change and after cuts, but not once the last weights are chosen by cuts alone: the
        # change is from step 6 to 45 with cuts every 8 steps, and 99% of it has been made by the cut at step 37.
        # The zeros that are there before the first step are counted once.
        assert setting.pop(1)[0] == 1
        assert list(setting) == [7, 14, 22]
        assert list(setting.values()) == [expected["lambda_p"]] * len(setting)
