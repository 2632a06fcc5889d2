"""What is compiled, when, what is said of it, and the compiled step among threads and processes."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import os
import signal
import subprocess
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_pdecay import AdamWLp
from hf_pdecay.optim import backends, foreach, reference
from hf_pdecay.optim.cpu import native
from hf_pdecay.optim.cpu import step as compiled
from tests.helpers.steps import normal, python, some_run


def test_nothing_compiles_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters
    from torch._inductor.codecache import CppCodeCache

    assert compiled.unavailable() is None
    library = compiled.library()
    folder = Path(library._name).parent.parent
    before = {path for path in folder.rglob("*") if path.suffix in (".so", ".o", ".cpp")}
    counted = copy.deepcopy(dict(counters))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was compiled or loaded again")

    for name in ("load", "load_async"):
        monkeypatch.setattr(CppCodeCache, name, refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    for dtype, moments in ((torch.float32, None), (torch.float64, None), (torch.bfloat16, "float32"),
                           (torch.float32, "bfloat16"), (torch.float16, None)):  # fmt: skip
        for shapes in ([(7,)], [(3, 5), (0,), (4, 2, 3, 3)], [(70_000,)] * 3):
            params = [torch.nn.Parameter(normal(*shape, dtype=dtype)) for shape in shapes]
            optimizer = AdamWLp(params, moments=moments, backend="compiled")
            for lr, lambda_p, p_norm, betas in ((0.1, 0.5, 0.8, (0.9, 0.999)), (0.0, 0.0, 2.0, (0.5, 0.9)),
                                                (torch.tensor(0.3), 1.0, 3.0, (0.0, 0.99))):  # fmt: skip
                optimizer.param_groups[0].update(lr=lr, lambda_p=lambda_p, p_norm=p_norm, betas=betas)
                some_run(optimizer, 1)
    assert compiled.library() is library
    assert {path for path in folder.rglob("*") if path.suffix in (".so", ".o", ".cpp")} == before
    assert dict(counters) == counted


STEP = """
import torch
from torch import Tensor
from hf_pdecay import AdamWLp
for backend in ("auto", "auto", "compiled"):
    param = torch.nn.Parameter(torch.ones(80_000))
    param.grad = torch.ones(80_000)
    optimizer = AdamWLp([param], backend=backend)
    try:
        optimizer.step()
        print("stepped", backend, optimizer._backend.chosen["cpu"][0], bool((param < 1).all()))
    except Exception as error:
        print("refused", backend, type(error).__name__, bool((param == 1).all()), int(optimizer.state[param]["step"]))
        print(error)
"""


@pytest.mark.slow
def test_cold_start_is_kept_for_later_processes(tmp_path: Path) -> None:
    cold = python(STEP, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert cold.returncode == 0, cold.stderr
    said = [line for line in cold.stderr.splitlines() if "compiled its step" in line]
    assert len(said) == 1 and said[0].startswith("WARNING") and str(tmp_path) in said[0]
    chosen = [line for line in cold.stderr.splitlines() if "takes backend 'compiled'" in line]
    assert len([line for line in chosen if "it was asked for" not in line]) == 1
    assert cold.stdout.split("\n")[:3] == ["stepped auto compiled True"] * 2 + ["stepped compiled compiled True"]
    libraries = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.so")}
    warm = python(STEP, TORCHINDUCTOR_CACHE_DIR=str(tmp_path), CXX=os.environ.get("CXX", "g++"))
    assert warm.returncode == 0 and warm.stdout == cold.stdout
    assert "WARNING" not in warm.stderr and "loaded its compiled step" in warm.stderr
    assert libraries == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.so")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no compiler", "unwritable cache"])
def test_without_a_compiler_auto_falls_back_and_says_why(kind: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "cache").mkdir()
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    if kind == "no compiler":
        environment |= {"CXX": "/nonexistent/c++", "PATH": str(tmp_path / "bin")}
    else:  # also for root, who may write into a read-only folder
        (tmp_path / "cache" / "locks").write_text("a file where a folder belongs")
    done = python(STEP, **environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["stepped auto foreach True"] * 2
    assert lines[2] == "refused compiled RuntimeError True 0"
    assert "backend='compiled'" in lines[3] and "backend='foreach'" in lines[3]
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("WARNING AdamWLp")]
    assert "'foreach'" in warning and ("/nonexistent/c++" if kind == "no compiler" else "locks") in warning


def test_a_new_process_finds_what_was_compiled_without_inductor() -> None:
    assert compiled.unavailable() is None
    done = python("""
