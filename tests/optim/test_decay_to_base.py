"""The step of weights whose change from a base decays: against formulas in float64, and what must hold exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_pdecay import AdamWLp, LpDecay
from hf_pdecay.optim.bases import give_bases, next_to


BACKENDS = ("reference", "foreach", "compiled")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPE = (301, 253)  # more than a backend compiles for, and odd


def grads(steps: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(steps)]


def start(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(3))).to(dtype)


def run(optimizer: torch.optim.Optimizer, param: Tensor, gradients: list[Tensor]) -> None:
    for grad in gradients:
        param.grad = torch.empty_like(param).copy_(grad)
        optimizer.step()


def by_formula(w0: Tensor, gradients: list[Tensor], lr: float, p_norm: float, lambda_p: float) -> Tensor:
    """AdamW and the decay of changes in float64; the first step does not decay, as all changes are 0 before it."""
    base, w = w0.double(), w0.double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for number, gradient in enumerate(gradients, 1):
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        stepped = w - lr * (m / (1 - 0.9**number)) / ((v / (1 - 0.999**number)).sqrt() + 1e-8)
        s = (w - base).abs() ** (2 - p_norm)
        factor = torch.ones_like(s) if number == 1 else s / (s + lr * lambda_p)
        w = base + (stepped - base) * factor
    return w


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p_norm", [0.5, 0.8, 1.0, 2.0, 2.5])
def test_the_step_is_that_of_the_formula(backend: str, p_norm: float) -> None:
    param = torch.nn.Parameter(start())
    optimizer = AdamWLp([param], lr=1e-3, p_norm=p_norm, lambda_p=0.2, decay_to="base", backend=backend)
    gradients = grads(12)
    run(optimizer, param, gradients)
    expected = by_formula(start(), gradients, 1e-3, p_norm, 0.2)
    # A change that dies in one of the two a step before it does in the other differs by what was left of it.
    difference = (param.detach().double() - expected).abs()
    assert difference.quantile(0.999) < 4e-7
    assert difference.max() < 1e-4
    if p_norm < 2:
        assert (param == start()).float().mean() > 0.003


@pytest.mark.parametrize("keep_zeros", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_has_died_is_bit_identical_to_the_base_and_stays_so(
    backend: str, dtype: torch.dtype, keep_zeros: bool
) -> None:
    base = start(dtype)
    base.view(-1)[::97] = -0.0
    base.view(-1)[1::97] = 0.0
    param = torch.nn.Parameter(base.clone())
    options: dict[str, Any] = {"p_norm": 0.8, "lambda_p": 0.05, "decay_to": "base", "keep_zeros": keep_zeros}
    optimizer = AdamWLp([param], lr=1e-3, backend=backend, **options)
    gradients = grads(20, dtype=dtype)
    run(optimizer, param, gradients[:2])
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    ends = torch.zeros(SHAPE, dtype=torch.bool)
    for grad in gradients[2:]:
        param.grad = grad.clone()
        before = param.detach() == base
        optimizer.step()
        ends |= before | (param.detach() == base)
        assert torch.equal(param.detach().view(whole)[ends], base.view(whole)[ends])
    assert 0.05 < ends.float().mean() < 1
    assert torch.equal(optimizer.state[param]["base"], base)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_no_change_decays_none_dies(backend: str, dtype: torch.dtype) -> None:
    base = start(dtype)
    param = torch.nn.Parameter(base.clone())
    optimizer = AdamWLp([param], lr=1e-3, lambda_p=0.0, decay_to="base", backend=backend)
    gradients = grads(12, dtype=dtype)
    run(optimizer, param, gradients[:3])
    with torch.no_grad():
        param[::2] = base[::2]
    optimizer.param_groups[0]["lambda_p"] = 1e-24
    changed = param.detach() != base
    for grad in gradients[3:]:
        # A learning rate far below the last bit, and gradients that lead back to the base.
        optimizer.param_groups[0]["lr"] = 1e-6
        param.grad = (param.detach() - base).sign() * grad.abs()
        optimizer.step()
        assert torch.equal(param.detach() != base, changed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_decay_the_step_is_that_of_weights_that_decay_to_zero(backend: str, dtype: torch.dtype) -> None:
    """The dense phase of a run with a target: plain AdamW, with the same rounding."""
    results = []
    for decay_to in ("zero", "base"):
        param = torch.nn.Parameter(start(dtype))
        optimizer = AdamWLp([param], lr=1e-3, lambda_p=0.0, decay_to=decay_to, backend=backend)
        optimizer.param_groups[0]["phase"] = "dense"
        run(optimizer, param, grads(5, dtype=dtype))
        results.append(param.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("moments", [None, "bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree(dtype: torch.dtype, moments: str | None) -> None:
    if moments == "8bit":
        pytest.importorskip("torchao")
    if moments == "bfloat16" and dtype == torch.float16:
        pytest.skip("the compiled step does not know these")
    shape = (256, 320)
    results = []
    for backend in ("foreach", "compiled"):
        param = torch.nn.Parameter(start(dtype, shape))
        options: dict[str, Any] = {"p_norm": 0.8, "lambda_p": 0.2, "decay_to": "base", "keep_zeros": True}
        optimizer = AdamWLp([param], lr=1e-3, moments=moments, backend=backend, **options)
        with torch.no_grad():
            param[:, ::5] = 0
        run(optimizer, param, grads(8, shape, dtype))
        assert not param[:, ::5].any()
        results.append(param.detach())
    same = (results[0] == results[1]).float().mean()
    close = (results[0].float() - results[1].float()).abs().max()
    assert same > (0.98 if dtype != torch.float32 else 0.4)
    assert close < (3e-3 if moments == "8bit" else 1e-3)


def test_keep_zeros_and_a_base_hold_both() -> None:
    base = start()
    base[:, ::3] = 0
    param = torch.nn.Parameter(base.clone())
    optimizer = AdamWLp([param], lr=1e-3, lambda_p=0.05, p_norm=0.8, decay_to="base", keep_zeros=True)
    run(optimizer, param, grads(15))
    assert not param[:, ::3].any()
    died = (param == base)[:, 1::3].float().mean()
    assert 0.02 < died < 0.98


@pytest.mark.parametrize("maximize", [False, True])
def test_a_nan_gradient_skips_the_step(maximize: bool) -> None:
    param = torch.nn.Parameter(start())
    optimizer = AdamWLp([param], lr=1e-3, lambda_p=0.5, decay_to="base", maximize=maximize)
    run(optimizer, param, grads(3))
    before = param.detach().clone()
    param.grad = torch.full_like(param, torch.nan)
    optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("make", [
    lambda params: AdamWLp(params, lr=1e-3, lambda_p=0.3, p_norm=0.8, decay_to="base"),
    lambda params: LpDecay(torch.optim.SGD(params, lr=0.05, momentum=0.9), lambda_p=0.3, p_norm=0.8, decay_to="base"),
])  # fmt: skip
def test_a_run_goes_on_from_a_checkpoint_bit_by_bit(make: Callable[[list[Tensor]], Any], tmp_path: Any) -> None:
    gradients = grads(16)
    param = torch.nn.Parameter(start())
    optimizer = make([param])
    run(optimizer, param, gradients[:8])
    torch.save([param.detach(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    run(optimizer, param, gradients[8:])
    weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other = torch.nn.Parameter(weights)
    resumed = make([other])
    resumed.load_state_dict(state)
    run(resumed, other, gradients[8:])
    assert torch.equal(param, other)
    assert torch.equal(resumed.state[other]["base"], start())
    assert 0.01 < (other == start()).float().mean() < 1


def test_around_adamw_it_is_adamw_lp() -> None:
    results = []
    for around in (False, True):
        param = torch.nn.Parameter(start())
        options: dict[str, Any] = {"lambda_p": 0.2, "p_norm": 0.8, "decay_to": "base"}
        if around:
            optimizer: Any = LpDecay(torch.optim.AdamW([param], lr=1e-3, weight_decay=0.0), **options)
        else:
            optimizer = AdamWLp([param], lr=1e-3, **options)
        run(optimizer, param, grads(10))
        results.append(param.detach())
    assert (results[0] - results[1]).abs().quantile(0.99) < 1e-7
    shares = [(result == start()).float().mean().item() for result in results]
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)
    assert shares[0] > 0.01


@pytest.mark.parametrize("size", [64, SHAPE[0] * SHAPE[1]])
def test_lp_decay_in_low_precision(size: int) -> None:
    """Small tensors decay by plain operations, large ones in C++."""
    base = start(torch.bfloat16, (size,))
    params = [torch.nn.Parameter(base.clone()), torch.nn.Parameter(base[: size // 2].clone())]
    optimizer = LpDecay(torch.optim.SGD(params, lr=0.02), lambda_p=0.05, p_norm=0.8, decay_to="base")
    earlier = [torch.zeros(param.shape, dtype=torch.bool) for param in params]
    for number, grad in enumerate(grads(12, (size,), torch.bfloat16)):
        for param in params:
            param.grad = grad[: param.numel()].clone()
        optimizer.step()
        dead = [param.detach() == base[: param.numel()] for param in params]
        for now, before in zip(dead, earlier, strict=True):
            assert number < 2 or (now | ~before).all()
        earlier = dead
    assert all(mask.any() for mask in dead)
    assert size == 64 or not dead[0].all()


@pytest.mark.parametrize("backend", ["foreach", "compiled"])
@pytest.mark.parametrize("kind", ["row", "column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_units_of_changes_decay_as_one(kind: str, backend: str, dtype: torch.dtype) -> None:
    base, gradients = start(dtype), grads(30, dtype=dtype)
    size = torch.linspace(0.01, 1, SHAPE[0 if kind == "row" else 1])
    scale = size[:, None] if kind == "row" else size[None, :]
    param = torch.nn.Parameter(base.clone())
    group = {"params": [param], "group": kind}
    optimizer = AdamWLp([group], lr=1e-3, lambda_p=0.01, p_norm=0.5, decay_to="base", backend=backend, eps=0.3)
    run(optimizer, param, [(scale * gradients[0].float()).to(dtype)] * 30)
    unchanged = param.detach() == base
    whole = unchanged.all(1 if kind == "row" else 0)
    assert 0.05 < whole.float().mean() < 0.95
    # Those with the least gradients have died.
    assert whole.float()[: len(whole) // 20].mean() > 0.9
    assert whole.float()[-len(whole) // 20 :].mean() < 0.1
    again = copy.deepcopy(param.detach())
    run(optimizer, param, gradients[:3])
    assert torch.equal((param.detach() == base).all(1 if kind == "row" else 0) & whole, whole)
    assert not torch.equal(again, param.detach())


@pytest.mark.parametrize("backend", ["foreach", "compiled"])
def test_two_of_four_changes_decay(backend: str) -> None:
    base = start(shape=(256, 256))
    param = torch.nn.Parameter(base.clone())
    group = {"params": [param], "group": "2:4"}
    optimizer = AdamWLp([group], lr=1e-3, lambda_p=0.5, p_norm=0.8, decay_to="base", backend=backend)
    run(optimizer, param, grads(25, (256, 256)))
    changed = (param.detach() != base).view(256, -1, 4).sum(-1)
    assert changed.min() >= 1
    assert (changed <= 2).float().mean() > 0.5


def test_units_agree_between_backends_and_around_another_optimizer() -> None:
    results = []
    for backend in ("foreach", "compiled", "around"):
        param = torch.nn.Parameter(start())
        group = {"params": [param], "group": "row"}
        options: dict[str, Any] = {"lambda_p": 0.3, "p_norm": 0.5, "decay_to": "base"}
        if backend == "around":
            optimizer: Any = LpDecay(torch.optim.AdamW([group], lr=1e-3, weight_decay=0.0), **options)
        else:
            optimizer = AdamWLp([group], lr=1e-3, backend=backend, **options)
        run(optimizer, param, grads(6))
        results.append(param.detach())
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_in_memory(layout: str, backend: str) -> None:
    shape = (64, 32, 6, 6)
    plain, other = (torch.nn.Parameter(start(shape=shape)) for _ in range(2))
    if layout == "channels_last":
        other.data = other.data.to(memory_format=torch.channels_last)
    else:
        other.data = other.data.transpose(0, 1).contiguous().transpose(0, 1)
    for param in (plain, other):
        optimizer = AdamWLp([param], lr=1e-3, lambda_p=0.3, decay_to="base", backend=backend)
        run(optimizer, param, grads(4, shape))
    torch.testing.assert_close(plain.detach(), other.detach(), rtol=0, atol=1e-6)


def test_another_base_than_the_first_weights() -> None:
    base = start() + 0.01
    param = torch.nn.Parameter(start())
    optimizer = AdamWLp([param], lr=1e-3, lambda_p=5.0, p_norm=0.8, decay_to="base")
    give_bases(optimizer, {param: base})
    run(optimizer, param, grads(60))
    assert optimizer.state[param]["base"] is base
    assert (param == base).float().mean() > 0.5


@pytest.mark.parametrize("kind", ["element", "row", "2:4"])
def test_a_given_base_may_lie_in_memory_in_another_order(kind: str) -> None:
    shape = (256, 320)
    results = []
    for plain in (True, False):
        base = start(shape=shape) + 0.01 * grads(1, shape)[0]
        param = torch.nn.Parameter(start(shape=shape))
        group = {"params": [param], "group": kind}
        optimizer = AdamWLp([group], lr=1e-3, lambda_p=0.3, p_norm=0.8, decay_to="base")
        give_bases(optimizer, {param: base if plain else base.t().contiguous().t()})
        run(optimizer, param, grads(4, shape))
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_bases_that_do_not_fit_are_refused() -> None:
    param, zero = torch.nn.Parameter(start()), torch.nn.Parameter(start())
    groups = [{"params": [param], "decay_to": "base"}, {"params": [zero]}]
    optimizer = AdamWLp(groups, lr=1e-3)
    with pytest.raises(ValueError, match=r"torch.bfloat16.*must be like its parameter"):
        give_bases(optimizer, {param: start(torch.bfloat16)})
    with pytest.raises(ValueError, match="decays to zero"):
        give_bases(optimizer, {zero: start()})
    with pytest.raises(TypeError, match="Only AdamWLp and LpDecay"):
        give_bases(torch.optim.SGD([param], lr=0.1), {param: start()})
    run(LpDecay(torch.optim.SGD([zero], lr=0.1)), zero, grads(1))
    with pytest.raises(ValueError, match="decay_to='bsae'; it must be one of zero, base"):
        AdamWLp([param], decay_to="bsae")


def test_a_checkpoint_of_another_decay_is_refused() -> None:
    param = torch.nn.Parameter(start())
    optimizer = AdamWLp([param], lr=1e-3, decay_to="base")
    run(optimizer, param, grads(2))
    with pytest.raises(ValueError, match="decay_to='base', this optimizer has decay_to='zero'"):
        AdamWLp([param], lr=1e-3).load_state_dict(optimizer.state_dict())


def test_a_tensor_that_has_not_moved_sleeps() -> None:
    """Its first gradient comes late, as that of an expert: else it would be held at the base for ever."""
    early, late = (torch.nn.Parameter(start()) for _ in range(2))
    optimizer = AdamWLp([early, late], lr=1e-3, lambda_p=0.1, decay_to="base")
    for number, grad in enumerate(grads(6)):
        early.grad, late.grad = grad.clone(), grad if number > 3 else torch.zeros_like(grad)
        optimizer.step()
    assert (late != start()).float().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_next_number(dtype: torch.dtype) -> None:
    base = torch.tensor([1.0, -1.0, 0.0, -0.0, 1.5, -1.5, 1e-6, -1e-6], dtype=dtype)
    for sign in (1.0, -1.0):
        following = next_to(base, torch.full_like(base, sign))
        wide = torch.nextafter if dtype in (torch.float32, torch.float64) else None
        if wide is not None:
            assert torch.equal(following, wide(base, torch.full_like(base, sign * torch.inf)))
        assert ((following.double() - base.double()) * sign > 0).all()
        # There is none between the two.
        middle = ((following.double() + base.double()) / 2).to(dtype)
        assert ((middle == following) | (middle == base)).all()


def test_a_schedule_free_optimizer_is_refused() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    param = torch.nn.Parameter(start())
    with pytest.raises(ValueError, match="schedule-free"):
        LpDecay(schedulefree.AdamWScheduleFree([param]), decay_to="base")
