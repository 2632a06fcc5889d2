from __future__ import annotations

import json

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import nn

from hf_pdecay import SparsityReport, measure_sparsity
from hf_pdecay.files import write_text
from hf_pdecay.sparsity.counting import measure_with_extra
from hf_pdecay.sparsity.dead_units import count_units

from ..helpers.models import tiny_gpt2


def _sparsified(model: nn.Module, fraction: float = 0.6) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param[torch.rand(param.shape, generator=generator) < fraction] = 0
    return model


def test_counts_equal_those_from_the_saved_file(tmp_path: object) -> None:
    model = _sparsified(tiny_gpt2())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")  # type: ignore[operator]
    report = measure_sparsity(model)
    assert {each.name for each in report.tensors} == set(saved)
    for each in report.tensors:
        on_disk = saved[each.name]
        assert each.shape == on_disk.shape
        assert each.parameters == on_disk.size
        assert each.zeros == int((on_disk == 0).sum())
        assert each.norm == pytest.approx(float(numpy.linalg.norm(on_disk.astype("float64"))), rel=1e-5)
    assert report.model.parameters == sum(each.size for each in saved.values())
    assert report.model.zeros == sum(int((each == 0).sum()) for each in saved.values())
    matrices = [each for name, each in saved.items() if ".c_" in name and name.endswith("weight")]
    assert report.sparsity == sum(int((each == 0).sum()) for each in matrices) / sum(each.size for each in matrices)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1e-40, -1e-20, 9.9e-14, 1e-13, 1.1e-13, -0.5, 1e4]), min_size=1, max_size=40
    ),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_zeros_and_near_zeros_by_hand(values: list[float], dtype: torch.dtype) -> None:
    layer = nn.Linear(len(values), 1, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values], dtype=torch.float64))
    stored = layer.weight.detach().double().flatten().tolist()
    threshold = torch.tensor(1e-13, dtype=dtype).item()
    (counted,) = measure_sparsity(layer).tensors
    assert counted.zeros == sum(value == 0 for value in stored)
    assert counted.near_zeros == sum(0 < abs(value) < threshold for value in stored)


def test_shared_tensors_count_once() -> None:
    model = tiny_gpt2()
    assert measure_sparsity(model).model.parameters == sum(param.numel() for param in model.parameters())
    # Two parameters over one piece of memory, as after loading tied weights by hand.
    pair = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    pair[1].weight.data = pair[0].weight.data
    assert measure_sparsity(pair).model.parameters == 16


def test_odd_parameters() -> None:
    model = nn.ParameterDict(
        {
            "empty": nn.Parameter(torch.empty(0, 3)),
            "scalar": nn.Parameter(torch.tensor(0.0)),
            "packed": nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False),
            "strided": nn.Parameter(torch.tensor([[0.0, 1.0], [2.0, 0.0]]).t()),
        }
    )
    report = measure_sparsity(model, decayed=["empty", "scalar", "strided"])
    assert [(each.name, each.parameters, each.zeros) for each in report.tensors] == [
        ("empty", 0, 0),
        ("scalar", 1, 1),
        ("strided", 4, 2),
    ]
    assert report.sparsity == 3 / 5
    assert measure_sparsity(nn.Module()).sparsity == 0


def test_a_large_tensor_is_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_pdecay.sparsity.counting._CHUNK", 7)
    layer = nn.Linear(10, 10, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1e-20)
        layer.weight[:, 0] = 0
    (counted,) = measure_sparsity(layer).tensors
    assert (counted.zeros, counted.near_zeros) == (10, 90)


def test_named_tensors_are_the_decayed_ones() -> None:
    report = measure_sparsity(tiny_gpt2(), decayed=["transformer.wte.weight"])
    assert [each.name for each in report.tensors if each.decayed] == ["transformer.wte.weight"]
    assert report.decayed.parameters == 64 * 32


