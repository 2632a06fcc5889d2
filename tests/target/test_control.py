from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_pdecay import AdamWLp, LpDecay
from hf_pdecay.optim.decay import lambda_for_threshold
from hf_pdecay.rules.assign import build_param_groups
from hf_pdecay.target.control import SparsityControl
from hf_pdecay.target.schedule import Schedule


STEPS = 200


def _model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)).to(dtype)


def _batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 16, generator=generator)
    return inputs.to(dtype), torch.stack([inputs[:, 0], inputs[:, 1] * inputs[:, 2], inputs[:, 3], inputs.sum(1)], 1)


def _zeros(model: nn.Module) -> float:
    weights = [param for param in model.parameters() if param.ndim == 2]
    return sum(int((each == 0).sum()) for each in weights) / sum(each.numel() for each in weights)


def _asked(control: SparsityControl, step: int) -> float:
    """The fraction of zeros that the schedule asks of the controlled weights after a step."""
    asked = sum(budget.target * budget.numel for budget in control.budgets)
    return asked / sum(budget.numel for budget in control.budgets) * control.schedule.progress(step)


class Loop:
    """A bare training loop, which notes the zeros after each step."""

    def __init__(self, *, lr: float = 1e-2, p_norm: float = 0.8, dtype: torch.dtype = torch.float32, **options: object):
        self.moments = options.pop("moments", None)
        self.rules = options.pop("rules", None)
        self.steps = int(str(options.pop("steps", STEPS)))
        self.model = _model(dtype)
        self.lr, self.p_norm, self.dtype, self.options = lr, p_norm, dtype, options
        self.history: list[float] = []
        self.start()

    def start(self) -> None:
        groups = build_param_groups(self.model, p_norm=self.p_norm, lambda_p=0.01, rules=self.rules)  # type: ignore[arg-type]
        self.optimizer = AdamWLp(groups, lr=self.lr, moments=self.moments)  # type: ignore[arg-type]

    def run(self, first: int = 1, last: int | None = None, rate: str = "cosine") -> Loop:
        self.control = SparsityControl(self.optimizer, self.steps, **self.options)  # type: ignore[arg-type]
        for step in range(first, (last or self.steps) + 1):
            factor = 0.0 if rate == "warmup" and step == 1 else 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * (1.0 if rate == "constant" else factor)
            inputs, wanted = _batch(step, self.dtype)
            (self.model(inputs).float() - wanted).square().mean().backward()
            self.control.before_step(step)
            self.optimizer.step()
            self.control.after_step(step)
            self.optimizer.zero_grad()
            self.history.append(_zeros(self.model))
        return self


@pytest.mark.parametrize("p_norm", [0.4, 0.8, 1.0, 1.2])
@pytest.mark.parametrize("target", [0.3, 0.9, 0.99])
def test_it_ends_where_it_was_asked_to_and_never_overshoots(p_norm: float, target: float) -> None:
    loop = Loop(p_norm=p_norm, target_sparsity=target).run()
    assert loop.history[-1] == pytest.approx(target, abs=1e-3)
    for step, zeros in enumerate(loop.history, 1):
        assert zeros <= _asked(loop.control, step) + 5e-3
    assert loop.history[: STEPS // 10] == [0.0] * (STEPS // 10)
    assert loop.history == sorted(loop.history)


@pytest.mark.parametrize("lr", [1e-5, 1e-3])
@pytest.mark.parametrize("rate", ["constant", "cosine", "warmup"])
def test_any_learning_rate_and_schedule(lr: float, rate: str) -> None:
    assert Loop(lr=lr, target_sparsity=0.8).run(rate=rate).history[-1] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("budget", ["global", "tensor"])
@pytest.mark.parametrize(("dtype", "moments"), [(torch.bfloat16, None), (torch.float32, "bfloat16")])
def test_low_precision(dtype: torch.dtype, moments: str | None, budget: str) -> None:
    loop = Loop(dtype=dtype, moments=moments, target_sparsity=0.7, sparsity_budget=budget).run()
    assert loop.history[-1] == pytest.approx(0.7, abs=1e-3)


def test_the_rest_heals_and_zeros_stay() -> None:
    loop = Loop(target_sparsity=0.9).run(last=150)
    before = [param.detach().clone() for param in loop.model.parameters() if param.ndim == 2]
    loop.run(first=151)
    after = [param.detach() for param in loop.model.parameters() if param.ndim == 2]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old == 0, new == 0)
        assert not torch.equal(old, new)


