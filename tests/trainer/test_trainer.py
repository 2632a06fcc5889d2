from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType

from hf_pdecay import AdamWLp, PDecayTrainer, PDecayTrainerMixin, SparsityReport, measure_sparsity
from hf_pdecay.layers.matrices import decayable_parameter_names

from ..helpers.models import build, tiny_gpt2


adamw_lp = sys.modules["hf_pdecay.optim.adamw_lp"]

MakeArgs = Callable[..., Any]


def _train(args: Any, data: Any, model: nn.Module | None = None, cls: type = PDecayTrainer, **kwargs: Any) -> Any:
    trainer = cls(model=model or tiny_gpt2(), args=args, train_dataset=data, eval_dataset=data, **kwargs)
    trainer.train()
    return trainer


def _weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in trainer.model.named_parameters()}


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _zeros(folder: Path) -> float:
    """Fraction of exact zeros in the matrices of a saved GPT-2, counted from the file."""
    saved = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if tensor.ndim == 2}
    matrices = [tensor for name, tensor in saved.items() if "wte" not in name and "wpe" not in name]
    assert len(matrices) == 8
    return sum(int((matrix == 0).sum()) for matrix in matrices) / sum(matrix.numel() for matrix in matrices)


def test_the_main_job(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    trainer = _train(make_args(max_steps=20), tokens)
    trainer.save_model()
    folder = tmp_path / "out"
    assert {"config.json", "model.safetensors", "README.md"} <= {file.name for file in folder.iterdir()}
    assert {"sparsity.json", "sparsity.jsonl", "sparsity.png"} <= {file.name for file in folder.iterdir()}
    sparsity = _zeros(folder)
    assert 0.2 < sparsity < 1
    assert SparsityReport.load(folder / "sparsity.json").sparsity == sparsity
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert measure_sparsity(again).sparsity == sparsity
    assert _same(dict(again.named_parameters()), _weights(trainer))
    tiny_gpt2().save_pretrained(tmp_path / "plain")
    ours, plain = (set((place / "config.json").read_text().split()) for place in (folder, tmp_path / "plain"))
    assert {word for word in ours ^ plain if "cache" not in word} <= {"true,", "false,"}


def test_groups_follow_the_arguments(make_args: MakeArgs, tokens: Any) -> None:
    args = make_args(weight_decay=0.1, keep_zeros=True, lp_rules={"attn": {"lambda_p": 0.7}}, adam_beta2=0.95)
    trainer = PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=tokens)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is AdamWLp
    names = {id(param): name for name, param in trainer.model.named_parameters()}
    decay_names = trainer.get_decay_parameter_names(trainer.model)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.9, 0.95), 1e-8)
        for param in group["params"]:
            name = names[id(param)]
            decayed = name in decayable_parameter_names(trainer.model)
            assert group["decayed"] == group["keep_zeros"] == decayed
            assert group["lambda_p"] == (0.0 if not decayed else 0.7 if "attn" in name else 0.1)
            # weight_decay keeps its meaning: HF's choice of parameters.
            assert group["weight_decay"] == (0.1 if name in decay_names else 0.0)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_another_optimizer_gives_hfs_trainer(optim: str, make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    ours = _train(make_args(optim=optim), tokens)
    ours.save_model()
    known = {field: getattr(ours.args, field) for field in ("max_steps", "logging_steps", "learning_rate")}
    stock_args = TrainingArguments(
        str(tmp_path / "stock"), optim=optim, use_cpu=True, report_to="none", save_strategy="no", **known
    )
    stock = _train(stock_args, tokens, cls=Trainer)
    stock.save_model()
    assert _same(_weights(ours), _weights(stock))
    assert type(ours.optimizer.optimizer) is type(stock.optimizer.optimizer)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        file.name for file in (tmp_path / "stock").iterdir()
    }


def test_lambda_zero_gives_hfs_adamw_to_the_bit(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    ours = _train(make_args(lambda_p=0.0, weight_decay=0.1), tokens)
    args = make_args(optim="adamw_torch", weight_decay=0.1, output_dir=str(tmp_path / "stock"))
    assert _same(_weights(ours), _weights(_train(args, tokens, cls=Trainer)))


@pytest.mark.parametrize(
    "features",
    [
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.01},
        {"bf16": True},
        # On a CPU without HF's scaler; test_adamw_lp_contract.py steps under a real one.
        {"fp16": True},
        {"label_smoothing_factor": 0.1},
        {"gradient_checkpointing": True},
        {"weight_decay": 0.1},
        {"dataloader_drop_last": True, "num_train_epochs": 1, "max_steps": -1},
    ],
    ids=lambda features: next(iter(features)),
)
def test_features_of_the_trainer(features: dict[str, Any], make_args: MakeArgs, tokens: Any) -> None:
    trainer = _train(make_args(lambda_p=0.5, **features), tokens)
    assert 0 < trainer.measure_sparsity().sparsity < 1
    assert all(torch.isfinite(param).all() for param in trainer.model.parameters())