import sys
from hf_pdecay.optim.cpu import step
assert step.library() is not None
assert "torch._inductor.cpp_builder" not in sys.modules
""")
    assert done.returncode == 0, done.stderr[-5000:]


# Inductor names the instruction sets of the processor, so that a flag of ours alone does not take one away.
OTHER_PROCESSOR = """
import sys
import pytest
from torch._inductor import config
from hf_pdecay.optim.cpu import native, step
config.cpp.simdlen = 256
native._FLAGS += ("-mno-avx512f",)
assert step.library().hf_pdecay_lanes() == 0
for words in (
    ["-k", "compiled", "tests/optim/test_adamw_lp.py", "tests/optim/test_foreach.py", "tests/optim/test_cpu_step.py"],
    ["tests/inference/test_sparse_inference.py"],
):
    assert pytest.main(["-q", "-p", "no:cacheprovider", *words]) == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="all tests take these loops here")
def test_the_loops_for_processors_without_avx512() -> None:
    done = python(OTHER_PROCESSOR)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="there is one way only here")
def test_avx512_gives_the_numbers_of_the_loops_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all dtypes, p on both sides of 2, weights that die, zeros of both signs, rests of less than 16 elements."""
    from torch._inductor import config

    lanes = compiled.library()
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-mno-avx512f"))
    with config.patch("cpp.simdlen", 256):
        loops, reason = native.load.__wrapped__(compiled.SOURCES, "A test", "loops")
    assert loops is not None, reason
    assert (lanes.hf_pdecay_lanes(), loops.hf_pdecay_lanes()) == (1, 0)
    generator = torch.Generator().manual_seed(0)

    def wide(n: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
        exponents = torch.randint(low, high, (n,), generator=generator)
        numbers = torch.randn(n, generator=generator) * torch.exp2(exponents.float())
        numbers[torch.randint(0, n, (n // 20 + 1,), generator=generator)] = 0.0
        numbers[torch.randint(0, n, (n // 40 + 1,), generator=generator)] = -0.0
        return numbers.clamp(-6e4, 6e4).to(dtype)

    pairs = [(w, m) for w, moments in compiled._MOMENTS.items() for m in moments if w != torch.float64]
    for n, (param_dtype, moment_dtype) in itertools.product((1, 15, 17, 64, 1000), pairs):
        least = -24 if param_dtype == torch.float16 else -149
        given = (
            wide(n, least, 8, param_dtype),
            wide(n, max(least, -60), 15, param_dtype),
            wide(n, -30, 4, moment_dtype),
            wide(n, -60, 8, moment_dtype).abs(),
        )
        codes = compiled.CODES[param_dtype], compiled.CODES[moment_dtype]
        # Changes of 0, of a unit in the last place and of any size.
        nothing, near = torch.rand(2, n, generator=generator)
        base = torch.where(
            nothing < 0.2, given[0], torch.where(near < 0.2, given[0] * (1 + 2**-7), given[0] + given[1])
        )
        settings = itertools.product((0.1, 0.8, 1.99, 2.0, 4.0), (1e-35, 1e-24, 0.01, 1e6), (0, 1), (None, base))
        for p_norm, lambda_p, keep_zeros, to in settings:
            hyper = array("d", (1e-3, 0.9, 0.999, 1e-8, 0.01, p_norm, lambda_p, keep_zeros, 0, 1))
            results = []
            for library in (lanes, loops):
                state, count = [each.clone() for each in given], torch.full((), 5.0)
                addresses = [each.data_ptr() for each in state]
                place = 0 if to is None else to.data_ptr()
                row = array("q", (*addresses, count.data_ptr(), n, 0, 3, *codes, 0, 0, 1, 1, 0, 0, 0, 0, 0, place))
                library.hf_pdecay_step.argtypes = lanes.hf_pdecay_step.argtypes
                assert library.hf_pdecay_step(compiled.address(row), 1, compiled.address(hyper), 1) == 0
                results.append([each.view(torch.uint8) for each in state])
            same = [torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True)]
            assert all(same), (n, param_dtype, moment_dtype, p_norm, lambda_p, keep_zeros, to is None, same)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log, in which nothing has been said yet."""
    backends._say.cache_clear()
    caplog.set_level(logging.INFO, logger="hf_pdecay")
    return caplog