def test_each_tensor_has_the_target_where_that_is_asked_for() -> None:
    loop = Loop(target_sparsity=0.5, sparsity_budget="tensor").run()
    for param in loop.model.parameters():
        if param.ndim == 2:
            assert int((param == 0).sum()) == param.numel() // 2


def test_rules_have_targets_of_their_own() -> None:
    loop = Loop(target_sparsity=0.8, rules={r"^2\.": {"target_sparsity": 0.9}, r"^4\.": "off"}).run()
    weights = {name: int((param == 0).sum()) for name, param in loop.model.named_parameters()}
    assert weights["2.weight"] == round(0.9 * 4096)
    assert weights["0.weight"] + weights["2.weight"] == pytest.approx(0.8 * (1024 + 4096), abs=1)
    assert weights["4.weight"] == 0


def test_what_is_cut_costs_least_to_second_order_in_the_metric_of_adam() -> None:
    loop = Loop(target_sparsity=0.5, sparsity_decay=0.0)
    schedule = Schedule(20, 150)
    first = next(step for step in range(1, STEPS) if schedule.prunes(step))
    loop.run(last=first - 1)
    inputs, wanted = _batch(first, torch.float32)
    (loop.model(inputs) - wanted).square().mean().backward()
    loop.control.before_step(first)
    loop.optimizer.step()
    states = [
        (param, loop.optimizer.state[param]["exp_avg_sq"]) for param in loop.model.parameters() if param.ndim == 2
    ]
    saliency = torch.cat([(w.detach().double() ** 2 * v.double().sqrt()).reshape(-1) for w, v in states])
    loop.control.after_step(first)
    cut = torch.cat([(param == 0).reshape(-1) for param, _ in states])
    assert 0 < cut.sum() < len(cut)
    assert saliency[cut].max() <= saliency[~cut].min() * (1 + 1e-6)


