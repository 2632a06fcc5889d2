"""Parameters of other dtypes and shapes than real matrices: complex, whole numbers, float8, no dimension, no weight."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from hf_pdecay import AdamWLp, LpDecay, make_optimizer
from hf_pdecay.optim.optimizer_names import OPTIMIZERS
from hf_pdecay.rules.assign import build_param_groups
from tests.helpers.steps import normal, through_a_file


ADAMW: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
COMPLEX = [torch.complex64, torch.complex128]


def complex_normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex64) -> torch.Tensor:
    real = torch.float64 if dtype == torch.complex128 else torch.float32
    return torch.view_as_complex(normal(*shape, 2, seed=seed, dtype=real).contiguous())


def parameters(dtype: torch.dtype, matrix: bool = True) -> list[nn.Parameter]:
    """Complex ones, of which one begins at zero, and a real matrix that decays."""
    shapes = [(5,), (), (300, 40)]
    some = [nn.Parameter(complex_normal(*shape, seed=k, dtype=dtype)) for k, shape in enumerate(shapes)]
    return [*some, nn.Parameter(torch.zeros(3, dtype=dtype)), nn.Parameter(normal(64, 1100, seed=9))][: 4 + matrix]


def give_grads(params: list[nn.Parameter], seed: int, lazy: bool = False) -> None:
    """With ``lazy`` every other gradient is a conjugate in name only, which torch's AdamW does not take."""
    for k, param in enumerate(params):
        if param.is_complex():
            grad = complex_normal(*param.shape, seed=100 * seed + k, dtype=param.dtype)
            param.grad = grad.conj() if lazy and seed % 2 else grad.conj_physical() if seed % 2 else grad
        else:
            param.grad = normal(*param.shape, seed=100 * seed + k)


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[4:], "lambda_p": 3.0, "p_norm": 0.3}, {"params": params[:4], "lambda_p": 0.0}]


@pytest.mark.parametrize("dtype", COMPLEX)
@pytest.mark.parametrize("moments", [None, "bfloat16", "8bit"])
@pytest.mark.parametrize("backend", ["auto", "compiled", "foreach", "reference"])
def test_complex_parameters_are_stepped_as_by_torch(backend: str, moments: str | None, dtype: torch.dtype) -> None:
    """Beside weights that decay: bit-identical in plain operations, else to 20 last bits of the largest."""
    if moments == "8bit":
        pytest.importorskip("torchao")
    ours, theirs = parameters(dtype), parameters(dtype, matrix=False)
    optimizer = AdamWLp(groups(ours), **ADAMW, backend=backend, moments=moments)
    adamw = torch.optim.AdamW(theirs, **ADAMW)
    for seed in range(6):
        give_grads(ours, seed, lazy=True)
        give_grads(theirs, seed)
        optimizer.step()
        adamw.step()
        if seed == 3:  # a checkpoint goes in between
            saved = through_a_file(optimizer.state_dict())
            optimizer = AdamWLp(groups(ours), **ADAMW, backend=backend, moments=moments)
            optimizer.load_state_dict(saved)
    eps = torch.finfo(dtype).eps
    for one, other in zip(ours[:4], theirs, strict=True):
        if backend == "foreach":
            assert torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=20 * eps, atol=20 * eps)
        for name in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[one][name].dtype == dtype
            torch.testing.assert_close(
                optimizer.state[one][name], adamw.state[other][name], rtol=20 * eps, atol=20 * eps
            )
    assert bool((ours[4] == 0).any())


def test_checkpoints_of_adamw_with_complex_parameters_load() -> None:
    ours, theirs = (parameters(torch.complex64, matrix=False) for _ in range(2))
    adamw, optimizer = torch.optim.AdamW(theirs, **ADAMW), AdamWLp(ours, **ADAMW, lambda_p=0.0)
    give_grads(theirs, 0)
    adamw.step()
    with torch.no_grad():
        for one, other in zip(ours, theirs, strict=True):
            one.copy_(other)
    optimizer.load_state_dict(through_a_file(adamw.state_dict()))
    for seed in (1, 2, 3):
        for params, stepped in ((ours, optimizer), (theirs, adamw)):
            give_grads(params, seed)
            stepped.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    copied = copy.deepcopy(optimizer)
    give_grads(copied.param_groups[0]["params"], 4)
    copied.step()


