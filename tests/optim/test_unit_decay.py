"""Structured decay in the optimizers: against float64 references, and what holds beside the formulas."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_pdecay import AdamWLp, LpDecay
from hf_pdecay.optim import foreach
from hf_pdecay.optim.unit_decay import unit_decay_of
from hf_pdecay.optim.unit_operations import weakest
from tests.helpers.reference.adamw_lp64 import Hyper
from tests.helpers.reference.unit_decay64 import UnitReference, Where, indices
from tests.helpers.steps import BACKENDS, DTYPES, bits, normal, through_a_file


quick = settings(derandomize=True, deadline=None, max_examples=60)

HYPER = Hyper(lr=0.02, weight_decay=0.1, p_norm=0.8, lambda_p=0.5)

# A fused projection whose three parts are of two heads of 4 each, its bias, and the output that reads the heads.
SHAPES = [(24, 6), (24,), (6, 8), (3, 24)]
HEADS = {
    "kind": "head",
    "count": 2,
    "name": "attention",
    "members": [
        *({"param": param, "dim": 0, "size": 4, "offset": 8 * part} for param in (0, 1) for part in range(3)),
        {"param": 2, "dim": 1, "size": 4, "offset": 0},
    ],
}


def head_places(head: int) -> list[Where]:
    found = [
        where
        for param in (0, 1)
        for part in range(3)
        for where in indices(SHAPES[param], param, 0, 8 * part + 4 * head, 8 * part + 4 * head + 4)
    ]
    return found + indices(SHAPES[2], 2, 1, 4 * head, 4 * head + 4)


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter((normal(*shape, seed=k) * 0.3).to(dtype)) for k, shape in enumerate(shapes)]


def give_grads(params: list[nn.Parameter], seed: int) -> list[np.ndarray]:
    for k, param in enumerate(params):
        grad = torch.empty_like(param)  # of the same strides
        param.grad = grad.copy_(normal(*param.shape, seed=100 * seed + k))
    return [param.grad.double().numpy().reshape(-1) for param in params if param.grad is not None]


def adamw(groups: list[dict[str, Any]], hyper: Hyper = HYPER, backend: str = "auto", **more: Any) -> AdamWLp:
    options = dataclasses.asdict(hyper)
    betas = (options.pop("beta1"), options.pop("beta2"))
    return AdamWLp(groups, betas=betas, backend=backend, **options, **more)


def wrapped(groups: list[dict[str, Any]], hyper: Hyper = HYPER, **more: Any) -> LpDecay:
    base = torch.optim.AdamW(
        groups, hyper.lr, (hyper.beta1, hyper.beta2), hyper.eps, hyper.weight_decay, maximize=hyper.maximize
    )
    return LpDecay(base, p_norm=hyper.p_norm, lambda_p=hyper.lambda_p, keep_zeros=hyper.keep_zeros, **more)


def values(params: list[nn.Parameter]) -> list[np.ndarray]:
    return [param.detach().double().numpy().reshape(-1) for param in params]


def make(how: str, groups: list[dict[str, Any]], hyper: Hyper = HYPER) -> AdamWLp | LpDecay:
    return wrapped(groups, hyper) if how == "wrapper" else adamw(groups, hyper, how)


HOW = [*BACKENDS, "wrapper"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-5, torch.float16: 2**-7}


# --- the formula


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", HOW)
def test_coupled_groups_shrink_as_one(how: str, dtype: torch.dtype) -> None:
    """Step by step from the same weights; what is in no group is AdamW's."""
    if how == "wrapper" and dtype == torch.float16:
        pytest.skip("torch's AdamW divides by 0 in float16")
    params = parameters(SHAPES, dtype)
    optimizer = make(how, [{"params": params, "group": "head", "units": [HEADS]}])
    reference = UnitReference(values(params), [head_places(0), head_places(1)])
    for seed in range(4):
        expected = reference.step(give_grads(params, seed), HYPER)
        optimizer.step()
        for param, right, tensor in zip(values(params), expected, reference.tensors, strict=True):
            tolerance = TOLERANCE[dtype]
            np.testing.assert_allclose(param, right, rtol=tolerance, atol=tolerance * np.abs(tensor.scale).max())
        if how != "wrapper" or dtype in (torch.float32, torch.float64):
            for tensor, param in zip(reference.tensors, params, strict=True):
                tensor.weight = values([param])[0].copy()
                state = optimizer.state[param]
                tensor.exp_avg, tensor.exp_avg_sq = (
                    state[name].double().numpy().reshape(-1).copy() for name in ("exp_avg", "exp_avg_sq")
                )
        else:
            break  # the base rounds its moments in its own way
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("p_norm", [0.5, 1.0, 1.3, 2.0, 3.0])
@pytest.mark.parametrize("kind", ["row", "column"])
@pytest.mark.parametrize("shape", [(6, 8), (700, 600), (5, 3, 2, 2), (4, 3, 8, 9), "channels last", "transposed"])
@pytest.mark.parametrize("backend", ["foreach", "compiled"])
def test_rows_and_columns_of_any_layout(
    backend: str, shape: Any, kind: str, p_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in several chunks, and where the order in memory is another."""
    if shape == (700, 600) and p_norm != 0.5:
        pytest.skip("large ones by one p")
    monkeypatch.setattr(foreach, "CPU_CHUNK", 1 << 18 if shape == (700, 600) else 16)
    if shape == "channels last":
        param = nn.Parameter(normal(5, 3, 4, 2).to(memory_format=torch.channels_last))
    elif shape == "transposed":
        param = nn.Parameter(normal(8, 6).t())
    else:
        param = nn.Parameter(normal(*shape))
    dim = 0 if kind == "row" else 1
    groups = [indices(param.shape, 0, dim, place, place + 1) for place in range(param.shape[dim])]
    hyper = dataclasses.replace(HYPER, p_norm=p_norm)
    optimizer = adamw([{"params": [param], "group": kind}], hyper, backend)
    reference = UnitReference(values([param]), groups)
    expected = reference.step(give_grads([param], 1), hyper)
    optimizer.step()
    np.testing.assert_allclose(values([param])[0], expected[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("kind", "shape"), [("2:4", (6, 16)), ("2:4", (600, 512)), ("1:4", (5, 8)), ("3:5", (4, 10))])
def test_n_of_m_shrinks_the_weakest(kind: str, shape: tuple[int, int], how: str, dtype: torch.dtype) -> None:
    n, m = map(int, kind.split(":"))
    param = parameters([shape], dtype)[0]
    optimizer = make(how, [{"params": [param], "group": kind}])
    blocks = [[(0, start + k) for k in range(m)] for start in range(0, param.numel(), m)]
    reference = UnitReference(values([param]), blocks)
    for seed in range(2):
        expected = reference.step_n_of_m(give_grads([param], seed), HYPER, n, m)
        optimizer.step()
        tolerance = TOLERANCE[dtype]
        np.testing.assert_allclose(values([param])[0], expected[0], rtol=tolerance, atol=tolerance)
        reference.tensors[0].weight = values([param])[0].copy()


def test_blocks_of_a_transposed_layer_lie_along_its_inputs() -> None:
    """HF's Conv1D holds inputs × outputs: the same numbers transposed give the same step."""
    weights = normal(6, 8)
    plain, turned = nn.Parameter(weights.clone()), nn.Parameter(weights.t().contiguous())
    units = [{"kind": "2:4", "count": 8, "name": "", "members": [{"param": 0, "dim": 0, "size": 1, "offset": 0}]}]
    one = adamw([{"params": [plain], "group": "2:4"}])
    other = adamw([{"params": [turned], "group": "2:4", "units": units}])
    for seed in range(3):
        give_grads([plain], seed)
        turned.grad = plain.grad.t().contiguous()
        one.step()
        other.step()
    torch.testing.assert_close(plain.t(), turned)
    assert not torch.equal(plain, weights)


@quick
@given(
    st.lists(st.floats(-50, 50, width=32).filter(lambda w: w == 0 or abs(w) > 1e-15), min_size=12, max_size=12),
    st.sampled_from([0.3, 0.8, 1.0, 1.7, 2.0, 3.0]),
    st.floats(1e-6, 10),
)
def test_the_factor_is_between_0_and_1_and_the_same_for_a_group(
    weights: list[float], p_norm: float, lambda_p: float
) -> None:
    """Without a gradient or a learning that moves them, weights are multiplied by what the formula says."""
    param = nn.Parameter(torch.tensor(weights).view(3, 4))
    before = param.detach().double().clone()
    param.grad = torch.zeros_like(param)
    adamw([{"params": [param], "group": "row"}], Hyper(lr=0.5, p_norm=p_norm, lambda_p=lambda_p)).step()
    for row, old in zip(param.detach().double(), before, strict=True):
        r = math.sqrt(float(old.square().mean()))
        s = r ** (2 - p_norm) if r else 0.0
        factor = (s / (s + 0.5 * lambda_p) if p_norm < 2 else 1 / (1 + 0.5 * lambda_p * r ** (p_norm - 2))) if r else 0
        torch.testing.assert_close(row, old * factor, rtol=3e-5, atol=1e-30)


@pytest.mark.parametrize("how", HOW)
def test_the_stride_of_a_single_row_says_nothing(how: str) -> None:
    found = []
    for weight in (normal(4, 999)[:1, :8], normal(4, 999)[:1, :8].clone()):
        param = nn.Parameter(weight)
        assert param.is_contiguous() and param.stride(0) in (999, 8)
        optimizer = make(how, [{"params": [param], "group": "row"}])
        give_grads([param], 1)
        optimizer.step()
        found.append(param.detach().clone())
    assert torch.equal(*found) and bool((found[0] != 0).all())


# --- what else must hold


@pytest.mark.parametrize("how", HOW)
def test_a_dead_group_stays_dead_and_one_that_began_so_may_learn(how: str) -> None:
    """Zero absorbs for whole groups only: a group that is partly zero is not zero."""
    weights = normal(4, 6)
    weights[0] = 0
    weights[1, :3] = 0
    param = nn.Parameter(weights)
    hyper = dataclasses.replace(HYPER, lambda_p=0.001)
    optimizer = make(how, [{"params": [param], "group": "row"}], hyper)
    give_grads([param], 1)
    optimizer.step()
    assert (param[0] != 0).all() and (param[1] != 0).all()
    with torch.no_grad():
        param[2] = 0
    for seed in range(3):
        give_grads([param], seed)
        optimizer.step()
    assert (param[2] == 0).all() and not param[2].signbit().any()
    assert (param[[0, 1, 3]] != 0).all()
    # Nothing that is felt, and yet the group is held: that is how a target keeps what it has cut.
    optimizer.param_groups[0]["lambda_p"] = 1e-300
    give_grads([param], 7)
    optimizer.step()
    assert (param[2] == 0).all() and (param[3] != 0).all()
    optimizer.param_groups[0]["lambda_p"] = 0.0
    give_grads([param], 8)
    optimizer.step()
    assert (param[2] != 0).all()


@pytest.mark.parametrize("how", HOW)
def test_ranks_whose_b_is_zero_decay_by_their_a(how: str) -> None:
    a, b = nn.Parameter(normal(4, 6)), nn.Parameter(torch.zeros(5, 4))
    members = [{"param": 0, "dim": 0, "size": 1, "offset": 0}, {"param": 1, "dim": 1, "size": 1, "offset": 0}]
    units = [{"kind": "rank", "count": 4, "name": "lora", "members": members}]
    optimizer = make(how, [{"params": [a, b], "group": "rank", "units": units}])
    groups = [indices(a.shape, 0, 0, r, r + 1) + indices(b.shape, 1, 1, r, r + 1) for r in range(4)]
    expected = UnitReference(values([a, b]), groups).step(give_grads([a, b], 0), HYPER)
    optimizer.step()
    for ours, right in zip(values([a, b]), expected, strict=True):
        np.testing.assert_allclose(ours, right, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["row", "2:4"])
def test_a_skipped_step_changes_nothing(kind: str, how: str) -> None:
    param = nn.Parameter(normal(4, 8))
    optimizer = make(how, [{"params": [param], "group": kind}])
    give_grads([param], 0)
    optimizer.step()
    before = bits(param)
    give_grads([param], 1)
    param.grad[0, 0] = math.nan
    optimizer.step()
    assert torch.equal(bits(param), before)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("kind", ["row", "2:4"])
@pytest.mark.parametrize("how", HOW)
def test_no_decay_is_adamw_to_the_bit(kind: str, how: str) -> None:
    hyper = dataclasses.replace(HYPER, lambda_p=0.0)
    ours, theirs = nn.Parameter(normal(4, 8)), nn.Parameter(normal(4, 8))
    one, other = make(how, [{"params": [ours], "group": kind}], hyper), make(how, [{"params": [theirs]}], hyper)
    for seed in range(3):
        for param, optimizer in ((ours, one), (theirs, other)):
            give_grads([param], seed)
            optimizer.step()
    assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["row", "2:4"])
