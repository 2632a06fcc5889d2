"""Rules with a ``group`` on fused experts: every expert has rows, columns, neurons and blocks of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_pdecay import AdamWLp, SparsityControl, build_param_groups, find_units, measure_sparsity
from hf_pdecay.layers.matrices import decayable_parameter_names
from hf_pdecay.rules.assign import assign
from hf_pdecay.sparsity.dead_units import count_units


SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Of each layout: gate and up one after the other or taking turns, inputs last or first, with biases or without.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "intermediate_size_mlp": 20, "interleave_moe_layer_step": 1},
    ),
}


def build(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config, more = CONFIGS[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**SIZES, **more)
    model: Any = AutoModelForCausalLM.from_config(made, attn_implementation="eager").float()
    if not any(".experts." in name and param.dim() == 3 for name, param in model.named_parameters()):
        pytest.skip("this release of transformers has lists of experts")
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    return model


def experts_of(model: nn.Module) -> tuple[str, nn.Module]:
    return next((name, module) for name, module in model.named_modules() if name.endswith("experts"))


def units(model: nn.Module, kind: str, of: str = "") -> list[Any]:
    found = [layer for layer in find_units(model, kind) if layer.members[0].matrix is not None]
    return [layer for layer in found if of in layer.name]


def weights_of(model: nn.Module, layer: Any, unit: int) -> list[Tensor]:
    """Views of the weights of one unit."""
    params = {name: param.detach() for name, param in model.named_parameters()}
    views = []
    for member in layer.members:
        matrix = params[member.param].narrow(0, member.matrix, 1)
        views.append(matrix.narrow(member.dim, member.offset + unit * member.size, member.size))
    return views


class Recorder:
    """What the experts give for tokens, and changes of what they are given."""

    def __init__(self, model: Any) -> None:
        self._model, (_, self._experts) = model, experts_of(model)

    @torch.no_grad()
    def outputs(self, changed: int | None = None) -> Tensor:
        found: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tokens = (args[0] if args else kwargs["hidden_states"]).clone()
            if changed is not None:
                tokens[..., changed] += 1
            return ((tokens, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": tokens})

        def after(_: nn.Module, __: Any, out: Any) -> None:
            found.append((out[0] if isinstance(out, tuple) else out).clone())

        handles = (
            self._experts.register_forward_pre_hook(before, with_kwargs=True),
            self._experts.register_forward_hook(after),
        )
        self._model(torch.arange(1, 25).view(2, 12))
        for handle in handles:
            handle.remove()
        return found[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_columns_are_what_takes_an_input_and_rows_what_gives_an_output(name: str) -> None:
    model = build(name)
    recorder = Recorder(model)
    assert not torch.equal(recorder.outputs(), recorder.outputs(changed=3))
    for layer in units(model, "column", "gate_up_proj"):
        for weights in weights_of(model, layer, 3):
            weights.zero_()
    assert torch.equal(recorder.outputs(), recorder.outputs(changed=3))
    assert recorder.outputs()[..., 5].any()
    for layer in units(model, "row", "down_proj"):
        for weights in weights_of(model, layer, 5):
            weights.zero_()
    outputs = recorder.outputs()
    assert not outputs[..., 5].any() and outputs[..., 6].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_neuron_is_what_feeds_it_and_what_it_feeds(name: str) -> None:
    """Without its rows a neuron's column is multiplied by 0, and that of the next neuron is not."""
    model = build(name)
    recorder = Recorder(model)
    layers = units(model, "neuron")
    assert len(layers) == 4 and layers[0].count == (8 if name == "qwen3_moe" else 12)
    for layer in layers:
        *ups, _ = weights_of(model, layer, 2)
        for weights in ups:
            weights.zero_()
    before = recorder.outputs()
    for layer in layers:
        weights_of(model, layer, 2)[-1].add_(1)
    assert torch.equal(recorder.outputs(), before)
    for layer in layers:
        weights_of(model, layer, 3)[-1].add_(1)
    assert not torch.equal(recorder.outputs(), before)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["row", "column", "neuron"])
