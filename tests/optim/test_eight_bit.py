"""Moments in 8 bits within the C++ step: torchao's numbers, code by code, and the step of plain operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


pytest.importorskip("torchao")

from hf_pdecay import AdamWLp  # noqa: E402

from ..helpers.eight_bit import borders, state_of  # noqa: E402
from ..helpers.reference.adamw_lp64 import Hyper, Reference  # noqa: E402
from ..helpers.steps import normal  # noqa: E402


quick = settings(derandomize=True, deadline=None, max_examples=60)


def stored(gradient: torch.Tensor) -> tuple[Any, Any]:
    """What a step without memory stores: the first moment is the gradient and the second its square."""
    param = torch.nn.Parameter(torch.ones_like(gradient))
    options: dict[str, Any] = {"betas": (0.0, 0.0), "moments": "8bit", "backend": "compiled", "skip_nonfinite": False}
    optimizer = AdamWLp([param], lr=1e-3, **options)
    param.grad = gradient
    optimizer.step()
    state = optimizer.state[param]
    assert type(state["exp_avg"]).__name__ == "OptimState8bit"
    return state["exp_avg"], state["exp_avg_sq"]


def check_codes(gradient: torch.Tensor) -> None:
    first, second = stored(gradient)
    for found, expected in ((first, state_of(gradient, True)), (second, state_of(gradient * gradient, False))):
        assert torch.equal(found.scale, expected.scale)
        assert torch.equal(found.codes, expected.codes)


def test_values_at_the_borders_get_torchaos_codes() -> None:
    values = torch.cat([borders(True), borders(False).sqrt()])
    check_codes(torch.cat([values, values.new_zeros(4096)]))


def test_all_codes_of_the_second_moment_come_up() -> None:
    numbers = state_of(torch.zeros(256), False).qmap
    first, second = stored(numbers.sqrt().repeat(16))
    assert len(second.codes.unique()) >= 250
    torch.testing.assert_close(second.dequantize(), numbers.repeat(16), rtol=0.02, atol=0)
    assert len(first.codes.unique()) >= 100


@quick
@given(st.data())
def test_any_values_get_torchaos_codes(data: st.DataObject) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    exponents = data.draw(st.sampled_from([(-1, 1), (-8, 0), (-30, -20), (-37, 18), (0, 18)]))
    values = generator.normal(size=4096 + 256) * 10.0 ** generator.uniform(*exponents, size=4096 + 256)
    values[generator.random(values.shape) < data.draw(st.sampled_from([0.0, 0.5, 0.99]))] = 0
    check_codes(torch.from_numpy(values.astype(np.float32)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_block(bad: float) -> None:
    gradient = normal(4096)
    gradient[700] = bad
    first, second = stored(gradient)
    for moment in (first, second):
        lost = ~moment.dequantize().isfinite()
        assert bool(lost[512:768].any()) and not bool(lost[:512].any()) and not bool(lost[768:].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p_norm", [0.5, 1.0, 2.0, 3.0])
def test_a_step_is_the_formula_and_its_moments_torchaos(p_norm: float, dtype: torch.dtype) -> None:
    """Step by step from the same state, by the reference in float64."""
    hyper = Hyper(lr=0.02, weight_decay=0.1, p_norm=p_norm, lambda_p=0.5)
    param = torch.nn.Parameter((normal(4096 + 768) * 0.3).to(dtype))
    param.data[::7] = 0
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "p_norm": p_norm, "lambda_p": 0.5}
    optimizer = AdamWLp([param], moments="8bit", backend="compiled", **options)
    for seed in range(1, 5):
        state = optimizer.state[param]
        before = param.detach().double().numpy()
        reference = Reference(before)
        if state:
            moments = [state[name].dequantize().double().numpy() for name in ("exp_avg", "exp_avg_sq")]
            reference = Reference(before, *moments, int(state["step"]), dormant=False)
        param.grad = normal(4096 + 768, seed=seed).to(dtype)
        expected = torch.from_numpy(reference.step(param.grad.double().tolist(), hyper))
        optimizer.step()
        found = param.detach().double()
        scale = torch.from_numpy(reference.scale * reference.factor)
        unit = 0.0 if dtype == torch.float32 else float(torch.finfo(dtype).eps)
        allowed = 2e-6 * scale + (5e-5 + unit) * expected.abs() + (1e-22 if dtype == torch.float32 else 6e-8)
        assert bool(((found - expected).abs() <= allowed).all())
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            exact = state_of(torch.from_numpy(getattr(reference, name)).float(), signed)
            codes, right = optimizer.state[param][name].codes.int(), exact.codes.int()
            # Values are computed in float32: at a border the last bit decides.
            assert int((codes - right).abs().max()) <= 1 and float((codes != right).float().mean()) < 2e-3
            torch.testing.assert_close(optimizer.state[param][name].scale, exact.scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("more", [{}, {"group": "row"}, {"group": "2:4"}, {"keep_zeros": True}, {"lambda_p": 0.0}])
def test_the_backends_agree(more: dict[str, Any]) -> None:
    found = []
    for backend in ("compiled", "foreach"):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(normal(*shape, seed=k) * 0.3) for k, shape in enumerate([(64, 256), (512, 16)])]
        params[0].data[:, ::5] = 0
        groups = [{"params": params, "lambda_p": 0.3, **more}]
        optimizer = AdamWLp(groups, lr=0.01, moments="8bit", backend=backend)
        for seed in range(3):
            for k, param in enumerate(params):
                param.grad = normal(*param.shape, seed=10 * seed + k)
            optimizer.step()
        found.append([param.detach() for param in params])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)
        assert torch.equal(one == 0, other == 0)


def test_a_map_that_is_none_of_torchaos() -> None:
    """Numbers that lie so near one another that the first bits do not tell them apart."""
    param = torch.nn.Parameter(normal(4096))
    optimizer = AdamWLp([param], betas=(0.0, 0.0), moments="8bit", backend="compiled", lr=1e-3)
    param.grad = normal(4096)
    optimizer.step()
    moment: Any = optimizer.state[param]["exp_avg"]
    moment.qmap.copy_(torch.linspace(-1, 1, 256))
    moment.qmap[100:150] = moment.qmap[100] + torch.arange(50) * 1e-5
    gradient = normal(4096, seed=3)
    param.grad = gradient
    optimizer.step()
    expected = state_of(gradient, True)
    expected.qmap.copy_(moment.qmap)
    expected.copy_(gradient)
    assert torch.equal(moment.codes, expected.codes)


def test_a_map_of_numbers_that_lie_far_apart() -> None:
    param = torch.nn.Parameter(normal(4096))
    optimizer = AdamWLp([param], betas=(0.0, 0.0), moments="8bit", backend="compiled", lr=1e-3)
    gradient = normal(4096, seed=3)
    param.grad = gradient.clone()
    optimizer.step()
    moment: Any = optimizer.state[param]["exp_avg"]
    moment.qmap[:128], moment.qmap[128:] = -1e38, 1e38
    optimizer.step()
    expected = state_of(gradient, True)
    expected.qmap.copy_(moment.qmap)
    expected.copy_(gradient)
    assert torch.equal(moment.codes, expected.codes)


def test_other_moments_are_refused() -> None:
    def refused(change: Any) -> str:
        param = torch.nn.Parameter(normal(4096))
        optimizer = AdamWLp([param], moments="8bit", backend="compiled")
        param.grad = normal(4096)
        optimizer.step()
        before = param.detach().clone()
        change(optimizer.state[param])
        with pytest.raises(ValueError, match="backend='compiled' cannot do the step of a tensor") as error:
            optimizer.step()
        assert torch.equal(param, before)
        return str(error.value)

    def shorter(state: dict[str, Any]) -> None:
        state["exp_avg"].scale = state["exp_avg"].scale[:-1].clone()

    def plain(state: dict[str, Any]) -> None:
        state["exp_avg"] = state["exp_avg"].dequantize()

    def gaps(state: dict[str, Any]) -> None:
        state["exp_avg_sq"].codes = torch.zeros(8192, dtype=torch.uint8)[::2]

    def halved(state: dict[str, Any]) -> None:
        state["exp_avg"].qmap = state["exp_avg"].qmap[:128].clone()

    def wide(state: dict[str, Any]) -> None:
        state["exp_avg"].scale = state["exp_avg"].scale.double()

    assert "one scale for 256 values" in refused(shorter)
    assert "both moments in 8 bits, or neither" in refused(plain)
    assert "without gaps" in refused(gaps)
    assert "a map of 256 numbers" in refused(halved)
    assert "torch.float64" in refused(wide)
