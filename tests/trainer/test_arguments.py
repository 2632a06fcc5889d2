from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments
from hf_pdecay.trainer.training_flags import SETTINGS


OWN = {
    "p_norm": 0.5,
    "lambda_p": 0.03,
    "target_sparsity": 0.7,
    "sparsity_begin": 0.2,
    "sparsity_end": 0.6,
    "sparsity_schedule": "linear",
    "sparsity_budget": "tensor",
    "sparsity_decay": 0.02,
    "rate_growth": 0.25,
    "p_norm_begin": 1.5,
    "keep_zeros": True,
    "lp_rules": {"attn": {"p_norm": 0.4}, "mlp": "off"},
    "skip_nonfinite": False,
    "sparsity_logging": "layer",
    "near_zero_threshold": 1e-9,
    "one_shot": "wanda",
    "weight_bits": 1.58,
    "activation_bits": 8,
    "teacher": "self",
    "teacher_task": 0.5,
    "teacher_logits": 2.0,
    "teacher_temperature": 3.0,
    "teacher_hidden": 0.0,
    "teacher_dtype": "bfloat16",
    "teacher_cache": "answers",
}
# These do not go with weights of few bits.
TO_BASE = {"decay_to": "base", "base_from": "some/model"}
REST = {name: value for name, value in OWN.items() if "bits" not in name and name != "one_shot"}


def _same(args: PDecayTrainingArguments, own: dict[str, Any] = OWN) -> None:
    for name, value in own.items():
        assert getattr(args, name) == value, name
    assert args.optim == "adamw_lp"


def test_every_own_field_is_covered_here() -> None:
    assert set(SETTINGS) == {*OWN, *TO_BASE}
    for name, value in (OWN | TO_BASE).items():
        assert getattr(PDecayTrainingArguments(), name) != value, f"{name} is tested with its default"


def test_command_line(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--optim", "adamw_lp", "--keep_zeros", "--no_skip_nonfinite"]
    words += ["--p_norm", "0.5", "--lambda_p", "0.03", "--sparsity_logging", "layer", "--near_zero_threshold", "1e-9"]
    words += ["--target_sparsity", "0.7", "--sparsity_begin", "0.2", "--sparsity_end", "0.6", "--p_norm_begin", "1.5"]
    words += ["--sparsity_schedule", "linear", "--sparsity_budget", "tensor", "--sparsity_decay", "0.02"]
    words += ["--rate_growth", "0.25"]
    words += ["--teacher", "self", "--teacher_task", "0.5", "--teacher_logits", "2", "--teacher_temperature", "3"]
    words += [
        "--teacher_hidden",
        "0",
        "--teacher_dtype",
        "bfloat16",
        "--teacher_cache",
        "answers",
        "--one_shot",
        "wanda",
        "--weight_bits",
        "1.58",
        "--activation_bits",
        "8",
    ]
    words += ["--lp_rules", json.dumps(OWN["lp_rules"]), "--weight_decay", "0.1"]
    (args,) = HfArgumentParser(PDecayTrainingArguments).parse_args_into_dataclasses(words)
    _same(args)
    assert args.weight_decay == 0.1
    words = ["--output_dir", str(tmp_path), "--decay_to", "base", "--base_from", "some/model"]
    (args,) = HfArgumentParser(PDecayTrainingArguments).parse_args_into_dataclasses(words)
    _same(args, TO_BASE)


def test_help_of_what_means_something_else_here() -> None:
    actions = HfArgumentParser(PDecayTrainingArguments)._actions
    texts = {action.dest: action.help or "" for action in actions}
    assert "backend=foreach" in texts["optim_args"]
    assert "decay" in texts["optim_target_modules"]
    assert "target_sparsity" in texts["lp_rules"] and "group" in texts["lp_rules"]


@pytest.mark.parametrize("own", [OWN, REST | TO_BASE], ids=["few bits", "to base"])
@pytest.mark.parametrize("kind", ["json", "yaml", "dict", "to_dict", "replace", "pickle"])
def test_round_trips(kind: str, own: dict[str, Any], tmp_path: Path) -> None:
    parser = HfArgumentParser(PDecayTrainingArguments)
    values: dict[str, Any] = {"output_dir": str(tmp_path), **own}
    file = tmp_path / f"args.{kind}"
    if kind == "json":
        file.write_text(json.dumps(values))
        (args,) = parser.parse_json_file(str(file))
    elif kind == "yaml":
        file.write_text(yaml.dump(values, sort_keys=False))
        (args,) = parser.parse_yaml_file(str(file))
    elif kind == "dict":
        (args,) = parser.parse_dict(values)
    elif kind == "to_dict":
        written = json.loads(PDecayTrainingArguments(**values).to_json_string())
        assert written["optim"] == "adamw_lp"
        (args,) = parser.parse_dict(written)
    elif kind == "replace":
        args = replace(PDecayTrainingArguments(**values), output_dir=str(tmp_path / "other"))
    else:
        torch.save(PDecayTrainingArguments(**values), file)
        args = torch.load(file, weights_only=False)
    _same(args, own)


@pytest.mark.parametrize(
    ("optim", "ours"),
    [("adamw_torch", "adamw_lp"), ("sgd", "sgd_lp"), ("lion_8bit", "lion_8bit_lp"), ("paged_lion_32bit", "lion_lp")],
)
@pytest.mark.parametrize("values", [{"target_sparsity": 0.9}, {"p_norm": 1.0}, {"lp_rules": {"mlp": "off"}}])
def test_settings_that_an_optimizer_does_not_read_are_refused(
    optim: str, ours: str, values: dict[str, Any], tmp_path: Path
) -> None:
    name, value = next(iter(values.items()))
    message = f"Invalid optim: optim='{optim}' does not read {re.escape(f'{name}={value!r}')}, .*; give optim='{ours}'"
    with pytest.raises(ValueError, match=message):
        PDecayTrainingArguments(str(tmp_path), optim=optim, **values)


def test_settings_that_a_given_optimizer_does_not_read_are_refused(tmp_path: Path) -> None:
    args = PDecayTrainingArguments(str(tmp_path), target_sparsity=0.9, use_cpu=True)
    model = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"the SGD that the Trainer was given does not read target_sparsity=0\.9"):
        PDecayTrainer(model=model, args=args, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))
    with pytest.raises(ValueError, match=r"the SGD that the Trainer was given does not read target_sparsity=0\.9"):
        PDecayTrainer(model=model, args=args, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))