@pytest.mark.parametrize("at", [10, 77, 150, 180])
def test_a_resumed_loop_is_the_same_loop(at: int) -> None:
    whole = Loop(target_sparsity=0.9, p_norm_begin=1.5).run()
    part = Loop(target_sparsity=0.9, p_norm_begin=1.5).run(last=at)
    saved = part.optimizer.state_dict()
    part.start()
    part.optimizer.load_state_dict(saved)
    part.run(first=at + 1)
    for one, other in zip(whole.model.parameters(), part.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("at", [31, 79])
def test_a_loop_that_goes_on_without_the_optimizers_state(at: int) -> None:
    """Between two cuts, where λ_p is set for what the next one takes: the user's would take far more."""
    part = Loop(target_sparsity=0.9).run(last=at)
    part.start()
    for group in part.optimizer.param_groups:
        group["lambda_p"] *= 1e4
    part.run(first=at + 1, last=at + 1)
    assert 0 < part.optimizer.param_groups[0]["lambda_p"] < 1


def test_a_target_that_comes_in_the_middle_sets_lambda_p_at_once() -> None:
    loop = Loop().run(last=31)
    for group in loop.optimizer.param_groups:
        group["lambda_p"] *= 1e4
    loop.options = {"target_sparsity": 0.3}
    loop.run(first=32)
    assert loop.history[-1] == pytest.approx(0.3, abs=1e-3)


def test_p_goes_from_its_first_to_its_last_value() -> None:
    loop = Loop(p_norm=0.5, p_norm_begin=1.5, sparsity_schedule="linear").run(last=20)
    assert loop.optimizer.param_groups[0]["p_norm"] == 1.5
    assert loop.optimizer.param_groups[0]["lambda_p"] == 0.01
    loop.run(first=21, last=85)
    assert loop.optimizer.param_groups[0]["p_norm"] == pytest.approx(1.0)
    loop.run(first=86)
    assert loop.optimizer.param_groups[0]["p_norm"] == 0.5


def test_a_model_that_is_sparser_than_asked() -> None:
    loop = Loop(target_sparsity=0.5)
    with torch.no_grad():
        for param in loop.model.parameters():
            param[torch.rand_like(param) < 0.8] = 0
    assert loop.run().history[-1] == pytest.approx(0.5, abs=1e-3)


def test_kept_zeros_count_towards_the_target() -> None:
    loop = Loop(target_sparsity=0.9, keep_zeros=True)
    with torch.no_grad():
        for param in loop.model.parameters():
            param[torch.rand_like(param) < 0.5] = 0
    kept = [param == 0 for param in loop.model.parameters() if param.ndim == 2]
    loop.run()
    assert loop.history[-1] == pytest.approx(0.9, abs=1e-3)
    for mask, param in zip(kept, (p for p in loop.model.parameters() if p.ndim == 2), strict=True):
        assert not param[mask].any()


def test_a_tensor_of_zeros_learns() -> None:
    loop = Loop(target_sparsity=0.5, sparsity_begin=0.0)
    nn.init.zeros_(loop.model[4].weight)  # type: ignore[index, arg-type]
    loop.run(rate="warmup")
    assert loop.model[4].weight.any()  # type: ignore[index, union-attr, operator]


def test_without_a_target_nothing_is_touched() -> None:
    loop = Loop(target_sparsity=0).run()
    assert not loop.control.budgets
    assert [group["lambda_p"] for group in loop.optimizer.param_groups if group["decayed"]] == [0.01]
    assert not any(group["keep_zeros"] for group in loop.optimizer.param_groups)


@pytest.mark.parametrize("steps", [200, 333, 1000, 20_000])
@pytest.mark.parametrize("shape", ["cubic", "linear", "cosine"])
def test_schedules(steps: int, shape: str) -> None:
    schedule = Schedule(steps // 10, steps * 3 // 4, shape)
    progress = [schedule.progress(step) for step in range(steps + 1)]
    assert progress == sorted(progress)
    assert (progress[schedule.begin], progress[schedule.end], progress[-1]) == (0, 1, 1)
    cuts = [step for step in range(1, steps + 1) if schedule.prunes(step)]
    intervals = {later - earlier for earlier, later in itertools.pairwise(cuts)}
    assert len(intervals) == 1 and (40 <= len(cuts) <= 85 or intervals <= {8, 50})
    assert cuts[-1] == schedule.end
    assert all(schedule.next_pruning(step) in cuts for step in range(schedule.begin + 1, schedule.end + 1))


def test_too_few_steps_are_refused_with_a_number_that_suffices() -> None:
    with pytest.raises(ValueError, match=r"max_steps of at least (\d+)") as refused:
        Loop(target_sparsity=0.9, steps=12).run()
    least = int(re.search(r"max_steps of at least (\d+)", str(refused.value))[1])  # type: ignore[index]
    assert Loop(target_sparsity=0.9, steps=least).run().history[-1] == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_sparsity": 1.0}, "target_sparsity=1.0"),
        ({"target_sparsity": -0.1}, "target_sparsity=-0.1"),
        ({"sparsity_begin": 0.8}, "sparsity_begin=0.8"),
        ({"sparsity_end": 1.1}, "sparsity_end=1.1"),
        ({"sparsity_schedule": "steep"}, "sparsity_schedule='steep'"),
        ({"sparsity_budget": "row"}, "sparsity_budget='row'"),
        ({"sparsity_decay": -1.0}, "sparsity_decay=-1.0"),
        ({"rate_growth": 1.5}, "rate_growth=1.5"),
        ({"p_norm_begin": 0.0}, "p_norm_begin"),
        ({"target_sparsity": 0.5, "p_norm": 2.0}, "p_norm=2 with a target"),
        ({"target_sparsity": 0.5, "p_norm_begin": 2.5}, "p_norm_begin=2.5 with a target"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Loop(**options).run()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["one cycle", "restarts", "exponential", "plateau"])
@pytest.mark.parametrize("p_norm", [0.4, 0.8])
def test_schedulers_of_torch(name: str, p_norm: float) -> None:
    steps, target = 300, 0.9
    model = _model()
    optimizer = AdamWLp(build_param_groups(model, p_norm=p_norm, lambda_p=0.01), lr=1e-2)
    scheduler: torch.optim.lr_scheduler.LRScheduler = {
        "one cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=steps),
        "restarts": lambda: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=40),
        "exponential": lambda: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.97),
        "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=3),
    }[name]()
    control = SparsityControl(optimizer, steps, target_sparsity=target, sparsity_decay=2.0)
    for step in range(1, steps + 1):
        inputs, wanted = _batch(step, torch.float32)
        loss = (model(inputs) - wanted).square().mean()
        loss.backward()
        control.before_step(step)
        optimizer.step()
        control.after_step(step)
        optimizer.zero_grad()
        scheduler.step(*([loss.item()] if name == "plateau" else []))  # type: ignore[arg-type]
        assert _zeros(model) <= _asked(control, step) + 5e-3
    assert _zeros(model) == pytest.approx(target, abs=1e-3)


