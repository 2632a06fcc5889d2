"""Runs whose target counts unchanged weights, beside plain recounts of which go, how many, and bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_pdecay import AdamWLp, LpDecay, measure_sparsity
from hf_pdecay.optim.bases import give_bases
from hf_pdecay.optim.muon import MuonWithAdamW
from hf_pdecay.optim.shards import Ranked
from hf_pdecay.target.budgets import divide_target, has_target, overall_target
from hf_pdecay.target.control import HOLDING, SparsityControl
from hf_pdecay.target.ranking import Ranking, prune_least


STEPS = 80
WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((30, 20), (25,), (6, 8, 10))
Grads = Callable[[int], Mapping[Tensor, Tensor]]


def _params(dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtype)) for shape in shapes]


def _noise(*params: Tensor) -> Grads:
    """Gradients with a direction that stays, so that weights travel, and noise."""

    def grads(step: int) -> dict[Tensor, Tensor]:
        found = {}
        for index, param in enumerate(params):
            drift = torch.randn(param.shape, generator=torch.Generator().manual_seed(1000 + index))
            noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(step * 100 + index))
            found[param] = (0.5 * drift + noise).to(param.dtype)
        return found

    return grads


def _run(
    optimizer: Any,
    grads: Grads,
    first: int = 1,
    last: int = STEPS,
    after: Callable[[int], None] | None = None,
    **target: Any,
) -> SparsityControl:
    control = SparsityControl(optimizer, STEPS, **{"target_sparsity": 0.8, **target})
    for step in range(first, last + 1):
        optimizer.zero_grad()
        for param, grad in grads(step).items():
            if param.requires_grad:
                param.grad = grad
        control.before_step(step)
        optimizer.step()
        control.after_step(step)
        if after is not None:
            after(step)
    return control


def _adamw(params: Any, **options: Any) -> AdamWLp:
    return AdamWLp(params, **{"lr": 1e-3, "lambda_p": 0.01, "decay_to": "base", **options})


def _bits(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().contiguous().view(WHOLE[tensor.element_size()]).flatten().numpy())


def _copies(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def _same(params: list[Any], bases: list[Tensor]) -> int:
    """How many weights have the bits of their base."""
    return sum(int((_bits(param) == _bits(base)).sum()) for param, base in zip(params, bases, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("backend", ["foreach", "compiled", "reference"])
def test_as_many_weights_as_asked_for_have_the_bits_of_their_base(
    dtype: torch.dtype, target: float, backend: str
) -> None:
    params = _params(dtype)
    with torch.no_grad():
        params[0][::7] = 0.0
        params[0][1::7] = -0.0
    bases = _copies(params)
    numel = sum(map(torch.numel, bases))
    optimizer = _adamw(params, lr=1e-2, backend=backend)
    healing: list[int] = []

    def note(step: int) -> None:
        if step >= 60:
            healing.append(_same(params, bases))

    control = _run(optimizer, _noise(*params), after=note, target_sparsity=target)
    assert healing == [round(target * numel)] * len(healing)
    assert _same(params, bases) == sum(int((a == b).sum()) for a, b in zip(params, bases, strict=True))
    assert all(torch.equal(optimizer.state[param]["base"], base) for param, base in zip(params, bases, strict=True))
    assert abs(control.shortfall()) < 0.02 and abs(control.excess()) < 0.02
    report = measure_sparsity(nn.ParameterList(params), changed_by=optimizer, decayed=["0", "1", "2"])
    assert report.sparsity == round(target * numel) / numel


@pytest.mark.parametrize("lr", [1e-6, 1e-4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_low_precision_hardly_moves_may_move_until_as_many_have_as_are_to(
    dtype: torch.dtype, lr: float
) -> None:
    """In bfloat16 a step of 1e-6 moves one weight of 0.1 in a few hundred: most have not moved when pruning begins."""
    params = _params(dtype, ((300, 200),))
    bases = _copies(params)
    _run(_adamw(params, lr=lr), _noise(*params), target_sparsity=0.9)
    assert _same(params, bases) == 54_000


def test_the_rest_heals_and_what_is_unchanged_stays() -> None:
    params = _params()
    bases = _copies(params)
    kept: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def note(step: int) -> None:
        if step in (60, STEPS):
            kept[step] = [p.detach() == b for p, b in zip(params, bases, strict=True)], _copies(params)

    optimizer = _adamw(params)
    _run(optimizer, _noise(*params), after=note)
    for before, after in zip(*(kept[step][0] for step in (60, STEPS)), strict=True):
        assert torch.equal(before, after)
    assert all(not torch.equal(*pair) for pair in zip(kept[60][1], kept[STEPS][1], strict=True))
    (group,) = optimizer.param_groups
    assert group["phase"] == "healing" and 0 < group["lambda_p"] and not group["keep_zeros"]


@pytest.mark.parametrize("p_norm", [0.4, 0.8, 1.0, 1.5])
def test_the_number_of_unchanged_weights_grows_with_the_schedule(p_norm: float) -> None:
    params = _params(shapes=((100, 80),))
    bases = _copies(params)
    history: list[int] = []
    optimizer = _adamw(params, p_norm=p_norm)
    control = _run(optimizer, _noise(*params), after=lambda _: history.append(_same(params, bases)), sparsity_decay=1.0)
    for step, count in enumerate(history, 1):
        assert count <= 8000 * 0.8 * control.schedule.progress(control.schedule.next_pruning(step)) + 40
        if control.schedule.prunes(step):
            assert count >= round(8000 * 0.8 * control.schedule.progress(step))
    assert history[-1] == 6400


@pytest.mark.parametrize("make", ["adamw_lp", "sgd"])
def test_the_learning_rate_grows_as_fewer_weights_may_change(make: str) -> None:
    params = _params(shapes=((100, 80),))
    bases = _copies(params)
    optimizer: Any = _adamw(params, lr=1e-3)
    if make == "sgd":
        optimizer = LpDecay(torch.optim.SGD(params, lr=1e-3), decay_to="base")
    (group,) = optimizer.param_groups
    moves: dict[int, float] = {}
    before = _copies(params)
    unchanged: dict[int, int] = {}

    def note(step: int) -> None:
        assert group["lr"] == 1e-3
        unchanged[step] = _same(params, bases)
        moved = (params[0].detach() - before[0]).abs()
        moves[step] = float(moved[moved > 0].median())
        before[0].copy_(params[0].detach())

    control = _run(optimizer, lambda _: {params[0]: torch.ones(100, 80)}, after=note, target_sparsity=0.96)
    assert unchanged[STEPS] == 7680
    for step in (2, control.schedule.begin, control.schedule.end + 1, STEPS):
        # Of a gradient that stays, SGD's and Adam's step is the learning rate.
        expected = 1e-3 * (1 - unchanged[step - 1] / 8000 if step > control.schedule.begin else 1) ** -0.5
        assert moves[step] == pytest.approx(expected, rel=0.01)
    assert moves[STEPS] == pytest.approx(5e-3, rel=0.01)


def test_a_step_that_fails_leaves_the_learning_rate() -> None:
    params = _params()
    optimizer = _adamw(params, lr=1e-3)
    optimizer.param_groups[0]["rate_scale"] = 10.0
    params[0].grad = torch.eye(30, 20).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_the_rate_can_stay_as_it_is() -> None:
    params = _params()
    optimizer = _adamw(params)
    _run(optimizer, _noise(*params), rate_growth=0.0)
    assert optimizer.param_groups[0]["rate_scale"] == 1


def test_p_of_two_and_more_is_refused() -> None:
    with pytest.raises(ValueError, match="p_norm=2 with a target"):
        SparsityControl(_adamw(_params(), p_norm=2.0), STEPS, target_sparsity=0.5)


def test_lambda_p_follows_the_changes_as_they_grow() -> None:
    """It is set from the median change that is to be kept, which does not decay faster than a share of a step."""
    params = _params(shapes=((200, 100),))
    bases = _copies(params)
    optimizer = _adamw(params, lr=1e-4)
    seen: list[tuple[float, float]] = []

    def note(step: int) -> None:
        change = (params[0].detach() - bases[0]).abs().flatten()
        seen.append((float(change.quantile(0.9)), optimizer.param_groups[0]["lambda_p"]))

    control = _run(optimizer, _noise(*params), after=note, sparsity_decay=1.0)
    begin = control.schedule.begin
    assert [lambda_p for _, lambda_p in seen[:begin]] == [0.0] * begin
    fresh = [step for step in range(begin + 1, 40) if step == begin + 1 or control.schedule.prunes(step - 1)]
    assert len(fresh) >= 3
    for step in fresh:
        median, lambda_p = seen[step - 2][0], seen[step - 1][1]
        # A step shrinks a change by α λ_p |c|^(p - 1).
        assert 0 < lambda_p * median ** (0.8 - 1) <= 0.101


@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    fraction=st.floats(0, 1),
    moments=st.booleans(),
    layout=st.sampled_from(["plain", "transposed", "strided"]),
    seed=st.integers(0, 100),
)
@settings(derandomize=True, max_examples=100, deadline=None)
def test_a_cut_of_changes_is_that_of_a_full_sort(
    shapes: list[tuple[int, int]], dtype: torch.dtype, fraction: float, moments: bool, layout: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def laid(tensor: Tensor) -> Tensor:
        if layout == "transposed":
            return tensor.t().contiguous().t()
        return torch.stack([tensor, tensor], -1)[..., 0] if layout == "strided" else tensor

    tensors = []
    for shape in shapes:
        base = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        steps = torch.randint(-3, 4, shape, generator=generator)
        weight = laid((base.double() * (1 + steps * 0.05)).to(dtype))
        second = torch.rand(shape, generator=generator) if moments else None
        tensors.append(Ranked(weight, second, base=base))
    before = [tensor.weight.clone() for tensor in tensors]
    score_dtype = np.float64 if dtype == torch.float64 else np.float32
    changes = np.concatenate(
        [np.abs((t.weight.double() - t.base.double()).numpy().flatten()) for t in tensors if t.base is not None]
    )
    saliency = changes.copy()
    if moments:
        saliency *= np.concatenate([(t.exp_avg_sq.double() + 1e-30).numpy().flatten() for t in tensors]) ** 0.25  # type: ignore[union-attr]
    ranking = Ranking(tensors)
    count = max(ranking.rank(fraction), 1)
    prune_least(tensors, ranking.least(count))
    gone = np.concatenate([_bits(t.weight) == _bits(t.base) for t in tensors])  # type: ignore[arg-type]
    assert gone.sum() == max(count, (changes == 0).sum())
    kept = np.concatenate([_bits(t.weight) == _bits(old) for t, old in zip(tensors, before, strict=True)])
    assert (gone | kept).all()
    if gone.any() and not gone.all():
        tolerance = 1e-12 if score_dtype is np.float64 and not moments else 1e-5
        assert saliency[gone].max() <= saliency[~gone].min() * (1 + tolerance)


def test_weights_that_equal_their_base_get_its_bits() -> None:
    """0.0 and -0.0 are equal, and a comparison of two files tells them apart."""
    base = torch.tensor([-0.0, 0.0, 1.0, 2.0])
    weight = torch.tensor([0.0, -0.0, 1.0, 3.0])
    for count in (1, 3):
        tensors = [Ranked(weight.clone(), base=base)]
        prune_least(tensors, Ranking(tensors).least(count))
        assert (_bits(tensors[0].weight) == _bits(base)).tolist() == [True, True, True, False]


@pytest.mark.parametrize("memory", ["channels last", "transposed"])
def test_weights_in_any_order_in_memory(memory: str) -> None:
    values = 0.1 * torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    start = (
        values.contiguous(memory_format=torch.channels_last) if memory == "channels last" else values.transpose(0, 1)
    )
    param = nn.Parameter(start)
    bases = _copies([param])
    _run(_adamw([param]), _noise(param))
    assert not param.is_contiguous()
    assert _same([param], bases) == round(0.8 * 432)


def test_rules_have_targets_of_their_own_and_share_none_with_what_decays_to_zero() -> None:
    params = _params(shapes=((40, 50), (20, 50), (60, 10), (30, 10)))
    bases = _copies(params)
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "target_sparsity": 0.5},
        {"params": params[2:3], "decay_to": "zero"},
        {"params": params[3:], "decay_to": "zero", "target_sparsity": 0.5},
    ]
    optimizer = _adamw(groups)
    control = _run(optimizer, _noise(*params))
    assert _same(params[1:2], bases[1:2]) == 500
    assert _same(params[:2], bases[:2]) == round(0.8 * 3000)
    assert int((params[3] == 0).sum()) == 150
    assert sorted((budget.to_base, budget.numel) for budget in control.budgets) == [
        (False, 300),
        (True, 1000),
        (True, 2000),
    ]
    # The new head has no target: its λ_p is the user's, and it trains.
    assert optimizer.param_groups[2]["lambda_p"] == 0.01 and "phase" not in optimizer.param_groups[2]
    assert _same(params[2:], bases[2:]) == 0
    assert overall_target(optimizer.param_groups, 0.8) == pytest.approx(0.8)
    groups = optimizer.param_groups
    assert [has_target(group, 0.8, groups) for group in groups] == [True, True, False, True]


@pytest.mark.parametrize("own", [0.99, 0.1])
def test_targets_of_rules_that_contradict_the_runs_are_refused_in_words_of_changes(own: float) -> None:
    params = _params(shapes=((40, 50), (40, 50)))
    groups = [{"params": params[:1], "target_sparsity": own}, {"params": params[1:]}]
    target = 0.3 if own == 0.99 else 0.9
    with pytest.raises(ValueError, match="cannot be met: .* unchanged"):
        SparsityControl(_adamw(groups), STEPS, target_sparsity=target)
    with pytest.raises(ValueError, match="would leave none of 4,000 decayed weights changed"):
        SparsityControl(_adamw(params), STEPS, target_sparsity=0.999999)


def test_each_tensor_has_the_target_where_that_is_asked_for() -> None:
    params = _params()
    bases = _copies(params)
    _run(_adamw(params), _noise(*params), sparsity_budget="tensor")
    for param, base in zip(params, bases, strict=True):
        assert _same([param], [base]) == round(0.8 * param.numel())


@pytest.mark.parametrize("at", [5, 30, 60, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["element", "row", "2:4"])
def test_a_resumed_run_is_the_same_run(at: int, dtype: torch.dtype, kind: str) -> None:
    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params, "group": kind}]

    target = {} if kind != "2:4" else {"target_sparsity": None}
    shapes = ((40, 48), (24, 16))
    whole = _params(dtype, shapes)
    _run(_adamw(groups(whole)), _noise(*whole), **target)
    part = _params(dtype, shapes)
    optimizer = _adamw(groups(part))
    _run(optimizer, _noise(*part), last=at, **target)
    saved = optimizer.state_dict()
    optimizer = _adamw(groups(part))
    optimizer.load_state_dict(saved)
    _run(optimizer, _noise(*part), first=at + 1, **target)
    for one, other in zip(whole, part, strict=True):
        assert (_bits(one) == _bits(other)).all()


def test_steps_skipped_for_nan_change_no_number() -> None:
    params = _params()
    bases = _copies(params)
    grads = _noise(*params)
    nan = (1, 9, 33, 60, 61, 75)  # the first step, a pruning step, the last one of them, and healing

    def with_nan(step: int) -> Mapping[Tensor, Tensor]:
        found = dict(grads(step))
        return {param: torch.full_like(grad, math.nan) for param, grad in found.items()} if step in nan else found

    optimizer = _adamw(params)
    _run(optimizer, with_nan)
    assert optimizer.skipped_steps == len(nan)
    assert _same(params, bases) == round(0.8 * 1105)


def _alive_units(params: list[Any], bases: list[Tensor], dim: int) -> list[int]:
    """The units of each parameter with a change, recounted by numpy."""
    counts = []
    for param, base in zip(params, bases, strict=True):
        changed = np.moveaxis((_bits(param) != _bits(base)).reshape(base.shape), dim, 0)
        counts.append(int(changed.reshape(base.shape[dim], -1).any(1).sum()))
    return counts


@pytest.mark.parametrize(("kind", "dim"), [("row", 0), ("column", 1)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", ["global", "tensor"])
def test_units_are_unchanged_as_a_whole(kind: str, dim: int, dtype: torch.dtype, budget: str) -> None:
    params = _params(dtype, ((30, 20), (50, 40)))
    bases = _copies(params)
    optimizer = _adamw([{"params": params, "group": kind}])
    control = _run(optimizer, _noise(*params), target_sparsity=0.7, sparsity_budget=budget)
    alive = _alive_units(params, bases, dim)
    counts = [base.shape[dim] for base in bases]
    if budget == "global":
        assert sum(counts) - sum(alive) == round(0.7 * sum(counts))
    else:
        assert alive == [count - round(0.7 * count) for count in counts]
    assert all(budget.to_base for budget in control.budgets)
    # Rows that live have changed in nearly all weights, so the others were not ended one by one.
    assert sum(b.numel() for b in bases) - _same(params, bases) > 0.9 * sum(
        n * b.numel() // b.shape[dim] for n, b in zip(alive, bases, strict=True)
    )


def test_units_that_go_are_those_that_changed_least() -> None:
    params = _params(shapes=((40, 30),))
    bases = _copies(params)
    scale = torch.linspace(0.1, 1, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(1))]

    def grads(step: int) -> dict[Tensor, Tensor]:
        noise = torch.randn(40, 30, generator=torch.Generator().manual_seed(step))
        return {params[0]: (torch.ones(40, 30) * scale[:, None] + 1e-3 * noise)}

    optimizer = LpDecay(torch.optim.SGD([{"params": params, "group": "row"}], lr=1e-3), decay_to="base")
    _run(optimizer, grads, target_sparsity=0.5)
    changed = (params[0].detach() != bases[0]).any(1)
    assert changed.sum() == 20
    assert scale[changed].min() > scale[~changed].max()


@pytest.mark.parametrize("kind", ["row", "element", "2:4"])
def test_experts_of_a_stack(kind: str) -> None:
    """Two of four experts get no gradient: they are unchanged, and count where single weights have a target."""
    (experts,) = _params(shapes=((4, 16, 8),))
    base = experts.detach().clone()
    group: dict[str, Any] = {"params": [experts], "group": kind}
    if kind == "row":
        group["units"] = [{"count": 16, "members": [{"param": 0, "dim": 1, "matrix": place}]} for place in range(4)]
    elif kind == "2:4":
        group["units"] = [{"count": 8, "members": [{"param": 0, "dim": 2}]}]
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(4, 1, 1)
    noise = _noise(experts)
    optimizer = _adamw([group])
    target = {} if kind == "2:4" else {"target_sparsity": 0.75}
    control = _run(
        optimizer, lambda step: {experts: noise(step)[experts] * mask}, **{"target_sparsity": None, **target}
    )
    assert torch.equal(experts[1], base[1]) and torch.equal(experts[3], base[3])
    changed = experts.detach() != base
    if kind == "row":
        assert int(changed[::2].any(2).sum()) == 32 - 24
    elif kind == "element":
        assert int((~changed).sum()) == round(0.75 * 512)
        assert overall_target(optimizer.param_groups, 0.75) == pytest.approx(0.75)
    else:
        assert int(changed[::2].unflatten(2, (-1, 4)).sum(-1).max()) == 2
        assert int((~changed[::2]).sum()) == 128
    assert [budget.numel for budget in control.budgets] == [256]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse", [False, True])
def test_of_each_block_as_many_change_as_the_pattern_allows(dtype: torch.dtype, sparse: bool) -> None:
    """Also where a block has more unchanged weights than it must: the spare ones stay unchanged in healing."""
    params = _params(dtype, ((40, 48),))
    bases = _copies(params)
    noise = _noise(*params)
    mask = (torch.arange(48) % 4 == 1).to(dtype) if sparse else torch.ones(48, dtype=dtype)
    counts: list[tuple[int, int]] = []

    def grads(step: int) -> Mapping[Tensor, Tensor]:
        # From step 62 on all weights have gradients.
        return {param: grad * (mask if step < 62 else 1) for param, grad in noise(step).items()}

    def note(step: int) -> None:
        changed = (params[0].detach() != bases[0]).unflatten(1, (-1, 4)).sum(-1)
        counts.append((int(changed.max()), int(changed.sum())))

    _run(_adamw([{"params": params, "group": "2:4"}], lr=1e-2), grads, after=note, target_sparsity=None)
    assert {count for count in counts[59:]} == {(1, 480) if sparse else (2, 960)}


def test_what_has_no_gradient_counts_as_unchanged_and_stays_so() -> None:
    """A pooler without a gradient is unchanged in the file: all weights together meet the target."""
    params = _params(shapes=((40, 50), (20, 50), (30, 40)))
    bases = _copies(params)
    noise = _noise(*params)
    late = 65  # in healing the second tensor gets gradients too

    def grads(step: int) -> Mapping[Tensor, Tensor]:
        return {param: grad for param, grad in noise(step).items() if param is not params[1] or step >= late}

    optimizer = _adamw(params)
    control = _run(optimizer, grads, target_sparsity=0.9)
    assert _same(params[1:2], bases[1:2]) == 1000
    assert _same(params, bases) == round(0.9 * 4200)
    assert [budget.numel for budget in control.budgets] == [4200] or control.budgets[0].numel == 3200


@pytest.mark.parametrize("kind", ["row", "element"])
def test_what_gets_its_first_gradient_late(kind: str) -> None:
    """While pruning goes on it joins the others; in healing it stays unchanged."""
    params = _params(shapes=((40, 50), (20, 50)))
    bases = _copies(params)
    noise = _noise(*params)
    for late, changes in ((40, True), (65, False)):
        for param, base in zip(params, bases, strict=True):
            param.data.copy_(base)
        optimizer = _adamw([{"params": params, "group": kind}], lr=1e-2)
        _run(
            optimizer,
            lambda step, late=late: {p: g for p, g in noise(step).items() if p is params[0] or step >= late},
            target_sparsity=0.5,
        )
        assert (_same(params[1:], bases[1:]) < 1000) == changes
        if kind == "element":
            assert _same(params, bases) == 1500
        else:
            assert sum(_alive_units(params, bases, 0)) == (30 if changes else 20)


def test_what_is_frozen_after_it_has_changed_counts_as_it_is() -> None:
    params = _params(shapes=((40, 50), (40, 50)))
    bases = _copies(params)

    def freeze(step: int) -> None:
        if step == 30:
            params[0].requires_grad_(False)

    control = _run(_adamw(params), _noise(*params), after=freeze, target_sparsity=0.6)
    frozen = _same(params[:1], bases[:1])
    assert 0 < frozen < 1200
    assert _same(params, bases) == 2400
    assert control.budgets[0].target == pytest.approx((2400 - frozen) / 2000)


def test_more_unchanged_weights_than_are_asked_for_are_all_kept() -> None:
    """Rows of an embedding whose tokens never come: they stay, and nothing that moves is pruned."""
    (param,) = _params(shapes=((100, 10),))
    bases = _copies([param])
    noise = _noise(param)
    seen = (torch.arange(100) < 30).float()[:, None]
    optimizer = _adamw([param])
    control = _run(optimizer, lambda step: {param: noise(step)[param] * seen}, target_sparsity=0.5)
    assert _same([param], bases) == 700
    assert control.excess() == pytest.approx(0.2, abs=0.01)


def test_keep_zeros_and_a_target_of_changes_both_hold() -> None:
    params = _params(shapes=((50, 40),))
    with torch.no_grad():
        params[0][torch.rand(50, 40, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    bases = _copies(params)
    zeros = bases[0] == 0
    _run(_adamw(params), _noise(*params), target_sparsity=0.9, keep_zeros=True)
    assert not params[0][zeros].any()
    assert _same(params, bases) == 1800


def test_given_bases_of_a_model_that_is_as_sparse_in_changes_as_asked() -> None:
    """As zeros of a sparse model do, unchanged weights stay from the start; too many of them learn anew."""
    for share, kept in ((0.5, True), (0.95, False)):
        params = _params(shapes=((50, 40),))
        bases = _copies(params)
        unchanged = torch.rand(50, 40, generator=torch.Generator().manual_seed(0)) < share
        with torch.no_grad():
            params[0][~unchanged] += 0.01
        optimizer = _adamw(params)
        give_bases(optimizer, {params[0]: bases[0]})
        control = _run(optimizer, _noise(*params))
        assert _same(params, bases) == 1600
        assert bool((params[0].detach() == bases[0])[unchanged].all()) == kept
        assert control.lets_go != kept


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda params: LpDecay(torch.optim.SGD(params, lr=1e-3), decay_to="base"),
    "momentum": lambda params: LpDecay(torch.optim.SGD(params, lr=1e-3, momentum=0.9), decay_to="base"),
    "adamw": lambda params: LpDecay(torch.optim.AdamW(params, lr=1e-3), decay_to="base"),
    "adafactor": lambda params: LpDecay(torch.optim.Adafactor(params, lr=1e-3), decay_to="base"),
    "muon": lambda params: LpDecay(
        MuonWithAdamW([{"params": params[:1], "use_muon": True}, {"params": params[1:], "use_muon": False}], lr=1e-3),
        decay_to="base",
    ),
    "bfloat16 moments": lambda params: _adamw(params, moments="bfloat16"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_optimizers(name: str, dtype: torch.dtype) -> None:
    params = _params(dtype)
    bases = _copies(params)
    counts: list[int] = []
    _run(OPTIMIZERS[name](params), _noise(*params), after=lambda _: counts.append(_same(params, bases)))
    assert counts[59:] == [round(0.8 * 1105)] * 21


@pytest.mark.parametrize("name", ["sgd", "momentum"])
@pytest.mark.parametrize("kind", ["row", "2:4"])
def test_units_under_other_optimizers(name: str, kind: str) -> None:
    params = _params(shapes=((40, 48),))
    bases = _copies(params)
    make = {"sgd": 0.0, "momentum": 0.9}
    base = torch.optim.SGD([{"params": params, "group": kind}], lr=1e-3, momentum=make[name])
    _run(LpDecay(base, decay_to="base"), _noise(*params), target_sparsity=None if kind == "2:4" else 0.5)
    changed = params[0].detach() != bases[0]
    assert int(changed.any(1).sum()) == 20 if kind == "row" else int(changed.unflatten(1, (-1, 4)).sum(-1).max()) == 2


@pytest.mark.parametrize("rate", ["cosine", "linear", "to zero"])
def test_what_is_unchanged_stays_at_any_rate(rate: str) -> None:
    """Near the end of a schedule α times a λ_p that only holds would vanish in float32, and biases of 0 would move."""
    params = _params(shapes=((40, 50), (400,)))
    with torch.no_grad():
        params[1].zero_()
    bases = _copies(params)
    optimizer = _adamw(params)
    counts: list[int] = []

    def schedule(step: int) -> None:
        left = 1 - step / STEPS
        rates = {"cosine": 1e-3 * 10.0 ** (-30 * (step / STEPS)), "linear": 1e-3 * left, "to zero": 1e-3 * (step < 70)}
        if step >= 60:
            counts.append(_same(params, bases))
            optimizer.param_groups[0]["lr"] = rates[rate]

    _run(optimizer, _noise(*params), after=schedule)
    assert counts == [round(0.8 * 2400)] * 21


def test_a_group_that_decays_to_base_by_units_beside_one_of_single_weights() -> None:
    params = _params(shapes=((40, 50), (40, 50)))
    bases = _copies(params)
    optimizer = _adamw([{"params": params[:1]}, {"params": params[1:], "group": "row"}])
    _run(optimizer, _noise(*params), target_sparsity=0.75)
    assert _same(params[:1], bases[:1]) == 1500
    assert _alive_units(params[1:], bases[1:], 0) == [10]
    assert overall_target(optimizer.param_groups, 0.75) is None


def test_budgets_without_any_run() -> None:
    def group(size: int, **more: Any) -> dict[str, Any]:
        return {"params": [nn.Parameter(torch.ones(size))], "p_norm": 0.8, "lambda_p": 0.01, "decayed": True, **more}

    base, zero = {"decay_to": "base"}, {"decay_to": "zero"}
    found = divide_target([group(100, **base), group(300, **zero), group(60, **base, group="row")], 0.5)
    assert [(each.kind, each.to_base, each.numel) for each in found] == [("element", True, 100), ("row", True, 60)]
    assert [each.to_base for each in divide_target([group(100, **zero)], 0.5)] == [False]
    # A group that decays to a base, and on which no decay acts, leaves the target to the others.
    idle = group(100, **{**base, "decayed": False, "lambda_p": 0.0})
    assert [each.numel for each in divide_target([idle, group(300, **zero)], 0.5)] == [300]
    assert HOLDING > 0


def test_a_target_that_comes_before_pruning_holds_nothing_that_has_not_moved_yet() -> None:
    (param,) = _params(torch.bfloat16, ((100, 80),))
    bases = _copies([param])
    optimizer = _adamw([param], lr=1e-5, lambda_p=0.0)
    grads = _noise(param)
    for step in (1, 2):
        param.grad = grads(step)[param]
        optimizer.step()
    assert 0.2 < _same([param], bases) / 8000 < 1
    optimizer.param_groups[0].update(lambda_p=0.01)
    _run(optimizer, grads, first=3, last=3, target_sparsity=0.999)
    assert optimizer.param_groups[0]["lambda_p"] == 0
