"""A step that does again what the last one did: it notices whatever has changed since."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_pdecay import AdamWLp, LpDecay
from tests.helpers.steps import normal, snapshot


SHAPES = [(300, 300), (7,), (64, 3, 3, 3), (40, 52)]


class Twins:
    """Two optimizers on equal weights, of which one finds out everything anew in each step."""

    def __init__(self, dtype: torch.dtype = torch.float32, first: dict[str, Any] | None = None, **options: Any) -> None:
        self.params = [
            [torch.nn.Parameter(normal(*shape, seed=seed).mul(0.1).to(dtype)) for seed, shape in enumerate(SHAPES)]
            for _ in range(2)
        ]
        self.optimizers = []
        for params in self.params:
            groups = [
                {"params": params[:2], **(first or {})},
                {"params": params[2:], "p_norm": 1.0, "weight_decay": 0.1},
            ]
            self.optimizers.append(AdamWLp(groups, lr=1e-2, lambda_p=0.1, **options))
        self.seed = 10

    def step(self, planned: bool) -> None:
        """One step of both on new gradients.

        Args:
            planned: Whether the first is to have done again what its last step did.
        """
        self.seed += 10
        for params in self.params:
            for number, param in enumerate(params):
                if param.grad is not None or self.seed == 20:
                    fresh = normal(*param.shape, seed=self.seed + number).to(param.dtype)
                    transposed = param.grad is not None and not param.grad.is_contiguous()
                    param.grad = fresh.mT.contiguous().mT if transposed else fresh
        first, second = self.optimizers
        second._cache.last = None
        plan = first._cache.last
        first.step()
        second.step()
        assert (plan is not None and first._cache.last is plan) == planned
        assert all(torch.equal(a, b) for a, b in zip(snapshot(first), snapshot(second), strict=True))

    def each(self, change: Callable[[AdamWLp, list[torch.nn.Parameter]], object]) -> None:
        for optimizer, params in zip(self.optimizers, self.params, strict=True):
            change(optimizer, params)


def begun(**options: Any) -> Twins:
    twins = Twins(**options)
    twins.step(planned=False)
    assert twins.optimizers[0].backends["cpu"][0] == "compiled"
    twins.step(planned=True)
    return twins


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_may_change(dtype: torch.dtype) -> None:
    twins = begun(dtype=dtype)
    for key, value in (("lr", 0.5), ("p_norm", 0.3), ("lambda_p", 0.7), ("betas", (0.5, 0.9)), ("eps", 1e-3)):
        twins.each(lambda optimizer, _, key=key, value=value: optimizer.param_groups[0].update({key: value}))
        twins.step(planned=True)


# Row k of the matrix with element k of the vector, as far as it goes; two more units of the matrix's other rows.
NEURONS = {
    "group": "neuron",
    "units": [
        {"count": 7, "members": [{"param": 0, "dim": 0, "size": 2}, {"param": 1, "dim": 0}]},
        {"count": 100, "members": [{"param": 0, "dim": 0, "offset": 14}]},
        {"count": 62, "members": [{"param": 0, "dim": 0, "size": 3, "offset": 114}]},
    ],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["neuron", "row", "2:4"])
def test_what_decays_by_groups_is_done_again_with_new_norms(kind: str, dtype: torch.dtype) -> None:
    twins = Twins(dtype, first=NEURONS if kind == "neuron" else None)
    if kind != "neuron":
        twins.each(
            lambda optimizer, _: optimizer.param_groups[1].update(params=optimizer.param_groups[1]["params"][1:])
        )
        twins.each(lambda optimizer, _: optimizer.param_groups[1].update({"group": kind, "units": None}))
    twins.step(planned=False)
    twins.step(planned=True)
    for key, value in (("lr", 0.5), ("p_norm", 0.3), ("lambda_p", 0.7), ("lr", 0.0), ("lr", 0.1), ("p_norm", 2.0)):
        twins.each(lambda optimizer, _, key=key, value=value: _set(optimizer, key, value))
        twins.step(planned=True)
    twins.each(lambda _, params: params[0].data.mul_(3))
    twins.step(planned=True)
    twins.each(lambda optimizer, _: _set(optimizer, "lambda_p", 0.0))
    twins.step(planned=False)


def _set(optimizer: AdamWLp, key: str, value: float) -> None:
    for group in optimizer.param_groups:
        group[key] = value


def element(optimizer: AdamWLp, _: list[torch.nn.Parameter]) -> None:
    optimizer.param_groups[0].update({"group": "element", "units": None})


def other_couplings(optimizer: AdamWLp, _: list[torch.nn.Parameter]) -> None:
    optimizer.param_groups[0]["units"] = NEURONS["units"][:2]  # type: ignore[index]


def no_gradient(_: AdamWLp, params: list[torch.nn.Parameter]) -> None:
    params[1].grad = None


def transposed(_: AdamWLp, params: list[torch.nn.Parameter]) -> None:
    params[0].data = params[0].data.mT


def reshaped(_: AdamWLp, params: list[torch.nn.Parameter]) -> None:
    """As many weights at the same address, and rows of another length."""
    params[0].data = params[0].data.view(450, 200)
    params[0].grad = normal(450, 200)


@pytest.mark.parametrize("change", [element, other_couplings, no_gradient, transposed, reshaped])
def test_other_groups_are_noticed(change: Callable[[AdamWLp, list[torch.nn.Parameter]], object]) -> None:
    twins = Twins(first=NEURONS)
    twins.step(planned=False)
    twins.step(planned=True)
    twins.each(change)
    twins.step(planned=False)


def test_couplings_that_change_in_place_are_noticed() -> None:
    twins = Twins(first=copy.deepcopy(NEURONS))
    twins.each(lambda optimizer, _: optimizer.param_groups[0].update(units=copy.deepcopy(NEURONS["units"])))
    twins.step(planned=False)
    twins.step(planned=True)
    twins.each(lambda optimizer, _: optimizer.param_groups[0]["units"][1].update(count=50))
    twins.step(planned=False)


@pytest.mark.parametrize(("kind", "member"), [("row", {"dim": 0}), ("2:4", {"dim": 1, "size": 1})])
def test_the_learning_rate_reaches_weights_in_no_group(kind: str, member: dict[str, int]) -> None:
    """The vector stands in the param group, and in no coupling."""
    units = [{"count": 300, "members": [{"param": 0, **member}]}]
    twins = Twins(first={"group": kind, "units": units})
    twins.step(planned=False)
    twins.step(planned=False)
    twins.each(lambda optimizer, _: _set(optimizer, "lr", 0.0))
    before = twins.params[0][1].detach().clone()
    twins.step(planned=False)
    assert torch.equal(twins.params[0][1], before)


@pytest.mark.parametrize("wrapped", [False, True])
def test_couplings_that_do_not_fit_any_more_are_refused(wrapped: bool) -> None:
    """They come with a checkpoint, or by hand, and compiled functions write where they say."""
    params = [torch.nn.Parameter(normal(*shape)) for shape in SHAPES[:2]]
    groups = [{"params": params, **copy.deepcopy(NEURONS), "lambda_p": 0.1}]
    optimizer: Any = LpDecay(torch.optim.SGD(params, lr=0.1)) if wrapped else AdamWLp(groups, backend="compiled")
    if wrapped:
        optimizer.param_groups[0].update(groups[0])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["units"][0]["members"][1]["offset"] = 10**7
    with pytest.raises(ValueError, match=r"reaches index 10000007 of dimension 0"):
        optimizer.load_state_dict(saved)
    optimizer.step()
    optimizer.param_groups[0]["units"] = saved["param_groups"][0]["units"]
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=r"reaches index 10000007 of dimension 0"):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


def test_groups_that_sleep_are_looked_at_until_they_are_awake() -> None:
    twins = Twins(first=NEURONS)
    twins.each(lambda _, params: params[0].data[:2].zero_())
    twins.each(lambda _, params: params[1].data[:1].zero_())
    twins.step(planned=False)
    twins.step(planned=False)
    twins.step(planned=True)
    assert all(params[0][:2].abs().max() > 0 for params in twins.params)


def change_data(_: AdamWLp, params: list[torch.nn.Parameter]) -> None:
    params[0].data = params[0].data.clone()


def shorten(_: AdamWLp, params: list[torch.nn.Parameter]) -> None:
    """Fewer weights at the same address, as pruning of another kind leaves them."""
    params[0].data = params[0].data[:200]
    params[0].grad = None


def transpose_data(_: AdamWLp, params: list[torch.nn.Parameter]) -> None:
    params[0].data = params[0].data.mT


def change_moment(optimizer: AdamWLp, params: list[torch.nn.Parameter]) -> None:
    state = optimizer.state[params[1]]
    state["exp_avg"] = state["exp_avg"].clone() * 2


def change_counter(optimizer: AdamWLp, params: list[torch.nn.Parameter]) -> None:
    optimizer.state[params[3]]["step"] = torch.tensor(100.0)


def drop_gradient(_: AdamWLp, params: list[torch.nn.Parameter]) -> None:
    params[2].grad = None


def no_decay(optimizer: AdamWLp, _: list[torch.nn.Parameter]) -> None:
    optimizer.param_groups[1]["lambda_p"] = 0.0


def keep_zeros(optimizer: AdamWLp, _: list[torch.nn.Parameter]) -> None:
    optimizer.param_groups[1]["keep_zeros"] = True


def transpose_gradient(_: AdamWLp, params: list[torch.nn.Parameter]) -> None:
    grad = params[0].grad
    assert grad is not None
    params[0].grad = grad.mT.contiguous().mT


def load(optimizer: AdamWLp, _: list[torch.nn.Parameter]) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def add_group(optimizer: AdamWLp, params: list[torch.nn.Parameter]) -> None:
    params.append(torch.nn.Parameter(normal(30, 20)))
    params[-1].grad = normal(30, 20)
    optimizer.add_param_group({"params": [params[-1]]})


@pytest.mark.parametrize(
    "change",
    [
        *(
            change_data,
            transpose_data,
            change_moment,
            change_counter,
            drop_gradient,
            no_decay,
            keep_zeros,
            transpose_gradient,
            load,
        ),
        add_group,
    ],
)
def test_what_else_changes_is_noticed(change: Callable[[AdamWLp, list[torch.nn.Parameter]], object]) -> None:
    twins = begun()
    twins.each(change)
    twins.step(planned=False)


def test_shorter_weights_at_the_same_address_are_refused() -> None:
    twins = begun(backend="compiled")
    twins.each(shorten)
    twins.params[0][0].grad = normal(200, 300)
    with pytest.raises(ValueError, match="gradient and moments are of shapes"):
        twins.optimizers[0].step()


@pytest.mark.parametrize("keys", [{}, {"step": torch.tensor(1.0)}], ids=["empty", "partial"])
def test_weights_that_move_are_noticed_beside_a_state_that_says_nothing(keys: dict[str, torch.Tensor]) -> None:
    # A look at the state of a parameter that has no gradient makes an entry for it.
    param, other = torch.nn.Parameter(normal(300, 300)), torch.nn.Parameter(normal(7))
    optimizer = AdamWLp([param, other], lr=1e-2, backend="compiled")
    optimizer.state[other].update(keys)
    param.grad = normal(300, 300, seed=1)
    optimizer.step()
    optimizer.step()
    param.data = param.data.clone()
    before = param.detach().clone()
    optimizer.step()
    assert not torch.equal(param, before)


def test_a_gradient_that_is_not_finite_is_noticed() -> None:
    twins = begun()
    for optimizer, params in zip(twins.optimizers, twins.params, strict=True):
        before = [param.detach().clone() for param in params]
        assert params[1].grad is not None
        params[1].grad[3] = float("nan")
        optimizer.step()
        assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
        assert optimizer.skipped_steps == 1


def test_a_sparse_gradient_is_refused_in_a_later_step() -> None:
    twins = begun()
    twins.params[0][0].grad = torch.ones(300, 300).to_sparse()
    with pytest.raises(ValueError, match="sparse gradients"):
        twins.optimizers[0].step()


def test_no_gradient_is_kept() -> None:
    twins = begun()
    for param in twins.params[0]:
        reference = weakref.ref(param.grad)
        param.grad = None
        gc.collect()
        assert reference() is None


def test_copies_begin_anew() -> None:
    twins = begun()
    copied = copy.deepcopy(twins.optimizers[0])
    assert copied._cache.last is None
    for old, new in zip(twins.params[0], (p for group in copied.param_groups for p in group["params"]), strict=True):
        assert old.grad is not None
        new.grad = old.grad.clone()
    copied.step()
    twins.optimizers[0].step()
    assert all(torch.equal(a, b) for a, b in zip(snapshot(copied), snapshot(twins.optimizers[0]), strict=True))
