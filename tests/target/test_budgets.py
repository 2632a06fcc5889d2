from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_pdecay.optim.param_groups import decayed_groups
from hf_pdecay.rules.assign import build_param_groups
from hf_pdecay.target.budgets import Budget, divide_target
from hf_pdecay.target.settings import Target, check_p_norms, check_target

from ..helpers.models import tiny_gpt2


def _group(*sizes: int, **settings: Any) -> dict[str, Any]:
    params = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    return {"params": params, "p_norm": 0.8, "lambda_p": 0.01, "decayed": True, "target_sparsity": None, **settings}


def _held(budget: Budget) -> list[Tensor]:
    return [param for _, params in budget.members for param in params]


def _zeros(found: list[Budget]) -> float:
    return sum(each.target * sum(param.numel() for param in _held(each)) for each in found)


def test_a_global_target_is_one_budget_of_all_that_decays() -> None:
    groups = [_group(30, 50), _group(20), _group(1000, decayed=False, lambda_p=0.0)]
    (budget,) = divide_target(groups, 0.7)
    assert (budget.target, budget.numel) == (0.7, 100)
    assert {id(param) for param in _held(budget)} == {id(param) for group in groups[:2] for param in group["params"]}
    assert [group for group, _ in budget.members] == groups[:2]
    assert all(mine is group for (mine, _), group in zip(budget.members, groups, strict=False))


def test_a_target_for_each_tensor() -> None:
    groups = [_group(30, 50), _group(20)]
    found = divide_target(groups, 0.7, "tensor")
    assert [(each.target, each.numel) for each in found] == [(0.7, 30), (0.7, 50), (0.7, 20)]
    assert [len(_held(each)) for each in found] == [1, 1, 1]
    assert found[0].members[0][0] is groups[0] and found[2].members[0][0] is groups[1]


@pytest.mark.parametrize("target", [None, 0, 0.0])
def test_no_target_is_no_budget(target: float | None) -> None:
    assert divide_target([_group(30), _group(20, target_sparsity=0)], target) == []
    assert divide_target([], target) == divide_target([], 0.5) == []


def test_targets_of_rules_alone() -> None:
    groups = [_group(30, target_sparsity=0.5), _group(40), _group(20, target_sparsity=0.9)]
    found = divide_target(groups, None)
    assert [(each.target, each.numel) for each in found] == [(0.5, 30), (0.9, 20)]
    assert id(groups[1]["params"][0]) not in {id(param) for each in found for param in _held(each)}


def test_the_rest_makes_up_for_what_rules_take() -> None:
    groups = [_group(100, target_sparsity=0.5), _group(200, 100), _group(100, target_sparsity=0.9)]
    found = [(each.target, each.numel) for each in divide_target(groups, 0.8)]
    # 0.8 of 500 are 400, of which the rules have 50 and 90: 260 of the other 300.
    assert found == [(0.5, 100), (pytest.approx(260 / 300), 300), (0.9, 100)]


def test_the_rest_makes_up_for_it_tensor_by_tensor() -> None:
    groups = [_group(100, target_sparsity=0.5), _group(200, 100)]
    found = divide_target(groups, 0.8, "tensor")
    assert [(pytest.approx(each.target), each.numel) for each in found] == [(0.5, 100), (0.9, 200), (0.9, 100)]


def test_a_rule_of_zero_is_left_alone_and_does_not_count() -> None:
    groups = [_group(100, target_sparsity=0), _group(60), _group(40, target_sparsity=0.5)]
    found = divide_target(groups, 0.6)
    assert sorted((each.target, each.numel) for each in found) == [
        (0.5, 40),
        (pytest.approx((0.6 * 100 - 20) / 60), 60),
    ]
    assert id(groups[0]["params"][0]) not in {id(param) for each in found for param in _held(each)}


def test_rules_of_the_same_target_share_it() -> None:
    groups = [_group(30, target_sparsity=0.5), _group(20, target_sparsity=0.5, p_norm=0.4)]
    (budget,) = divide_target(groups, None)
    assert (budget.target, budget.numel) == (0.5, 50)


def test_rules_may_leave_nothing_to_the_others() -> None:
    groups = [_group(50, target_sparsity=0.8), _group(50)]
    assert sorted(each.target for each in divide_target(groups, 0.4)) == [0.0, 0.8]


@given(
    st.lists(
        st.tuples(st.integers(1, 500), st.one_of(st.none(), st.just(0.0), st.floats(0.01, 0.99))),
        min_size=1,
        max_size=6,
    ),
    st.floats(0.01, 0.99),
    st.sampled_from(["global", "tensor"]),
)
@settings(max_examples=150, deadline=None)
def test_all_together_come_to_the_target_or_it_is_refused(
    made: list[tuple[int, float | None]], target: float, scope: str
) -> None:
    groups = [_group(size, target_sparsity=own) for size, own in made]
    counted = [(size, own) for size, own in made if own != 0]
    total = sum(size for size, _ in counted)
    ruled = sum(size * own for size, own in counted if own is not None)
    free = sum(size for size, own in counted if own is None)
    reachable = ruled - 0.5 <= target * total <= ruled + max(free - 1, 0) + 0.5
    if total and not reachable:
        with pytest.raises(ValueError, match="cannot be met"):
            divide_target(groups, target, scope)
        return
    found = divide_target(groups, target, scope)
    assert sum(each.numel for each in found) == total
    assert all(0 <= each.target <= 1 for each in found)
    assert _zeros(found) == pytest.approx(target * total, abs=0.51)


