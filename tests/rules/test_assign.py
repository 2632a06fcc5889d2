from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import nn

from hf_pdecay.layers.matrices import decayable_parameter_names
from hf_pdecay.layers.saved_names import names_in_files
from hf_pdecay.names import clean_name
from hf_pdecay.rules.assign import assign, build_param_groups, decayed_parameter_names
from hf_pdecay.rules.spec import load_rules
from hf_pdecay.rules.table import group_table

from ..helpers.models import ARCHITECTURES, build, tiny_gpt2


# The last parts of the names of what decays, written down from the architectures' own descriptions. This is the only
# place that knows names; the package goes by module type.
DECAYED = {
    "gpt2": {"c_attn.weight", "c_proj.weight", "c_fc.weight"},
    "llama": {f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")},
    "qwen3": {f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")},
    "bert": {"query.weight", "key.weight", "value.weight", "dense.weight"},
    "bert-classifier": {"query.weight", "key.weight", "value.weight", "dense.weight", "classifier.weight"},
    "t5": {f"{name}.weight" for name in ("q", "k", "v", "o", "wi_0", "wi_1", "wo")},
    "modernbert": {f"{name}.weight" for name in ("Wqkv", "Wo", "Wi", "dense")},
}


@pytest.mark.parametrize("architecture", DECAYED)
def test_matrices_decay_in_every_architecture(architecture: str) -> None:
    model = build(architecture)
    found = decayable_parameter_names(model)
    assert {".".join(name.split(".")[-2:]) for name in found} == DECAYED[architecture]
    # Nothing with one of these endings is left out.
    expected = [name for name, _ in model.named_parameters() if ".".join(name.split(".")[-2:]) in DECAYED[architecture]]
    assert found == expected


def test_experts_decay_whether_fused_or_not() -> None:
    model = build("mixtral")
    found = set(decayable_parameter_names(model))
    experts = [(name, param) for name, param in model.named_parameters() if "experts" in name]
    assert experts and all(name in found for name, _ in experts)
    # All experts' weights: 2 layers × 4 experts × 3 matrices of 32 × 48.
    assert sum(param.numel() for _, param in experts) == 2 * 4 * 3 * 32 * 48
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in found)


def test_convolutions_decay_and_position_tables_do_not() -> None:
    model = build("vit")
    found = set(decayable_parameter_names(model))
    left_out = {name: param for name, param in model.named_parameters() if name not in found}
    assert any(param.ndim == 4 for name, param in model.named_parameters() if name in found)
    assert sum("position_embeddings" in name or "cls_token" in name for name in left_out) == 2
    assert all(param.ndim == 1 or param.shape[0] == 1 for param in left_out.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_vocabulary_table_decays(architecture: str) -> None:
    model = build(architecture)
    found = set(decayable_parameter_names(model))
    vocabulary = 64
    for name, param in model.named_parameters(remove_duplicate=False):
        if param.ndim == 2 and vocabulary in param.shape and ("embed" in name or "head" in name or "wte" in name):
            assert name not in found


def test_tied_head_is_left_out_in_a_plain_module() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 16, bias=False)
            self.hidden = nn.Linear(8, 8)
            self.table = nn.Embedding(16, 8)
            self.table.weight = self.head.weight

    assert decayable_parameter_names(Tied()) == ["hidden.weight"]


def test_other_module_types() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv1d(3, 4, 2),
            "up": nn.ConvTranspose2d(3, 4, 2),
            "attention": nn.MultiheadAttention(8, 2),
            "norm": nn.GroupNorm(2, 4),
            "bag": nn.EmbeddingBag(10, 4),
            "lstm": nn.LSTM(4, 4),
        }
    )
    assert decayable_parameter_names(model) == [
        "conv.weight",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]