def test_zeros_are_kept_where_that_was_asked_for(kind: str, how: str) -> None:
    weights = normal(4, 8)
    weights[1, 3] = 0
    param = nn.Parameter(weights)
    optimizer = make(how, [{"params": [param], "group": kind}], dataclasses.replace(HYPER, keep_zeros=True))
    for seed in range(3):
        give_grads([param], seed)
        optimizer.step()
    assert param[1, 3] == 0 and (param[1, [1, 2, 4]] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("how", ["foreach", "compiled", "wrapper"])
def test_a_checkpoint_goes_on_to_the_bit(how: str, dtype: torch.dtype) -> None:
    """Through a file that is read with ``weights_only``: groups that sleep, and random bits, go on as they were."""
    params = parameters(SHAPES, dtype)
    with torch.no_grad():
        for param, place in head_places(1):
            params[param].view(-1)[place] = 0  # asleep, and without gradients below
    group = {"params": params, "group": "head", "units": [HEADS]}

    def run(optimizer: AdamWLp | LpDecay, params: list[nn.Parameter], seeds: range) -> None:
        for seed in seeds:
            give_grads(params, seed)
            if seed < 3:
                for param, place in head_places(1):
                    params[param].grad.view(-1)[place] = 0
            optimizer.step()

    one = make(how, [group])
    run(one, params, range(2))
    saved = through_a_file(one.state_dict())
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    other = make(how, [{**group, "params": copies}])
    other.load_state_dict(saved)
    run(one, params, range(2, 6))
    run(other, copies, range(2, 6))
    for param, copied in zip(params, copies, strict=True):
        assert torch.equal(bits(param), bits(copied))
    assert all(params[param].view(-1)[place] != 0 for param, place in head_places(1))
    assert copy.deepcopy(one).param_groups[0]["units"] == [HEADS]


def test_low_precision_shrinks_on_average_as_it_should() -> None:
    """A factor that is lost to rounding to nearest in bfloat16 has its effect in the mean."""
    param = nn.Parameter(torch.full((64, 512), 1.0, dtype=torch.bfloat16))
    hyper = Hyper(lr=0.001, p_norm=1.0, lambda_p=1.0)
    optimizer = adamw([{"params": [param], "group": "row"}], hyper)
    for _ in range(10):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    # r falls by α λ_p a step, at p = 1.
    assert float(param.detach().double().mean()) == pytest.approx(0.99, abs=4 * 2**-9 * math.sqrt(10 / param.numel()))


@pytest.mark.parametrize("backend", ["foreach", "compiled"])
def test_a_member_without_gradients_shrinks_by_other_random_bits_in_each_step(backend: str) -> None:
    """By the same ones some weights would never move and others would fall by a unit each time."""
    leader = torch.nn.Parameter(torch.ones(32, 16))
    still = torch.nn.Parameter((1 + torch.rand(32, 512, generator=torch.Generator().manual_seed(0))).bfloat16())
    exact = torch.nn.Parameter(still.detach().float())
    units = [{"count": 32, "members": [{"param": 0, "dim": 0}, {"param": 1, "dim": 0}]}]
    for weights in (still, exact):
        first = torch.nn.Parameter(leader.detach().clone())
        group = {"params": [first, weights], "group": "row", "units": units}
        optimizer = AdamWLp([group], lr=1e-2, p_norm=1.0, lambda_p=0.1, backend=backend)
        for _ in range(100):
            first.grad = torch.zeros_like(first)
            optimizer.step()
    ratio = still.detach().float() / exact.detach()
    # A step rounds by at most a unit of 2^-7: at random, a hundred of them amount to a few.
    assert ratio.std() < 0.03 and (ratio.mean() - 1).abs() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["row", "column", "2:4"])
