from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers import training_args as hf_arguments
from transformers.training_args import OptimizerNames

import hf_pdecay
from hf_pdecay import AdamWLp, PDecayTrainer, PDecayTrainerMixin, PDecayTrainingArguments, SparsityReport
from hf_pdecay.trainer import training_flags
from hf_pdecay.trainer.arguments import settings_of
from hf_pdecay.trainer.settings import DecaySettings

from ..helpers.models import build, tiny_gpt2


pytestmark = pytest.mark.usefixtures("undrawn")


RUN = {
    "use_cpu": True,
    "report_to": "none",
    "max_steps": 20,
    "logging_steps": 2,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "disable_tqdm": True,
}
# Every field of our own, with a value that is not its default, and what the step is computed by.
SETTINGS: dict[str, Any] = {
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
TO_BASE: dict[str, Any] = {"decay_to": "base", "base_from": "some/model"}
_OF_FEW_BITS = ("weight_bits", "activation_bits", "one_shot")
RULES = {"h.0.attn": {"p_norm": 0.9}, "wte": "off"}


def _args(folder: Path, optim_args: str | None = None, **options: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), **{**RUN, "optim": "adamw_lp", "optim_args": optim_args, **options})


def _train(args: Any, data: Any, cls: type[Trainer] = Trainer, **kwargs: Any) -> Any:
    trainer = cls(model=tiny_gpt2(), args=args, train_dataset=data, eval_dataset=data)
    trainer.train(**kwargs)
    trainer.save_model()
    return trainer


def _same_weights(left: Path, right: Path) -> bool:
    tensors, others = (load_file(folder / "model.safetensors") for folder in (left, right))
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_importing_registers_nothing() -> None:
    assert "adamw_lp" not in [name.value for name in OptimizerNames]
    with pytest.raises(ValueError, match="adamw_lp is not a valid OptimizerNames"):
        TrainingArguments("out", optim="adamw_lp")


def test_unregister_leaves_everything_as_it_was(tmp_path: Path) -> None:
    before = vars(OptimizerNames).copy(), list(OptimizerNames), vars(Trainer).copy()
    maps = [{**OptimizerNames._member_map_}, {**OptimizerNames._value2member_map_}]
    for _ in range(2):
        hf_pdecay.register()
        hf_pdecay.register()
        assert OptimizerNames("adamw_lp") is OptimizerNames.ADAMW_LP is OptimizerNames["ADAMW_LP"]
        assert [name.value for name in OptimizerNames].count("adamw_lp") == 1
        hf_pdecay.unregister()
        hf_pdecay.unregister()
        assert (vars(OptimizerNames).keys(), list(OptimizerNames), vars(Trainer)) == (before[0].keys(), *before[1:])
        assert [{**OptimizerNames._member_map_}, {**OptimizerNames._value2member_map_}] == maps
        with pytest.raises(ValueError, match="not a valid OptimizerNames"):
            TrainingArguments(str(tmp_path), optim="adamw_lp")


def test_stock_arguments_know_the_name(registered: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--output_dir", str(tmp_path), "--optim", "adamw_lp", "--optim_args", "p_norm=0.7", "--use_cpu"]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words)
    assert (args.optim, args.optim_args) == ("adamw_lp", "p_norm=0.7")
    assert json.loads(args.to_json_string())["optim"] == "adamw_lp"
    (again,) = HfArgumentParser(TrainingArguments).parse_dict(args.to_dict())
    assert again.optim is OptimizerNames.ADAMW_LP
    assert TrainingArguments(str(tmp_path)).set_optimizer("adamw_lp", args="p_norm=0.7").optim == "adamw_lp"
    with pytest.raises(SystemExit):
        HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--help"])
    assert "adamw_lp" in capsys.readouterr().out


def test_saved_arguments(tmp_path: Path) -> None:
    hf_pdecay.register()
    args = _args(tmp_path, "p_norm=0.7")
    pickled = pickle.dumps(args)
    torch.save(args, tmp_path / "training_args.bin")
    assert pickle.loads(pickled).optim is OptimizerNames.ADAMW_LP
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).optim is OptimizerNames.ADAMW_LP
    hf_pdecay.unregister()
    for load in (lambda: pickle.loads(pickled), lambda: torch.load(tmp_path / "training_args.bin", weights_only=False)):
        with pytest.raises(ValueError, match="adamw_lp is not a valid OptimizerNames"):
            load()


