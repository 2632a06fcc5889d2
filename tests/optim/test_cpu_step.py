"""Backend "compiled" takes raw addresses: layouts, guard bands, refusals, what is skipped. Other backends beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_pdecay import AdamWLp
from hf_pdecay.optim.backends import BackendChoice
from hf_pdecay.optim.cpu import step as compiled
from hf_pdecay.optim.tensor_step import Hyperparameters, TensorStep
from tests.helpers.memory import PeakMemory
from tests.helpers.steps import BACKENDS, DTYPES, MOMENT_NAMES, OPTIONS, PLAIN, dense, normal, same, snapshot


def step_by(backend: str, *tensors: torch.Tensor) -> None:
    """One step by a backend on weights, gradient, moments and counter that lie where a test has put them."""
    step = TensorStep(*tensors, True, Hyperparameters(**OPTIONS), 0)  # type: ignore[arg-type]
    for share in BackendChoice(backend).assign([step]):
        share.backend.step()


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
            step_by(backend, param, grad, exp_avg, exp_avg_sq, torch.zeros(()))
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


def looks_finite(*grads: torch.Tensor) -> bool:
    hyper = Hyperparameters(0.1, 0.9, 0.999, 1e-8, 0.0, 0.8, 0.01, False, False)
    return compiled.Batch(
        [TensorStep(grad, grad, grad, grad, torch.zeros(()), True, hyper, 0) for grad in grads]
    ).all_finite()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_value_is_found_at_every_place(dtype: torch.dtype) -> None:
    kind, bad, largest = SPECIAL[dtype]
    sign = -(2 ** (8 * torch.finfo(dtype).bits // 8 - 1))
    for size in (1, 2, 3, 4, 5, 31, 67, 130, 262_146):
        stored = torch.full((size,), largest, dtype=kind)
        stored[::2] += sign
        other = torch.zeros(3, dtype=dtype)
        values = stored.view(dtype)
        assert looks_finite(other, values, other), "large finite values are not infinite"
        edges = {0, 1, size // 4 - 1, size // 4, size // 2, 3 * (size // 4), size - 3, size - 2, size - 1}
        for place in range(size) if size < 200 else sorted(edges | {262_143, 262_144}):
            before = int(stored[place])
            for value in bad if size < 70 else bad[:2]:
                for signed in (value, value + sign):
                    stored[place] = signed
                    assert not looks_finite(other, values, other), (size, place, hex(value))
            stored[place] = before
        assert looks_finite(values)


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
@pytest.mark.parametrize("kind", ["gaps", "float16 and bfloat16"])
def test_refusal_of_a_later_tensor_comes_before_anything_is_written(kind: str, careless: int | None) -> None:
    first = torch.nn.Parameter(normal(300))
    dtype = torch.float16 if kind[0] == "f" else torch.float32
    last = torch.nn.Parameter(normal(64, 64, dtype=dtype) if kind != "gaps" else strided(normal(64, 65)))
    moments = "bfloat16" if kind[0] == "f" else None
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
def test_refuses_tensors_that_do_not_match(which: str, other: str) -> None:
    """Read by their addresses they would be read and written beyond their end (here there is room behind it)."""
    tensors = {name: torch.zeros(64) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    tensors[which] = torch.zeros(256)[:32] if other == "fewer" else torch.zeros(256, dtype=torch.bfloat16)[:64]
    if (which, other) == ("exp_avg", "bfloat16"):
        tensors["exp_avg_sq"] = torch.zeros(64)
    step = torch.zeros(())
    with pytest.raises((ValueError, RuntimeError)):
        step_by("compiled", *tensors.values(), step)
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
