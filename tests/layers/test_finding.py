"""The tables of coupled groups, held against gradients: what a group's weights act on, and what acts on them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_pdecay import Heads, Neurons, add_architecture, find_units
from hf_pdecay.layers import architectures
from hf_pdecay.layers.finding import find_layers
from hf_pdecay.optim.units import Member, Units

from ..helpers.models import build


KNOWN = (
    "bert",
    "bert-classifier",
    "distilbert",
    "gemma",
    "gemma2",
    "gpt2",
    "gpt2-cross",
    "llama",
    "mistral",
    "modernbert",
    "qwen2",
    "qwen3",
    "roberta",
    "t5",
    "t5-plain",
    "vit",
)
OUTGOING = ("down", "output")


def lively(name: str) -> Any:
    """A tiny model in float64 whose weights are all so large, biases too, that each of them matters."""
    model = build(name).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator, dtype=param.dtype), alpha=0.15)
    return model


def outputs(model: Any) -> Tensor:
    """What a model says of a fixed input."""
    generator = torch.Generator().manual_seed(3)
    if model.config.model_type == "vit":
        size = model.config.image_size
        return model(pixel_values=torch.randn(2, 1, size, size, generator=generator).double()).logits
    ids = torch.randint(2, model.config.vocab_size, (2, 9), generator=generator)
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    if getattr(model.config, "add_cross_attention", False):
        width = model.config.hidden_size
        more["encoder_hidden_states"] = torch.randn(2, 6, width, generator=generator).double()
    return model(input_ids=ids, **more).logits


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    logits = outputs(model)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4), dtype=logits.dtype)
    (logits * weight).sum().backward()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def part(found: Units, member: Member, tensor: Tensor, group: int) -> Tensor:
    """The weights of a group in one parameter."""
    return tensor.narrow(member.dim, member.offset + group * member.size, member.size)


def zero(model: nn.Module, found: Units, members: list[Member], group: int) -> None:
    with torch.no_grad():
        for member in members:
            part(found, member, model.get_parameter(member.param), group).zero_()


def marked(model: nn.Module, found: Units, members: list[Member], group: int) -> dict[str, Tensor]:
    masks = {name: torch.zeros_like(param, dtype=torch.bool) for name, param in model.named_parameters()}
    for member in members:
        part(found, member, masks[member.param], group).fill_(True)
    return masks


@pytest.mark.parametrize("kind", ["neuron", "head"])
@pytest.mark.parametrize("name", KNOWN)
def test_a_group_is_what_acts_through_it_and_nothing_else(name: str, kind: str) -> None:
    # A weight that has a gradient, and has none once the outgoing weights of a group are zero, acts through the group
    # alone. So those are to be its incoming weights; and what no longer has one once these are zero, its outgoing.
    for layer in find_layers(lively(name), kind):
        found, group = layer.units, layer.units.count - 1
        sides: dict[bool, list[Member]] = {True: [], False: []}
        for member, what in zip(found.members, layer.sites, strict=True):
            sides[what.part in OUTGOING].append(member)
        for outgoing in (True, False):
            model = lively(name)
            before = {key: grad.abs() > 1e-9 for key, grad in gradients(model).items()}
            zero(model, found, sides[outgoing], group)
            after = {key: grad.abs() <= 1e-15 for key, grad in gradients(model).items()}
            lost = {key: before[key] & after[key] for key in before}
            wanted = marked(model, found, sides[not outgoing], group)
            allowed = wanted if outgoing else marked(model, found, list(found.members), group)
            assert sum(int((wanted[key] & before[key]).sum()) for key in before) > 0
            for key in before:
                assert not (wanted[key] & before[key] & ~lost[key]).any(), (found.name, key, "has still a gradient")
                assert not (lost[key] & ~allowed[key]).any(), (found.name, key, "is not a member")


@pytest.mark.parametrize("name", KNOWN)
def test_every_layer_is_found_and_groups_share_nothing(name: str) -> None:
    model = build(name)
    for kind in ("neuron", "head"):
        masks = {key: torch.zeros_like(param, dtype=torch.int) for key, param in model.named_parameters()}
        for found in find_units(model, kind):
            for group in range(found.count):
                for member in found.members:
                    part(found, member, masks[member.param], group).add_(1)
        assert all(int(mask.max()) <= 1 for mask in masks.values())
        # All of each parameter that has some, as no layer of these models has weights beside its groups.
        assert all(int(mask.min()) == int(mask.max()) for mask in masks.values())
        layers = getattr(model.config, "num_hidden_layers", 0)
        blocks = {re.search(r"\d+", key)[0] for key, mask in masks.items() if mask.any()}  # type: ignore[index]
        assert len(blocks) == layers


def test_grouped_queries_share_a_head_and_a_stack_of_t5_its_heads() -> None:
    found = find_units(build("llama"), "head")
    assert [(each.count, [member.size for member in each.members]) for each in found] == [(2, [16, 8, 8, 16])] * 2
    t5 = find_units(build("t5-plain"), "head")
    assert [each.name for each in t5] == [
        "encoder",
        "decoder",
        "decoder.block.0.layer.1",
        "decoder.block.1.layer.1",
    ]
    assert [len(each.members) for each in t5] == [9, 9, 4, 4]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_rows_and_columns_are_what_feeds_and_what_takes(name: str) -> None:
    model = lively(name)
    modules = dict(model.named_modules())
    for kind in ("row", "column"):
        for found in find_units(model, kind):
            module, weight = modules[found.name], found.members[0]
            (inputs,) = (len(module.weight) if weight.dim == (kind == "row") else module.weight.shape[1],)
            x = torch.randn(3, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
            zeroed = [module.get_parameter(each.param.rpartition(".")[2]) for each in found.members]
            with torch.no_grad():
                kept = [each.clone() for each in zeroed]
                for each, member in zip(zeroed, found.members, strict=True):
                    each.narrow(member.dim, 1, 1).zero_()
                if kind == "row":
                    assert (module(x)[:, 1] == 0).all() and (module(x)[:, 0] != 0).all()
                else:
                    moved = x.clone()
                    moved[:, 1] += 1
                    assert torch.equal(module(x), module(moved))
                for each, value in zip(zeroed, kept, strict=True):
                    each.copy_(value)


@pytest.mark.usefixtures("lora_beside_torchao")
def test_ranks_are_those_of_lora() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(build("llama"), config)
    found = find_units(model, "rank")
    assert len(found) == 4 and {each.count for each in found} == {3}
    for each in found:
        shapes = [model.get_parameter(member.param).shape[member.dim] for member in each.members]
        assert shapes == [3, 3]
        assert [("lora_A" in member.param, "lora_B" in member.param) for member in each.members] == [
            (True, False),
            (False, True),
        ]


def test_names_are_clean_and_the_meta_device_will_do() -> None:
    with torch.device("meta"):
        model = build("llama")
    assert find_units(torch.nn.DataParallel(model), "neuron") == find_units(build("llama"), "neuron")


class Own(nn.Module):
    """A layer of an architecture of one's own."""

    def __init__(self, inputs: int = 4, width: int = 6) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(inputs, width), nn.Linear(width, inputs), nn.ReLU()