def test_it_never_waits_for_the_device(kind: str, dtype: torch.dtype) -> None:
    """On the meta device there are no values that the host could look at: it would be an error."""
    param = nn.Parameter(torch.zeros(16, 16, device="meta", dtype=dtype))
    param.grad = torch.zeros_like(param)
    scalar = torch.zeros((), device="meta")
    sleeping = [torch.zeros(16, dtype=torch.bool, device="meta")]
    group = {"params": [param], "group": kind, "p_norm": 0.8, "dormant_units": sleeping}
    decay = unit_decay_of(group, 0, lambda _: scalar, lambda _: scalar)
    decay.take_norms()
    decay.before_step()
    decay.after_step(scalar.bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["row", "2:4"])
def test_a_step_that_the_device_knows_to_be_skipped(kind: str, dtype: torch.dtype) -> None:
    """On an accelerator the host does not know whether there was a step: a tensor says so."""
    param = nn.Parameter(normal(16, 16).to(dtype))
    param.grad = torch.zeros_like(param)
    before = bits(param)
    for finite in (False, True):
        group = {"params": [param], "group": kind, "p_norm": 0.8}
        decay = unit_decay_of(group, 0, lambda _: torch.tensor(0.1), lambda _: torch.tensor(1.0))
        decay.take_norms()
        decay.before_step()
        decay.after_step(torch.tensor(finite))
        assert torch.equal(bits(param), before) == (not finite)


