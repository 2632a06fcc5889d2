"""λ_p = 0 is torch.optim.AdamW to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_pdecay import AdamWLp
from tests.helpers import steps


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def race(
    weights: list[torch.Tensor], steps: int, seed: int = 0, lr_now: float | None = None, **options: Any
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Run both optimizers on the same gradients and compare weights and moments after every step, to the bit."""
    ours = [torch.nn.Parameter(w.clone(memory_format=torch.preserve_format)) for w in weights]
    theirs = [torch.nn.Parameter(w.clone(memory_format=torch.preserve_format)) for w in weights]
    optimizer = AdamWLp(ours, lambda_p=0.0, **options)
    adamw = torch.optim.AdamW(theirs, foreach=False, **{"weight_decay": 0.0, **options})
    source = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for mine, other in zip(ours, theirs, strict=True):
            grad = torch.randn(mine.shape, generator=source)
            grad = (grad + 0.1 * grad.sign()).to(mine.dtype)  # away from 0, so that float16 holds its square
            mine.grad, other.grad = grad.clone(), grad.clone()
        if lr_now is not None and step == 1:
            optimizer.param_groups[0]["lr"] = adamw.param_groups[0]["lr"] = lr_now
        optimizer.step()
        adamw.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other), f"step {step}: {(mine != other).sum()} of {mine.numel()} weights differ"
            assert mine.stride() == other.stride()
            for name in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(optimizer.state[mine][name], adamw.state[other][name]), name
    return ours, theirs


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11)).to(dtype)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"lr": 3e-2, "weight_decay": 0.01, "maximize": True},
    {"betas": (0.8, 0.95), "eps": 1e-4, "lr": 1e-4},
    {"betas": (0.0, 0.99), "weight_decay": 0.3},
    {"lr": 0.0, "weight_decay": 0.1},
    {"lr": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_steps_of_odd_sizes(options: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        options = {**options, "eps": 1e-4}  # 1e-8 is 0 in float16
    shapes = [(), (1,), (7,), (31,), (33, 3), (129,), (5, 0), (1003,)]
    race([normal(*shape, dtype=dtype) for shape in shapes], steps=25, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [262_144, 262_145, 300_000, 1_000_003])
def test_sizes_around_and_above_a_chunk(size: int, dtype: torch.dtype) -> None:
    race([normal(size, dtype=dtype)], steps=3, weight_decay=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_formats(dtype: torch.dtype) -> None:
    conv = normal(8, 6, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    transposed = normal(13, 7, dtype=dtype).t()
    large = normal(700, 501, dtype=dtype).t()
    large_conv = normal(256, 130, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    assert not any(t.is_contiguous() for t in (conv, transposed, large, large_conv))
    race([conv, transposed, large, large_conv], steps=4, weight_decay=0.1)


def test_parameter_that_is_a_strided_view() -> None:
    base = normal(40, 9)
    mine, other = base.clone(), base.clone()
    views = [mine[::3, 1::2], other[::3, 1::2]]
    for view in views:
        view.requires_grad_()
    optimizer = AdamWLp([views[0]], lambda_p=0.0)
    adamw = torch.optim.AdamW([views[1]], weight_decay=0.0, foreach=False)
    for _ in range(5):
        for view in views:
            view.grad = normal(*view.shape)
        optimizer.step()
        adamw.step()
    assert torch.equal(mine, other)
    assert not torch.equal(mine, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    lr = torch.full(shape, 1e-3, dtype=dtype)
    # A 0-dim parameter times a 0-dim float64 lr is a float64 product in torch: left out there.
    weights = [normal(37), normal()] if dtype == torch.float32 else [normal(37)]
    race(weights, steps=5, weight_decay=0.1, lr=lr)
    assert torch.equal(lr, torch.full(shape, 1e-3, dtype=dtype))


def test_lr_that_a_scheduler_moved() -> None:
    race([normal(37)], steps=5, weight_decay=0.1, lr_now=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p_norm", [0.1, 0.8, 2.0, 3.0])
def test_p_norm_says_nothing_without_lambda_p(dtype: torch.dtype, p_norm: float) -> None:
    weight = torch.nn.Parameter(normal(65, dtype=dtype))
    other = torch.nn.Parameter(normal(65, dtype=dtype))
    optimizer = AdamWLp([weight], p_norm=p_norm, lambda_p=0.0, eps=1e-4)
    adamw = torch.optim.AdamW([other], eps=1e-4, weight_decay=0.0, foreach=False)
    for _ in range(5):
        weight.grad, other.grad = normal(65, dtype=dtype), normal(65, dtype=dtype)
        optimizer.step()
        adamw.step()
    assert torch.equal(weight, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wholly_zero_and_partly_zero_tensors(dtype: torch.dtype) -> None:
    partly = normal(33, dtype=dtype)
    partly[::3] = 0
    race([torch.zeros(9, dtype=dtype), partly], steps=6, weight_decay=0.1, eps=1e-4)


def test_group_without_decay_beside_one_with() -> None:
    decayed, plain, other = (torch.nn.Parameter(normal(40)) for _ in range(3))
    groups = [{"params": [decayed], "lambda_p": 0.5}, {"params": [plain], "lambda_p": 0.0}]
    optimizer = AdamWLp(groups, lr=0.01)
    adamw = torch.optim.AdamW([other], lr=0.01, weight_decay=0.0, foreach=False)
    for _ in range(6):
        for parameter in (decayed, plain, other):
            parameter.grad = normal(40)
        optimizer.step()
        adamw.step()
    assert torch.equal(plain, other)
    assert not torch.equal(decayed, other)


def test_non_contiguous_gradient() -> None:
    weight, other = torch.nn.Parameter(normal(600, 501)), torch.nn.Parameter(normal(600, 501))
    optimizer = AdamWLp([weight], lambda_p=0.0)
    adamw = torch.optim.AdamW([other], weight_decay=0.0, foreach=False)
    for grad in (normal(501, 600).t(), normal(600, 1).expand(600, 501), normal(600, 501)):
        weight.grad, other.grad = grad, grad
        optimizer.step()
        adamw.step()
    assert torch.equal(weight, other)


# --- large models, which the compiled step does


def race_of_groups(
    *lambdas: float, size: int, dtype: torch.dtype = torch.float32
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The weights of AdamWLp's groups of those λ_p under "auto", each with those of torch's AdamW."""
    ours = [torch.nn.Parameter(steps.normal(size, seed=k, dtype=dtype)) for k in range(len(lambdas))]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    groups: list[dict[str, Any]] = [{"params": [p], "lambda_p": x} for p, x in zip(ours, lambdas, strict=True)]
    optimizer = AdamWLp(groups, weight_decay=0.1)
    adamw = torch.optim.AdamW(theirs, weight_decay=0.1)
    for seed in range(8):
        for k, (param, rival) in enumerate(zip(ours, theirs, strict=True)):
            param.grad = steps.normal(size, seed=10 * seed + k, dtype=dtype)
            rival.grad = param.grad.clone()
        optimizer.step()
        adamw.step()
    return list(zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_model_without_decay_is_adamw_to_the_bit(dtype: torch.dtype) -> None:
    assert all(torch.equal(one, other) for one, other in race_of_groups(0.0, 0.0, size=70_000, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_group_without_decay_beside_one_that_decays_is_adamw_to_rounding(dtype: torch.dtype) -> None:
    (decayed, plain), (one, other) = race_of_groups(0.1, 0.0, size=70_000, dtype=dtype)
    assert not torch.equal(decayed, plain)
    torch.testing.assert_close(one, other, rtol=16 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