@pytest.mark.parametrize(
    ("own", "target", "least", "most"),
    [(0.9, 0.3, "45.0%", "95.0%"), (0.1, 0.6, "5.0%", "55.0%"), (0.9, 0.96, "45.0%", "95.0%")],
)
def test_rules_that_the_target_contradicts(own: float, target: float, least: str, most: str) -> None:
    with pytest.raises(ValueError, match=rf"target_sparsity={target:g} cannot be met.*from {least} to {most} zeros"):
        divide_target([_group(500, target_sparsity=own), _group(500)], target)


def test_rules_for_all_weights_must_agree_with_the_target() -> None:
    assert [each.target for each in divide_target([_group(100, target_sparsity=0.5)], 0.5)] == [0.5]
    with pytest.raises(ValueError, match="target_sparsity=0.7 cannot be met"):
        divide_target([_group(100, target_sparsity=0.5)], 0.7)


def test_a_target_that_leaves_nothing_is_refused_with_the_most_that_would_do() -> None:
    with pytest.raises(
        ValueError,
        match=r"target_sparsity=0\.99999999 cannot be met: it would leave none of 100 decayed weights.* 0\.99 ",
    ):
        divide_target([_group(100)], 0.99999999)
    assert divide_target([_group(100)], 0.99)[0].target == pytest.approx(0.99)


@pytest.mark.parametrize("target", [-0.1, 1, 1.0, 1.5, 90, float("nan"), float("inf"), True, False, "0.9", [0.9]])
def test_targets_out_of_range_are_refused(target: Any) -> None:
    message = re.escape(f"target_sparsity={target!r}; it must be at least 0 and below 1")
    with pytest.raises(ValueError, match=message):
        check_target(target)
    with pytest.raises(ValueError, match=message):
        divide_target([_group(100)], target)
    if target is not False:
        with pytest.raises(ValueError, match=message):
            divide_target([_group(100, target_sparsity=target)], None)


def test_targets_in_range() -> None:
    assert check_target(None) is check_target(0) is check_target(0.0) is None
    assert check_target(0.9) == 0.9
    assert check_target(0.999999) == 0.999999
    with pytest.raises(ValueError, match="share=2; it must be"):
        check_target(2, "share")


@pytest.mark.parametrize("scope", ["layer", "Global", None, ""])
def test_unknown_budgets(scope: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"sparsity_budget={scope!r}; it must be one of global, tensor")):
        Target(sparsity_budget=scope)


@pytest.mark.parametrize("value", [2, 2.0, 3.5])
def test_p_of_two_and_more_has_no_target(value: float) -> None:
    check_p_norms(targeted=False, p_norm=value, p_norm_begin=value)
    with pytest.raises(ValueError, match=rf"Invalid p_norm: p_norm={value:g} with a target_sparsity"):
        check_p_norms(targeted=True, p_norm=value)
    with pytest.raises(ValueError, match=rf"Invalid p_norm_begin: p_norm_begin={value:g} with a target_sparsity"):
        check_p_norms(targeted=True, p_norm=0.8, p_norm_begin=value)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "0.5"])
def test_p_norm_begin_out_of_range(value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Invalid p_norm_begin: p_norm_begin={value!r}; it must be")):
        Target(p_norm_begin=value)


def test_groups_that_decay() -> None:
    plain = {"params": [], "p_norm": 0.8, "lambda_p": 0.1}
    off, idle = {**plain, "lambda_p": 0.0}, {**plain, "lambda_p": 0.0, "decayed": True}
    foreign = {"params": [], "lr": 1e-3}
    undecayed = {**plain, "decayed": False}
    assert decayed_groups([plain, off, foreign, idle, undecayed]) == [plain, idle]


def test_empty_tensors_make_no_budget() -> None:
    assert divide_target([_group(0)], 0.5) == []
    assert [each.numel for each in divide_target([_group(0, 10)], 0.5, "tensor")] == [10]


def test_a_model_with_rules_counted_by_hand() -> None:
    # Two layers of c_attn 32 × 96, c_proj 32 × 32 in attn, c_fc 32 × 128, c_proj 128 × 32 in mlp.
    attention, mlp = 2 * (32 * 96 + 32 * 32), 2 * (2 * 32 * 128)
    rules = {r"attn": {"target_sparsity": 0.5}, r"h\.0\.mlp": {"target_sparsity": 0}}
    groups = build_param_groups(tiny_gpt2(), p_norm=0.8, lambda_p=0.01, rules=rules)
    found = sorted((each.target, each.numel) for each in divide_target(groups, 0.7))
    half = mlp // 2
    assert found == [(0.5, attention), (pytest.approx((0.7 * (attention + half) - 0.5 * attention) / half), half)]
    (budget,) = divide_target(build_param_groups(tiny_gpt2(), p_norm=0.8, lambda_p=0.01), 0.9)
    assert budget.numel == attention + mlp