def test_weak_rows_die_and_strong_ones_stay() -> None:
    """A regression whose target depends on 3 of 12 hidden rows' worth of outputs."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    truth = torch.zeros(12, 8)
    truth[[1, 5, 9]] = torch.randn(3, 8)
    y = x @ truth.t() + 0.01 * torch.randn(256, 12)
    layer = nn.Linear(8, 12, bias=False)
    optimizer = AdamWLp([{"params": [layer.weight], "group": "row"}], lr=0.01, p_norm=0.8, lambda_p=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
    alive = (layer.weight != 0).any(1)
    assert alive.nonzero().flatten().tolist() == [1, 5, 9]
    torch.testing.assert_close(layer.weight[alive], truth[alive], rtol=0.1, atol=0.1)


# --- bad input


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"group": "filter"}, "it must be one of element, row, column, neuron, head, rank, or N:M"),
        ({"group": 2}, "it must be one of element, row"),
        ({"group": "4:2"}, "N must be below M"),
        ({"group": "neuron"}, "group='neuron' without units"),
        ({"group": "2:4"}, "dimension 1 is not divisible by 4"),
        ({"group": "row", "units": [{"count": 3}]}, "it must be a list of"),
        ({"group": "row", "units": [{"count": 3, "members": []}]}, "at least one unit and one member"),
        ({"group": "row", "units": [{"count": 3, "members": [{"param": 1, "dim": 0}]}]}, "names parameter 1 of 1"),
        ({"group": "row", "units": [{"count": 3, "members": [{"param": 0, "dim": 2}]}]}, "does not fit"),
        ({"group": "row", "units": [{"count": 3, "members": [{"param": 0, "dim": 0, "offset": 3}]}]}, "index 6"),
        (
            {"group": "row", "units": [{"count": 2, "members": [{"param": 0, "dim": 0}, {"param": 0, "dim": 1}]}]},
            "belong to another unit of this kind",
        ),
    ],
)
@pytest.mark.parametrize("how", ["foreach", "wrapper"])
def test_wrong_groups_are_refused(how: str, group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(how, [{"params": [nn.Parameter(normal(5, 6))], **group}])


@pytest.mark.parametrize(("kind", "shape"), [("row", (0, 3)), ("column", (3, 0)), ("2:4", (3, 0))])
def test_what_has_no_groups_is_refused(kind: str, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"group='{kind}' on a parameter, which is empty along that dimension; leave"):
        adamw([{"params": [nn.Parameter(torch.empty(shape))], "group": kind}])


def test_columns_of_a_vector_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        adamw([{"params": [nn.Parameter(normal(5))], "group": "column"}])


@quick
@given(st.lists(st.floats(0, 10, width=32), min_size=8, max_size=24).map(lambda w: w[: len(w) // 4 * 4]))
def test_the_weakest_two_of_four_are_those_of_a_sort(scores: list[float]) -> None:
    """By a network of minima and maxima, by a search, and exactly."""
    tensor = torch.tensor(scores)
    exact = weakest(tensor, (2, 4), exact=True).view(-1, 4)
    assert (exact.sum(1) == 2).all()
    for block, chosen, loose in zip(tensor.view(-1, 4), exact, weakest(tensor, (2, 4)).view(-1, 4), strict=True):
        assert block[chosen].max() <= block[~chosen].min()
        second = sorted(block.tolist())[2]
        assert loose.tolist() == [score < second for score in block.tolist()]
