"""Checkpoints of AdamWLp and of torch's AdamW, exact resumption, and steps with NaN or infinite gradients."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from hf_pdecay import AdamWLp
from tests.helpers.reference.adamw_lp64 import Hyper, Reference


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BAD = [math.nan, math.inf, -math.inf]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(normal(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]


def run(optimizer: torch.optim.Optimizer, *seeds: int) -> None:
    for seed in seeds:
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                p.grad = normal(*p.shape, seed=1000 * i + seed).to(p.dtype)
        optimizer.step()


def clone(some: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in some]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """Save and load as Trainer does, which allows no arbitrary classes in the file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True, map_location="cpu")


# --- resumption


@pytest.mark.parametrize("dtype", DTYPES)
def test_resumed_run_is_the_run_that_was_not_interrupted(dtype: torch.dtype) -> None:
    whole = parameters((33,), (7, 5), (), dtype=dtype)
    groups: list[dict[str, Any]] = [{"params": whole[:1], "p_norm": 0.5}, {"params": whole[1:]}]
    optimizer = AdamWLp(groups, lr=0.01, lambda_p=0.1)
    run(optimizer, 1, 2, 3)
    saved = through_a_file(optimizer.state_dict())
    resumed = clone(whole)
    run(optimizer, 4, 5, 6)
    again = AdamWLp([{"params": resumed[:1]}, {"params": resumed[1:]}], lr=0.5, lambda_p=0.3, p_norm=1.5)
    again.load_state_dict(saved)
    assert [g["p_norm"] for g in again.param_groups] == [0.5, 0.8]
    assert [g["lambda_p"] for g in again.param_groups] == [0.1, 0.1]
    run(again, 4, 5, 6)
    for p, q in zip(whole, resumed, strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, again.state[q][key]) and value.dtype == again.state[q][key].dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_uses_a_generator_of_its_own(dtype: torch.dtype) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        (p,) = some = parameters((500,), dtype=dtype)
        optimizer = AdamWLp(some, lr=0.01, lambda_p=0.1)
        for step in range(3):
            p.grad = normal(500, seed=step).to(dtype)
            optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)
        results.append(p)
    assert torch.equal(*results)


def test_equal_tensors_round_independently() -> None:
    some = [torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = AdamWLp([{"params": some[:2]}, {"params": some[2:]}], lr=0.1, lambda_p=0.01)
    for p in some:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    first, second, third = ((p < 1).double() - (p < 1).double().mean() for p in some)
    for a, b in ((first, second), (first, third)):
        assert abs(float((a * b).mean()) / float(a.square().mean())) < 0.1
    before = [p.detach().clone() for p in some]
    optimizer.step()
    moved = [(p != b).double() for p, b in zip(some, before, strict=True)]
    a, b = first, moved[0] - moved[0].mean()
    assert abs(float((a * b).mean()) / float(a.square().mean())) < 0.1


def test_state_dict_helpers_of_distributed_checkpoints() -> None:
    """They run a step with a learning rate of 0 to create the state, and know only `state` and `param_groups`."""
    model, other = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    optimizer = AdamWLp(model.parameters(), lr=0.01, p_norm=0.5)
    run(optimizer, 1, 2)
    other.load_state_dict(model.state_dict())
    fresh = AdamWLp(other.parameters(), lr=0.01)
    set_optimizer_state_dict(other, fresh, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["exp_avg"], fresh.state[q]["exp_avg"])
        assert int(fresh.state[q]["step"]) == 2
    assert fresh.param_groups[0]["p_norm"] == 0.5
    run(optimizer, 3)
    run(fresh, 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


# --- checkpoints of torch's AdamW


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_checkpoint_continues_to_the_bit_without_lambda_p(dtype: torch.dtype) -> None:
    theirs = parameters((33,), (7, 5), dtype=dtype)
    adamw = torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.1, eps=1e-4, foreach=False)
    run(adamw, 1, 2, 3)
    ours = clone(theirs)
    optimizer = AdamWLp(ours, p_norm=0.5, lambda_p=0.0)
    optimizer.load_state_dict(through_a_file(adamw.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["p_norm"], group["lambda_p"], group["keep_zeros"]) == (0.5, 0.0, False)
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.02, 0.1, 1e-4)
    run(adamw, 4, 5)
    run(optimizer, 4, 5)
    for p, q in zip(theirs, ours, strict=True):
        assert torch.equal(p, q)


def test_adamw_checkpoint_continues_with_decay() -> None:
    theirs = parameters((33,))
    adamw = torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.1)
    run(adamw, 1, 2, 3)
    ours = clone(theirs)
    optimizer = AdamWLp([{"params": ours, "p_norm": 0.5, "lambda_p": 0.2}])
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    assert optimizer.param_groups[0]["p_norm"] == 0.5 and optimizer.param_groups[0]["lambda_p"] == 0.2
    state = adamw.state[theirs[0]]
    weight, m, v = (t.detach().double().numpy() for t in (theirs[0], state["exp_avg"], state["exp_avg_sq"]))
    reference = Reference(weight, m, v, steps=3, dormant=False)
    run(optimizer, 4)
    reference.step(normal(33, seed=4).tolist(), Hyper(lr=0.02, weight_decay=0.1, p_norm=0.5, lambda_p=0.2))
    expected = torch.from_numpy(reference.weight)
    torch.testing.assert_close(ours[0].detach().double(), expected, rtol=1e-4, atol=1e-7)
    run(optimizer, 5, 6)