def test_names_of_wrapped_modules_are_clean() -> None:
    model = tiny_gpt2()
    compiled = torch.compile(model)
    assert decayable_parameter_names(compiled) == decayable_parameter_names(model)
    assert clean_name("_orig_mod.transformer.h.0._checkpoint_wrapped_module.mlp.weight") == "transformer.h.0.mlp.weight"
    assert clean_name("module._orig_mod.a.weight") == "a.weight"
    assert clean_name("a.module_list.0.weight") == "a.module_list.0.weight"


def test_every_trainable_parameter_is_in_one_group() -> None:
    model = tiny_gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    groups = build_param_groups(model, p_norm=0.5, lambda_p=0.1, weight_decay=0.3, keep_zeros=True)
    params = [param for group in groups for param in group["params"]]
    assert len(params) == len({id(param) for param in params})
    assert {id(param) for param in params} == {id(param) for param in model.parameters() if param.requires_grad}
    decayed, rest = groups
    assert (decayed["p_norm"], decayed["lambda_p"], decayed["weight_decay"], decayed["keep_zeros"]) == (
        0.5,
        0.1,
        0.3,
        True,
    )
    assert (rest["lambda_p"], rest["weight_decay"], rest["keep_zeros"]) == (0.0, 0.0, False)


def test_weight_decay_goes_by_the_names_given() -> None:
    model = tiny_gpt2()
    groups = build_param_groups(
        model, p_norm=0.5, lambda_p=0.1, weight_decay=0.3, weight_decay_names=["lm_head.weight"]
    )
    assert all(group["weight_decay"] == 0 for group in groups)
    groups = build_param_groups(
        model, p_norm=0.5, lambda_p=0.1, weight_decay=0.3, weight_decay_names=["transformer.wte.weight"]
    )
    assert [len(group["params"]) for group in groups if group["weight_decay"] == 0.3] == [1]


def test_first_match_wins_and_rules_refine() -> None:
    rules = {r"h\.0\.attn": {"p_norm": 0.4}, "attn": {"lambda_p": 0.7}, r"mlp\.c_fc": "off", "wte": {}}
    found = assign(tiny_gpt2(), p_norm=0.8, lambda_p=0.01, rules=rules)
    first, second = found["transformer.h.0.attn.c_attn.weight"], found["transformer.h.1.attn.c_attn.weight"]
    assert (first.decayed, first.p_norm, first.lambda_p) == (True, 0.4, 0.01)
    assert (second.decayed, second.p_norm, second.lambda_p) == (True, 0.8, 0.7)
    assert not found["transformer.h.0.mlp.c_fc.weight"].decayed
    assert found["transformer.h.0.mlp.c_fc.weight"].lambda_p == 0
    assert found["transformer.h.0.mlp.c_proj.weight"].rule == "default"
    # A rule brings in what does not decay by default.
    assert found["transformer.wte.weight"].decayed


def test_a_rule_for_matrices_does_not_draw_in_biases() -> None:
    found = assign(tiny_gpt2(), p_norm=0.8, lambda_p=0.01, rules={"attn": {"p_norm": 0.5}})
    assert not found["transformer.h.0.attn.c_attn.bias"].decayed
    found = assign(tiny_gpt2(), p_norm=0.8, lambda_p=0.01, rules={r"attn.*bias": {"p_norm": 0.5}})
    assert found["transformer.h.0.attn.c_attn.bias"].decayed


def test_a_rule_may_use_any_name_of_a_shared_parameter() -> None:
    found = assign(tiny_gpt2(), p_norm=0.8, lambda_p=0.01, rules={"lm_head": {"lambda_p": 0.5}})
    assert found["transformer.wte.weight"].lambda_p == 0.5


