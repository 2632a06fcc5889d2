"""Backend "compiled" takes raw addresses: layouts, guard bands, refusals, threads, processes and the cold start.

What holds for every backend of the state and its checkpoints is here too.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_pdecay import AdamWLp
from hf_pdecay.optim import adamw_lp, backends, compiled, foreach, reference
from tests.test_adamw_lp_functional import PeakMemory


ROOT = Path(__file__).parent.parent
BACKENDS = ["compiled", "foreach", "reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MOMENT_NAMES = ("exp_avg", "exp_avg_sq")
PLAIN = [torch.float32, torch.float64]
OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "p_norm": 0.8,
    "lambda_p": 0.5,
    "keep_zeros": False,
    "maximize": False,
}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(moment: torch.Tensor) -> torch.Tensor:
    """The values of a moment, also of one in 8 bit."""
    return moment if type(moment) is torch.Tensor else moment.dequantize()


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the bits of a tensor, so that NaN equals NaN and 0 differs from -0."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().clone().contiguous().view(kinds[tensor.element_size()])


def snapshot(optimizer: AdamWLp) -> list[torch.Tensor]:
    """The bits of all weights and all state."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            found += [bits(param), *(bits(state[name]) for name in ("step", "exp_avg", "exp_avg_sq") if name in state)]
    return found


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, whose messages of the log go to stderr."""
    head = "import logging; logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s')\n"
    return subprocess.run(
        [sys.executable, "-c", head + code, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


# --- layouts


def strided(t: torch.Tensor) -> torch.Tensor:
    """A view with gaps, of a storage twice as large."""
    return torch.zeros(*t.shape, 2, dtype=t.dtype)[..., 0].copy_(t)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor], Callable[[Any], torch.Tensor]]] = {
    "channels_last": ((6, 5, 4, 3), *2 * (lambda t: t.to(memory_format=torch.channels_last),)),
    "channels_last_3d": ((6, 5, 4, 3, 2), *2 * (lambda t: t.to(memory_format=torch.channels_last_3d),)),
    "weights_channels_last": ((6, 5, 4, 3), lambda t: t.to(memory_format=torch.channels_last), lambda t: t),
    "gradients_channels_last": ((6, 5, 4, 3), lambda t: t, lambda t: t.to(memory_format=torch.channels_last)),
    "one_channel": ((6, 1, 4, 3), lambda t: t, lambda t: t.to(memory_format=torch.channels_last)),
    "transposed": ((40, 9), *2 * (lambda t: t.t().contiguous().t(),)),
    "gradients_transposed": ((40, 9), lambda t: t, lambda t: t.t().contiguous().t()),
    "expanded_gradients": ((40, 9), lambda t: t, lambda t: t[:1].expand(40, 9)),
    "expanded_to_channels": ((6, 5, 4, 3), lambda t: t.to(memory_format=torch.channels_last),
                             lambda t: t[:, :1, :1, :1].expand(6, 5, 4, 3)),
    "strided": ((40, 9), *2 * (strided,)),
    "strided_gradients": ((40, 9), lambda t: t, strided),
    "permuted": ((6, 5, 4, 3), *2 * (lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),)),
    "offset": ((40, 9), *2 * (lambda t: torch.cat([t.flatten()[:3], t.flatten()])[3:].view(40, 9),)),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["compiled", "auto", "foreach", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", PLAIN)
def test_layout_changes_no_result(backend: str, layout: str, dtype: torch.dtype) -> None:
    shape, of_weight, of_grad = LAYOUTS[layout]
    found = []
    for plain in (True, False):
        weight, big = normal(*shape, seed=1, dtype=dtype), normal(70_000, seed=2, dtype=dtype)
        param, other = torch.nn.Parameter(weight if plain else of_weight(weight)), torch.nn.Parameter(big)
        optimizer = AdamWLp([param, other], lr=0.02, lambda_p=0.5, weight_decay=0.1, backend=backend)
        for seed in (3, 4):
            # The values of an expanded gradient are those of the expansion.
            grad = of_grad(normal(*shape, seed=seed, dtype=dtype))
            param.grad, other.grad = grad.contiguous() if plain else grad, big
            try:
                optimizer.step()
            except ValueError as error:
                assert backend == "compiled" and not plain
                assert "backend='compiled'" in str(error) and str(tuple(shape)) in str(error)
                assert "backend='auto'" in str(error)
                assert torch.equal(param, weight) and torch.equal(other, big)
                assert int(optimizer.state[other]["step"]) == 0
                return
        assert backend != "auto" or optimizer._backend.chosen["cpu"][0] == "compiled"
        found.append([t.detach().clone() for t in (param, *(optimizer.state[param][m] for m in MOMENT_NAMES))])
    rounding = 0 if backend in ("compiled", "reference") else 2e-6  # auto may take foreach for one of the two
    for one, other_one in zip(*found, strict=True):
        torch.testing.assert_close(one, other_one, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbouring_memory_stays_untouched(backend: str, dtype: torch.dtype) -> None:
    """Weights, gradient and moments are views at odd offsets into larger storages; nothing beside them changes."""
    guard = 77.0
    for offset, size in ((1, 1), (3, 63), (5, 64), (7, 65), (1, 1000), (9, 4097), (3, 131_075)):
        stores = [torch.full((size + 2 * offset + 64,), guard, dtype=dtype) for _ in range(4)]
        views = [store[offset : offset + size] for store in stores]
        values = [normal(size, seed=k, dtype=dtype) for k in range(2)] + [torch.zeros(size, dtype=dtype)] * 2
        for view, value in zip(views, values, strict=True):
            view.copy_(value)
        aligned = [value.clone() for value in values]
        for some in (views, aligned):
            param, grad, exp_avg, exp_avg_sq = some
            adamw_lp([param], [grad], [exp_avg], [exp_avg_sq], [torch.zeros(())], [None], **OPTIONS, backend=backend)
        for store, view, expected in zip(stores, views, aligned, strict=True):
            assert bool((store[:offset] == guard).all()) and bool((store[offset + size :] == guard).all())
            assert torch.equal(view, expected)
        assert torch.equal(views[1], values[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_and_0_dim_tensors_among_others(backend: str, dtype: torch.dtype) -> None:
    shapes: list[tuple[int, ...]] = [(5,), (0,), (), (3, 0, 2), (70,), (0, 4, 0, 2)]
    params = [torch.nn.Parameter(normal(*shape, seed=1, dtype=dtype)) for shape in shapes]
    others = [torch.nn.Parameter(params[k].detach().clone()) for k in (0, 2, 4)]
    for some in (params, others):
        for param in some:
            param.grad = torch.ones_like(param)
        optimizer = AdamWLp(some, lr=0.02, lambda_p=0.0 if dtype in DTYPES[2:] else 0.5, backend=backend)
        if backend == "reference" and dtype in DTYPES[2:]:
            pytest.skip("rounds by the tensor's place")
        optimizer.step()
        assert all(int(optimizer.state[param]["step"]) == 1 for param in some)
    assert all(torch.equal(params[k], param) for k, param in zip((0, 2, 4), others, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_empty_tensors(backend: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(0)), torch.nn.Parameter(torch.zeros(2, 0))]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = AdamWLp(params, backend=backend)
    optimizer.step()
    assert optimizer.skipped_steps == 0 and int(optimizer.state[params[0]]["step"]) == 1


# --- NaN and infinite gradients

SPECIAL = {
    torch.float32: (torch.int32, [0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF], 0x7F7FFFFF),
    torch.float64: (torch.int64, [0x7FF << 52, (0x7FF << 52) + 1, 0x7FF8 << 48, 2**63 - 1], (0x7FF << 52) - 1),
    torch.bfloat16: (torch.int16, [0x7F80, 0x7F81, 0x7FC0, 0x7FFF], 0x7F7F),
    torch.float16: (torch.int16, [0x7C00, 0x7C01, 0x7E00, 0x7FFF], 0x7BFF),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_value_is_found_at_every_place(dtype: torch.dtype) -> None:
    kind, bad, largest = SPECIAL[dtype]
    sign = -(2 ** (8 * torch.finfo(dtype).bits // 8 - 1))
    for size in (1, 2, 3, 4, 5, 31, 67, 130, 262_146):
        stored = torch.full((size,), largest, dtype=kind)
        stored[::2] += sign
        other = torch.zeros(3, dtype=dtype)
        values = stored.view(dtype)
        assert compiled.all_finite([other, values, other]), "large finite values are not infinite"
        edges = {0, 1, size // 4 - 1, size // 4, size // 2, 3 * (size // 4), size - 3, size - 2, size - 1}
        for place in range(size) if size < 200 else sorted(edges | {262_143, 262_144}):
            before = int(stored[place])
            for value in bad if size < 70 else bad[:2]:
                for signed in (value, value + sign):
                    stored[place] = signed
                    assert not compiled.all_finite([other, values, other]), (size, place, hex(value))
            stored[place] = before
        assert compiled.all_finite([values])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "moments"), [*((dtype, None) for dtype in DTYPES), (torch.float32, "bfloat16")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_skipped_step_writes_nothing_to_the_bit(
    backend: str, dtype: torch.dtype, moments: str | None, bad: float
) -> None:
    params = [torch.nn.Parameter(normal(size, seed=size, dtype=dtype)) for size in (70, 0, 4097)]
    params[0].data[0] = -0.0
    optimizer = AdamWLp(params, lr=0.02, lambda_p=0.5, moments=moments, backend=backend)
    for steps in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        if steps:
            break
        optimizer.step()
    before = snapshot(optimizer)
    for param, place in ((params[0], 0), (params[0], 69), (params[2], 4096)):
        grad = torch.ones_like(param)
        grad[place] = bad
        param.grad = grad
        optimizer.step()
        assert same(before, snapshot(optimizer))
        param.grad = torch.ones_like(param)
    assert optimizer.skipped_steps == 3
    optimizer.step()
    assert not same(before, snapshot(optimizer)) and optimizer.skipped_steps == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_skip_of_one_group_spares_the_group_that_does_not_ask(backend: str, dtype: torch.dtype) -> None:
    careful, careless = (torch.nn.Parameter(torch.full((70,), 0.5, dtype=dtype)) for _ in range(2))
    groups: list[dict[str, Any]] = [{"params": [careful]}, {"params": [careless], "skip_nonfinite": False}]
    optimizer = AdamWLp(groups, lr=0.02, lambda_p=0.5, backend=backend)
    careful.grad, careless.grad = torch.full_like(careful, float("nan")), torch.ones_like(careless)
    optimizer.step()
    assert bool((careful == 0.5).all()) and bool((careless != 0.5).all()) and optimizer.skipped_steps == 1
    careful.grad, careless.grad = torch.ones_like(careful), torch.full_like(careless, float("nan"))
    optimizer.step()
    assert bool((careful != 0.5).all()) and bool(careless.isnan().all()) and optimizer.skipped_steps == 1


# --- refusals


@pytest.mark.parametrize("name", ["fast", "Compiled", "", None, 1])
def test_unknown_backend_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=r"^Invalid backend: backend=.*must be one of auto, compiled") as error:
        AdamWLp([torch.nn.Parameter(torch.ones(3))], backend=name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", ["float16", "8bits", "", 8])
def test_unknown_moments_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=r"^Invalid moments: moments=.*float32, bfloat16, 8bit") as error:
        AdamWLp([torch.nn.Parameter(torch.ones(3))], moments=name)
    assert repr(name) in str(error.value)
    with pytest.raises(ValueError, match="Invalid moments"):
        AdamWLp([{"params": [torch.nn.Parameter(torch.ones(3))], "moments": name}])


def refused_and_unharmed(optimizer: AdamWLp, shape: tuple[int, ...]) -> None:
    before = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]
    with pytest.raises(ValueError, match=r"backend='compiled'") as error:
        optimizer.step()
    assert str(shape) in str(error.value) and "backend='auto'" in str(error.value)
    after = [param for group in optimizer.param_groups for param in group["params"]]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(int(state["step"]) == 0 for state in optimizer.state.values())
    moments = [state[name] for state in optimizer.state.values() for name in MOMENT_NAMES]
    assert all(bool((dense(moment) == 0).all()) for moment in moments)


@pytest.mark.parametrize("careless", [0, 1, None])
@pytest.mark.parametrize("kind", ["8bit", "gaps", "float16 and bfloat16"])
def test_refusal_of_a_later_tensor_comes_before_anything_is_written(kind: str, careless: int | None) -> None:
    first = torch.nn.Parameter(normal(300))
    dtype = torch.float16 if kind[0] == "f" else torch.float32
    last = torch.nn.Parameter(normal(64, 64, dtype=dtype) if kind != "gaps" else strided(normal(64, 65)))
    moments = "8bit" if kind == "8bit" else "bfloat16" if kind[0] == "f" else None
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [last], "moments": moments}]
    if careless is not None:
        groups[careless]["skip_nonfinite"] = False
    optimizer = AdamWLp(groups, backend="compiled")
    first.grad, last.grad = torch.ones_like(first), torch.ones_like(last)
    refused_and_unharmed(optimizer, tuple(last.shape))


def test_gradient_of_another_dtype_is_refused() -> None:
    """torch lets a parameter ask for it. As float32 its bits would be other numbers, and half lie beyond its end."""
    param = torch.nn.Parameter(normal(64))
    if not hasattr(param, "grad_dtype"):
        pytest.skip("this torch has gradients of the parameter's dtype only")
    param.grad_dtype = torch.bfloat16
    param.grad = torch.ones(256, dtype=torch.bfloat16)[:64]
    refused_and_unharmed(AdamWLp([param], backend="compiled"), (64,))


@pytest.mark.parametrize("which", ["grad", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("other", ["fewer", "bfloat16"])
def test_functional_refuses_tensors_that_do_not_match(which: str, other: str) -> None:
    """Read by their addresses they would be read and written beyond their end (here there is room behind it)."""
    tensors = {name: torch.zeros(64) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    tensors[which] = torch.zeros(256)[:32] if other == "fewer" else torch.zeros(256, dtype=torch.bfloat16)[:64]
    if (which, other) == ("exp_avg", "bfloat16"):
        tensors["exp_avg_sq"] = torch.zeros(64)
    step = torch.zeros(())
    with pytest.raises((ValueError, RuntimeError)):
        param, grad, exp_avg, exp_avg_sq = ([tensor] for tensor in tensors.values())
        adamw_lp(param, grad, exp_avg, exp_avg_sq, [step], [None], **OPTIONS, backend="compiled")
    assert step.item() == 0


def test_weight_that_was_resized_is_refused() -> None:
    """Pruning by ``param.data = ...``. The other way, to more weights, would write beyond the moments' end."""
    param = torch.nn.Parameter(normal(64))
    optimizer = AdamWLp([param], backend="compiled")
    param.grad = torch.ones(64)
    optimizer.step()
    param.grad = None
    param.data = normal(32)
    param.grad = torch.ones(32)
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("number", [False, True])
def test_step_counter_of_another_dtype(backend: str, default: torch.dtype, number: bool) -> None:
    """torch's AdamW counts in float64 where that is the default dtype, and old checkpoints in numbers."""
    weight = normal(64)
    found = []
    for dtype in (torch.float32, default):
        rival = torch.nn.Parameter(weight.clone())
        rival.grad = torch.ones(64)
        torch.set_default_dtype(dtype if not number and dtype == torch.float64 else torch.float32)
        try:
            adamw = torch.optim.AdamW([rival])
            for _ in range(300):
                adamw.step()
            saved = adamw.state_dict()
            if number:
                saved["state"][0]["step"] = 300
            torch.set_default_dtype(dtype)
            param = torch.nn.Parameter(rival.detach().clone())
            optimizer = AdamWLp([param], backend=backend)
            optimizer.load_state_dict(saved)
            param.grad = torch.ones_like(param)
            optimizer.step()
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        assert int(optimizer.state[param]["step"]) == 302
        found.append(param.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_that_is_negated_lazily(backend: str) -> None:
    gradient = torch.tensor([1 + 2j]).conj().imag
    assert gradient.is_neg() and gradient.item() == -2
    param = torch.nn.Parameter(torch.ones(1))
    param.grad = gradient
    optimizer = AdamWLp([param], lambda_p=0.0, backend=backend)
    if backend == "compiled":  # which reads what lies in memory
        with pytest.raises(ValueError, match="negates"):
            optimizer.step()
        return
    optimizer.step()
    assert param.item() > 1


# --- autograd, flush-to-zero, memory


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_sees_the_change(backend: str, dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(normal(70, dtype=dtype))
    optimizer = AdamWLp([param], backend=backend)
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_loading_does_not_flush_denormals_to_zero() -> None:
    assert compiled.unavailable() is None
    assert (torch.tensor(1e-40) * 1.0).item() > 0
    assert (torch.tensor([1e-310], dtype=torch.float64) * 0.5).item() > 0
    param = torch.nn.Parameter(torch.full((100,), 1e-40))
    param.grad = torch.zeros(100)
    AdamWLp([param], lambda_p=0.0, backend="compiled").step()
    assert bool((param > 0).all())


def test_compiled_makes_no_temporaries() -> None:
    for dtype, moments in ((torch.float32, None), (torch.bfloat16, "float32"), (torch.float32, "bfloat16")):
        param = torch.nn.Parameter(torch.full((1_000_000,), 0.5, dtype=dtype))
        param.grad = torch.full_like(param, 0.1)
        optimizer = AdamWLp([param], moments=moments, backend="compiled")
        optimizer.step()
        with PeakMemory() as memory:
            optimizer.step()
        assert memory.peak < 1000


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("backend", ["compiled", "foreach"])
def test_process_does_not_grow(backend: str) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    params = [torch.nn.Parameter(torch.full((2_000,), 0.5)) for _ in range(30)]
    for param in params:
        param.grad = torch.full_like(param, 0.1)
    optimizer = AdamWLp(params, backend=backend)
    for _ in range(20):
        optimizer.step()
    before = resident()
    for _ in range(200):
        optimizer.step()
    assert resident() - before < 200 * 4096  # less than a page a step


# --- checkpoints and copies

STATES = [(backend, moments) for backend in BACKENDS for moments in (None, "float32", "bfloat16")]
STATES += [(backend, "8bit") for backend in ("auto", "foreach", "reference")]


def some_run(optimizer: AdamWLp, *seeds: int) -> None:
    for seed in seeds:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = normal(*param.shape, seed=seed).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize(("backend", "moments"), STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_continues_to_the_bit(backend: str, moments: str | None, dtype: torch.dtype) -> None:
    whole = [torch.nn.Parameter(normal(*shape, seed=1, dtype=dtype)) for shape in ((64, 64), (33,))]
    options: dict[str, Any] = {"lr": 0.01, "lambda_p": 0.1, "moments": moments, "backend": backend}
    optimizer = AdamWLp(whole, **options)
    some_run(optimizer, 1, 2, 3)
    saved = through_a_file(optimizer.state_dict())
    resumed = [torch.nn.Parameter(param.detach().clone()) for param in whole]
    some_run(optimizer, 4, 5)
    again = AdamWLp(resumed, **options)
    again.load_state_dict(saved)
    some_run(again, 4, 5)
    for param, other in zip(whole, resumed, strict=True):
        assert torch.equal(param, other)
        for name in MOMENT_NAMES:
            one, two = optimizer.state[param][name], again.state[other][name]
            assert one.dtype == two.dtype and type(one) is type(two)
            assert torch.equal(dense(one), dense(two))


def test_float32_moments_of_bfloat16_weights_lose_no_bit() -> None:
    param = torch.nn.Parameter(normal(70, dtype=torch.bfloat16))
    optimizer = AdamWLp([param], moments="float32", backend="compiled")
    some_run(optimizer, 1, 2, 3)
    before = {name: optimizer.state[param][name].clone() for name in MOMENT_NAMES}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in before.values())
    again = AdamWLp([param], moments="float32", backend="compiled")
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert all(torch.equal(again.state[param][name], value) for name, value in before.items())


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_adamw_checkpoint_becomes_small_moments(moments: str) -> None:
    rival = torch.nn.Parameter(normal(4096))
    adamw = torch.optim.AdamW([rival])
    for seed in range(20):
        rival.grad = normal(4096, seed=seed)
        adamw.step()
    param = torch.nn.Parameter(rival.detach().clone())
    optimizer = AdamWLp([param], moments=moments)
    optimizer.load_state_dict(through_a_file(adamw.state_dict()))
    assert optimizer.param_groups[0]["moments"] == moments
    for name in MOMENT_NAMES:
        exact, stored = adamw.state[rival][name], optimizer.state[param][name]
        if moments == "bfloat16":
            assert stored.dtype == torch.bfloat16
            torch.testing.assert_close(stored.float(), exact, rtol=2.0**-8, atol=0)
        else:
            assert type(stored).__name__ == "OptimState8bit"
            largest = exact.view(-1, 256).abs().amax(1, keepdim=True).expand(-1, 256).reshape(-1)
            assert bool(((stored.dequantize() - exact).abs() <= 0.02 * largest).all())
    param.grad = torch.ones(4096)
    optimizer.step()
    assert bool(param.isfinite().all()) and int(optimizer.state[param]["step"]) == 21


def test_checkpoint_of_bfloat16_moments_continues_in_adamw() -> None:
    param = torch.nn.Parameter(normal(70))
    optimizer = AdamWLp([param], moments="bfloat16", backend="compiled")
    some_run(optimizer, 1, 2)
    rival = torch.nn.Parameter(param.detach().clone())
    adamw = torch.optim.AdamW([rival])
    adamw.load_state_dict(through_a_file(optimizer.state_dict()))
    assert adamw.state[rival]["exp_avg_sq"].dtype == torch.float32
    assert torch.equal(adamw.state[rival]["exp_avg_sq"], optimizer.state[param]["exp_avg_sq"].float())
    rival.grad = torch.ones(70)
    adamw.step()
    assert bool(rival.isfinite().all())


@pytest.mark.parametrize(("backend", "moments"), STATES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_to_the_bit(backend: str, moments: str | None, how: str) -> None:
    param = torch.nn.Parameter(normal(4096))
    optimizer = AdamWLp([param], lr=0.01, lambda_p=0.1, moments=moments, backend=backend)
    some_run(optimizer, 1, 2)
    again = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert again._backend.name == backend
    for each in (optimizer, again):
        some_run(each, 3)
    (other,) = again.param_groups[0]["params"]
    assert other is not param and torch.equal(other, param)


def test_pickle_of_an_older_version_can_be_read() -> None:
    """As ``__setstate__`` says; 0.1.0 knew no backends and no moments."""
    param = torch.nn.Parameter(normal(70))
    param.grad = torch.ones(70)
    optimizer = AdamWLp([param])
    optimizer.step()
    old = copy.deepcopy({key: optimizer.__getstate__()[key] for key in ("defaults", "state", "param_groups")})
    for each in (old["defaults"], *old["param_groups"]):
        del each["moments"]
    again = AdamWLp.__new__(AdamWLp)
    again.__setstate__(old)
    again.step()
    assert again._backend.name == "auto"


# --- what is compiled, when, and what is said of it


def test_nothing_compiles_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters
    from torch._inductor.codecache import CppCodeCache

    assert compiled.unavailable() is None
    library = compiled._library()
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
    assert compiled._library() is library
    assert {path for path in folder.rglob("*") if path.suffix in (".so", ".o", ".cpp")} == before
    assert dict(counters) == counted


STEP = """
import torch
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
    for module in (compiled, foreach, reference):
        name = module.__name__.rpartition(".")[2]
        step: Any = module.step

        def spy(*args: Any, name: str = name, step: Any = step) -> None:
            taken.add(name)
            step(*args)

        monkeypatch.setattr(module, "step", functools.wraps(step)(spy))
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


RESUME = """
import sys, torch
from hf_pdecay import AdamWLp
param = torch.nn.Parameter(torch.ones(4096))
optimizer = AdamWLp([param], moments="8bit")
optimizer.load_state_dict(torch.load(sys.argv[1], weights_only=True))
param.grad = torch.ones(4096)
optimizer.step()
print(int(optimizer.state[param]["step"]))
"""


@pytest.mark.slow
def test_checkpoint_of_8bit_moments_loads_in_a_new_process(tmp_path: Path) -> None:
    """The Trainer builds the optimizer, then loads its state with ``weights_only=True``, before the first step."""
    param = torch.nn.Parameter(torch.ones(4096))
    optimizer = AdamWLp([param], moments="8bit")
    some_run(optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    done = python(RESUME, str(tmp_path / "optimizer.pt"))
    assert done.returncode == 0, done.stderr[-600:]
    assert done.stdout.split() == ["2"]