def test_settings_that_an_optimizer_of_a_subclass_does_not_read_are_refused(tmp_path: Path) -> None:
    trainer = PDecayTrainer(
        model=torch.nn.Linear(4, 4),
        args=PDecayTrainingArguments(str(tmp_path), p_norm=0.5, use_cpu=True, max_steps=1),
        train_dataset=[{"input": torch.zeros(4)}],
    )
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)  # as a subclass may do
    with pytest.raises(ValueError, match=r"the SGD that the Trainer was given does not read p_norm=0\.5"):
        trainer.create_optimizer()


def test_optim_args_that_are_no_string(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Invalid optim_args: optim_args=\{'moments': 'bfloat16'\}; for"):
        PDecayTrainingArguments(str(tmp_path), optim_args={"moments": "bfloat16"})  # type: ignore[arg-type]


def test_a_misspelt_setting_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'adamw_torch' does not read target_sparcity=0\.9"):
        PDecayTrainingArguments(str(tmp_path), optim="adamw_torch", optim_args="target_sparcity=0.9")
    PDecayTrainingArguments(str(tmp_path), optim="galore_adamw", optim_args="rank=64,scale=2,norm=1")


def test_numbers_that_yaml_reads_as_strings_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    lines = [f"output_dir: {tmp_path}", "learning_rate: 1e-4", "weight_decay: 1e-2", "lambda_p: 1e-3", "p_norm: 8e-1"]
    strings = ["target_sparsity: '0.5'", "keep_zeros: 'true'", "p_norm_begin: 'none'", "adam_epsilon: 1e-9"]
    file.write_text("\n".join([*lines, *strings]))
    (args,) = HfArgumentParser(PDecayTrainingArguments).parse_yaml_file(str(file))
    assert (args.learning_rate, args.weight_decay, args.adam_epsilon) == (1e-4, 1e-2, 1e-9)
    assert (args.lambda_p, args.p_norm, args.target_sparsity) == (1e-3, 0.8, 0.5)
    assert args.keep_zeros is True and args.p_norm_begin is None


@pytest.mark.parametrize(("name", "value"), [("learning_rate", "fast"), ("lambda_p", "1e-"), ("keep_zeros", "maybe")])
def test_a_string_that_is_no_number_is_refused_by_name(name: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"Invalid {name}: {name}='{value}'"):
        PDecayTrainingArguments(str(tmp_path), **{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"target_sparsity": 90},
        {"lp_rules": {"mlp": {"target_sparsity": 90}}},
        {"sparsity_begin": 0, "sparsity_end": 90},
    ],
)
def test_a_percentage_asks_whether_the_fraction_was_meant(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Was 0\.9 meant\?$"):
        PDecayTrainingArguments(str(tmp_path), **values)


def test_rules_file_becomes_part_of_the_arguments(tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    file.write_text(json.dumps(OWN["lp_rules"]))
    args = PDecayTrainingArguments(str(tmp_path), lp_rules=str(file))
    file.unlink()
    assert args.to_dict()["lp_rules"] == OWN["lp_rules"]


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_all_other_names_are_accepted_as_before(name: str, tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--optim", name]
    (args,) = HfArgumentParser(PDecayTrainingArguments).parse_args_into_dataclasses(words)
    (stock,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words)
    assert args.optim == stock.optim
    assert type(args.optim) is type(stock.optim)


def test_nothing_else_differs_from_the_parent(tmp_path: Path) -> None:
    # logging_dir and run_name carry the time of day on some releases.
    ours, stock = PDecayTrainingArguments(str(tmp_path)).to_dict(), TrainingArguments(str(tmp_path)).to_dict()
    differing = {name for name in stock if ours[name] != stock[name]} - {"logging_dir", "run_name"}
    assert differing == {"optim"}
    assert ours["weight_decay"] == 0


def test_set_optimizer(tmp_path: Path) -> None:
    args = PDecayTrainingArguments(str(tmp_path), optim="sgd")
    assert args.set_optimizer("adamw_lp", learning_rate=1e-3, weight_decay=0.1).optim == "adamw_lp"
    assert (args.learning_rate, args.weight_decay) == (1e-3, 0.1)
    assert args.set_optimizer("adafactor").optim == OptimizerNames.ADAFACTOR


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("p_norm", 0, "p_norm=0; it must be a finite number above 0"),
        ("p_norm", -1.0, "p_norm=-1.0; it must be"),
        ("p_norm", float("nan"), "p_norm=nan"),
        ("p_norm", float("inf"), "p_norm=inf"),
        ("lambda_p", -0.1, "lambda_p=-0.1; it must be a finite number of at least 0"),
        ("lambda_p", float("inf"), "lambda_p=inf"),
        ("lambda_p", float("nan"), "lambda_p=nan"),
        ("sparsity_logging", "all", "sparsity_logging='all'; it must be one of overall, layer"),
        ("near_zero_threshold", -1.0, "near_zero_threshold=-1.0"),
        ("near_zero_threshold", float("nan"), "near_zero_threshold=nan"),
        ("near_zero_threshold", "x", "near_zero_threshold='x'; it must be a number"),
        ("sparsity_begin", "x", "sparsity_begin='x'; it must be a number"),
        ("sparsity_end", None, "sparsity_end=None"),
        ("sparsity_decay", "much", "sparsity_decay='much'; it must be a number"),
        ("optim_args", "p_norm=0.5", "optim_args='p_norm=0.5'; for optim='adamw_lp' it takes backend=NAME"),
        ("optim_args", "backend", "optim_args='backend'; for optim='adamw_lp' it takes backend=NAME"),
        ("optim_args", "backend=fast", "backend='fast' for optim='adamw_lp'; it must be one of auto, compiled"),
        (
            "optim_args",
            "moments=4bit",
            "moments='4bit' for optim='adamw_lp'; it must be one of float32, bf",
        ),
        ("lp_rules", "{", "lp_rules"),
        ("keep_zeros", "maybe", "keep_zeros='maybe'; it must be true or false"),
        ("skip_nonfinite", 3, "skip_nonfinite=3; it must be True or False"),
        ("learning_rate", -1.0, "learning_rate=-1.0; it must be a finite number of at least 0"),
        ("learning_rate", float("nan"), "learning_rate=nan"),
        ("weight_decay", float("inf"), "weight_decay=inf"),
        ("adam_epsilon", -1.0, "adam_epsilon=-1.0"),
        ("adam_beta1", 1.5, "adam_beta1=1.5; it must be at least 0 and below 1"),
        ("adam_beta2", 1.0, "adam_beta2=1.0"),
        ("optim", "adamw_l", "adamw_l"),
    ],
)
def test_bad_values_are_told_plainly(field: str, value: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        PDecayTrainingArguments(str(tmp_path), **{field: value})


def test_unknown_optimizer_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(PDecayTrainingArguments).parse_args_into_dataclasses(["--optim", "adamw_l"])
    assert "adamw_lp" in capsys.readouterr().err