def test_a_pattern_without_a_match_lists_near_ones() -> None:
    with pytest.raises(ValueError, match=r"'h.0.atn.c_attn' matches no trainable.*transformer\.h\.0\.attn\.c_attn"):
        assign(tiny_gpt2(), p_norm=0.8, lambda_p=0.01, rules={"h.0.atn.c_attn": {"p_norm": 0.5}})
    with pytest.raises(ValueError, match=r"near matches among the weights that decay: .*mlp") as error:
        assign(tiny_gpt2(), p_norm=0.8, lambda_p=0.01, rules={"mpl": "off"})
    assert "hf-pdecay preview CONFIG_OR_FOLDER --tensors" in str(error.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pattern", ["atn.weigth", "fcc1", "zzzz", "qkv_porj", "embedding", "norm_bias"])
def test_near_matches_are_weights_that_decay(architecture: str, pattern: str) -> None:
    model = build(architecture)
    names = {*decayable_parameter_names(model)}
    names |= {alias for name in names for alias in names_in_files(model).get(name, ())}
    try:
        assign(model, p_norm=0.8, rules={pattern: "off"})
    except ValueError as error:
        shown = re.search(r"(?:that decay|named like): (.*?)\. `hf-pdecay", str(error))
        assert shown is not None and {*shown[1].split(", ")} <= names


def deep() -> nn.Module:
    """Twelve layers of a stack, and one stack beside it whose names end alike."""
    layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(2, 2), "amlp": nn.Linear(2, 2)}) for _ in range(12))
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": layers}), "layers": nn.ModuleList([nn.Linear(2, 2)] * 1)})
    model["other"] = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})})
    return model


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [
        # A whole name of a tensor or a module takes that alone.
        ("model.layers.1.mlp.weight", {"model.layers.1.mlp.weight"}),
        ("model.layers.1.mlp", {"model.layers.1.mlp.weight"}),
        ("layers.0.weight", {"layers.0.weight"}),
        ("other.model.layers.0.bias", {"other.model.layers.0.bias"}),
        ("model.layers.1", {f"model.layers.1.{kind}mlp.weight" for kind in ("", "a")}),
        # Other patterns are searched; a dot stands for itself unless it is repeated.
        ("model.layers.1.", {f"model.layers.1.{kind}mlp.weight" for kind in ("", "a")}),
        ("ayers.1.mlp", {"model.layers.1.mlp.weight"}),
        (r"layers\.1\.mlp", {"model.layers.1.mlp.weight"}),
        ("layers.1.*.mlp", {f"model.layers.{place}.mlp.weight" for place in (1, 10, 11)}),
        (
            r"^model.layers.[0-2]..?mlp.weight$",
            {f"model.layers.{place}.mlp.weight" for place in range(3)}
            | {f"model.layers.{place}.amlp.weight" for place in range(3)},
        ),
        ("ayers.1", {f"model.layers.{place}.{kind}mlp.weight" for place in (1, 10, 11) for kind in ("", "a")}),
    ],
)
def test_exact_names_match_exactly(pattern: str, taken: set[str]) -> None:
    found = assign(deep(), p_norm=0.8, rules={pattern: {"p_norm": 0.5}})
    assert {name for name, how in found.items() if how.rule == pattern} == taken
    assert all(how.p_norm == 0.5 for how in found.values() if how.rule == pattern)


def test_every_whole_name_is_a_rule_for_that_tensor_alone() -> None:
    for name in ARCHITECTURES:
        model = build(name)
        for key in [key for key, _ in model.named_parameters()][:12]:
            found = assign(model, p_norm=0.8, rules={key: {"p_norm": 0.5}})
            assert [taken for taken, how in found.items() if how.rule == key] == [key]