def test_all_that_a_rule_matches_decays_in_units_and_meets_its_target(name: str, kind: str) -> None:
    model = build(name)
    pattern = "experts" if kind == "neuron" else "layers"
    if name == "llama4" and kind == "neuron":
        pattern = r"\.experts"
    rules: dict[str, Any] = {pattern: {"group": kind, "target_sparsity": 0.5}}
    found = assign(model, p_norm=0.8, lambda_p=0.01, rules=rules)
    matched = [name for name in decayable_parameter_names(model) if pattern.replace("\\", "") in name]
    assert len(matched) >= 2 and all(found[name].group == kind for name in matched)
    optimizer = AdamWLp(build_param_groups(model, p_norm=0.8, lambda_p=0.01, rules=rules), lr=1e-2)
    control = SparsityControl(optimizer, 20, sparsity_budget="tensor")
    start = copy.deepcopy(model.state_dict())
    for step in range(1, 21):
        control.before_step(step)
        model(torch.arange(1, 25).view(2, 12), labels=torch.arange(1, 25).view(2, 12)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        control.after_step(step)
    layers = [layer for layer in find_units(model, kind) if {m.param for m in layer.members} & set(matched)]
    wanted = sum(round(0.5 * layer.count) for layer in layers)
    count, dead = count_units(optimizer.param_groups)[kind]
    assert (count, int(dead)) == (sum(layer.count for layer in layers), wanted)
    for layer in layers:  # each expert by itself, as the budget says
        if layer.members[0].matrix is not None:
            alive = [any(bool(w.any()) for w in weights_of(model, layer, unit)) for unit in range(layer.count)]
            assert sum(alive) == layer.count - round(0.5 * layer.count)
    decayed = {tensor.name for tensor in measure_sparsity(model, decayed=matched).tensors if tensor.decayed}
    assert decayed == set(matched)
    assert any(not torch.equal(start[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_lie_along_the_inputs(name: str) -> None:
    model = build(name)
    rules = {"layers": {"group": "2:4"}}
    optimizer = AdamWLp(build_param_groups(model, p_norm=0.8, lambda_p=0.01, rules=rules), lr=1e-2)
    control = SparsityControl(optimizer, 20)
    for step in range(1, 21):
        control.before_step(step)
        model(torch.arange(1, 25).view(2, 12), labels=torch.arange(1, 25).view(2, 12)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        control.after_step(step)
    count, fitting = count_units(optimizer.param_groups)["2:4"]
    assert int(fitting) == count
    params = dict(model.named_parameters())
    stacks = {layer.members[0].param: layer.members[0].dim for layer in units(model, "column")}
    assert len(stacks) == 2
    for param, dim in stacks.items():
        blocks = params[param].movedim(dim, -1).unflatten(-1, (-1, 4))
        assert int((blocks != 0).sum(-1).max()) == 2


def test_a_stack_decays_as_a_list_of_its_matrices_does() -> None:
    """In norms, factors and moments; dormant matrices too."""
    torch.manual_seed(0)
    stack, bias = torch.randn(3, 6, 4), torch.randn(3, 6)
    stack[1, 2] = bias[1, 2] = 0
    grads = torch.randn(5, 3, 6, 4), torch.randn(5, 3, 6)
    fused = nn.Parameter(stack.clone()), nn.Parameter(bias.clone())
    members = [[{"param": 0, "dim": 1, "matrix": e}, {"param": 1, "dim": 1, "matrix": e}] for e in range(3)]
    listed = [nn.Parameter(part.clone()) for e in range(3) for part in (stack[e], bias[e])]
    pairs = [[{"param": 2 * e, "dim": 0}, {"param": 2 * e + 1, "dim": 0}] for e in range(3)]
    options: dict[str, Any] = {"lr": 0.05, "p_norm": 0.8, "lambda_p": 0.3, "backend": "foreach"}
    optimizers = []
    for params, sides in ((fused, members), (listed, pairs)):
        layers = [{"kind": "row", "count": 6, "members": side} for side in sides]
        optimizers.append(AdamWLp([{"params": list(params), "group": "row", "units": layers}], **options))
    for step in range(5):
        for param, grad in zip(fused, grads, strict=True):
            param.grad = grad[step].clone()
        for index, param in enumerate(listed):
            param.grad = grads[index % 2][step][index // 2].clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(fused[0].data, torch.stack([param.data for param in listed[::2]]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(fused[1].data, torch.stack([param.data for param in listed[1::2]]), rtol=1e-6, atol=1e-7)


def test_matrices_of_a_stack_are_rounded_by_different_random_bits() -> None:
    stack = nn.Parameter(torch.full((2, 4, 64), 0.7).bfloat16())
    layers = [{"count": 4, "members": [{"param": 0, "dim": 1, "matrix": e}]} for e in range(2)]
    optimizer = AdamWLp([{"params": [stack], "group": "row", "units": layers}], lr=1e-3, p_norm=1.0, lambda_p=0.5)
    stack.grad = torch.zeros_like(stack)
    optimizer.step()
    assert not torch.equal(stack[0], stack[1])


@pytest.mark.parametrize("member", [{"dim": 1, "matrix": 2}, {"dim": 0, "matrix": 0}, {"dim": 1, "matrix": True}])
def test_a_matrix_that_is_not_there_is_refused(member: dict[str, Any]) -> None:
    layers = [{"count": 4, "members": [{"param": 0, **member}]}]
    with pytest.raises(ValueError, match="names no matrix"):
        AdamWLp([{"params": [nn.Parameter(torch.ones(2, 4, 4))], "group": "row", "units": layers}])


def test_a_matrix_with_outputs_of_two_dimensions_has_no_rows() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.ones(8, 2, 4))

        def forward(self, states: Tensor) -> Tensor:
            return torch.einsum("bih,hnd->bind", states, self.query)

    assert decayable_parameter_names(Heads()) == ["query"]
    with pytest.raises(ValueError, match=r"group='row' on query, a matrix whose inputs or outputs have several"):
        assign(Heads(), p_norm=0.8, lambda_p=0.01, rules={"query": {"group": "row"}})


def test_a_rule_for_experts_leaves_their_biases_alone() -> None:
    model = build("gpt_oss")
    found = assign(model, p_norm=0.8, lambda_p=0.01, rules={"experts": {"p_norm": 0.5}})
    assert {name.rpartition(".")[2] for name, how in found.items() if how.rule == "experts"} == {
        "gate_up_proj",
        "down_proj",
    }


def test_what_a_rule_matches_and_no_unit_has_is_named() -> None:
    model = build("qwen3_moe")
    rules: dict[str, Any] = {"layers": {"group": "neuron", "target_sparsity": 0.5}}
    with pytest.raises(ValueError, match=r"'layers' has group='neuron' and matches .*q_proj\.weight and 3 more, which"):
        assign(model, p_norm=0.8, lambda_p=0.01, rules=rules)
    for other in ({"self_attn": "off"}, {"self_attn": {"group": "2:4"}}, {"self_attn": {}}):
        for order in (rules | other, other | rules):
            found = assign(model, p_norm=0.8, lambda_p=0.01, rules=order)
            assert {how.rule for how in found.values() if how.group == "neuron"} == {"layers"}


def test_shrinking_says_that_it_leaves_fused_experts() -> None:
    from hf_pdecay import shrink

    with pytest.raises(ValueError, match=r"neurons of fused experts"):
        shrink(build("qwen3_moe"))
