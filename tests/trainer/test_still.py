from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
)

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments


def _train(model: Any, out: Path, **options: Any) -> PDecayTrainer:
    callbacks = options.pop("callbacks", None)
    trainer_class = options.pop("trainer_class", PDecayTrainer)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, 60, (64, 16))]
    options = {"max_steps": 60, "target_sparsity": 0.5, "learning_rate": 1e-3, "logging_steps": 20, **options}
    args = PDecayTrainingArguments(
        str(out), report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, **options
    )
    trainer: PDecayTrainer = trainer_class(model=model, args=args, train_dataset=data, callbacks=callbacks)
    trainer.train()
    return trainer


def _zeros(model: Any, part: str) -> float:
    some = [
        param for name, param in model.named_parameters() if part in name and param.dim() > 1 and "embed" not in name
    ]
    return sum(int((param == 0).sum()) for param in some) / sum(param.numel() for param in some)


def _small(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **more}


def test_a_vision_language_model_on_text_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=_small(model_type="clip_vision_model", image_size=32, patch_size=8),
        text_config=_small(model_type="llama", num_key_value_heads=2, vocab_size=64),
        image_token_index=63,
    )
    model = LlavaForConditionalGeneration(config)
    with caplog.at_level(logging.WARNING):
        trainer = _train(model, tmp_path)
    assert _zeros(model, "vision_tower") == _zeros(model, "multi_modal_projector") == 0
    assert _zeros(model, "language_model") == pytest.approx(0.5, abs=1e-4)
    told = [record.getMessage() for record in caplog.records if "leaves alone" in record.getMessage()]
    assert len(told) == 1 and "24,576 of the 43,008 weights that decay" in told[0] and "vision_tower" in told[0]
    trainer.save_model()
    report = json.loads((tmp_path / "sparsity.json").read_text())
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-4) and report["still"] == 24_576
    card = (tmp_path / "README.md").read_text()
    assert "24,576 weights had no gradient or were frozen" in card and "not reached" not in card


def test_an_expert_to_which_no_token_is_routed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**_small(num_key_value_heads=2, vocab_size=64), num_local_experts=4))
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            # Two of four experts per token: the last one never is.
            module.register_forward_hook(_never_the_last)
    # transformers 5 stacks the experts in one parameter, transformers 4 has a module for each.
    experts = {name: param for name, param in model.named_parameters() if ".experts." in name}
    before = {name: param.detach().clone() for name, param in experts.items()}
    _train(model, tmp_path)
    for name, param in experts.items():
        stacked = param.dim() == 3
        if stacked or ".experts.3." in name:
            assert torch.equal(param[3] if stacked else param, before[name][3] if stacked else before[name])
        if stacked or ".experts.3." not in name:
            assert ((param[:3] if stacked else param) == 0).any()


def _never_the_last(gate: Any, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        logits, weights, chosen = output
        return logits, weights, torch.where(chosen == 3, 0, chosen)
    return output.index_fill(-1, torch.tensor([3]), -1e9)


class _Freeze(TrainerCallback):
    def __init__(self, part: str) -> None:
        self.part, self.kept = part, {}  # type: ignore[var-annotated]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 30:
            for name, param in kwargs["model"].named_parameters():
                if self.part in name:
                    param.requires_grad_(False)
                    self.kept[name] = param.detach().clone()


@pytest.mark.parametrize("rules", [None, {"mlp": {"group": "neuron"}}])
def test_layers_that_a_callback_freezes_in_mid_run(
    tmp_path: Path, rules: Any, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16))
    freeze = _Freeze("h.0.")
    with caplog.at_level(logging.WARNING):
        _train(model, tmp_path, callbacks=[freeze], lp_rules=rules)
    assert freeze.kept
    for name, kept in freeze.kept.items():
        assert torch.equal(model.get_parameter(name), kept)
    if rules is None:
        assert _zeros(model, "h.1.") == pytest.approx(0.5, abs=1e-3)
    assert "leaves alone" in caplog.text


def test_a_trainer_that_keeps_no_history_of_its_logs(tmp_path: Path) -> None:
    class Quiet(PDecayTrainer):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16))
    _train(model, tmp_path, trainer_class=Quiet)
    assert len((tmp_path / "sparsity.jsonl").read_text().splitlines()) == 3
