from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from hf_pdecay import AdamWLp, SparsityControl, build_param_groups
from hf_pdecay.layers.matrices import decayable_parameter_names
from hf_pdecay.rules.table import group_table


class Half(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def custom(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Half())
    return layer


def conv() -> nn.Module:
    return nn.Conv1d(4, 4, 16, padding=8)


NORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight norm": (lambda: parametrizations.weight_norm(conv(), dim=2), "WeightNorm"),
    "spectral norm": (lambda: parametrizations.spectral_norm(conv()), "SpectralNorm"),
    "orthogonal": (lambda: parametrizations.orthogonal(conv()), "Orthogonal"),
    "custom": (lambda: custom(conv()), "Half"),
    "old weight norm": (lambda: nn.utils.weight_norm(conv(), dim=2), "WeightNorm"),
    "old spectral norm": (lambda: nn.utils.spectral_norm(conv()), "SpectralNorm"),
}


def train(model: nn.Module, shape: tuple[int, ...], target: float, **grouping: Any) -> AdamWLp:
    torch.manual_seed(0)
    optimizer = AdamWLp(build_param_groups(model, p_norm=0.8, lambda_p=0.01, **grouping), lr=1e-2)
    control = SparsityControl(optimizer, total_steps=40, target_sparsity=target)
    for step in range(1, 41):
        nn.functional.cross_entropy(model(torch.randn(shape)), torch.arange(8) % 2).backward()
        control.before_step(step)
        optimizer.step()
        control.after_step(step)
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 0
    return optimizer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", NORMS)
def test_no_target_makes_nan_of_a_parametrization(name: str, target: float) -> None:
    # Clips of 5 frames: most of the 16 taps see only padding.
    model = nn.Sequential(NORMS[name][0](), nn.Flatten(), nn.Linear(4 * 6, 20), nn.Linear(20, 2))
    optimizer = train(model, (8, 4, 5), target)
    assert all(bool(param.isfinite().all()) for param in model.parameters())
    weights = [param for group in optimizer.param_groups if group["decayed"] for param in group["params"]]
    assert weights == [model[2].weight, model[3].weight]
    zeros, total = sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)
    assert zeros == round(target * total)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", NORMS)
def test_what_cannot_decay_is_named(name: str) -> None:
    make, by = NORMS[name]
    model = nn.Sequential(make(), nn.Flatten(), nn.Linear(24, 2))
    assert decayable_parameter_names(model) == ["2.weight"]
    with pytest.warns(UserWarning, match=rf"such as 0\..*neither decay nor keep zeros.*\({by}\)"):
        groups = build_param_groups(model, p_norm=0.8, lambda_p=0.01)
    assert f"parametrized: {by}" in [row[0] for row in group_table(groups).rows]
    with pytest.raises(ValueError, match=r"Invalid lp_rules: '\^0' matches only what a parametrization"):
        build_param_groups(model, p_norm=0.8, rules={"^0": {"p_norm": 0.5}})
    # With others that decay it is left out; a rule may switch it off.
    with pytest.warns(UserWarning, match="neither decay"):
        groups = build_param_groups(model, p_norm=0.8, rules={"weight": {"p_norm": 0.5}})
    assert [len(group["params"]) for group in groups if group["decayed"]] == [1]
    build_param_groups(model, p_norm=0.8, rules={"^0": "off"})


@pytest.mark.filterwarnings("ignore")
def test_keep_zeros_refuses_zeros_that_a_parametrization_holds() -> None:
    layer = nn.Linear(8, 8)
    build_param_groups(nn.Sequential(parametrizations.weight_norm(layer), nn.Linear(8, 8)), p_norm=0.8, keep_zeros=True)
    sparse = nn.Linear(8, 8)
    nn.init.zeros_(sparse.weight[:, :4].detach())
    model = nn.Sequential(parametrizations.weight_norm(sparse), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"keep_zeros=True, and 0\.weight has zeros, but WeightNorm computes it"):
        build_param_groups(model, p_norm=0.8, keep_zeros=True)


@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
def test_under_a_mask_the_original_decays(target: float) -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2))
    prune.l1_unstructured(model[0], "weight", 0.3)
    prune.random_unstructured(model[0], "weight", 0.1)  # a container of methods
    assert decayable_parameter_names(model) == ["0.weight_orig", "2.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, (8, 40), target)
    weights = [model[0].weight_orig, model[2].weight]
    assert sum(int((weight == 0).sum()) for weight in weights) == round(target * 1680)
    masked = int((model[0].weight_mask == 0).sum())
    prune.remove(model[0], "weight")
    zeros = sum(int((model[place].weight == 0).sum()) for place in (0, 2))
    assert zeros >= max(masked, round(target * 1680))  # the mask may hide others


def test_rows_of_a_masked_weight() -> None:
    model = nn.Sequential(prune.l1_unstructured(nn.Linear(8, 6), "weight", 0.3), nn.Linear(6, 2))
    groups = build_param_groups(model, p_norm=0.8, rules={"0.weight": {"group": "row", "target_sparsity": 0.5}})
    assert groups[0]["units"][0]["count"] == 6


def test_keep_zeros_refuses_a_mask() -> None:
    model = nn.Sequential(nn.Linear(8, 8), prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5))
    with pytest.raises(ValueError, match=r"1\.weight is under torch.nn.utils.prune.*prune\.remove\(module, 'weight'\)"):
        build_param_groups(model, p_norm=0.8, keep_zeros=True)
    prune.remove(model[1], "weight")
    assert build_param_groups(model, p_norm=0.8, keep_zeros=True)[0]["keep_zeros"]


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_parametrized_layers_alone_is_refused_with_the_reason() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(4, 4, 3)), parametrizations.weight_norm(nn.Linear(4, 4))
    )
    optimizer = AdamWLp(build_param_groups(model, p_norm=0.8), lr=1e-3)
    with pytest.raises(ValueError, match=r"nothing that is trained decays.*\(parametrized: WeightNorm\).*remove the"):
        SparsityControl(optimizer, total_steps=40, target_sparsity=0.5)
    for layer in model:
        parametrize.remove_parametrizations(layer, "weight")
    assert decayable_parameter_names(model) == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    ("kind", "options"), [("LoHa", {}), ("LoKr", {}), ("IA3", {"feedforward_modules": []}), ("Vera", {}), ("HRA", {})]
)
def test_adapters_that_do_not_decay_are_named(kind: str, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = getattr(peft, f"{kind}Config")(target_modules=["0", "1"], **options)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), config)
    with pytest.warns(UserWarning, match=rf"neither decay nor keep zeros.*\({kind.lower()}\)"):
        groups = build_param_groups(model, p_norm=0.8, keep_zeros=True)
    assert f"adapter: {kind.lower()}" in [group["rule"] for group in groups]
    assert not any(group["decayed"] for group in groups)


@pytest.mark.usefixtures("lora_beside_torchao")
def test_lora_decays_without_a_warning() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 16)), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = build_param_groups(model, p_norm=0.8)
    assert [group["decayed"] for group in groups] == [True, False]
