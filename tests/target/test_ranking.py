from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_pdecay.optim.shards import Ranked
from hf_pdecay.target.ranking import Ranking, Threshold, prune_least, scores


SAMPLE = 32_768
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("normal", "constant", "coarse", "mostly zero", "all zero", "transposed", "strided", "tiny")


def _weights(kind: str, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, generator=generator, dtype=torch.float64)
    match kind:
        case "normal":
            return normal.to(dtype)
        case "constant":
            return torch.full((size,), -0.25, dtype=dtype)
        case "coarse":
            return (normal * 2).round().div(2).to(dtype)
        case "mostly zero":
            return torch.where(normal.abs() < 1.6, 0.0, normal).to(dtype)
        case "all zero":
            return torch.zeros(size, dtype=dtype)
        case "transposed":
            return torch.cat([normal, -normal, normal * 3]).to(dtype).view(3, size).t()
        case "strided":
            return torch.stack([normal, normal + 1], 1).to(dtype)[:, 0]
        case "tiny":
            return (normal * 6e-8).to(dtype)
    raise ValueError(kind)


def _moment(weight: Tensor, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A second moment over many orders of magnitude, a tenth of it 0."""
    generator = torch.Generator().manual_seed(seed + 1)
    value = 10 ** (torch.rand(weight.shape, generator=generator, dtype=torch.float64) * 10 - 12)
    return torch.where(torch.rand(weight.shape, generator=generator) < 0.1, 0.0, value).to(dtype)


def _flat(tensors: Sequence[Ranked]) -> np.ndarray:
    """All weights in float64."""
    return np.concatenate([each.weight.double().flatten().numpy() for each in tensors])


def _saliency(tensors: Sequence[Ranked]) -> np.ndarray:
    """What the weights are ranked by, in float64."""
    parts = []
    for each in tensors:
        part = np.abs(each.weight.double().flatten().numpy())
        if each.exp_avg_sq is not None:  # the least moment lets weights that never had a gradient rank by magnitude
            part = part * (each.exp_avg_sq.double().flatten().numpy() + 1e-30) ** 0.25
        parts.append(part)
    return np.concatenate(parts)


def _check_by_magnitude(tensors: Sequence[Ranked], count: int) -> Threshold:
    """Compare a cut by magnitude with a full sort, before and after it is made."""
    before = _flat(tensors)
    magnitudes = np.abs(before)
    expected = np.sort(magnitudes)[count - 1]
    cut = Ranking(tensors).least(count)
    assert cut.score == expected
    assert cut.equal == (magnitudes == expected).sum()
    assert cut.ties == count - (magnitudes < expected).sum()
    prune_least(tensors, cut)
    after = _flat(tensors)
    assert (after == 0).sum() == max(count, (before == 0).sum())
    removed = (before != 0) & (after == 0)
    assert (after[~removed] == before[~removed]).all()
    if removed.any():
        assert magnitudes[removed].max() <= magnitudes[after != 0].min(initial=math.inf)
    return cut


@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(1, 400), st.sampled_from(DTYPES), st.integers(0, 1000)),
        min_size=1,
        max_size=5,
    ),
    st.floats(0, 1),
)
@settings(max_examples=100, deadline=None)
def test_a_cut_by_magnitude_is_that_of_a_full_sort(
    made: list[tuple[str, int, torch.dtype, int]], fraction: float
) -> None:
    tensors = [Ranked(_weights(*each)) for each in made]
    numel = sum(each.weight.numel() for each in tensors)
    assert Ranking(tensors).rank(fraction) == round(fraction * numel)
    _check_by_magnitude(tensors, max(1, round(fraction * numel)))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([kind for kind in KINDS if kind not in ("constant", "tiny")]),
            st.integers(1, 400),
            st.sampled_from(DTYPES),
            st.integers(0, 1000),
        ),
        min_size=1,
        max_size=5,
    ),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@settings(max_examples=100, deadline=None)
def test_a_cut_by_saliency_is_that_of_a_full_sort(
    made: list[tuple[str, int, torch.dtype, int]], fraction: float, moment: torch.dtype
) -> None:
    weights = [_weights(*each) for each in made]
    tensors = [Ranked(each, _moment(each, place, moment)) for place, each in enumerate(weights)]
    before, saliency = _flat(tensors), _saliency(tensors)
    count = max(1, round(fraction * len(before)))
    prune_least(tensors, Ranking(tensors).least(count))
    after = _flat(tensors)
    assert (after == 0).sum() == max(count, (before == 0).sum())
    removed, left = (before != 0) & (after == 0), after != 0
    assert (after[left] == before[left]).all()
    if removed.any() and left.any():
        # Scores are float32.
        assert saliency[removed].max() <= saliency[left].min() * (1 + 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_zero_for_zeros_only(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).tiny
    weight = torch.tensor([0.0, -0.0, smallest, -smallest, 1.0], dtype=dtype)
    for second in (None, torch.zeros(5), torch.full((5,), 1e-38)):
        assert (scores(Ranked(weight, second), torch.promote_types(dtype, torch.float32)) == 0).tolist() == [
            True,
            True,
            False,
            False,
            False,
        ]


@pytest.mark.parametrize("layout", ["transposed", "columns", "channels last"])
def test_a_cut_reaches_tensors_that_are_not_contiguous(layout: str) -> None:
    base = torch.randn(6, 8, 10, 4, generator=torch.Generator().manual_seed(0))
    weight = {
        "transposed": base.view(48, 40).t(),
        "columns": base.view(48, 40)[:, ::3],
        "channels last": base.contiguous(memory_format=torch.channels_last),
    }[layout]
    assert not weight.is_contiguous()
    others = base.view(48, 40).clone()
    moment = _moment(weight, 3)
    saliency = _saliency([Ranked(weight, moment)])
    count = weight.numel() // 3
    prune_least([Ranked(weight, moment)], Ranking([Ranked(weight, moment)]).least(count))
    gone = (weight == 0).flatten().numpy()
    assert set(np.flatnonzero(gone)) == set(np.argsort(saliency)[:count])
    if layout == "columns":
        kept = torch.ones(40, dtype=torch.bool)
        kept[::3] = False
        assert torch.equal(base.view(48, 40)[:, kept], others[:, kept])


def test_a_cut_of_parameters_with_gradients() -> None:
    param = torch.nn.Parameter(torch.arange(1.0, 11.0))
    prune_least([Ranked(param)], Ranking([Ranked(param)]).least(4))
    assert param.detach().tolist() == [0.0] * 4 + [5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    assert param.requires_grad and param.is_leaf


def _structured(name: str) -> list[Tensor]:
    """Weights whose sample misleads: stride 3 through 98,304 of them sees one column in three."""
    size = 3 * SAMPLE
    at = torch.arange(size)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(size, generator=generator) + 0.5
    match name:
        case "sample sees large ones only":
            return [torch.where(at % 3 == 0, 100 * noise, noise)]
        case "sample sees small ones only":
            return [torch.where(at % 3 == 0, noise, 100 * noise)]
        case "sample sees zeros only":
            return [torch.where(at % 3 == 0, torch.zeros(()), noise)]
        case "sample sees a constant":
            return [torch.where(at % 3 == 0, torch.full((), 7.0), noise)]
        case "sorted":
            return [noise.sort().values]
        case "sorted backwards":
            return [noise.sort(descending=True).values.bfloat16()]
        case "periodic":
            return [((at % 64) + 1.0).view(-1, 64), (at[: size // 2] % 48) / 7]
        case "all large ones in one tensor":
            return [noise[:50_000], noise[50_000:90_000] * 1e4, noise[90_000:], torch.zeros(20_000)]
    raise ValueError(name)


@pytest.mark.parametrize(
    ("name", "misleads"),
    [
        ("sample sees large ones only", True),
        ("sample sees small ones only", True),
        ("sample sees zeros only", True),
        ("sample sees a constant", True),
        ("sorted", False),
        ("sorted backwards", False),
        ("periodic", False),
        ("all large ones in one tensor", False),
    ],
)
@pytest.mark.parametrize("fraction", [0.0001, 0.2, 0.34, 0.5, 0.9, 0.9999, 1.0])
def test_structured_weights_that_the_sample_misjudges(
    name: str, misleads: bool, fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[tuple[float, float]] = []
    between = Ranking._between

    def spy(self: Ranking, low: float, high: float) -> tuple[int, int, Tensor]:
        looks.append((low, high))
        return between(self, low, high)

    monkeypatch.setattr(Ranking, "_between", spy)
    tensors = [Ranked(each) for each in _structured(name)]
    count = max(1, round(fraction * sum(each.weight.numel() for each in tensors)))
    _check_by_magnitude(tensors, count)
    assert len(looks) <= 10
    if misleads and fraction == 0.5:
        assert len(looks) > 1 and looks[-1][1] - looks[-1][0] > looks[0][1] - looks[0][0]


@given(st.integers(SAMPLE + 1, 5 * SAMPLE), st.floats(0.01, 0.99), st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_more_weights_than_the_sample_has(size: int, fraction: float, seed: int) -> None:
    first = _weights("normal", size // 2, torch.bfloat16, seed)
    second = _weights("normal", size - size // 2, torch.float32, seed + 1) * 5
    ranking = Ranking([Ranked(first), Ranked(second)])
    magnitudes = np.abs(_flat([Ranked(first), Ranked(second)]))
    assert abs((magnitudes <= ranking.quantile(fraction)).mean() - fraction) < 0.02
    _check_by_magnitude([Ranked(first), Ranked(second)], round(fraction * size))


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_a_quantile_of_few_weights_is_exact(kinds: list[str], fraction: float, seed: int) -> None:
    tensors = [Ranked(_weights(kind, 100 + seed, torch.float32, seed)) for kind in kinds]
    magnitudes = np.sort(np.abs(_flat(tensors)))
    place = min(int(fraction * len(magnitudes)), len(magnitudes) - 1)
    assert Ranking(tensors).quantile(fraction) == magnitudes[place]


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("with_moment", [False, True])
@pytest.mark.parametrize("size", [1000, 2 * SAMPLE])
def test_nan_is_never_cut_and_inf_last(size: int, with_moment: bool, fraction: float) -> None:
    weight = _weights("normal", size, torch.float32, 0)
    weight[: size // 5] = math.nan
    weight[size // 5 : 2 * size // 5 : 2] = math.inf
    weight[size // 5 + 1 : 2 * size // 5 : 2] = -math.inf
    weight = weight[torch.randperm(size, generator=torch.Generator().manual_seed(0))]
    before = weight.clone()
    tensors = [Ranked(weight, torch.full((size,), 1e-4) if with_moment else None)]
    count = round(fraction * size)
    prune_least(tensors, Ranking(tensors).least(count))
    numbers, infinite = int((~before.isnan()).sum()), int(before.isinf().sum())
    assert int((weight == 0).sum()) == min(count, numbers)
    assert torch.equal(weight.isnan(), before.isnan())
    assert int(weight.isinf().sum()) == min(infinite, max(numbers - count, 0))


def test_nothing_but_nan() -> None:
    weight = torch.full((100,), math.nan)
    prune_least([Ranked(weight)], Ranking([Ranked(weight)]).least(50))
    assert weight.isnan().all()


@pytest.mark.parametrize(("tensors", "size"), [(4, 1000), (3, 150_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_are_spread_evenly(tensors: int, size: int, dtype: torch.dtype) -> None:
    weights = [torch.full((size,), 0.5 if place % 2 else -0.5, dtype=dtype) for place in range(tensors)]
    ranked = [Ranked(each) for each in weights]
    count = tensors * size * 3 // 10
    cut = _check_by_magnitude(ranked, count)
    assert (cut.ties, cut.equal) == (count, tensors * size)
    for weight in weights:
        zeros = (weight == 0).view(-1, 100).sum(1)
        assert zeros.min() >= 29 and zeros.max() <= 31


def test_ties_are_spread_among_those_above_smaller_ones() -> None:
    low, tied = torch.full((300,), 0.125), [torch.full((500,), 0.25), torch.full((1500,), 0.25)]
    tensors = [Ranked(each) for each in (tied[0], low, torch.ones(1000), tied[1])]
    _check_by_magnitude(tensors, 800)
    assert not low.any()
    assert abs(int((tied[0] == 0).sum()) - 125) <= 1
    assert abs(int((tied[1] == 0).sum()) - 375) <= 1


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_float64_beside_the_same_numbers_in_float32(fraction: float) -> None:
    exact = torch.rand(501, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    for shift in range(8):
        tensors = [Ranked(exact.clone()), Ranked(exact.float()), Ranked(exact.bfloat16())]
        _check_by_magnitude(tensors, round(fraction * 1503) + shift)


def test_empty_tensors_and_a_single_weight() -> None:
    weights = [torch.empty(0), torch.tensor([3.0]), torch.empty(0, 4), torch.tensor(2.0)]
    tensors = [Ranked(each) for each in weights]
    _check_by_magnitude(tensors, 1)
    assert weights[1].item() == 3 and weights[3].item() == 0
    _check_by_magnitude(tensors, 2)
    assert weights[1].item() == 0