def test_a_frozen_parameter_is_no_match() -> None:
    model = tiny_gpt2()
    model.transformer.wte.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        assign(model, p_norm=0.8, lambda_p=0.01, rules={"wte": {}})
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_param_groups(model.requires_grad_(False), p_norm=0.8, lambda_p=0.01)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"(": "off"}, r"pattern '\(' is not a regular expression"),
        ({"a": {"pnorm": 1}}, "unknown key 'pnorm'; known keys are p_norm, lambda_p"),
        ({"a": "on"}, "'a' has the value 'on'"),
        ({"a": {"p_norm": 0}}, "p_norm=0; it must be"),
        ({"a": {"lambda_p": -1}}, "lambda_p=-1; it must be"),
        ({"a": {"p_norm": float("nan")}}, "p_norm=nan"),
        ("{not json", "is not JSON"),
        ("[1, 2]", "must be a JSON object"),
        ('{"a": "off"', "is not JSON"),
        ('{"a": "off", "b": {}, "a": {"p_norm": 0.5}}', "the given string has 'a' twice in one object; give it once"),
        ('{"a": {"p_norm": 0.5, "p_norm": 0.8}}', "has 'p_norm' twice"),
        ("missing.json", "cannot read the file 'missing.json'"),
    ],
)
def test_bad_rules_are_told_plainly(rules: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_rules(rules)  # type: ignore[arg-type]
    assert "lp_rules" in str(error.value)


def test_rules_come_from_text_file_or_dict(tmp_path: object) -> None:
    rules = {"attn": {"p_norm": 0.5}, "mlp": "off"}
    file = tmp_path / "rules.json"  # type: ignore[operator]
    file.write_text(json.dumps(rules))
    assert load_rules(json.dumps(rules)) == load_rules(str(file)) == load_rules(rules) == rules
    assert list(load_rules(str(file))) == ["attn", "mlp"]
    assert load_rules(None) == {}
    file.write_text("[1]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        load_rules(str(file))


def test_a_target_of_null_is_a_share_in_that_of_the_run() -> None:
    assigned = assign(tiny_gpt2(), p_norm=0.8, lambda_p=0.01, rules={"attn": {"target_sparsity": None}, "mlp": {}})
    assert {each.target_sparsity for each in assigned.values()} == {None}
    off = assign(tiny_gpt2(), p_norm=0.8, lambda_p=0.01, rules={"attn": {"target_sparsity": 0}})
    assert off["transformer.h.0.attn.c_attn.weight"].target_sparsity == 0


@pytest.mark.parametrize(
    ("rules", "targeted"),
    [
        ({"mlp": {"target_sparsity": 0.5}}, True),
        ({"mlp": {"group": "neuron", "target_sparsity": 0.5}}, True),
        ({"mlp": {"group": "2:4"}}, True),
        ({"mlp": {"group": "2:4", "target_sparsity": 0}}, False),
        ({"mlp": {"group": "neuron", "lambda_p": 0.1}}, False),
        ({"mlp": {"p_norm": 0.5}}, False),
        ({"mlp": "off"}, False),
    ],
)
def test_beside_a_target_in_a_rule_nothing_decays_unasked(rules: dict[str, Any], targeted: bool) -> None:
    model = build("llama")

    def of_attention(more: dict[str, Any] | None = None, **options: Any) -> set[tuple[str, bool, float]]:
        found = assign(model, p_norm=0.8, rules=rules | (more or {}), **options)
        return {
            (how.rule, how.decayed, how.lambda_p) for name, how in found.items() if "attn" in name and "_proj" in name
        }

    assert of_attention() == {("no target", False, 0.0) if targeted else ("default", True, 0.01)}
    assert of_attention(lambda_p=0.01) == {("default", True, 0.01)}
    assert of_attention({"attn": {}}) == {("attn", True, 0.01)}
    assert of_attention({"attn": {"lambda_p": 0.3}}) == {("attn", True, 0.3)}


def test_decayed_names_and_table_agree_with_the_groups() -> None:
    model = tiny_gpt2()
    groups = build_param_groups(model, p_norm=0.5, lambda_p=0.0)
    # λ_p = 0 for now, as while healing: still the weights that decay.
    assert decayed_parameter_names(model, groups) == decayable_parameter_names(model)
    table = group_table(groups)
    tensors, parameters = ([row[column] for row in table.rows] for column in (1, 2))
    assert sum(int(cell) for cell in tensors) == len(list(model.parameters()))
    assert sum(int(cell.replace(",", "")) for cell in parameters) == sum(param.numel() for param in model.parameters())
