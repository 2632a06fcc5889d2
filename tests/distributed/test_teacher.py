"""A teacher under FSDP2: what it teaches is what it teaches one process, and each process holds a part of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from .layout_run import model
from .test_layouts import Layout, Run, run_in


pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(int(tf.__version__.partition(".")[0]) < 5, reason="a teacher takes transformers 5"),
]


def test_a_teacher_is_divided_as_the_model(tmp_path: Path) -> None:
    other = model(3)
    with torch.no_grad():
        other.lm_head.weight.mul_(20)
    other.save_pretrained(tmp_path / "llama")
    config = tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0)
    tf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    base: dict[str, Any] = {"target_sparsity": 0.5, "max_steps": 40, "logging_steps": 5, "teacher_task": 0.5}
    saved = {"save_strategy": "steps", "save_steps": 20}
    cases = [
        {"name": "self", **base, "teacher": "self", **saved},
        {"name": "named", **base, "teacher": str(tmp_path / "llama")},
        {"name": "accumulated", **base, "teacher": str(tmp_path / "llama"), "gradient_accumulation_steps": 2},
        {"name": "gpt2", **base, "teacher": str(tmp_path / "gpt2"), "teacher_temperature": 2.0},
    ]
    alone, divided = tmp_path / "alone", tmp_path / "divided"
    run_in(alone, Layout("one process", "single", 1), *cases)
    resumed = {"name": "resumed", **base, "teacher": "self", "resume": str(divided / "self" / "checkpoint-20")}
    efficient = {**cases[1], "name": "efficient", "ram_efficient": "true"}
    narrow = {**cases[1], "name": "narrow", "bf16": True, "teacher_dtype": "bfloat16"}
    run_in(divided, Layout("FSDP2 × 2", "fsdp2", 2), *cases, resumed, efficient, narrow)
    for case in cases:
        one, two = Run(alone / case["name"]), Run(divided / case["name"])
        two.check()
        assert two.found["teacher"] == pytest.approx(one.found["teacher"], rel=5e-3, abs=1e-5), case["name"]
        assert two.found["eval_loss"] == pytest.approx(one.found["eval_loss"], abs=5e-3)
        assert one.found["held"] == (1 if case["name"] != "gpt2" else 0)
        assert two.found["held"] == pytest.approx(0.5 if case["name"] != "gpt2" else 0, abs=0.02)
    assert one.found["teacher"][-1] > 0.01
    whole, again = Run(divided / "self"), Run(divided / "resumed")
    assert all((whole.weights[name] == again.weights[name]).all() for name in whole.weights)
    for name, near in (("efficient", 1e-3), ("narrow", 0.1)):
        assert Run(divided / name).found["teacher"] == pytest.approx(
            Run(divided / "named").found["teacher"], rel=near
        ), name