@pytest.mark.parametrize(("size", "name"), [(65_535, "foreach"), (65_536, "compiled")])
def test_auto_logs_its_choice_once(size: int, name: str, log: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        param = torch.nn.Parameter(torch.ones(size))
        optimizer = AdamWLp([param])
        some_run(optimizer, 1, 2, 3)
        assert optimizer.backends["cpu"][0] == name
    said = [record for record in log.records if "takes backend" in record.getMessage()]
    assert [record.levelno for record in said] == [logging.INFO]
    assert f"cpu takes backend '{name}'" in said[0].getMessage() and f"{size:,}" in said[0].getMessage()


def test_auto_says_what_a_dense_run_takes(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no λ_p is above 0 the step is foreach's: so should the log and ``backends`` say."""
    taken: set[str] = set()
    for holder, name in ((compiled.Batch, "compiled"), (foreach, "foreach"), (reference, "reference")):
        step: Any = holder.step

        def spy(*args: Any, name: str = name, step: Any = step) -> None:
            taken.add(name)
            step(*args)

        monkeypatch.setattr(holder, "step", functools.wraps(step)(spy))
    optimizer = AdamWLp([torch.nn.Parameter(torch.ones(70_000))], lambda_p=0.0)
    some_run(optimizer, 1)
    assert taken == {"foreach"}
    (said,) = [record.getMessage() for record in log.records if "takes backend" in record.getMessage()]
    assert "'foreach'" in said


# --- threads and processes


@pytest.mark.parametrize("number", [1, 2])
def test_two_optimizers_in_two_threads(number: int, threads: Callable[[int], None]) -> None:
    def train(seed: int, results: dict[int, torch.Tensor]) -> None:
        torch.set_num_threads(number)
        param = torch.nn.Parameter(normal(150_000, seed=seed, dtype=torch.bfloat16))
        optimizer = AdamWLp([param], lr=0.01, lambda_p=0.1, backend="compiled")
        for k in range(10):
            param.grad = torch.full_like(param, 0.1 * k)
            optimizer.step()
        results[seed] = param.detach()

    alone: dict[int, torch.Tensor] = {}
    together: dict[int, torch.Tensor] = {}
    for seed in range(2):
        train(seed, alone)
    workers = [threading.Thread(target=train, args=(seed, together)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert together.keys() == alone.keys()
    assert all(torch.equal(alone[seed], together[seed]) for seed in range(2))


FORK = """
import os, signal, sys, torch
from hf_pdecay import AdamWLp
param = torch.nn.Parameter(torch.ones(300_000))
param.grad = torch.ones(300_000)
optimizer = AdamWLp([param], backend="compiled")
for number in (1, 2):
    torch.set_num_threads(number)
    optimizer.step()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends the child if it hangs
        torch.set_num_threads(1)
        optimizer.step()
        os._exit(0 if int(optimizer.state[param]["step"]) == number + 1 else 1)
    print(os.waitpid(child, 0)[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_child_steps_after_a_fork() -> None:
    """With one thread, as DataLoader's workers have. With more GNU's OpenMP hangs there, in torch's own AdamW too."""
    done = python(FORK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0"], f"{signal.SIGALRM:d} is that of the alarm: {done.stdout}"
