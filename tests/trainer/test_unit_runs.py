"""Runs of the Trainer whose weights decay by groups; dead groups are counted again from the files, by numpy."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

import hf_pdecay
from hf_pdecay import PDecayTrainer, SparsityReport

from ..helpers.launching import launch
from ..helpers.models import build


pytestmark = pytest.mark.usefixtures("undrawn")


MakeArgs = Callable[..., Any]
STEPS = 40


class InOrder(PDecayTrainer):
    """Takes the data in their order: a shuffled epoch that transformers 4.57 resumes goes on with other batches."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def _train(name: str, args: Any, data: Any, resume: str | None = None, cls: type[Trainer] = InOrder) -> Any:
    trainer = cls(model=build(name), args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


def _weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def _dead(parts: list[Any]) -> Any:
    """Which groups are all zero, given their weights in several tensors, group by group along the first axis."""
    return np.all([(part.reshape(len(part), -1) == 0).all(1) for part in parts], axis=0)


def _neurons(weights: dict[str, Any], layer: int) -> Any:
    if f"model.layers.{layer}.mlp.up_proj.weight" in weights:
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (weights[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return _dead([gate, up, down.T])
    mlp = f"transformer.h.{layer}.mlp"
    return _dead([weights[f"{mlp}.c_fc.weight"].T, weights[f"{mlp}.c_fc.bias"], weights[f"{mlp}.c_proj.weight"]])


def _heads(weights: dict[str, Any], layer: int) -> Any:
    """Two of each: of Llama those of keys and values, with the queries that share them."""
    if f"model.layers.{layer}.self_attn.q_proj.weight" in weights:
        attention = f"model.layers.{layer}.self_attn"
        q, k, v, o = (weights[f"{attention}.{name}_proj.weight"] for name in "qkvo")
        return _dead([part.reshape(2, -1) for part in (q, k, v, o.T)])
    attention = f"transformer.h.{layer}.attn"
    fused = weights[f"{attention}.c_attn.weight"].T.reshape(3, 2, -1)
    bias = weights[f"{attention}.c_attn.bias"].reshape(3, 2, -1)
    return _dead([*fused, *bias, weights[f"{attention}.c_proj.weight"].reshape(2, -1)])


def _pattern(weights: dict[str, Any]) -> list[Any]:
    """How many weights of each 4 along the inputs are not zero, in each layer that decays."""
    counts = []
    for name, weight in weights.items():
        if re.search(r"(proj|c_fc|c_attn)\.weight", name):
            by_inputs = weight.T if "transformer.h" in name else weight
            counts.append((by_inputs.reshape(len(by_inputs), -1, 4) != 0).sum(-1))
    return counts


@pytest.mark.parametrize("budget", ["global", "tensor"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_of_the_neurons(name: str, budget: str, make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    """The rest of the model is trained as ever, and files, log and card say how many neurons are dead."""
    rules = {"mlp": {"group": "neuron", "target_sparsity": 0.5}, ".": "off"}
    trainer = _train(name, make_args(max_steps=STEPS, lp_rules=rules, sparsity_budget=budget), tokens)
    folder = tmp_path / "out"
    dead = [_neurons(_weights(folder), layer) for layer in range(2)]
    assert sum(map(sum, dead)) == sum(map(len, dead)) // 2
    if budget == "tensor":
        assert [sum(flags) for flags in dead] == [len(flags) // 2 for flags in dead]
    # Single weights of live neurons are not pruned.
    alive = sum(int((weight == 0).sum()) for name, weight in _weights(folder).items() if "mlp" in name)
    size = {"llama": 3 * 32, "gpt2": 2 * 32 + 1}[name]
    assert alive == size * sum(map(sum, dead))
    report = json.loads((folder / "sparsity.json").read_text())
    total = sum(map(len, dead))
    assert report["units"] == [{"kind": "neuron", "count": total, "dead": total // 2}]
    assert SparsityReport.load(folder / "sparsity.json").to_dict() == report
    assert f"neurons: 50.0% of {total:,} dead" in (folder / "README.md").read_text()
    assert trainer.state.log_history[-2]["sparsity/neurons"] == 0.5
    lines = [json.loads(line) for line in (folder / "sparsity.jsonl").read_text().splitlines()]
    assert lines[-1]["units"] == {"neurons": 0.5} and lines[0]["units"] == {"neurons": 0.0}


@pytest.mark.parametrize(
    ("given", "zeros"),
    [
        ({}, False),
        ({"lambda_p": 5.0}, True),
        ({"target_sparsity": 0.5}, True),
        ({"optim_target_modules": "all-linear"}, None),
    ],
)
def test_beside_a_target_in_a_rule_nothing_decays_unasked(
    given: dict[str, Any], zeros: bool | None, make_args: MakeArgs, tokens: Any, tmp_path: Path, capsys: Any
) -> None:
    """Unless λ_p, a target of the run or modules ask for it; the table of a run says so."""
    rules = {"mlp": {"group": "neuron", "target_sparsity": 0.5}}
    trainer = _train("llama", make_args(max_steps=STEPS, lp_rules=rules, **{"lambda_p": None, **given}), tokens)
    attention = [weight for name, weight in _weights(tmp_path / "out").items() if "attn" in name]
    if zeros is not None:
        assert any(bool((weight == 0).any()) for weight in attention) == zeros
    decayed = [group["rule"] for group in trainer.optimizer.param_groups if group["decayed"]]
    assert set(decayed) == ({"mlp"} if not given else {"mlp", "default"})
    assert ("no target: only rules have targets" in " ".join(capsys.readouterr().out.split())) == (not given)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_of_the_heads_and_a_quarter_of_the_neurons(
    name: str, make_args: MakeArgs, tokens: Any, tmp_path: Path
) -> None:
    """A budget never mixes kinds: the run's target is that of the heads, by themselves."""
    rules = {"mlp": {"group": "neuron", "target_sparsity": 0.25}, "attn": {"group": "head"}}
    args = make_args(max_steps=STEPS, lp_rules=rules, target_sparsity=0.5, sparsity_budget="tensor")
    _train(name, args, tokens)
    for layer in range(2):
        heads, neurons = (count(_weights(tmp_path / "out"), layer) for count in (_heads, _neurons))
        assert sum(heads) == 1 and len(heads) == 2
        assert sum(neurons) == len(neurons) // 4


def test_one_group_stays_at_least(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    """0.9 of two heads would be both, and a layer without heads passes nothing on."""
    rules = {"attn": {"group": "head", "target_sparsity": 0.9}}
    _train("llama", make_args(max_steps=STEPS, lp_rules=rules, sparsity_budget="tensor"), tokens)
    assert [_heads(_weights(tmp_path / "out"), layer).sum() for layer in range(2)] == [1, 1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_of_four(name: str, make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    """Exactly, and without a target that says so."""
    args = make_args(max_steps=STEPS, lp_rules={"attn|mlp": {"group": "2:4"}})
    _train(name, args, tokens)
    patterns = _pattern(_weights(tmp_path / "out"))
    assert len(patterns) == {"llama": 14, "gpt2": 8}[name]
    assert all((counts == 2).all() for counts in patterns)
    report = json.loads((tmp_path / "out/sparsity.json").read_text())
    blocks = sum(counts.size for counts in patterns)
    assert report["units"] == [{"kind": "2:4", "count": blocks, "dead": blocks}]


@pytest.mark.parametrize("optim", ["adamw_lp", "sgd_lp"])
def test_by_flags_in_a_stock_trainer(optim: str, tokens: Any, tmp_path: Path) -> None:
    """``--optim NAME --optim_args``, with the rules in a file; SGD knows no second moments."""
    (tmp_path / "rules.json").write_text(json.dumps({"mlp": {"group": "neuron"}, "self_attn": "off"}))
    hf_pdecay.register()
    try:
        args = TrainingArguments(
            str(tmp_path / "out"),
            use_cpu=True,
            report_to="none",
            max_steps=STEPS,
            learning_rate=1e-2,
            save_strategy="no",
            optim=optim,
            optim_args=f"target_sparsity=0.5,lp_rules={tmp_path}/rules.json",
        )
        _train("llama", args, tokens, cls=Trainer)
    finally:
        hf_pdecay.unregister()
    assert sum(sum(_neurons(_weights(tmp_path / "out"), layer)) for layer in range(2)) == 48


@pytest.mark.parametrize("extra", [{}, {"bf16": True, "optim_args": "moments=bfloat16"}])
@pytest.mark.parametrize("group", ["neuron", "head", "2:4", "row"])
def test_a_resumed_run_goes_on_to_the_bit(
    group: str, extra: dict[str, Any], make_args: MakeArgs, tokens: Any, tmp_path: Path
) -> None:
    target = {} if group == "2:4" else {"target_sparsity": 0.5}
    rules = {"attn" if group == "head" else "mlp": {"group": group, **target}}
    options = {"max_steps": STEPS, "lp_rules": rules, "save_strategy": "steps", "save_steps": 20, **extra}
    _train("llama", make_args(**options, output_dir=str(tmp_path / "whole")), tokens)
    again = make_args(**options, output_dir=str(tmp_path / "again"))
    _train("llama", again, tokens, resume=str(tmp_path / "whole/checkpoint-20"))
    whole, resumed = _weights(tmp_path / "whole"), _weights(tmp_path / "again")
    assert whole.keys() == resumed.keys()
    for name, weight in whole.items():
        assert np.array_equal(weight.view(np.int32), resumed[name].view(np.int32)), name


def test_dead_neurons_stay_dead_while_the_rest_heals(make_args: MakeArgs, tokens: Any) -> None:
    """After the end zeros are held group by group: a single zero in a group that lives is free to move."""
    rules = {"mlp": {"group": "neuron", "target_sparsity": 0.5}}

    class Watched(InOrder):
        seen: list[Any] = []

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 35:
                up = model.model.layers[0].mlp.up_proj.weight
                neuron = int((up != 0).any(1).nonzero()[0])
                with torch.no_grad():
                    up[neuron, 0] = 0
                self.seen += [
                    neuron,
                    [int((layer.mlp.up_proj.weight == 0).all(1).sum()) for layer in model.model.layers],
                ]
            return super().training_step(model, *args, **kwargs)

    trainer = _train("llama", make_args(max_steps=STEPS, lp_rules=rules), tokens, cls=Watched)
    neuron, before = Watched.seen
    layers = trainer.model.model.layers
    assert layers[0].mlp.up_proj.weight[neuron, 0] != 0
    assert [int((layer.mlp.up_proj.weight == 0).all(1).sum()) for layer in layers] == before


def test_a_zero_initialised_head_learns(make_args: MakeArgs, tokens: Any) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    rules = {"layers.*weight": {"group": "column", "lambda_p": 1e-4}}
    PDecayTrainer(model=model, args=make_args(lp_rules=rules), train_dataset=tokens).train()
    assert (model.model.layers[0].self_attn.o_proj.weight != 0).all()
    assert (model.model.layers[1].mlp.down_proj.weight != 0).all()


@pytest.mark.slow
def test_under_ddp_replicas_agree(tmp_path: Path) -> None:
    launch("tests.helpers.unit_ddp_run", tmp_path / "out")
    weights = _weights(tmp_path / "out")
    assert sum(sum(_neurons(weights, layer)) for layer in range(2)) == 48
    attention = {name: weight for name, weight in weights.items() if "self_attn" in name}
    assert all((counts == 2).all() for counts in _pattern(attention))


@pytest.mark.usefixtures("lora_beside_torchao")
def test_half_of_the_ranks_of_an_adapter(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    """B begins with zeros and learns: a rank whose A is not zero is not dead."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama"), config)
    rules = {"lora_": {"group": "rank", "target_sparsity": 0.5}}
    trainer = InOrder(model=model, args=make_args(max_steps=STEPS, lp_rules=rules), train_dataset=tokens)
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    names = [name for name in saved if "lora_A" in name]
    dead = [_dead([saved[name], saved[name.replace("lora_A", "lora_B")].T]) for name in names]
    assert len(dead) == 4 and sum(map(sum, dead)) == 8
    assert "ranks: 50.0% of 16 dead" in (tmp_path / "out/README.md").read_text()
    assert hf_pdecay.rank_sparsity(model).dead == 8


def test_a_forecast_of_groups(make_args: MakeArgs, tokens: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A λ_p that lets no neuron die is said before the run, with the one that would."""
    rules = {"mlp": {"group": "neuron", "lambda_p": 1e-9}}
    with caplog.at_level(logging.WARNING):
        _train("llama", make_args(lp_rules=rules, max_steps=2), tokens)
    assert "can zero at most 0.0% of these neurons" in caplog.text


@pytest.mark.parametrize(
    ("rules", "options", "message"),
    [
        ({"mlp": {"group": "neurone"}}, {}, "group='neurone'; it must be one of element, row, column, neuron, head"),
        ({"mlp": {"group": ["row"]}}, {}, "it must be one of element"),
        ({"attn": {"group": "neuron"}}, {}, "what it matches is in no neuron"),
        ({"mlp": {"group": "rank"}}, {}, "no LoRA adapter"),
        ({"mlp": {"group": "2:5"}}, {}, "not divisible by 5"),
        ({"mlp": {"group": "2:4", "target_sparsity": 0.7}}, {}, "which implies 0.5"),
        (
            {"mlp": {"group": "neuron"}, "down_proj": {"group": "2:4"}},
            {},
            r"down_proj.weight is claimed by 'down_proj' \(group='2:4'\) and by 'mlp' \(group='neuron'\)",
        ),
        (
            {"up_proj": {"p_norm": 0.5}, "mlp": {"group": "neuron"}},
            {},
            r"up_proj.weight is claimed by 'mlp' \(group='neuron'\) and by 'up_proj' \(group='element'\)",
        ),
        ({"mlp": "off", "mlp.": {"group": "neuron"}}, {}, "rules before it have all that it matches"),
        ({"mlp": {"group": "neuron", "p_norm": 2, "target_sparsity": 0.5}}, {}, "p_norm=2 with a target_sparsity"),
        ({"mlp|attn": {"group": "2:4"}}, {"target_sparsity": 0.9}, "leave the target out"),
        ({"mlp": {"group": "neuron"}}, {"optim": "muon_lp"}, "splits the parameters of a group"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    rules: dict[str, Any], options: dict[str, Any], message: str, make_args: MakeArgs, tokens: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        args = make_args(lp_rules=rules, **options)
        PDecayTrainer(model=build("llama"), args=args, train_dataset=tokens)


def test_frozen_members_are_refused(make_args: MakeArgs, tokens: Any) -> None:
    model = build("llama")
    model.model.layers[1].mlp.gate_proj.weight.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.gate_proj\.weight, in which neurons of .* lie, is not trained"
    ):
        args = make_args(lp_rules={"mlp": {"group": "neuron"}})
        PDecayTrainer(model=model, args=args, train_dataset=tokens)
