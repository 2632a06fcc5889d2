"""Moments of each kind under each backend: checkpoints, copies and pickles."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_pdecay import AdamWLp
from tests.helpers.steps import BACKENDS, MOMENT_NAMES, dense, normal, python, some_run, through_a_file


STATES = [(backend, moments) for backend in BACKENDS for moments in (None, "float32", "bfloat16")]
STATES += [(backend, "8bit") for backend in ("auto", "foreach", "reference")]


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