def test_group_by_length(make_args: MakeArgs) -> None:
    from datasets import Dataset
    from transformers import DataCollatorWithPadding

    lengths = [3 + 5 * (number % 3) for number in range(24)]
    rows = [[1 + number % 60 for number in range(length)] for length in lengths]
    data = Dataset.from_dict({"input_ids": rows, "labels": [0] * len(rows)})

    class Pad(DataCollatorWithPadding):
        def __init__(self) -> None:
            pass

        def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
            width = max(len(feature["input_ids"]) for feature in features)
            ids = torch.tensor(
                [feature["input_ids"] + [0] * (width - len(feature["input_ids"])) for feature in features]
            )
            return {"input_ids": ids, "labels": ids}

    import transformers

    # The flag was renamed in transformers 5.
    flag = (
        {"train_sampling_strategy": "group_by_length"}
        if int(transformers.__version__.split(".")[0]) >= 5
        else {"group_by_length": True}
    )
    trainer = _train(make_args(lambda_p=0.5, **flag), data, data_collator=Pad())
    assert 0 < trainer.measure_sparsity().sparsity < 1


@pytest.mark.parametrize("name", [name.value for name in SchedulerType])
def test_every_scheduler(name: str, make_args: MakeArgs, tokens: Any) -> None:
    kwargs: dict[str, Any] = {"lr_scheduler_type": name, "warmup_steps": 2}
    if name == "cosine_with_min_lr" or name == "cosine_warmup_with_min_lr":
        kwargs["lr_scheduler_kwargs"] = {"min_lr": 1e-4}
    if name == "warmup_stable_decay":
        kwargs["lr_scheduler_kwargs"] = {"num_decay_steps": 2}
    if name in ("reduce_lr_on_plateau", "greedy"):
        kwargs |= {"eval_strategy": "steps", "eval_steps": 4}
    trainer = _train(make_args(max_steps=10, lambda_p=0.5, **kwargs), tokens)
    assert 0 < trainer.measure_sparsity().sparsity < 1
    assert all(torch.isfinite(param).all() for param in trainer.model.parameters())


def test_the_first_step_of_a_warmup_decays_nothing(make_args: MakeArgs, tokens: Any) -> None:
    before = {name: param.detach().clone() for name, param in tiny_gpt2().named_parameters()}
    trainer = _train(make_args(max_steps=1, warmup_steps=4, lambda_p=10.0), tokens)
    assert _same(_weights(trainer), before)