@pytest.mark.slow
def test_a_long_run_does_not_get_ahead_of_its_schedule() -> None:
    loop = Loop(lr=1e-3, p_norm=0.4, target_sparsity=0.95, steps=12_000).run()
    assert max(zeros - _asked(loop.control, step) for step, zeros in enumerate(loop.history, 1)) <= 5e-3
    assert loop.history[-1] == pytest.approx(0.95, abs=1e-3)


def test_an_optimizer_that_decays_nothing_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(4, 4))], lr=0.1)
    with pytest.raises(ValueError, match="nothing that is trained decays by p norm.* AdamWLp or LpDecay"):
        SparsityControl(optimizer, 60, target_sparsity=0.5)


def test_a_group_that_is_added_later_is_cut_too() -> None:
    def group(seed: int) -> dict[str, Any]:
        param = torch.nn.Parameter(torch.randn(40, 25, generator=torch.Generator().manual_seed(seed)))
        return {"params": [param], "p_norm": 0.8, "lambda_p": 0.0, "decayed": True}

    optimizer = AdamWLp([group(0)], lr=1e-3)
    control = SparsityControl(optimizer, 60, target_sparsity=0.5)
    for step in range(1, 61):
        if step == 3:
            optimizer.add_param_group(group(1))
        control.before_step(step)
        for each in optimizer.param_groups:
            each["params"][0].grad = torch.randn(40, 25, generator=torch.Generator().manual_seed(step)) * 1e-3
        optimizer.step()
        control.after_step(step)
    zeros = [int((each["params"][0] == 0).sum()) for each in optimizer.param_groups]
    assert sum(zeros) == 1000 and min(zeros) > 300


def test_a_target_where_lambda_p_is_0_is_told_what_is_missing() -> None:
    for make in (
        lambda params: LpDecay(torch.optim.SGD(params, lr=0.1), lambda_p=0.0),
        lambda params: AdamWLp(params, lambda_p=0.0),
    ):
        optimizer = make([torch.nn.Parameter(torch.randn(8, 8))])
        with pytest.raises(ValueError, match="all param groups have lambda_p=0, .* Give lambda_p above 0, such"):
            SparsityControl(optimizer, 100, target_sparsity=0.5)
    plain = torch.optim.SGD([torch.nn.Parameter(torch.randn(8, 8))], lr=0.1)
    with pytest.raises(ValueError, match="take AdamWLp or LpDecay"):
        SparsityControl(plain, 100, target_sparsity=0.5)


@pytest.mark.parametrize("p_norm", [0.5, 0.8, 1.2, 1.8])
@pytest.mark.parametrize("lr", [1e-5, 1e-4])
def test_in_a_short_run_of_small_steps_decay_moves_weights_less_than_the_steps_can(lr: float, p_norm: float) -> None:
    """As in fine-tuning: λ_p by the length of the run alone would shrink weights many times as far."""
    loop = Loop(lr=lr, p_norm=p_norm, target_sparsity=0.5, sparsity_decay=1.0)
    loop.run(last=21)
    group = next(group for group in loop.optimizer.param_groups if group["lambda_p"])
    weights = torch.cat([param.detach().abs().flatten() for param in group["params"]])
    median = float(weights[weights > 0].quantile(0.75))
    # A step shrinks |w| by α λ_p |w|^(p - 1).
    assert group["lambda_p"] * median ** (p_norm - 1) <= 0.11
    assert lambda_for_threshold(p_norm, median, 0.5 * lr * STEPS) * median ** (p_norm - 1) > 1


def test_in_a_run_from_scratch_the_length_of_the_run_sets_lambda_p() -> None:
    loop = Loop(lr=1e-2, steps=1000, target_sparsity=0.5, sparsity_decay=1.0).run(last=126)
    (group,) = (group for group in loop.optimizer.param_groups if group["lambda_p"])
    weights = torch.cat([param.detach().abs().flatten() for param in group["params"]])
    halving = lambda_for_threshold(0.8, float(weights.quantile(0.75)), 0.5 * 1e-2 * 1000)
    assert 0 < group["lambda_p"] <= halving * 1.2