def test_blocks_add_up() -> None:
    report = measure_sparsity(_sparsified(tiny_gpt2()))
    blocks = report.by_block()
    assert list(blocks) == ["transformer.h.0", "transformer.h.1"]
    assert sum(block.zeros for block in blocks.values()) == report.decayed.zeros
    assert sum(block.parameters for block in blocks.values()) == report.decayed.parameters
    flat = measure_sparsity(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert list(flat.by_block()) == ["0", "1"]


def test_json_round_trip(tmp_path: object) -> None:
    report = measure_sparsity(_sparsified(tiny_gpt2()), near_zero_threshold=1e-3)
    assert SparsityReport.from_json(report.to_json()) == report
    path = tmp_path / "sub" / "sparsity.json"  # type: ignore[operator]
    report.save(path)
    assert SparsityReport.load(path) == report
    written = json.loads(path.read_text())
    assert written["sparsity"] == report.sparsity
    assert written["model"]["zeros"] == sum(tensor["zeros"] for tensor in written["tensors"])
    assert [file.name for file in path.parent.iterdir()] == ["sparsity.json"]
    with pytest.raises(ValueError, match="not a sparsity report"):
        SparsityReport.from_json("{}")
    for damaged in ("{}", report.to_json()[:100]):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"sub/sparsity\.json' cannot be read as a sparsity report \(.*[^.]\)\.$"):
            SparsityReport.load(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sparsity.json"  # type: ignore[operator]
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["sparsity.json"]


def test_pandas_frame() -> None:
    report = measure_sparsity(_sparsified(tiny_gpt2()))
    frame = report.to_pandas()
    assert len(frame) == len(report.tensors)
    chosen = frame[frame.decayed]
    assert chosen.zeros.sum() / chosen.parameters.sum() == pytest.approx(report.sparsity)


def test_prints_as_a_table() -> None:
    report = measure_sparsity(_sparsified(tiny_gpt2()))
    text = str(report)
    assert "transformer.h.0.mlp.c_fc.weight" in text
    assert f"{report.sparsity:.2%}" in text and f"{report.model_sparsity:.2%}" in text
    many = measure_sparsity(_sparsified(tiny_gpt2(n_layer=11)))
    assert "transformer.h.10 " in str(many) and "c_fc" not in str(many)


def test_extra_values_come_along() -> None:
    _, extra = measure_with_extra(nn.Linear(2, 2), extra=[torch.tensor(7), 3, torch.tensor(5)])
    assert extra == [7, 3, 5]


def test_counting_transfers_once() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Transfers(TorchDispatchMode):
        """Counts what would wait for a device: scalars read and copies to the host."""

        count = 0

        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            self.count += str(func) in ("aten._local_scalar_dense.default", "aten._to_copy.default") and (
                str(func) != "aten._to_copy.default" or (kwargs or {}).get("device") is not None
            )
            return func(*args, **(kwargs or {}))  # type: ignore[operator]

    model = tiny_gpt2()
    with Transfers() as transfers:
        measure_with_extra(model, extra=[torch.tensor(7)])
    # Tensor.tolist() reads the memory that one transfer brought, without an operator of its own.
    assert transfers.count == 0


def _with_bases(
    weights: dict[str, torch.Tensor], bases: dict[str, torch.Tensor], **group: object
) -> tuple[nn.ParameterDict, torch.optim.Optimizer]:
    """A model, and an optimizer whose state holds bases, as after the first step."""
    model = nn.ParameterDict({name: nn.Parameter(weight) for name, weight in weights.items()})
    optimizer = torch.optim.SGD([{"params": [model[name] for name in bases], "decay_to": "base", **group}], lr=0.1)
    for name, base in bases.items():
        optimizer.state[model[name]]["base"] = base
    return model, optimizer


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_unchanged_weights_by_hand(data: st.DataObject, dtype: torch.dtype) -> None:
    pairs = data.draw(
        st.lists(st.sampled_from([(1.0, 1.0), (1.0, 1.5), (0.0, 0.0), (0.0, 1.0), (1.0, 1 + 2**-7), (-2.0, 2.0)]))
    )
    base = torch.tensor([first for first, _ in pairs], dtype=dtype)
    weight = torch.tensor([second for _, second in pairs], dtype=dtype)
    model, optimizer = _with_bases({"some": weight}, {"some": base})
    (counted,) = measure_sparsity(model, changed_by=optimizer, near_zero_threshold=0.1).tensors
    changes = (weight.double() - base.double()).tolist()
    assert counted.zeros == sum(change == 0 for change in changes)
    assert counted.near_zeros == sum(0 < abs(change) < 0.1 for change in changes)
    assert counted.norm == pytest.approx(sum(change**2 for change in changes) ** 0.5, rel=1e-6)


def test_which_weights_are_unchanged() -> None:
    """Frozen ones, and those before their first step; of trained ones without a base nothing is known."""
    weights = {name: torch.ones(6) for name in ("stepped", "unstepped", "frozen", "new")}
    model, optimizer = _with_bases(weights, {"stepped": torch.tensor([1.0, 1, 0, 0, 0, 1])})
    optimizer.add_param_group({"params": [model["unstepped"]], "decay_to": "base"})
    optimizer.add_param_group({"params": [model["new"]], "decay_to": "zero"})
    report = measure_sparsity(model, changed_by=optimizer, decayed=["stepped", "unstepped"])
    zeros = {each.name: each.zeros for each in report.tensors}
    assert zeros == {"stepped": 3, "unstepped": 6, "frozen": 6, "new": 0}
    assert report.sparsity == 9 / 12
    assert report.model_sparsity == 15 / 24
    # Rows of the transposed weights, whose memory has gaps, are compared in their order.
    base = torch.arange(12.0).view(3, 4).t()
    weight = base.contiguous()
    weight[2] = 7
    model, optimizer = _with_bases({"strided": weight}, {"strided": base})
    (counted,) = measure_sparsity(model, changed_by=optimizer).tensors
    assert counted.zeros == 9


def test_unchanged_units() -> None:
    base = torch.randn(6, 4)
    weight = base.clone()
    weight[1, 2] += 1
    weight[4] = 0
    model, optimizer = _with_bases({"some": weight}, {"some": base}, group="row")
    count, dead = count_units(optimizer.param_groups, changed_by=optimizer)["row"]
    assert (count, int(dead)) == (6, 4)
    optimizer.param_groups[0]["group"] = "2:4"
    weight[0, :3] += 1
    count, fitting = count_units(optimizer.param_groups, changed_by=optimizer)["2:4"]
    assert (count, int(fitting)) == (6, 4)
    # Without a first step nothing has changed.
    optimizer.state.clear()
    optimizer.param_groups[0]["group"] = "row"
    assert int(count_units(optimizer.param_groups, changed_by=optimizer)["row"][1]) == 6