@pytest.mark.parametrize("bad", [complex(math.nan, 0), complex(0, math.inf)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_bad_complex_gradients_are_seen(bad: complex, wrapped: bool) -> None:
    params = parameters(torch.complex64)
    for name in ("auto", "foreach", "compiled"):
        optimizer: Any = (
            LpDecay(torch.optim.SGD(groups(params), lr=0.1))
            if wrapped
            else AdamWLp(groups(params), **ADAMW, backend=name)
        )
        give_grads(params, 0)
        params[2].grad[7, 3] = bad  # type: ignore[index]
        before = [param.detach().clone() for param in params]
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert all(torch.equal(one, other) for one, other in zip(before, params, strict=True))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_complex_parameters_beside_decay_around_a_base(base: Any) -> None:
    ours, theirs = parameters(torch.complex64), parameters(torch.complex64, matrix=False)
    optimizer, plain = LpDecay(base(groups(ours), lr=0.1)), base(theirs, lr=0.1)
    for seed in range(3):
        give_grads(ours, seed)
        give_grads(theirs, seed)
        optimizer.step()
        plain.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=False))


@pytest.mark.parametrize("settings", [{"lambda_p": 0.1}, {"lambda_p": 0.0, "keep_zeros": True}])
def test_what_cannot_decay_is_refused(settings: dict[str, Any]) -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    for make in (lambda: AdamWLp([param], **settings), lambda: LpDecay(torch.optim.SGD([param], lr=0.1), **settings)):
        with pytest.raises(ValueError, match=r"cannot decay a parameter of torch.complex64 \(shape \(3,\)"):
            make()
    with pytest.raises(ValueError, match="cannot train a parameter of torch.float8_e4m3fn"):
        AdamWLp([nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn))], lambda_p=0.0)


def test_a_lambda_p_that_comes_later_is_refused_too() -> None:
    optimizers = [
        AdamWLp(parameters(torch.complex64, matrix=False), lambda_p=0.0),
        LpDecay(torch.optim.SGD(parameters(torch.complex64, matrix=False), lr=0.1), lambda_p=0.0),
    ]
    for optimizer in optimizers:
        for later in (False, True):
            give_grads(optimizer.param_groups[0]["params"], 0)
            optimizer.param_groups[0]["lambda_p"] = 0.1 * later
            if not later:
                optimizer.step()
                continue
            with pytest.raises(ValueError, match="cannot decay a parameter of torch.complex64"):
                optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "compiled", "foreach", "reference"])
def test_parameters_of_no_dimension_and_of_no_weight(backend: str) -> None:
    """Also those that are whole numbers and never have a gradient, as in quantised layers."""
    params = [nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.empty(0, 5)), nn.Parameter(torch.empty(0))]
    whole = nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)
    optimizer = AdamWLp(
        [{"params": params}, {"params": [whole], "lambda_p": 0.0}], lr=0.1, lambda_p=1.0, p_norm=0.5, backend=backend
    )
    base = LpDecay(torch.optim.SGD([nn.Parameter(param.detach().clone()) for param in params], lr=0.1), lambda_p=9.0)
    for stepped in (optimizer, base):
        for _ in range(20):
            for param in stepped.param_groups[0]["params"]:
                param.grad = torch.zeros_like(param)
            stepped.step()
        assert stepped.param_groups[0]["params"][0].item() == 0
        stepped.load_state_dict(through_a_file(stepped.state_dict()))
    assert whole.tolist() == [0, 1, 2, 3]


class Spectral(nn.Module):
    """A complex parameter, a complex layer, and a real layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(complex_normal(5))
        self.rotate = nn.Linear(4, 4, dtype=torch.complex64)
        self.up = nn.Linear(8, 8)


def test_rules_for_what_cannot_decay() -> None:
    model = Spectral()
    decayed = [group for group in build_param_groups(model, p_norm=0.8, lambda_p=0.1) if group["decayed"]]
    assert [tuple(param.shape) for group in decayed for param in group["params"]] == [(8, 8)]
    for pattern, name in (("mix", "mix"), ("rotate", "rotate.weight"), (".*", "rotate.weight")):
        with pytest.raises(ValueError, match=rf"takes {name}, whose dtype torch.complex64 does not decay"):
            build_param_groups(model, p_norm=0.8, lambda_p=0.1, rules={pattern: {"p_norm": 1.0}})
    rules: Any = {"rotate": "off", "mix": "off", ".*": {"p_norm": 1.0}}
    build_param_groups(model, p_norm=0.8, lambda_p=0.1, rules=rules)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_names_of_optimizers_say_early_whether_they_take_complex_parameters(name: str) -> None:
    if OPTIMIZERS[name].package is not None:
        pytest.importorskip(OPTIMIZERS[name].package[0])  # type: ignore[index]
    model = Spectral()
    groups = build_param_groups(model, p_norm=0.8, lambda_p=0.1)
    if not OPTIMIZERS[name].takes_complex:
        with pytest.raises(ValueError, match=r"does not take complex parameters, and 3 are to be trained, such as"):
            make_optimizer(name, groups, lr=0.01)
        return
    optimizer = make_optimizer(name, groups, lr=0.01)
    before = [param.detach().clone() for param in model.parameters()]
    for param in model.parameters():
        param.grad = complex_normal(*param.shape) if param.is_complex() else normal(*param.shape)
    optimizer.step()
    assert not any(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
