from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_pdecay import build_param_groups, load_rules
from hf_pdecay.rules.assign import assign
from hf_pdecay.rules.table import NOT_IN_BASE, group_table

from ..helpers.models import build


NEW = ("classifier.weight", "classifier.bias")


def _aims(**options: object) -> dict[str, tuple[bool, str, str, float | None]]:
    found = assign(build("bert-classifier"), p_norm=0.8, **options)
    return {name: (each.decayed, each.decay_to, each.rule, each.target_sparsity) for name, each in found.items()}


def test_all_weights_decay_to_base_but_the_new_ones() -> None:
    aims = _aims(decay_to="base", new=NEW)
    assert aims.pop("classifier.weight") == (True, "zero", NOT_IN_BASE, 0.0)
    assert aims.pop("classifier.bias") == (False, "zero", NOT_IN_BASE, None)
    assert set(aims.values()) == {(True, "base", "default", None)}


def test_without_it_nothing_changes() -> None:
    assert _aims() == _aims(new=NEW)
    assert {aim for _, aim, _, _ in _aims().values()} == {"zero"}


@pytest.mark.parametrize("settings", [{"p_norm": 0.5}, {"decay_to": "base"}])
def test_a_rule_takes_what_the_base_has(settings: dict[str, object]) -> None:
    aims = _aims(decay_to="base", new=NEW, rules={"": settings})
    assert aims["classifier.weight"] == (True, "zero", NOT_IN_BASE, 0.0)
    others = [aim for name, aim in aims.items() if name not in NEW]
    assert set(others) == {(True, "base", "", None)}  # biases and norms too


def test_a_rule_for_new_weights_alone() -> None:
    aims = _aims(decay_to="base", new=NEW, rules={"classifier": {"target_sparsity": 0.5}})
    assert aims["classifier.weight"] == (True, "zero", "classifier", 0.5)
    assert aims["classifier.bias"] == (False, "zero", NOT_IN_BASE, None)
    with pytest.raises(ValueError, match="the base has nothing that it matches, such as classifier"):
        _aims(decay_to="base", new=NEW, rules={"classifier": {"decay_to": "base"}})


def test_rules_say_off_and_zero() -> None:
    rules = {"LayerNorm": "off", "layer.0": {"decay_to": "zero"}, "layer.1": {"target_sparsity": 0.9}}
    aims = _aims(decay_to="base", rules=rules, lambda_p=0.1)
    assert aims["bert.embeddings.LayerNorm.weight"] == (False, "zero", "LayerNorm", None)
    assert aims["bert.encoder.layer.0.output.dense.weight"] == (True, "zero", "layer.0", None)
    # As in other runs, a pattern for zeros that matches matrices sets these alone.
    assert aims["bert.encoder.layer.0.output.dense.bias"] == (True, "base", "default", None)
    assert aims["bert.encoder.layer.1.output.dense.bias"] == (True, "base", "layer.1", 0.9)


def test_one_rule_to_base_in_an_ordinary_run() -> None:
    aims = _aims(rules={"layer.0.output": {"decay_to": "base", "lambda_p": 0.1}})
    assert {name for name, aim in aims.items() if aim[1] == "base"} == {
        f"bert.encoder.layer.0.output.{name}"
        for name in ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias")
    }
    assert aims["bert.encoder.layer.1.output.dense.weight"] == (True, "zero", "default", None)
    assert not aims["bert.embeddings.word_embeddings.weight"][0]


def test_only_floats_decay_and_parametrized_layers_too() -> None:
    model = nn.ModuleDict({"normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "plain": nn.Linear(4, 4)})
    model.register_parameter("turns", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    groups = build_param_groups(model, p_norm=0.8, decay_to="base")
    decayed = {id(param) for group in groups if group["decay_to"] == "base" for param in group["params"]}
    assert decayed == {id(param) for name, param in model.named_parameters() if name != "turns"}


def test_the_table_says_what_is_new() -> None:
    groups = build_param_groups(build("bert-classifier"), p_norm=0.8, decay_to="base", new=NEW)
    table = group_table(groups)
    assert "decays to" in table.headings
    assert table.caption is not None and table.caption.startswith("not in the base: new parameters, such as a head")
    ordinary = group_table(build_param_groups(build("bert-classifier"), p_norm=0.8))
    assert ordinary.caption is None and "decays to" not in ordinary.headings


def test_values_are_checked() -> None:
    with pytest.raises(ValueError, match="'mlp': Invalid decay_to: decay_to='one'; it must be one of zero, base"):
        load_rules({"mlp": {"decay_to": "one"}})
    with pytest.raises(ValueError, match="Invalid decay_to: decay_to='one'"):
        build_param_groups(nn.Linear(2, 2), p_norm=0.8, decay_to="one")
