"""Optimizers by name: what each name makes, its options, and the sentences for bad ones."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_pdecay import AdamWLp, LpDecay
from hf_pdecay.optim.muon import MuonWithAdamW
from hf_pdecay.optim.optimizer_names import OPTIMIZERS, arranged, make_optimizer, parse_options
from hf_pdecay.rules.assign import build_param_groups
from tests.helpers.models import tiny_gpt2
from tests.helpers.steps import normal, through_a_file


SLOW = ("adamw_torch_8bit_lp", "adamw_torch_4bit_lp")  # compiled at the first step
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in OPTIMIZERS]

Base = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
RATE: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.02}
ADAM: dict[str, Any] = {**RATE, "betas": (0.8, 0.95), "eps": 1e-6}


def bnb(kind: str, **options: Any) -> Base:
    return lambda groups: getattr(pytest.importorskip("bitsandbytes").optim, kind)(groups, **options)


def ao(kind: str, **options: Any) -> Base:
    return lambda groups: getattr(pytest.importorskip("torchao.optim"), kind)(groups, **options)


def free(**options: Any) -> Base:
    return lambda groups: pytest.importorskip("schedulefree").AdamWScheduleFree(groups, **options)


LION: dict[str, Any] = {**RATE, "betas": (0.8, 0.95)}
EXPECTED: dict[str, tuple[dict[str, str], Base]] = {
    "adamw_lp": ({}, lambda groups: torch.optim.AdamW(groups, **ADAM)),
    "sgd_lp": (
        {"momentum": "0.9", "nesterov": "True"},
        lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True, **RATE),
    ),
    "adafactor_lp": (
        {"beta2_decay": "-0.7", "d": "1.5"},
        lambda groups: torch.optim.Adafactor(groups, beta2_decay=-0.7, d=1.5, **RATE),
    ),
    "lion_lp": ({}, bnb("Lion", **LION)),
    "lion_8bit_lp": ({"min_8bit_size": "256"}, bnb("Lion8bit", min_8bit_size=256, **LION)),
    "adamw_bnb_8bit_lp": ({"min_8bit_size": "256"}, bnb("AdamW8bit", min_8bit_size=256, **ADAM)),
    "adamw_torch_8bit_lp": ({"block_size": "128"}, ao("AdamW8bit", block_size=128, **ADAM)),
    "adamw_torch_4bit_lp": ({}, ao("AdamW4bit", **ADAM)),
    "schedule_free_adamw_lp": ({"warmup_steps": "3"}, free(warmup_steps=3, **ADAM)),
}


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(normal(*shape, seed=k) * 0.1) for k, shape in enumerate([(64, 96), (10,), (4, 3, 2, 2)])]


def steps(optimizer: Any, params: list[nn.Parameter], *seeds: int) -> list[nn.Parameter]:
    if isinstance(optimizer, LpDecay):
        optimizer.train()
    elif hasattr(optimizer, "train"):
        optimizer.train()
    for seed in seeds:
        for k, param in enumerate(params):
            param.grad = normal(*param.shape, seed=10 * seed + k)
        optimizer.step()
    return params


def made(name: str, params: list[nn.Parameter], **overrides: Any) -> AdamWLp | LpDecay:
    package = OPTIMIZERS[name].package
    if package is not None:
        pytest.importorskip(package[0])
    return make_optimizer(name, [{"params": params, "decayed": True}], **ADAM, **overrides)


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.slow) if each in SLOW else each for each in EXPECTED]
)
def test_without_decay_a_name_is_the_optimizer_that_it_says(name: str, eager: None) -> None:
    options, base = EXPECTED[name]
    ours, theirs = parameters(), parameters()
    steps(made(name, ours, options=options, lambda_p=0.0), ours, 1, 2, 3, 4)
    steps(base([{"params": theirs}]), theirs, 1, 2, 3, 4)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_muon_is_torchs_on_matrices_and_adamw_on_the_rest() -> None:
    ours, theirs = parameters(), parameters()
    options = {"momentum": "0.8", "nesterov": "false", "ns_steps": "4", "adjust_lr_fn": "original"}
    optimizer = made("muon_lp", ours, options=options, lambda_p=0.0)
    muon = torch.optim.Muon(theirs[:1], momentum=0.8, nesterov=False, ns_steps=4, adjust_lr_fn="original", **RATE)
    adamw = torch.optim.AdamW(theirs[1:], **ADAM)
    for seed in (1, 2, 3):
        steps(optimizer, ours, seed)
        for k, param in enumerate(theirs):
            param.grad = normal(*param.shape, seed=10 * seed + k)
        muon.step()
        adamw.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_each_name_decays_and_goes_on_from_a_checkpoint(name: str, eager: None) -> None:
    params = parameters()
    optimizer = made(name, params, p_norm=0.3, lambda_p=5.0)
    assert isinstance(optimizer, AdamWLp if name == "adamw_lp" else LpDecay)
    steps(optimizer, params, 1, 2)
    saved = through_a_file(optimizer.state_dict())
    resumed = [nn.Parameter(param.detach().clone()) for param in params]
    steps(optimizer, params, 3, 4)
    again = made(name, resumed)
    again.load_state_dict(saved)
    steps(again, resumed, 3, 4)
    assert all(torch.equal(one, other) for one, other in zip(params, resumed, strict=True))
    assert bool((params[0] == 0).any()) and not bool((params[0] == 0).all())


def test_muon_takes_the_matrices_that_decay_of_a_model() -> None:
    model = tiny_gpt2()
    groups = build_param_groups(model, p_norm=0.8, lambda_p=0.01)
    optimizer = make_optimizer("muon_lp", groups, lr=0.01)
    names = {param: name for name, param in model.named_parameters()}
    by_muon = {names[param] for group in optimizer.param_groups if group["use_muon"] for param in group["params"]}
    assert by_muon == {
        name for name in names.values() if name.endswith("weight") and (".attn" in name or ".mlp" in name)
    }
    as_arranged = [[id(param) for param in group["params"]] for group in arranged("muon_lp", groups)]
    assert as_arranged == [[id(param) for param in group["params"]] for group in optimizer.param_groups]
    assert all(group["lambda_p"] == 0 for group in optimizer.param_groups if not group["decayed"])


def test_muon_parts_a_group_that_is_added_and_refuses_what_is_no_matrix() -> None:
    first, second = parameters(), parameters()
    optimizer = LpDecay(MuonWithAdamW(first, lr=0.01))
    optimizer.add_param_group({"params": second, "lr": 0.5})
    sizes = [(len(group["params"]), group["use_muon"], group["lr"]) for group in optimizer.param_groups]
    assert sizes == [(1, True, 0.01), (2, False, 0.01), (1, True, 0.5), (2, False, 0.5)]
    with pytest.raises(ValueError, match=r"Muon takes matrices alone, .* shape \(10,\)"):
        MuonWithAdamW([{"params": parameters(), "use_muon": True}])
    twin = copy.deepcopy(optimizer)
    twins = [param for group in twin.param_groups for param in group["params"]]
    originals = [param for group in optimizer.param_groups for param in group["params"]]
    steps(optimizer, originals, 1, 2)
    steps(twin, twins, 1, 2)
    assert all(torch.equal(one, other) for one, other in zip(originals, twins, strict=True))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("adam_lp", {}, r"Invalid optim: optim='adam_lp'; with p-norm decay there are adamw_lp, sgd_lp, muon_lp"),
        ("sgd_lp", {"momentm": "0.9"}, r"'sgd_lp' has no option 'momentm'; it has dampening, momentum, nesterov"),
        ("sgd_lp", {"momentum": "high"}, r"momentum='high' for optim='sgd_lp'; it must be a number in \[0, 1\)"),
        ("sgd_lp", {"momentum": "1.5"}, r"momentum='1.5' .* must be a number in \[0, 1\)"),
        ("sgd_lp", {"momentum": "nan"}, r"momentum='nan' .* must be a number in \[0, 1\)"),
        ("sgd_lp", {"nesterov": "yes", "momentum": "0.9"}, r"nesterov='yes' .* it must be true or false"),
        ("sgd_lp", {"nesterov": "true"}, r"nesterov=true for optim='sgd_lp' takes a momentum above 0"),
        ("muon_lp", {"ns_steps": "2.5"}, r"ns_steps='2.5' .* a whole number in \[1, 100\)"),
        ("muon_lp", {"adjust_lr_fn": "none"}, r"adjust_lr_fn='none' .* one of match_rms_adamw, original"),
        ("adafactor_lp", {"beta2_decay": "1"}, r"beta2_decay='1' .* must be a number below 0"),
        ("adamw_lp", {"backend": "fast"}, r"backend='fast' .* must be one of auto, compiled"),
    ],
)
def test_bad_names_and_options_are_refused(name: str, options: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_options(name, options)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ImportError, match=r"optim='lion_lp' needs bitsandbytes: pip install 'hf-pdecay\[bitsandbytes\]'"
    ):
        parse_options("lion_lp", {})