def test_an_unknown_architecture_is_named_and_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Own())
    with pytest.raises(ValueError, match=r"neurons of Sequential lie.*hf_pdecay\.add_architecture\(.*Own") as caught:
        find_units(model, "neuron")
    assert "Neurons(...)" in str(caught.value)
    monkeypatch.setattr(architectures, "_ROWS", dict(architectures._ROWS))
    add_architecture(Own, Neurons(("first",), "second", "act"))
    (found,) = find_units(model, "neuron")
    assert found == Units(
        "neuron", 6, (Member("0.first.weight", 0), Member("0.first.bias", 0), Member("0.second.weight", 1)), "0"
    )


def test_what_cannot_be_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="kind='heads'; it must be one of row, column"):
        find_units(build("llama"), "heads")
    monkeypatch.setattr(architectures, "_ROWS", dict(architectures._ROWS))
    add_architecture(Own, Heads("first", "first", "first", "second", "first.in_features"))
    with pytest.raises(ValueError, match="first has 3 rows, fewer than one head"):
        find_units(nn.Sequential(Own(4, 3)), "head")
    with pytest.raises(ValueError, match="give at least one Neurons or Heads"):
        add_architecture(Own)
    mixtral = build("mixtral")
    with pytest.raises(ValueError, match=r"MixtralForCausalLM.*Heads\(\.\.\.\).*MixtralAttention"):
        find_units(mixtral, "head")


@pytest.mark.usefixtures("lora_beside_torchao")
def test_adapters_are_to_be_merged_first() -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="no LoRA adapter"):
        find_units(build("llama"), "rank")
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match=r"down_proj is a Linear.*merge that first"):
        find_units(adapted, "neuron")


def test_layers_that_share_a_weight_are_found_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
    model["b"].weight = model["a"].weight
    biases = Member("a.bias", 0), Member("b.bias", 0)
    assert find_units(model, "row") == [Units("row", 4, (Member("a.weight", 0), *biases), "a")]
    assert find_units(model, "column") == [Units("column", 3, (Member("a.weight", 1),), "a")]


def test_a_parametrized_layer_is_refused() -> None:
    model: Any = build("gpt2")
    nn.utils.parametrizations.weight_norm(model.transformer.h[0].mlp.c_fc)
    with pytest.raises(ValueError, match="h.0.mlp.c_fc computes its weight from other parameters"):
        find_units(model, "neuron")