@pytest.mark.parametrize("to_base", [False, True])
def test_every_setting_goes_through_optim_args(registered: None, tmp_path: Path, to_base: bool) -> None:
    file = tmp_path / "some rules.json"
    file.write_text(json.dumps(RULES))
    given = {key: value for key, value in SETTINGS.items() if not (to_base and key in _OF_FEW_BITS)}
    left_out = {*_OF_FEW_BITS} if to_base else {*TO_BASE}
    given |= TO_BASE if to_base else {}
    assert {*SETTINGS, *TO_BASE, "lp_rules"} == {*training_flags.SETTINGS}
    text = ", ".join(f"{key} = {value}" for key, value in given.items())
    text += f", lp_rules={file}, backend=foreach, moments=bfloat16"
    stock = settings_of(_args(tmp_path, text, optim_target_modules=["attn"]))
    ours = PDecayTrainingArguments(
        str(tmp_path),
        **given,
        lp_rules=str(file),
        optim_args="backend=foreach,moments=bfloat16",
        optim_target_modules=["attn"],
        use_cpu=True,
    )
    assert stock == ours.decay_settings
    default = DecaySettings()
    assert [key for key in vars(default) if getattr(stock, key) == getattr(default, key)] == [
        *(key for key in vars(default) if key in left_out),
        "optim",
    ]
    assert settings_of(_args(tmp_path, optim="sgd")) is None


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"p_norm": 0.5, "lambda_p": 0.1}, {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 3}),
        ({"target_sparsity": 0.8, "p_norm_begin": 1.5, "sparsity_logging": "layer"}, {"max_grad_norm": 0.5}),
        ({"p_norm": 0.5, "lambda_p": 0.1}, {"optim_target_modules": r".*mlp\.c_fc"}),
    ],
)
def test_a_stock_trainer_ends_where_ours_does(
    settings: dict[str, Any], options: dict[str, Any], tokens: Any, tmp_path: Path
) -> None:
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    _train(PDecayTrainingArguments(str(ours), **RUN, **settings, **options), tokens, cls=PDecayTrainer)
    hf_pdecay.register()
    try:
        text = ",".join(f"{key}={value}" for key, value in settings.items())
        trainer = _train(_args(stock, text, **options), tokens)
    finally:
        hf_pdecay.unregister()
    assert isinstance(trainer, PDecayTrainerMixin) and type(trainer).__name__ == "Trainer"
    assert _same_weights(ours, stock)
    for name in ("sparsity.json", "sparsity.jsonl", "config.json"):
        assert (ours / name).read_text() == (stock / name).read_text()
    assert {file.name for file in ours.iterdir()} == {file.name for file in stock.iterdir()}
    assert SparsityReport.load(stock / "sparsity.json").sparsity > 0
    card = (stock / "README.md").read_text(encoding="utf-8")
    assert "- hf-pdecay\n" in card and "- p_norm: " in card and "adamw_lp with betas" in card


def test_a_resumed_run_ends_with_the_same_bits(registered: None, tokens: Any, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 6}  # an epoch: amid one transformers 4.57 loses the random state
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        _train(_args(folder, "target_sparsity=0.6", **options), tokens)
    assert SparsityReport.load(whole / "checkpoint-12" / "sparsity.json").sparsity > 0
    (cut / "checkpoint-20" / "optimizer.pt").write_bytes(b"cut short")
    (cut / "checkpoint-18" / "trainer_state.json").unlink()
    trainer = _train(_args(cut, "target_sparsity=0.6", **options), tokens, resume_from_checkpoint=True)
    assert trainer.state.global_step == 20
    assert _same_weights(whole, cut)
    for name in ("sparsity.json", "sparsity.jsonl"):
        assert (whole / name).read_text() == (cut / name).read_text()