def test_best_model_and_early_stopping(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    args = make_args(
        max_steps=40,
        lambda_p=2.0,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
    )
    trainer = _train(args, tokens, callbacks=[EarlyStoppingCallback(early_stopping_patience=1)])
    trainer.save_model()
    best = Path(trainer.state.best_model_checkpoint)
    # The report at the end is of the model that was loaded back, not of the last step.
    assert SparsityReport.load(tmp_path / "out" / "sparsity.json").sparsity == _zeros(best) == _zeros(tmp_path / "out")
    assert SparsityReport.load(best / "sparsity.json").sparsity == _zeros(best)


def test_keep_zeros_fine_tunes_a_sparse_model(make_args: MakeArgs, tokens: Any) -> None:
    model = tiny_gpt2()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name in decayable_parameter_names(model):
                param[torch.rand(param.shape, generator=generator) < 0.7] = 0
    before = {name: param == 0 for name, param in model.named_parameters() if name in decayable_parameter_names(model)}
    trainer = _train(make_args(keep_zeros=True, lambda_p=0.0, weight_decay=0.1), tokens, model=model)
    for name, param in trainer.model.named_parameters():
        if name in before:
            assert torch.equal(param == 0, before[name])


class _Poisoned(PDecayTrainer):
    """Makes the gradients of one step NaN."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == 2:
            next(self.model.parameters()).grad.fill_(float("nan"))
        return loss


def test_nan_gradients_are_skipped_and_counted(make_args: MakeArgs, tokens: Any) -> None:
    trainer = _train(make_args(), tokens, cls=_Poisoned)
    assert all(torch.isfinite(param).all() for param in trainer.model.parameters())
    assert trainer.optimizer.optimizer.skipped_steps == 1
    assert trainer.state.log_history[-2]["skipped_steps"] == 1
    trainer = _train(make_args(skip_nonfinite=False), tokens, cls=_Poisoned)
    assert not all(torch.isfinite(param).all() for param in trainer.model.parameters())


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_the_norm_that_clips_saves_the_look_at_the_gradients(
    max_grad_norm: float, make_args: MakeArgs, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    look = adamw_lp.all_finite
    monkeypatch.setattr(adamw_lp, "all_finite", lambda parts: looks.append(len(parts)) or look(parts))
    trainer = PDecayTrainer(
        model=tiny_gpt2(), args=make_args(max_grad_norm=max_grad_norm, max_steps=3), train_dataset=tokens
    )
    trainer.train()
    clips = max_grad_norm > 0 or version.parse(transformers.__version__).major >= 5  # which takes the norm for the log
    assert len(looks) == (0 if clips else 3)


class _ChangesGradients(TrainerCallback):
    """Makes a gradient NaN between clipping and the third step."""

    def __init__(self, how: str) -> None:
        self._how = how

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        param = model.transformer.h[0].mlp.c_fc.weight
        if state.global_step != 2:
            return
        if self._how == "replaced":
            param.grad = torch.full_like(param, float("nan"))
        else:
            grad = {"data": param.grad.data, "in place": param.grad}[self._how]
            grad[0, 0] = float("nan")


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.0}, {}, {"gradient_accumulation_steps": 2, "optim": "sgd_lp"}])
@pytest.mark.parametrize("how", ["in place", "data", "replaced"])
def test_a_gradient_that_a_callback_makes_nan_after_clipping(
    how: str, options: dict[str, Any], make_args: MakeArgs, tokens: Any
) -> None:
    trainer = PDecayTrainer(
        model=tiny_gpt2(),
        args=make_args(max_steps=5, **options),
        train_dataset=tokens,
        callbacks=[_ChangesGradients(how)],
    )
    trainer.train()
    assert trainer.optimizer.optimizer.skipped_steps == 1
    assert all(param.isfinite().all() for param in trainer.model.parameters())


class _LossParams(Trainer):
    """Trains a parameter that is not the model's, as losses of sentence-transformers have, to NaN gradients once."""

    of_loss: nn.Parameter

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        both = list(self.model.parameters()), [self.of_loss]
        return cls, {**kwargs, "optimizer_dict": [{"params": params, "weight_decay": 0.0} for params in both]}

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.of_loss.grad = torch.full_like(self.of_loss, float("nan") if self.state.global_step == 2 else 1.0)
        return loss


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_nan_gradients_that_no_norm_is_taken_of(max_grad_norm: float, make_args: MakeArgs, tokens: Any) -> None:
    class Mine(PDecayTrainerMixin, _LossParams):
        of_loss = nn.Parameter(torch.ones(4))

    trainer = _train(make_args(max_grad_norm=max_grad_norm), tokens, cls=Mine)
    assert trainer.optimizer.optimizer.skipped_steps == 1
    assert torch.isfinite(Mine.of_loss).all() and not torch.equal(Mine.of_loss, torch.ones(4))


def test_a_model_that_is_made_anew_leaves_nothing_of_the_one_before(make_args: MakeArgs, tokens: Any) -> None:
    def model() -> nn.Module:
        return tiny_gpt2()

    trainer = PDecayTrainer(model_init=model, args=make_args(max_steps=2), train_dataset=tokens)
    trainer.train()
    before = weakref.ref(trainer.optimizer.optimizer)
    trainer.train()
    gc.collect()
    assert before() is None
    assert trainer.optimizer.optimizer.grad_norm is None


@pytest.mark.parametrize(
    ("optim_args", "dtype", "backend"),
    [
        ("backend=foreach, moments=bfloat16", torch.bfloat16, "foreach"),
        ("backend=compiled", torch.float32, "compiled"),
        ("moments=float32", torch.float32, "foreach"),  # too few weights to compile for
    ],
)
def test_optim_args_choose_how_the_step_is_computed(
    optim_args: str,
    dtype: torch.dtype,
    backend: str,
    make_args: MakeArgs,
    tokens: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = PDecayTrainer(model=tiny_gpt2(), args=make_args(optim_args=optim_args, max_steps=2), train_dataset=tokens)
    trainer.train()
    state = next(iter(trainer.optimizer.state.values()))
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
    assert f"Step on cpu: {backend}, as" in capsys.readouterr().out


def test_the_mixin_goes_before_any_trainer(make_args: MakeArgs, tokens: Any) -> None:
    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.seen = True
            return super().compute_loss(*args, **kwargs)

    class SparseOwn(PDecayTrainerMixin, Own):
        pass

    trainer = _train(make_args(), tokens, cls=SparseOwn)
    assert trainer.seen
    assert type(trainer.optimizer.optimizer) is AdamWLp


class _Plain(nn.Module):
    """No Hugging Face model: no config, no save_pretrained."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 64), nn.ReLU(), nn.Linear(64, 3)
        )

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("settings", [{"target_sparsity": 0.8, "max_steps": 40}, {"max_steps": 10}])
def test_a_plain_module(settings: dict[str, Any], make_args: MakeArgs, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(1, 8, 8, generator=generator), "labels": n % 3} for n in range(40)]
    trainer = _train(make_args(**settings), data, model=_Plain())
    trainer.save_model()
    saved = {
        name: tensor for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items() if tensor.ndim > 1
    }
    zeros = sum(int((tensor == 0).sum()) for tensor in saved.values()) / sum(
        tensor.numel() for tensor in saved.values()
    )
    assert SparsityReport.load(tmp_path / "out" / "sparsity.json").sparsity == zeros > 0
    assert "target_sparsity" not in settings or zeros == pytest.approx(0.8, abs=1e-3)
    assert f"{zeros:.2%}" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_nothing_else_is_overridden() -> None:
    overrides = {name for name in vars(PDecayTrainerMixin) if callable(getattr(Trainer, name, None))}
    assert overrides - {"__init__", "__doc__", "__dict__", "__weakref__"} <= {
        "train",  # which checkpoint to go on from
        "_load_from_checkpoint",  # models whose files have other names, which the Trainer does not find
        "_load_best_model",
        "create_optimizer",
        "save_model",
        "_save",  # tied weights, which FSDP2 would save twice
        "_save_rng_state",  # the processes wait for each other, so that trainer_state.json is written last of all
        "create_model_card",
        "hyperparameter_search",  # each trial has a folder of its own
        "_hp_search_setup",
        "_get_output_dir",
    }


def test_an_optimizer_that_is_passed_in_stays(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    model = tiny_gpt2()
    optimizer = AdamWLp(model.parameters(), lr=1e-3, p_norm=0.7, lambda_p=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = _train(make_args(), tokens, model=model, optimizers=(optimizer, scheduler))
    assert trainer.optimizer.optimizer is optimizer
    trainer.save_model()
    report = SparsityReport.load(tmp_path / "out" / "sparsity.json")
    parameters = list(model.parameters())
    assert report.decayed.tensors == len(parameters)  # that optimizer decays them all
    assert report.decayed.zeros == sum(int((param == 0).sum()) for param in parameters)


class TestBadInput:
    @pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
    def test_gradients_that_will_be_sparse(self, kind: Any, make_args: MakeArgs, tokens: Any) -> None:
        model = nn.Sequential(nn.ModuleDict({"words": kind(8, 4, sparse=True)}), nn.Linear(4, 4))
        with pytest.raises(ValueError, match=r"optim='adamw_lp' takes no sparse gradients, and 0\.words is made with"):
            PDecayTrainer(model=model, args=make_args(), train_dataset=tokens)
        model[0]["words"].weight.requires_grad_(False)
        PDecayTrainer(model=model, args=make_args(), train_dataset=tokens)

    def test_rules_that_match_nothing(self, make_args: MakeArgs, tokens: Any) -> None:
        with pytest.raises(ValueError, match="lp_rules: the pattern 'c_att_n' matches no trainable parameter"):
            PDecayTrainer(model=tiny_gpt2(), args=make_args(lp_rules={"c_att_n": "off"}), train_dataset=tokens)

    def test_output_dir_below_a_file(self, make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="output_dir=.* cannot be written to .*Not a directory"):
            PDecayTrainer(
                model=tiny_gpt2(), args=make_args(output_dir=str(tmp_path / "file" / "out")), train_dataset=tokens
            )

    def test_output_dir_that_takes_no_file(
        self, make_args: MakeArgs, tokens: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # A superuser may write anywhere, so the refusal itself is made up here.
        def refuse(**_: Any) -> None:
            raise PermissionError("Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        with pytest.raises(OSError, match="output_dir=.* cannot be written to .*Permission denied"):
            PDecayTrainer(model=tiny_gpt2(), args=make_args(), train_dataset=tokens)

    def test_checkpoint_of_another_model(self, make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
        tiny_gpt2(n_embd=16).save_pretrained(tmp_path / "other")
        args = make_args(resume_from_checkpoint=str(tmp_path / "other"))
        with pytest.raises(
            ValueError, match=r"resume_from_checkpoint: .* another model: .*\[48\] there and \[96\] here"
        ):
            PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=tokens)
        build("bert").save_pretrained(tmp_path / "bert")
        args = make_args(resume_from_checkpoint=str(tmp_path / "bert"))
        with pytest.raises(ValueError, match="another model: it holds bert.* and no tensor of the name of any here"):
            PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=tokens)

    def test_checkpoint_of_other_rules(self, make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
        _train(make_args(save_strategy="steps", save_steps=4), tokens)
        folder = str(tmp_path / "out" / "checkpoint-4")
        PDecayTrainer(model=tiny_gpt2(), args=make_args(resume_from_checkpoint=folder), train_dataset=tokens)
        args = make_args(resume_from_checkpoint=folder, lp_rules={"attn": "off"})
        with pytest.raises(ValueError, match="resume_from_checkpoint: the optimizer in .* lp_rules"):
            PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=tokens)
