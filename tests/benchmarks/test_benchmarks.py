"""The benchmarks run and say what they ought to; how fast anything is, is not tested."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ..helpers.reference.adamw_lp64 import Hyper, Reference


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = (
    "contenders",
    "figure",
    "gpu",
    "memory",
    "overhead",
    "probes",
    "rivals",
    "scaling",
    "semi_structured",
    "shrink",
    "step_speed",
    "tables",
    "timing",
    "training_step",
)


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules; they import their neighbours, as they do when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in MODULES}
        for name in MODULES:  # their names are common ones
            del sys.modules[name]


@pytest.fixture(scope="module")
def speed(bench: dict[str, ModuleType]) -> dict[str, Any]:
    """The figures of a size that no user is offered."""
    size = bench["contenders"].Size("tiny", ((64, 128), (16, 256), (33,)))
    return bench["step_speed"].measure(size, "cpu", rounds=3, quick=True, copy_numel=1 << 16)


def numbers(tree: Any) -> Iterator[float]:
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list):
        if isinstance(tree, (int, float)) and not isinstance(tree, bool):
            yield tree
        return
    for branch in tree:
        yield from numbers(branch)


def record_of(bench: dict[str, ModuleType], speed: dict[str, Any]) -> dict[str, Any]:
    compiling = {"cold": 1.0, "warm": 0.1}
    step_speed, tables = bench["step_speed"], bench["tables"]
    command = tables.command("step_speed.py", ["--quick", "--output", "/somewhere/else"])
    record = {"command": command, "sizes": [speed], "skipped_sizes": []}
    record |= tables.conditions("cpu", step_speed.PACKAGES)
    return record | {"notes": step_speed.notes_on("cpu", compiling)}


def test_speed_has_all_rows_and_finite_numbers(bench: dict[str, ModuleType], speed: dict[str, Any]) -> None:
    contenders = bench["contenders"]
    size = contenders.Size("tiny", ((64, 128), (16, 256), (33,)))
    expected = {contender.name for contender in contenders.contenders_for(size, "cpu", quick=True)}
    rows = {row["name"]: row for row in speed["rows"]}
    assert rows.keys() | speed["left_out"].keys() == expected
    ours = {f"AdamWLp auto, p = {p}" for p in ("0.5", "0.8", "1", "1.2", "1.5", "2", "3")}
    ours |= {f"AdamWLp auto, p = 0.8, {what}" for what in ("gradients not checked", "bfloat16 moments")}
    theirs = {contenders.BASELINE, contenders.CHECKED, contenders.AUTHORS, contenders.AUTHORS_FUSED}
    assert rows.keys() >= ours | theirs | {"AdamWLp foreach, p = 0.8"}
    # What is not there, is not there for want of a package or of a compiler.
    assert not any("p = 0.8" in name and "compiled" not in name and "8-bit" not in name for name in speed["left_out"])
    assert all(math.isfinite(value) for value in numbers(speed))
    assert all(row["median_ms"] > 0 and row["gb_per_s"] > 0 and row["visits"] > 0 for row in rows.values())
    assert speed["auto_ratios"].keys() == {"0.5", "0.8", "1", "1.2", "1.5", "2", "3"}
    assert speed["speed_up_over_authors"]["median"] > 0 and speed["speed_up_over_authors_fused"]["median"] > 0


def test_state_and_memory_are_those_of_the_formats(bench: dict[str, ModuleType], speed: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in speed["rows"]}
    weights = speed["weights"]
    assert rows["torch AdamW, fused"]["state_bytes_per_weight"] == pytest.approx(8 + 3 * 4 / weights)
    # Beside what AdamW has, whether a tensor is dormant: a byte for each of the three.
    assert rows["AdamWLp auto, p = 0.8"]["state_bytes_per_weight"] == pytest.approx(8 + 3 * (4 + 1) / weights)
    assert rows["AdamWLp auto, p = 0.8, bfloat16 moments"]["state_bytes_per_weight"] == pytest.approx(4, abs=0.01)
    eight = rows.get("AdamWLp auto, p = 0.8, 8-bit moments")
    if eight is not None:  # a byte and a 256th of a float32 for each moment, and a table of 256 for each tensor
        assert 2 < eight["state_bytes_per_weight"] < 2.5
    authors = next(row for name, row in rows.items() if name.startswith("authors"))
    assert authors["extra_bytes"] >= 4 * weights  # the clones


def test_bytes_that_a_step_has_to_move(bench: dict[str, ModuleType]) -> None:
    memory, timing, contenders = bench["memory"], bench["timing"], bench["contenders"]
    params = timing.make_params(contenders.Size("one", ((10, 10),)), "cpu")
    optimizer = torch.optim.AdamW(params)
    optimizer.step()
    assert memory.least_bytes(optimizer, params) == 2800
    assert all((param.detach() * param.grad < 0).all() for param in params)


def test_sharing_follows_the_memory(bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    timing, size = bench["timing"], bench["contenders"].Size("some", ((1000, 1000),))
    part = 4_000_000
    for free, expected in ((1000 * part, timing.OWN), (60 * part, timing.STATE), (6 * part, timing.NOTHING)):
        monkeypatch.setattr(timing, "available_bytes", lambda device, free=free: free)
        assert timing.choose_sharing(size, 10, "cpu") == expected
    monkeypatch.setattr(timing, "available_bytes", lambda device: part)
    with pytest.raises(timing.NotEnoughMemoryError, match="some"):
        timing.choose_sharing(size, 10, "cpu")


def test_optimizers_share_moments_where_memory_is_short(
    bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    timing, contenders = bench["timing"], bench["contenders"]
    size = contenders.Size("tiny", ((16, 256),))
    monkeypatch.setattr(timing, "choose_sharing", lambda *_: timing.NOTHING)
    available = [one for one in contenders.contenders_for(size, "cpu", quick=True) if one.missing is None]
    entrants, left_out, _ = timing.line_up(available, size, "cpu")
    assert all("torchao" in name for name in left_out) and len(entrants) + len(left_out) == len(available)
    plain = [entrant for entrant in entrants if entrant.contender.plain_state]
    addresses = {
        entrant.step.__self__.state[param]["exp_avg"].data_ptr() for entrant in plain for param in state_of(entrant)
    }
    assert len(plain) > 5 and len(addresses) == 1


def state_of(entrant: Any) -> list[torch.Tensor]:
    return list(entrant.step.__self__.state)


def test_what_cannot_run_is_left_out_with_a_reason(bench: dict[str, ModuleType]) -> None:
    timing, contenders = bench["timing"], bench["contenders"]
    size = contenders.Size("tiny", ((8, 8),))

    def broken(params: list[torch.Tensor]) -> None:
        raise ValueError("it is broken\nand more")

    runners = [contenders.contenders_for(size, "cpu")[0], contenders.Contender("broken", broken)]
    result = timing.race(runners, size, "cpu", 9, seconds=0, copy_numel=1024)
    assert result.left_out == {"broken": "it is broken"} and result.others == []
    assert result.rounds == 3  # the least, when the time is up


def test_speed_is_written_as_a_table_and_a_figure(
    bench: dict[str, ModuleType], speed: dict[str, Any], tmp_path: Path
) -> None:
    record = record_of(bench, speed)
    text = bench["tables"].speed_text(record)
    bench["tables"].write(record, text, tmp_path, "speed")
    for column in ("ratio to fused AdamW", "GB/s", "of copy", "extra MB", "process MB", "state B/weight"):
        assert column in text
    assert all(f"| {row['name']}" in text for row in speed["rows"])
    assert "times as fast as the authors' algorithm" in text
    assert "over fused AdamW that looks at the gradients too" in text
    assert "/somewhere" not in text and record["command"] == "python benchmarks/step_speed.py --quick"
    (tmp_path / "speed.json").write_text(json.dumps(record))
    argv = ["--plot", str(tmp_path / "speed.json"), "--figure", str(tmp_path / "speed.png")]
    assert bench["step_speed"].main(argv) == 0
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("p_norm", [0.5, 0.8, 1.0, 1.2, 1.5])
@pytest.mark.parametrize("fused", [True, False])
def test_the_authors_algorithm_is_ours_with_lambda_over_p(
    bench: dict[str, ModuleType], p_norm: float, fused: bool
) -> None:
    lambda_p, lr = 0.3, 1e-2
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, generator=generator)
    weight[:2] = 0
    param = torch.nn.Parameter(weight.clone())
    hyper = Hyper(lr=lr, weight_decay=0.1, p_norm=p_norm, lambda_p=lambda_p)
    expected = Reference(weight.double().numpy())
    optimizer = bench["rivals"].AuthorsAdamW(
        [param], lr=lr, weight_decay=0.1, p_norm=p_norm, lambda_=lambda_p / p_norm, fused=fused
    )
    for _ in range(6):
        param.grad = torch.randn(40, generator=generator)
        optimizer.step()
        new = torch.from_numpy(expected.step(param.grad.tolist(), hyper))
        torch.testing.assert_close(param.detach().double(), new, rtol=1e-4, atol=1e-7)


def test_torch_adamw_that_looks_skips_what_is_not_finite(bench: dict[str, ModuleType]) -> None:
    params = [torch.nn.Parameter(torch.full((3,), float(size))) for size in (1, 2)]
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    checked, plain = bench["rivals"].checked_adamw(params, lr=0.1), bench["rivals"].torch_adamw(twins, 0.1, fused=True)
    for number, bad in enumerate((0.5, math.nan, 0.25, math.inf)):
        for param, twin in zip(params, twins, strict=True):
            param.grad, twin.grad = torch.ones(3), torch.ones(3)
        params[1].grad[2] = twins[1].grad[2] = bad
        checked.step()
        if number % 2 == 0:
            plain.step()
        assert all(torch.equal(param, twin) for param, twin in zip(params, twins, strict=True))


def test_the_other_rivals_step(bench: dict[str, ModuleType]) -> None:
    pytest.importorskip("torchao.prototype.pat.optim")
    params = bench["timing"].make_params(bench["contenders"].Size("one", ((8, 8),)), "cpu")
    before = params[0].detach().clone()
    optimizer = bench["rivals"].prune_optimizer(params, lr=1e-3)
    for _ in range(3):
        optimizer.step()
    assert "latent" in optimizer.state[params[0]]
    assert 0 < (params[0].detach() - before).abs().max() < 1e-2
    assert params[0].all()


@pytest.mark.slow
def test_probes_measure_in_a_process_of_their_own(bench: dict[str, ModuleType]) -> None:
    growth = bench["probes"].rss_growth(bench["contenders"].SIZES["1M"], ["torch AdamW, fused"])
    assert growth.keys() == {"torch AdamW, fused"}
    assert growth["torch AdamW, fused"] is None or growth["torch AdamW, fused"] >= 0


def test_overhead_of_a_very_small_model(bench: dict[str, ModuleType]) -> None:
    overhead, tables = bench["overhead"], bench["tables"]
    model = overhead.Model("least", layers=1, heads=2, width=16, batch=2, block=16, repeats=1, steps=20)
    entry = overhead.measure(model, overhead.load_data(model, most=64), repeats=2, steps=20, device="cpu")
    assert entry["runs"].keys() == {"adamw_torch_fused", "adamw_lp"}
    for run in entry["runs"].values():
        assert run.keys() == {*overhead.PARTS, "start_seconds", "end_seconds"}
    assert all(math.isfinite(value) for value in numbers(entry))
    sparse = entry["runs"]["adamw_lp"]
    assert 0 < sparse["callback_ms"]["median"] <= sparse["log_ms"]["median"] < sparse["whole_ms"]["median"]
    assert entry["runs"]["adamw_torch_fused"]["callback_ms"]["median"] == 0
    record = {"command": "c", "models": [entry], "notes": overhead.NOTES}
    text = tables.overhead_text(record | tables.conditions("cpu", overhead.PACKAGES))
    assert "optimizer.step()" in text and "SparsityCallback" in text


@pytest.mark.parametrize(
    ("script", "argv", "named"),
    [
        ("step_speed", ["--sizes", "3M"], "--sizes"),
        ("step_speed", ["--rounds", "0"], "--rounds 0"),
        ("overhead", ["--steps", "5"], "--steps 5"),
        ("overhead", ["--model", "huge"], "--model"),
        ("training_step", ["--tokens", "0"], "--tokens"),
    ],
)
def test_bad_options_are_refused(
    bench: dict[str, ModuleType], capsys: pytest.CaptureFixture[str], script: str, argv: list[str], named: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench[script].main(argv)
    assert named in capsys.readouterr().err


def test_scaling_measures_every_part(bench: dict[str, ModuleType]) -> None:
    scaling = bench["scaling"]
    size = scaling.measure(tensors=2, width=64, rounds=3)
    assert size["weights"] == 2 * 64 * 64
    assert set(size["ratio_to_step"]) == {"step", "cut", "lambda_p", "log"}
    assert all(math.isfinite(value) and value > 0 for value in numbers(size))
    assert size["ratio_to_step"]["step"]["median"] == 1
    record = {"command": "python", "sizes": {"tiny": size}, "interval": size["interval"]}
    text = scaling.text(record | bench["tables"].conditions("cpu", ("torch",)))
    assert "| tiny in 2 tensors" in text


def test_a_training_step_is_measured_whole_and_in_parts(bench: dict[str, ModuleType]) -> None:
    training_step = bench["training_step"]
    batch = training_step.measure(4, rounds=3, layers=2, width=64, flush=1 << 12)
    assert batch["weights"] == 2 * 64 * 64 and min(batch["least_ratio"].values()) > 1
    assert all(math.isfinite(value) and value > 0 for value in numbers(batch))
    assert all(row["ms"]["backward"] < row["ms"]["together"] for row in batch["rows"].values())
    assert {entry["median"] for entry in batch["rows"][training_step.BASELINE]["ratio"].values()} == {1}
    text = training_step.text({"command": "c", "batches": [batch]} | bench["tables"].conditions("cpu", ("torch",)))
    assert "| AdamWLp, gradients checked by hooks in backward |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run for minutes")
def test_each_part_for_a_gpu_knows_its_arguments_and_says_that_there_is_none(
    bench: dict[str, ModuleType], capfd: pytest.CaptureFixture[str]
) -> None:
    parts = [name for name, (module, _) in bench["gpu"].PARTS.items() if module != "pytest"]
    assert bench["gpu"].main(["--only", *parts]) == 1
    out, err = capfd.readouterr()
    assert err.count("torch sees no GPU") == len(parts)
    assert all(f"\n{name}: ended with code 2" in out for name in parts)
    for name, (module, arguments) in bench["gpu"].PARTS.items():
        files = [word for word in arguments if module == "pytest" and word.endswith(".py")]
        assert all(Path(file).is_file() for file in files), name


def test_parts_go_on_after_one_that_fails(
    bench: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = bench["gpu"]
    (tmp_path / "broken_part.py").write_text("def main(argv):\n    raise RuntimeError('out of something')\n")
    (tmp_path / "whole_part.py").write_text("def main(argv):\n    print('got', *argv)\n    return 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(gpu, "PARTS", {"one": ("broken_part", ()), "two": ("whole_part", ("--all",))})
    assert gpu.main([]) == 1
    captured = capsys.readouterr()
    assert "one: failed after" in captured.out and "two: done after" in captured.out and "got --all" in captured.out
    assert "out of something" in captured.err
    assert gpu.main(["--only", "two"]) == 0
