"""Trainers that others wrote, by flag: their signatures, their optimizers, and runs that only evaluate."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from ..helpers.models import build, tiny_gpt2


RUN = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 5e-3, "logging_steps": 10}


def arguments(folder: Path, optim_args: str = "target_sparsity=0.5", **options: Any) -> TrainingArguments:
    settings = {**RUN, "max_steps": 20, "save_strategy": "no", "optim": "adamw_lp", **options}
    return TrainingArguments(str(folder), optim_args=optim_args, **settings)


class Bare(Trainer):
    """Takes less than the Trainer does, as many do."""

    def train(self) -> Any:
        return super().train()

    def save_model(self, output_dir: str | None = None) -> None:
        super().save_model(output_dir)


class Named(Trainer):
    def train(self, resume: bool = False, **kwargs: Any) -> Any:
        assert resume
        return super().train(**kwargs)


class Layered(Trainer):
    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        raise AssertionError("never asked")


def test_a_train_and_a_save_model_of_their_own_get_what_was_given(
    registered: None, tokens: Any, tmp_path: Path
) -> None:
    bare = Bare(model=tiny_gpt2(), args=arguments(tmp_path / "bare"), train_dataset=tokens)
    bare.train()
    bare.save_model(str(tmp_path / "saved"))
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    decayed = [weight for name, weight in weights.items() if ".c_" in name and weight.dim() == 2]
    assert sum(int((weight == 0).sum()) for weight in decayed) == sum(weight.numel() for weight in decayed) // 2
    named = Named(model=tiny_gpt2(), args=arguments(tmp_path / "named"), train_dataset=tokens)
    named.train(resume=True)
    assert named.state.global_step == 20


def test_an_optimizer_of_their_own_is_not_left_out_in_silence(
    registered: None, tokens: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Layered(model=tiny_gpt2(), args=arguments(tmp_path), train_dataset=tokens)
    with caplog.at_level(logging.WARNING, logger="hf_pdecay"):
        trainer.train()
    assert "Layered.create_optimizer is not asked" in caplog.text


def test_what_only_evaluates_need_not_train(registered: None, tokens: Any, tmp_path: Path) -> None:
    frozen = tiny_gpt2().requires_grad_(False)
    trainer = Trainer(model=frozen, args=arguments(tmp_path, max_steps=1), eval_dataset=tokens)
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="no trainable parameter"):
        Trainer(model=frozen, args=arguments(tmp_path), train_dataset=tokens)


def test_a_target_for_nothing_is_refused(registered: None, tokens: Any, tmp_path: Path) -> None:
    model = build("llama").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match="target_sparsity=0.5, and nothing that is trained decays"):
        Trainer(model=model, args=arguments(tmp_path), train_dataset=tokens)


@pytest.mark.parametrize(
    ("optim", "name", "value"),
    [("sgd_lp", "weight_decay", -1.0), ("muon_lp", "weight_decay", float("nan")), ("adamw_lp", "learning_rate", -1.0)],
)
def test_values_of_their_arguments_are_checked_under_their_names(
    optim: str, name: str, value: float, registered: None, tokens: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"Invalid {name}: {name}={value}; it must be a finite number of at least 0"):
        Trainer(model=tiny_gpt2(), args=arguments(tmp_path, optim=optim, **{name: value}), train_dataset=tokens)


def vit() -> nn.Module:
    return build("vit")


def neox() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**shape, vocab_size=64, max_position_embeddings=32))


@pytest.mark.parametrize("make", [vit, neox])
def test_models_whose_files_have_other_names_resume_and_end_with_the_best(
    make: Any, registered: None, tokens: Any, tmp_path: Path
) -> None:
    if make is vit:
        config = make().config
        generator = torch.Generator().manual_seed(0)
        size = (config.num_channels, config.image_size, config.image_size)
        data = [{"pixel_values": torch.randn(size, generator=generator), "labels": number % 2} for number in range(48)]
    else:
        data = tokens
    options = {"max_steps": 24, "save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 6}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "per_device_train_batch_size": 8}
    states = {}
    for name in ("whole", "cut"):
        args = arguments(tmp_path / name, **options)
        trainer = Trainer(model=make(), args=args, train_dataset=data, eval_dataset=data[:8] if make is vit else data)
        trainer.train()
        best = trainer.state.best_model_checkpoint
        assert best is not None
        same = type(trainer.model).from_pretrained(best).state_dict()
        assert all(torch.equal(tensor, same[key]) for key, tensor in trainer.model.state_dict().items())
        if name == "cut":
            # After sparsity_end, from where no cut makes zeros any more.
            for step in (24,):
                (Path(args.output_dir) / f"checkpoint-{step}" / "trainer_state.json").unlink()
            torch.manual_seed(9)
            trainer = Trainer(
                model=make(), args=args, train_dataset=data, eval_dataset=data[:8] if make is vit else data
            )
            nn.init.normal_(next(iter(trainer.model.parameters())))
            trainer.train(resume_from_checkpoint=True)
        last = type(trainer.model).from_pretrained(tmp_path / name / "checkpoint-24")
        states[name] = last.state_dict()
    assert all(torch.equal(states["cut"][key], tensor) for key, tensor in states["whole"].items())
    zeros = [
        tensor for key, tensor in states["cut"].items() if tensor.dim() == 2 and "layer" in key and "norm" not in key
    ]
    assert sum(int((tensor == 0).sum()) for tensor in zeros) >= sum(tensor.numel() for tensor in zeros) * 0.45
