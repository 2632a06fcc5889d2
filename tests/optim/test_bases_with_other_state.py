"""Bases that keep what Adam does not: entries of no parameter, and second moments that are not of each weight."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_pdecay import LpDecay, SparsityControl
from hf_pdecay.optim.muon import MuonWithAdamW
from tests.helpers.steps import normal, through_a_file


SHAPES = [(16, 24), (8, 8), (24,)]
STEPS = 40


class Counting(torch.optim.SGD):
    """Keeps a number, a tensor and a dict of its own, as SPAM, MADGRAD and TRAC do."""

    def step(self, closure: Any = None) -> Any:
        own: Any = self.state
        own["number"] = own.get("number", 0) + 1
        own["k"] = own.get("k", torch.tensor([0])) + 1
        own.setdefault("more", {})["step"] = own["number"]
        return super().step(closure)


class Wrapped(Counting):
    """Its checkpoints have a form of their own, as those of Magma."""

    def state_dict(self) -> dict[str, Any]:
        return {"base": super().state_dict(), "tau": 2.0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["base"])


def second(name: str, value: Callable[[torch.Tensor], Any], *, only: int | None = None) -> type[torch.optim.SGD]:
    """An optimizer that keeps something by this name for each parameter, or for one of a number of dimensions."""

    class Keeping(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        self.state[param]["exp_avg_sq"] = param.grad.square()
                        if only in (None, param.dim()):
                            self.state[param][name] = value(param.grad)
            return result

    return Keeping


BASES: dict[str, type[torch.optim.SGD]] = {
    "of a tensor (Amos)": second("exp_avg_sq", lambda grad: grad.square().mean()),
    "of rows (Nero)": second("exp_avg_sq", lambda grad: grad.square().mean(-1, keepdim=True)),
    "of a projection (GaLore)": second("exp_avg_sq", lambda grad: grad.square()[:4]),
    "of a projection as large": second("projector", lambda grad: torch.eye(2)),
    "of eigenvectors (SOAP)": second("Q", lambda grad: [torch.eye(2)]),
    "of the matrices alone": second("exp_avg_sq", lambda grad: grad.square()[:4], only=2),
    "none (sparse masks)": second("exp_avg_sq", lambda grad: None),
}


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(normal(*shape, seed=k) * 0.3) for k, shape in enumerate(SHAPES)]


def train(optimizer: LpDecay, params: list[nn.Parameter], steps: range) -> LpDecay:
    control = SparsityControl(optimizer, STEPS, target_sparsity=0.5)
    for step in steps:
        for k, param in enumerate(params):
            # Gradients of small weights are large, so that the two scores choose others.
            param.grad = normal(*param.shape, seed=100 * step + k) / (param.detach().abs() + 0.01)
        control.before_step(step)
        optimizer.step()
        control.after_step(step)
    return optimizer


def zeros(params: list[nn.Parameter]) -> int:
    return sum(int((param == 0).sum()) for param in params)


@pytest.mark.parametrize("kind", [Counting, Wrapped])
def test_what_a_base_keeps_for_itself_stays(kind: type[Counting]) -> None:
    whole, params, cut = parameters(), parameters(), parameters()
    plain = kind(parameters(), lr=0.001, momentum=0.9)
    train(LpDecay(kind(whole, lr=0.001, momentum=0.9)), whole, range(1, STEPS + 1))
    assert zeros(whole) == sum(param.numel() for param in whole) // 2
    half = train(LpDecay(kind(params, lr=0.001, momentum=0.9)), params, range(1, 21))
    own: Any = half.state
    assert own["number"] == own["more"]["step"] == 20 and own["k"].tolist() == [20]
    assert set(half.state_dict()) == set(plain.state_dict())
    for copied in (copy.deepcopy(half), pickle.loads(pickle.dumps(half))):
        assert copied.state["number"] == 20
        train(copied, copied.param_groups[0]["params"], range(21, STEPS + 1))
        assert all(torch.equal(a, b) for a, b in zip(copied.param_groups[0]["params"], whole, strict=True))
    with torch.no_grad():
        for one, other in zip(cut, params, strict=True):
            one.copy_(other)
    again = LpDecay(kind(cut, lr=0.5), p_norm=0.3)
    again.load_state_dict(through_a_file(half.state_dict()))
    assert again.param_groups[0]["p_norm"] == 0.8
    train(again, cut, range(21, STEPS + 1))
    assert all(torch.equal(one, other) for one, other in zip(cut, whole, strict=True))


@pytest.mark.parametrize("kind", [Counting, Wrapped])
def test_a_checkpoint_of_such_a_base_alone_loads(kind: type[Counting]) -> None:
    params = parameters()
    base = kind(params, lr=0.001)
    for param in params:
        param.grad = torch.ones_like(param)
    base.step()
    optimizer = LpDecay(kind(parameters(), lr=0.5), p_norm=0.3, lambda_p=0.2)
    optimizer.load_state_dict(through_a_file(base.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["p_norm"], group["lambda_p"]) == (0.001, 0.3, 0.2)
    for param in group["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.base.state["number"] == 2  # type: ignore[index]


@pytest.mark.parametrize("units", ["element", "row", "2:4"])
@pytest.mark.parametrize("name", BASES)
def test_weights_are_ranked_by_what_there_is(name: str, units: str, caplog: pytest.LogCaptureFixture) -> None:
    """The zeros are those of the same run without any second moment."""
    results = []
    for kind in (BASES[name], torch.optim.SGD):
        params = parameters()
        decayed = params if units == "element" else params[:2]
        groups = [{"params": decayed, "group": units}]
        if units != "2:4":
            with caplog.at_level(logging.WARNING, "hf_pdecay"):
                train(LpDecay(kind(groups, lr=0.001)), params, range(1, STEPS + 1))
        else:
            optimizer = LpDecay(kind(groups, lr=0.001))
            control = SparsityControl(optimizer, STEPS)
            for step in range(1, STEPS + 1):
                for k, param in enumerate(params):
                    param.grad = normal(*param.shape, seed=100 * step + k) / (param.detach().abs() + 0.01)
                control.before_step(step)
                optimizer.step()
                control.after_step(step)
        if units != "row":
            assert zeros(decayed) == sum(param.numel() for param in decayed) // 2
        results.append(params)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    said = [record for record in caplog.records if "ranked by magnitude alone" in record.message]
    assert len(said) == 1


def test_second_moments_of_each_weight_are_read_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    results = []
    for kind in (second("more", lambda grad: None), torch.optim.SGD):
        params = parameters()
        train(LpDecay(kind(params, lr=0.001)), params, range(1, STEPS + 1))
        results.append(params)
    assert not torch.equal(results[0][0] == 0, results[1][0] == 0)
    assert "magnitude" not in caplog.text


def test_moments_of_some_tensors_alone_rank_none(caplog: pytest.LogCaptureFixture) -> None:
    """Muon keeps none of matrices, and AdamW beside it one of convolutions; they share a target."""
    matrix, kernel = nn.Parameter(normal(20, 30) * 0.3), nn.Parameter(normal(10, 10, 3, 3, seed=1) * 0.3)
    optimizer = LpDecay(MuonWithAdamW([matrix, kernel], lr=1e-4))
    train(optimizer, [matrix, kernel], range(1, STEPS + 1))
    for param in (matrix, kernel):
        assert 0.4 < float((param == 0).float().mean()) < 0.6
    assert "for 1 of 2 tensors" in caplog.text


def test_optimizers_of_other_packages() -> None:
    """Where they are installed."""
    tried = 0
    for package, name, options in (
        ("madgrad", "MADGRAD", {"lr": 0.01}),
        ("pytorch_optimizer", "Amos", {"lr": 0.01}),
        ("pytorch_optimizer", "SOAP", {"lr": 0.01}),
        ("pytorch_optimizer", "SPAM", {"lr": 0.01}),
        ("galore_torch", "GaLoreAdamW", {"lr": 0.01}),
    ):
        try:
            module = __import__(package)
        except ImportError:
            continue
        params = parameters()
        groups: list[dict[str, Any]] = [{"params": params}]
        if package == "galore_torch":
            projection = {"rank": 4, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
            groups = [{"params": params[:2], **projection}, {"params": params[2:]}]
        train(LpDecay(getattr(module, name)(groups, **options)), params, range(1, STEPS + 1))
        assert zeros(params) == sum(param.numel() for param in params) // 2, name
        tried += 1
    if not tried:
        pytest.skip("needs madgrad, pytorch_optimizer or galore_torch")