def test_another_optimizer_is_left_alone(tokens: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    stock = _train(_args(left, optim="adamw_torch"), tokens)
    hf_pdecay.register(remind=True)
    try:
        with caplog.at_level(logging.WARNING, logger="hf_pdecay"):
            trainer = _train(_args(right, optim="adamw_torch"), tokens)
            Trainer(model=tiny_gpt2(), args=_args(right, optim="sgd"))
    finally:
        hf_pdecay.unregister()
    assert type(trainer) is Trainer
    assert [type(callback) for callback in trainer.callback_handler.callbacks] == [
        type(callback) for callback in stock.callback_handler.callbacks
    ]
    assert _same_weights(left, right)
    assert {file.name for file in left.iterdir()} == {file.name for file in right.iterdir()}
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hf_pdecay")]
    assert said == [
        "hf_pdecay is registered and not in use, as optim='adamw_torch': nothing decays by p norm. "
        "Give --optim adamw_lp."
    ]


def test_a_trainer_made_before_and_one_made_in_between(tokens: Any, tmp_path: Path) -> None:
    before = Trainer(model=tiny_gpt2(), args=_args(tmp_path / "before", optim="adamw_torch"), train_dataset=tokens)
    hf_pdecay.register()
    between = Trainer(model=tiny_gpt2(), args=_args(tmp_path / "between", "lambda_p=0.1"), train_dataset=tokens)
    before.train()
    assert type(before) is Trainer and not (tmp_path / "before" / "sparsity.json").exists()
    # It has no callbacks of ours, so it must not seem to work.
    late = Trainer(model=tiny_gpt2(), args=_args(tmp_path / "late", optim="adamw_torch"), train_dataset=tokens)
    late.args.set_optimizer("adamw_lp")
    with pytest.raises(ValueError, match="cannot instantiate unsupported optimizer"):
        late.train()
    hf_pdecay.unregister()
    between.train()
    between.save_model()
    assert type(between.optimizer.optimizer) is AdamWLp
    assert SparsityReport.load(tmp_path / "between" / "sparsity.json").sparsity > 0


class _Own(Seq2SeqTrainer):
    """A subclass with methods of its own, and what they need made after Trainer.__init__."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
        return loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        assert self.losses is not None
        return super().get_decay_parameter_names(model)


def test_a_subclass_of_ones_own(registered: None, tokens: Any, tmp_path: Path) -> None:
    args = Seq2SeqTrainingArguments(str(tmp_path / "out"), **RUN, optim="adamw_lp", optim_args="target_sparsity=0.5")
    trainer = _Own(model=build("t5"), args=args, train_dataset=tokens)
    trainer.train()
    trainer.save_model()
    assert isinstance(trainer, _Own) and len(trainer.losses) == 20
    assert (type(trainer).__module__, type(trainer).__qualname__) == (_Own.__module__, "_Own")
    assert SparsityReport.load(tmp_path / "out" / "sparsity.json").sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (["attn"], lambda name: ".attn." in name),
        (["c_fc", r".*\.1\.attn\.c_proj"], lambda name: ".c_fc." in name or "1.attn.c_proj" in name),
        (r".*\.h\.0\..*", lambda name: ".h.0." in name),
        ("all-linear", lambda name: True),
        ("all_linear", lambda name: True),
    ],
)
def test_target_modules(
    targets: Any, chosen: Callable[[str], bool], ours: bool, registered: None, tmp_path: Path
) -> None:
    model = tiny_gpt2()
    options = {**RUN, "weight_decay": 0.1, "optim_target_modules": targets}
    args = PDecayTrainingArguments(str(tmp_path), **options) if ours else _args(tmp_path, **options)
    optimizer = Trainer(model=model, args=args).create_optimizer()
    names = {id(param): name for name, param in model.named_parameters()}
    for group in optimizer.param_groups:
        for param in group["params"]:
            name = names.pop(id(param))
            matrix = name.startswith("transformer.h.") and param.ndim == 2
            assert group["decayed"] == (matrix and chosen(name)) == (group["lambda_p"] > 0)
            assert group["weight_decay"] == (0.1 if matrix or "wte" in name or "wpe" in name else 0)
    assert not names


def test_rules_bring_in_what_target_modules_leave_out(registered: None, tmp_path: Path) -> None:
    (tmp_path / "rules.json").write_text('{"wte": {"lambda_p": 0.5}}')
    args = _args(tmp_path, f"lp_rules={tmp_path / 'rules.json'}", optim_target_modules=["attn"])
    groups = Trainer(model=tiny_gpt2(), args=args).create_optimizer().param_groups
    assert [(group["rule"], group["decayed"], len(group["params"])) for group in groups] == [
        ("wte", True, 1),
        ("default", True, 4),
        ("not in optim_target_modules", False, 4),
        ("not decayed", False, 19),
    ]


@pytest.mark.usefixtures("registered")
class TestBadInput:
    @pytest.mark.parametrize(
        ("optim_args", "message"),
        [
            ("p_nrom=0.8", "key 'p_nrom' in optim_args='p_nrom=0.8' is not known; did you mean 'p_norm'"),
            ("target=0.8,zzz=1", "key 'target' .* did you mean 'target_sparsity'"),
            ("zzz=1", "key 'zzz' .* known keys are target_sparsity, sparsity_begin"),
            ("target_modules=attn", "key 'target_modules'"),
            ("p_norm=much", "Invalid p_norm: p_norm='much'; it must be a number"),
            ("p_norm=none", "p_norm='none'; it must be a number"),
            ("keep_zeros=maybe", "keep_zeros='maybe'; it must be true or false"),
            ("p_norm", "'p_norm' in optim_args='p_norm' is not KEY=VALUE"),
            ("p_norm=", "'p_norm=' in optim_args='p_norm=' is not KEY=VALUE"),
            ("p_norm=1,p_norm=2", "has 'p_norm' twice"),
            ("p_norm=0", "p_norm=0.0; it must be a finite number above 0"),
            ("p_norm=nan", "p_norm=nan"),
            ("lambda_p=-1", "lambda_p=-1.0"),
            ("target_sparsity=90", "target_sparsity=90.0; it must be at least 0 and below 1"),
            ("target_sparsity=0.5,p_norm=2", "p_norm=2 with a target_sparsity"),
            ("sparsity_begin=0.8", "sparsity_begin=0.8"),
            ("sparsity_schedule=fast", "sparsity_schedule='fast'"),
            ("backend=fast", "backend='fast'"),
            ("moments=4bit", "moments='4bit'"),
            ('lp_rules={"attn":"off"}', "must be the path of a JSON file"),
            ("lp_rules=nowhere.json", "cannot read the file 'nowhere.json'"),
            ("target_sparsity=0.9,sparsity_begin=0.1,sparsity_end=0.2", "of 20 steps only"),
        ],
    )
    def test_optim_args(self, optim_args: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            Trainer(model=tiny_gpt2(), args=_args(tmp_path, optim_args))

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (["atn"], r"optim_target_modules=\['atn'\] matches no module .* named like: transformer.h.0.attn"),
            ("attn", "optim_target_modules='attn' matches no module"),
            (["wte"], "matches no module whose weights decay"),
            ([], r"optim_target_modules=\[\] matches no module"),
            ("(", r"optim_target_modules='\(' is not a regular expression"),
            ([1], r"optim_target_modules=\[1\]; it must be a list of strings"),
        ],
    )
    def test_target_modules(self, targets: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            Trainer(model=tiny_gpt2(), args=_args(tmp_path, optim_target_modules=targets))

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="output_dir=.* cannot be written to"):
            Trainer(model=tiny_gpt2(), args=_args(tmp_path / "file" / "out"))

    def test_an_optimizer_that_is_given_wins_and_it_is_said(
        self, tokens: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = tiny_gpt2()
        optimizers = torch.optim.SGD(model.parameters(), lr=0.1), None
        args = _args(tmp_path, max_steps=1)
        with caplog.at_level(logging.WARNING, logger="hf_pdecay"):
            Trainer(model=model, args=args, train_dataset=tokens, optimizers=optimizers).train()
        assert "optim='adamw_lp' is not in use: the Trainer was given a SGD" in caplog.text


class TestATransformersThatMoved:
    def test_a_method(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(Trainer, "_save_rng_state")
        with pytest.raises(
            RuntimeError, match=rf"transformers {transformers.__version__}: .*_save_rng_state is missing"
        ):
            hf_pdecay.register()
        assert "adamw_lp" not in [name.value for name in OptimizerNames]

    @pytest.mark.parametrize("moved", [None, Enum("Names", {"SGD": 1})])
    def test_the_enum(self, moved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hf_arguments, "OptimizerNames", moved)
        with pytest.raises(RuntimeError, match="OptimizerNames is not an enum of strings"):
            hf_pdecay.register()

    def test_another_librarys_hook_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Trainer, "__init__", Trainer.__init__)  # which puts it back at the end
        hf_pdecay.register()
        ours, made = Trainer.__init__, []

        def around(self: Any, *args: Any, **kwargs: Any) -> None:
            made.append(self)
            ours(self, *args, **kwargs)

        Trainer.__init__ = around  # type: ignore[method-assign]
        hf_pdecay.unregister()
        trainer = Trainer(model=tiny_gpt2(), args=_args(tmp_path, optim="sgd"))
        assert made == [trainer] and type(trainer) is Trainer