def test_adamw_checkpoint_with_fused_foreach_and_scheduler_keys() -> None:
    theirs = parameters((5,))
    adamw = torch.optim.AdamW(theirs, lr=0.02, foreach=True)
    torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: 1.0)
    run(adamw, 1)
    optimizer = AdamWLp(parameters((5,)))
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.param_groups[0]["initial_lr"] == 0.02
    run(optimizer, 2)
    assert optimizer.skipped_steps == 0


def test_adamw_checkpoint_whose_step_is_a_number() -> None:
    """As torch before 1.12 wrote it, which torch's own AdamW still loads."""
    theirs = parameters((5,))
    adamw = torch.optim.AdamW(theirs, lr=0.02)
    run(adamw, 1, 2)
    saved = copy.deepcopy(adamw.state_dict())
    saved["state"][0]["step"] = 2
    ours = clone(theirs)
    optimizer = AdamWLp(ours)
    optimizer.load_state_dict(saved)
    run(optimizer, 3)
    assert int(optimizer.state[ours[0]]["step"]) == 3


def refused_and_unharmed(optimizer: AdamWLp, saved: dict[str, Any], match: str) -> None:
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in state.items())


def test_amsgrad_checkpoint_is_refused() -> None:
    adamw = torch.optim.AdamW(parameters((5,)), amsgrad=True)
    run(adamw, 1)
    optimizer = AdamWLp(parameters((5,)))
    run(optimizer, 1)
    refused_and_unharmed(optimizer, adamw.state_dict(), "(?i)amsgrad")


@pytest.mark.parametrize("kind", [AdamWLp, torch.optim.AdamW])
def test_checkpoint_of_another_model_is_refused(kind: Callable[..., torch.optim.Optimizer]) -> None:
    other = kind(parameters((5,), (4, 3)))
    run(other, 1)
    optimizer = AdamWLp(parameters((5,), (3, 4)))
    run(optimizer, 1)
    refused_and_unharmed(optimizer, other.state_dict(), r"(?s)\(?4, 3\)?.*\(?3, 4\)?|\(?3, 4\)?.*\(?4, 3\)?")
    wrong_second = copy.deepcopy(optimizer.state_dict())
    wrong_second["state"][1]["exp_avg_sq"] = torch.zeros(9, 9)
    refused_and_unharmed(optimizer, wrong_second, r"9, 9")
    refused_and_unharmed(AdamWLp(parameters((5,))), other.state_dict(), r"2.*1|1.*2")


def test_checkpoint_of_another_optimizer_is_refused() -> None:
    sgd = torch.optim.SGD(parameters((5,)), momentum=0.9)
    run(sgd, 1)
    optimizer = AdamWLp(parameters((5,)))
    run(optimizer, 1)
    refused_and_unharmed(optimizer, sgd.state_dict(), "exp_avg|another optimizer|AdamW")


def test_checkpoint_with_an_invalid_hyperparameter_is_refused() -> None:
    optimizer = AdamWLp(parameters((5,)))
    run(optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["p_norm"] = math.nan
    refused_and_unharmed(optimizer, saved, "p_norm.*nan")


def test_loading_does_not_change_the_checkpoint() -> None:
    adamw = torch.optim.AdamW(parameters((5,)))
    run(adamw, 1)
    saved = adamw.state_dict()
    keys = set(saved["param_groups"][0])
    optimizer = AdamWLp(parameters((5,)))
    optimizer.load_state_dict(saved)
    run(optimizer, 2)
    assert set(saved["param_groups"][0]) == keys


# --- NaN and infinite gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("lambda_p", [0.0, 0.1])
def test_step_with_a_bad_gradient_is_skipped_and_counted(dtype: torch.dtype, bad: float, lambda_p: float) -> None:
    some = parameters((33,), (5, 3), (), dtype=dtype)
    other = clone(some)
    hyper: dict[str, Any] = {"lr": 0.01, "lambda_p": lambda_p, "eps": 1e-4}
    optimizer = AdamWLp([{"params": some[:2]}, {"params": some[2:]}], **hyper)
    undisturbed = AdamWLp([{"params": other[:2]}, {"params": other[2:]}], **hyper)
    run(optimizer, 1)
    run(undisturbed, 1)
    weights, state = clone(some), copy.deepcopy(optimizer.state_dict()["state"])
    for place in (0, 1, 2):
        for i, p in enumerate(some):
            grad = torch.ones_like(p)
            if i == place:
                grad.view(-1)[-1] = bad
            p.grad = grad
        optimizer.step()
        assert optimizer.skipped_steps == place + 1
    for key, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[key][name]) for name, value in values.items())
    for p, q in zip(some, weights, strict=True):
        assert torch.equal(p, q)
    run(optimizer, 2, 3)
    run(undisturbed, 2, 3)
    for p, q in zip(some, other, strict=True):
        assert torch.equal(p, q)
    assert undisturbed.skipped_steps == 0


