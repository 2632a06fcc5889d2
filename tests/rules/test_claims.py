"""Which rule takes which groups, and what a target asks of them: by hand, without any training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_pdecay import AdamWLp
from hf_pdecay.rules.assign import build_param_groups
from hf_pdecay.sparsity.dead_units import count_units
from hf_pdecay.target.budgets import divide_target
from hf_pdecay.target.control import SparsityControl
from hf_pdecay.target.pruning import prune

from ..helpers.models import build
from ..helpers.steps import normal, through_a_file


def groups_of(model: nn.Module, rules: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    return build_param_groups(model, p_norm=0.8, lambda_p=0.01, rules=rules, **options)


def names(model: nn.Module, group: dict[str, Any]) -> list[str]:
    by_id = {id(param): name for name, param in model.named_parameters()}
    return [by_id[id(param)] for param in group["params"]]


# --- rules


def test_a_pattern_takes_whole_layers_biases_included() -> None:
    """Of the one layer that it matches a weight of; the other decays weight by weight, and its biases not at all."""
    model = build("gpt2")
    groups = groups_of(model, {r"h\.0\.mlp\.c_fc": {"group": "neuron", "p_norm": 0.5}}, weight_decay=0.1)
    first = next(group for group in groups if group.get("group") == "neuron")
    mlp = "transformer.h.0.mlp"
    assert names(model, first) == [f"{mlp}.c_fc.weight", f"{mlp}.c_fc.bias", f"{mlp}.c_proj.weight"]
    assert first["p_norm"] == 0.5 and first["weight_decay"] == 0.1 and first["decayed"]
    (coupling,) = first["units"]
    assert (coupling["kind"], coupling["count"], coupling["name"]) == ("neuron", 128, mlp)
    assert coupling["members"] == [
        {"param": 0, "dim": 1, "size": 1, "offset": 0},
        {"param": 1, "dim": 0, "size": 1, "offset": 0},
        {"param": 2, "dim": 0, "size": 1, "offset": 0},
    ]
    rest = [name for group in groups if group is not first and group["decayed"] for name in names(model, group)]
    assert "transformer.h.1.mlp.c_fc.weight" in rest and not any(name.endswith("bias") for name in rest)
    assert all("units" not in group for group in groups if group is not first)


def test_a_broad_pattern_takes_neither_embeddings_nor_the_head() -> None:
    for kind in ("row", "column", "2:4", "neuron"):
        model = build("llama")
        others = {"attn": {}} if kind == "neuron" else {}  # what is in no neuron must have a rule
        for group in groups_of(model, {".": {"group": kind}, **others}):
            assert group["decayed"] or "group" not in group
            assert "group" in group or kind == "neuron" or not group["decayed"]
            assert not any("embed" in name or "lm_head" in name for name in names(model, group) if group["decayed"])
    model = build("llama")
    (head,) = (group for group in groups_of(model, {"lm_head": {"group": "row"}}) if "group" in group)
    assert names(model, head) == ["lm_head.weight"] and head["units"][0]["count"] == 64


def test_rules_before_it_keep_what_they_have() -> None:
    model = build("llama")
    groups = groups_of(model, {r"layers\.0": "off", "mlp": {"group": "neuron"}})
    (taken,) = (group for group in groups if "group" in group)
    assert len(taken["units"]) == 1 and all("layers.1.mlp" in name for name in names(model, taken))


@pytest.mark.parametrize(
    "layers", [(nn.Linear(6, 8), nn.Linear(5, 8)), (nn.Conv2d(3, 8, 2), nn.Conv2d(4, 8, 2))], ids=["linear", "conv"]
)
def test_a_bias_of_two_layers_is_in_rows_of_one(layers: tuple[nn.Module, nn.Module]) -> None:
    model = nn.ModuleDict({"one": layers[0], "other": layers[1]})
    model["other"].bias = model["one"].bias
    words = "'one|other' has group='row', and one and other share one.bias, which would be in rows of both; leave one"
    with pytest.raises(ValueError, match=words.replace("|", r"\|")):
        groups_of(model, {"one|other": {"group": "row"}})
    for pattern in ("one", "other"):
        (taken,) = (group for group in groups_of(model, {pattern: {"group": "row"}}) if "group" in group)
        assert sorted(names(model, taken)) == sorted([f"{pattern}.weight", "one.bias"])
    assert len(groups_of(model, {"one|other": {"group": "column"}})[0]["units"]) == 2


@pytest.mark.parametrize(("kind", "dim"), [("row", 0), ("column", 1)])
def test_convolutions_have_rows_and_columns(kind: str, dim: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.ConvTranspose2d(8, 4, 2))
    (taken,) = (group for group in groups_of(model, {"weight": {"group": kind}}) if "group" in group)
    counts = [(each["members"][0]["dim"], each["count"]) for each in taken["units"]]
    assert counts == ([(0, 8), (1, 4)] if kind == "row" else [(1, 3), (0, 8)])
    assert [len(each["members"]) for each in taken["units"]] == ([2, 2] if kind == "row" else [1, 1])


def test_blocks_lie_along_the_inputs() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Conv2d(4, 3, 2))
    (taken,) = (group for group in groups_of(model, {"weight": {"group": "2:4"}}) if "group" in group)
    assert [(each["members"][0]["dim"], each["count"]) for each in taken["units"]] == [(1, 8), (1, 4)]
    with pytest.raises(ValueError, match=r"0\.weight, whose 6 inputs are not divisible by 4"):
        groups_of(nn.Sequential(nn.Linear(6, 8)), {"weight": {"group": "2:4"}})


def test_param_groups_are_plain_data() -> None:
    model = build("llama")
    optimizer = AdamWLp(groups_of(model, {"attn": {"group": "head"}}))
    saved = through_a_file(optimizer.state_dict())
    assert saved["param_groups"][0]["units"] == optimizer.param_groups[0]["units"]


# --- targets


def layers(rules: dict[str, Any]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return groups_of(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 20), nn.Linear(20, 4)), rules)


def test_a_budget_has_units_of_one_kind() -> None:
    found = divide_target(layers({"0.weight": {"group": "row"}, "2.weight": {"group": "2:4"}}), 0.25)
    assert {budget.kind: (budget.target, budget.units, budget.numel) for budget in found} == {
        "row": (0.25, 12, 12 * 8 + 12),
        "2:4": (0.5, 80, 80),
        "element": (0.25, 240, 240),
    }
    each = divide_target(layers({"weight": {"group": "row"}}), 0.5, "tensor")
    assert [(budget.kind, budget.units) for budget in each] == [("row", 12), ("row", 20), ("row", 4)]


def test_n_of_m_is_its_own_target() -> None:
    assert [budget.target for budget in divide_target(layers({"weight": {"group": "1:4"}}), None)] == [0.75]
    assert divide_target(layers({"weight": {"group": "1:4", "target_sparsity": 0}}), None) == []
    with pytest.raises(ValueError, match="which implies 0.75; leave the target out"):
        divide_target(layers({"weight": {"group": "1:4"}}), 0.9)


def test_the_rest_of_a_kind_makes_up_for_what_rules_take() -> None:
    rules = {"0.weight": {"group": "row", "target_sparsity": 0.25}, "weight": {"group": "row"}}
    found = {budget.target: budget.units for budget in divide_target(layers(rules), 0.5)}
    assert found == {0.25: 12, (0.5 * 36 - 0.25 * 12) / 24: 24}
    with pytest.raises(ValueError, match="the rows can be from 25.0% to 25.0%"):
        divide_target(layers({"weight": {"group": "row", "target_sparsity": 0.25}}), 0.5)


# --- cuts


def cut_by_hand(weights: torch.Tensor, seconds: torch.Tensor, count: int) -> torch.Tensor:
    """Rows with the least sums of w² √v are set to zero."""
    sums = (weights.double() ** 2 * seconds.double().sqrt()).sum(1)
    result = weights.clone()
    result[sums.argsort()[:count]] = 0
    return result


def test_the_least_salient_groups_are_cut() -> None:
    """By the second moments too: a group of large weights that the loss does not feel goes first."""
    param = nn.Parameter(normal(10, 6))
    optimizer = AdamWLp([{"params": [param], "group": "row", "target_sparsity": 0.4}])
    param.grad = normal(10, 6, seed=1) * torch.logspace(-3, 3, 10)[:, None].flip(0)
    optimizer.step()
    second = optimizer.state[param]["exp_avg_sq"]
    expected = cut_by_hand(param.detach(), second, 4)
    plain = param.detach().square().sum(1).argsort()[:4]
    assert set(plain.tolist()) != set((expected == 0).all(1).nonzero().flatten().tolist())
    (budget,) = divide_target(optimizer.param_groups, None)
    prune(budget, optimizer, 1.0)
    assert torch.equal(param, expected)


def test_groups_of_different_sizes_are_compared_by_weight() -> None:
    """Two layers of equal weights: neither is cut for its rows being longer."""
    short, long = nn.Parameter(torch.ones(6, 2)), nn.Parameter(torch.ones(6, 50))
    with torch.no_grad():
        short[:3] *= 0.1
        long[:3] *= 0.1
    optimizer = AdamWLp([{"params": [short, long], "group": "row"}])
    (budget,) = divide_target(optimizer.param_groups, 0.5)
    prune(budget, optimizer, 1.0)
    assert [(each == 0).all(1).sum().item() for each in (short, long)] == [3, 3]


@pytest.mark.parametrize("dim", [0, 1])
def test_cuts_of_blocks_take_the_least_of_the_weakest(dim: int) -> None:
    weights = normal(8, 12)
    param = nn.Parameter(weights.t().contiguous() if dim == 0 else weights.clone())
    member = {"param": 0, "dim": dim, "size": 1, "offset": 0}
    units = [{"kind": "2:4", "count": 12, "name": "", "members": [member]}]
    optimizer = AdamWLp([{"params": [param], "group": "2:4", "units": units}])
    (budget,) = divide_target(optimizer.param_groups, None)
    weakest = sorted(value for block in weights.abs().view(-1, 4).tolist() for value in sorted(block)[:2])
    for progress in (0.5, 1.0):
        prune(budget, optimizer, progress)
        count = round(progress * len(weakest))
        expected = weights.masked_fill(weights.abs() <= weakest[count - 1], 0) if progress < 1 else None
        now = param.detach().t() if dim == 0 else param.detach()
        assert (now == 0).sum() == count
        if expected is not None:
            chosen = set(weakest[:count])
            assert {float(each) for each in weights[now == 0].abs()} == {float(torch.tensor(each)) for each in chosen}
    assert ((now.reshape(-1, 4) != 0).sum(1) == 2).all()


def test_what_is_dead_already_counts() -> None:
    """And a group that sleeps, as it began with zeros and never learned, is among them at the end."""
    param = nn.Parameter(normal(8, 4))
    with torch.no_grad():
        param[:3] = 0
    optimizer = AdamWLp([{"params": [param], "group": "row", "lambda_p": 0.01}], lr=1e-3)
    control = SparsityControl(optimizer, 40, target_sparsity=0.5)
    for step in range(1, 41):
        control.before_step(step)
        param.grad = normal(8, 4, seed=step)
        if step < 35:
            param.grad[:3] = 0
        optimizer.step()
        control.after_step(step)
    total, dead = count_units(optimizer.param_groups)["row"]
    assert (total, int(dead)) == (8, 4)
    assert (param[:3] == 0).all()


def test_a_row_of_a_transposed_convolution_has_the_biases_of_all_its_groups() -> None:
    layer = nn.ConvTranspose2d(8, 6, 3, groups=2)
    group = next(each for each in groups_of(layer, {"weight": {"group": "row"}}) if each.get("group") == "row")
    with torch.no_grad():
        layer.weight[:, 1] = 0
        layer.bias[[1, 4]] = 0
        seen = [channel for channel in range(6) if not layer(normal(1, 8, 5, 5))[0, channel].any()]
        assert seen == [1, 4]
        assert int(count_units([group])["row"][1]) == 1
        layer.bias[4] = 1
        assert int(count_units([group])["row"][1]) == 0


@pytest.mark.parametrize("kdim", [None, 12])
def test_attention_of_torch_has_rows_and_columns_and_blocks(kdim: int | None) -> None:
    """Its three projections are one weight, or three where keys have a size of their own, with one bias for all."""
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=kdim)})
    projections = ["attn.in_proj_weight"] if kdim is None else [f"attn.{part}_proj_weight" for part in "qkv"]
    for kind in ("row", "column", "2:4"):
        found = names(model, groups_of(model, {"attn": {"group": kind}})[0])
        assert {*projections, "attn.out_proj.weight"} <= set(found)
    group = groups_of(model, {"proj_weight": {"group": "row", "target_sparsity": 0.125}})[0]
    assert set(names(model, group)) == {*projections, "attn.in_proj_bias"}
    with torch.no_grad():
        for param in group["params"]:
            param.fill_(1.0)
            param.grad = torch.ones_like(param)
        last, bias = model["attn"].get_parameter(projections[-1].partition(".")[2]), model["attn"].in_proj_bias
        last[-3:] = bias[-3:] = 0.5
    optimizer = AdamWLp([group], lr=1e-9)
    optimizer.step()
    (budget,) = divide_target(optimizer.param_groups, None)
    assert budget.units == 24
    prune(budget, optimizer, 1.0)
    assert not last[-3:].any() and not bias[-3:].any()
    assert all((param != 0).sum() == param.numel() - 3 * param[0].numel() for param in (last, bias))
    units, dead = count_units(optimizer.param_groups)["row"]
    assert (units, int(dead)) == (24, 3)


def on_meshes(meshes: dict[str, str]) -> nn.Module:
    """Llama whose parameters, by a part of their names, state a device mesh."""
    model = build("llama")
    for name, param in model.named_parameters():
        param.device_mesh = next((mesh for part, mesh in meshes.items() if part in name), "all")  # type: ignore[attr-defined]
    return model


def test_units_across_device_meshes_are_refused() -> None:
    model = on_meshes({"layers.0.mlp.down_proj": "experts"})
    message = (
        r"'mlp' has group='neuron', but model\.layers\.0\.mlp\.down_proj\.weight .* leave model\.layers\.0\.mlp out"
    )
    with pytest.raises(ValueError, match=message):
        groups_of(model, {"mlp": {"group": "neuron"}})


def test_layers_on_different_device_meshes_are_in_different_groups() -> None:
    groups = groups_of(on_meshes({"layers.0.mlp": "experts"}), {"mlp": {"group": "neuron"}})
    units = [group["units"] for group in groups if "units" in group]
    assert [[layer["name"] for layer in layers] for layers in units] == [["model.layers.0.mlp"], ["model.layers.1.mlp"]]
    assert all([member["param"] for member in layers[0]["members"]] == [0, 1, 2] for layers in units)


def test_a_zero_bias_stays_in_the_group_of_its_units() -> None:
    groups = groups_of(build("gpt2"), {"mlp": {"group": "neuron"}}, isolate_zero=True)
    assert sum("units" in group for group in groups) == 1