@pytest.mark.parametrize("bad", BAD)
def test_bad_gradient_at_the_first_step_leaves_a_zero_tensor_asleep(bad: float) -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = AdamWLp([p], lr=0.01)
    p.grad = torch.tensor([1.0, bad, 1.0, 1.0])
    optimizer.step()
    assert p.tolist() == [0.0] * 4
    p.grad = torch.ones(4)
    optimizer.step()
    assert p.tolist() == pytest.approx([-0.01] * 4)


@pytest.mark.parametrize("bad", BAD)
def test_bad_value_is_found_at_every_place(bad: float) -> None:
    for size in (1, 2, 7, 8, 9, 16, 31, 33, 67):
        (p,) = some = parameters((size,))
        optimizer = AdamWLp(some)
        for place in range(size):
            p.grad = torch.ones(size)
            p.grad[place] = bad
            optimizer.step()
            assert optimizer.skipped_steps == place + 1
        assert torch.equal(p, normal(size))


@pytest.mark.parametrize(
    ("dtype", "size", "value"),
    [
        (torch.float16, 5000, 6e4),
        (torch.bfloat16, 5000, 3e38),
        (torch.float32, 300_000, 3e38),
        (torch.float64, 9, 1e308),
    ],
)
def test_large_finite_gradients_are_not_taken_for_infinite(dtype: torch.dtype, size: int, value: float) -> None:
    (p,) = some = parameters((size,), dtype=dtype)
    optimizer = AdamWLp(some)
    p.grad = torch.full_like(p, value)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert int(optimizer.state[p]["step"]) == 1
    assert bool(p.isfinite().all())


def test_skipped_steps_survive_checkpoints_and_copies() -> None:
    (p,) = some = parameters((4,))
    optimizer = AdamWLp(some)
    run(optimizer, 1)
    p.grad = torch.full((4,), math.nan)
    optimizer.step()
    optimizer.step()
    assert optimizer.skipped_steps == 2 and isinstance(optimizer.skipped_steps, int)
    fresh = AdamWLp(parameters((4,)))
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.skipped_steps == 2
    assert copy.deepcopy(optimizer).skipped_steps == 2
    optimizer.add_param_group({"params": parameters((3,))})
    assert optimizer.skipped_steps == 2


def test_skipped_steps_count_steps_whichever_group_was_in_them() -> None:
    first, second = parameters((4,), (3,))
    optimizer = AdamWLp([{"params": [first]}, {"params": [second]}])
    for p, rest in ((first, second), (second, first), (second, first)):
        p.grad, rest.grad = torch.full_like(p, math.nan), None
        optimizer.step()
    assert optimizer.skipped_steps == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lambda_p", [0.0, 0.1])
@pytest.mark.parametrize("bad", BAD)
def test_without_skipping_nan_is_written_as_adamw_does(dtype: torch.dtype, lambda_p: float, bad: float) -> None:
    (p,), (q,) = ours, theirs = parameters((4,), dtype=dtype), parameters((4,), dtype=dtype)
    optimizer = AdamWLp(ours, lambda_p=lambda_p, skip_nonfinite=False, eps=1e-4)
    adamw = torch.optim.AdamW(theirs, eps=1e-4)
    for some in (p, q):
        some.grad = torch.tensor([1.0, bad, 1.0, 1.0], dtype=dtype)
    optimizer.step()
    adamw.step()
    assert optimizer.skipped_steps == 0
    assert p.isnan().tolist() == q.isnan().tolist() == [False, True, False, False]


def test_skips_that_only_the_device_knows_are_counted_in_place() -> None:
    """A CUDA graph replays what it was captured with: a counter that is assigned anew would not move."""
    optimizer = AdamWLp(parameters((4,)))
    optimizer.param_groups[0]["skipped_steps"] = 2
    optimizer._count_skipped(torch.tensor(False))
    counter = optimizer.param_groups[0]["skipped_steps"]
    optimizer._count_skipped(torch.tensor(True))
    optimizer._count_skipped(torch.tensor(False))
    assert optimizer.param_groups[0]["skipped_steps"] is counter
    assert optimizer.skipped_steps == 4
