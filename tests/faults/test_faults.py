"""Faults other than a kill, each in a real run: a clear end, and nothing of ours half-written."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from hf_pdecay import PDecayTrainer, SparsityReport
from hf_pdecay.files import append_line
from hf_pdecay.sparsity.history import read_history
from hf_pdecay.trainer.checkpoints import fault, newest_whole
from tests.helpers.models import tiny_gpt2


MakeArgs = Callable[..., Any]
CITATION = (resources.files("hf_pdecay") / "sparsity" / "citation.md").read_text()
MAJOR = int(importlib.metadata.version("transformers").split(".")[0])


class InOrder(PDecayTrainer):
    """Takes the data in their order: a shuffled epoch that transformers 4.57 resumes goes on with other batches."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class AtStep(TrainerCallback):
    """Calls a function once, at the end of a step."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


@contextmanager
def _files_of_at_most(size: int) -> Iterator[Callable[[], None]]:
    """Give a function from whose call on a write beyond a size fails, as on a full disk, until the block ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _ours_are_whole(out: Path) -> None:
    for file in out.rglob("sparsity.json"):
        SparsityReport.load(file)
    text = (out / "sparsity.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    assert [json.loads(line)["step"] for line in text.splitlines()] == [line["step"] for line in read_history(out)]
    for file in out.rglob("README.md"):
        assert file.read_text().endswith(CITATION)
    assert not list(out.rglob(".*.tmp"))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# The limits at which the history, the report, the weights and the optimizer's state no longer fit.
@pytest.mark.parametrize("size", [1_000, 2_000, 50_000, 150_000, 200_000])
def test_disk_full(size: int, make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4}
    whole = InOrder(model=tiny_gpt2(), args=make_args(**args, output_dir=str(tmp_path / "whole")), train_dataset=tokens)
    whole.train()
    whole.save_model()
    with _files_of_at_most(size) as limit:
        trainer = InOrder(model=tiny_gpt2(), args=make_args(**args), train_dataset=tokens, callbacks=[AtStep(5, limit)])
        with pytest.raises(Exception, match="File too large|PytorchStreamWriter|unexpected pos"):
            trainer.train()
    _ours_are_whole(out)
    assert newest_whole(out) == str(out / "checkpoint-4")
    assert not (out / "checkpoint-8").exists() or fault(out / "checkpoint-8") is not None
    again = InOrder(model=tiny_gpt2(), args=make_args(**args), train_dataset=tokens)
    again.train(resume_from_checkpoint=True)
    again.save_model()
    assert _same(_weights(tmp_path / "whole"), _weights(out))
    assert (out / "sparsity.jsonl").read_text() == (tmp_path / "whole" / "sparsity.jsonl").read_text()


def test_a_line_that_does_not_fit_leaves_the_history_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "new" / "sparsity.jsonl"
    append_line(file, {"step": 1})
    before = file.read_bytes()
    with _files_of_at_most(len(before) + 6) as limit:
        limit()
        with pytest.raises(OSError, match="too large"):
            append_line(file, {"step": 2})
    assert file.read_bytes() == before == b'{"step": 1}\n'
    append_line(file, {"step": 2})
    assert file.read_bytes() == before + b'{"step": 2}\n'


def test_the_output_folder_is_removed(
    make_args: MakeArgs, tokens: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    args = make_args(max_steps=12, save_strategy="steps", save_steps=4)
    remove = AtStep(5, lambda: shutil.rmtree(out))
    trainer = PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=tokens, callbacks=[remove])
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        trainer.train()
    trainer.save_model()
    assert caplog.text.count("is gone. It is made again") == 1
    assert [line["step"] for line in read_history(out)] == [6, 8, 10, 12]
    assert newest_whole(out) == str(out / "checkpoint-12")
    saved = _weights(out)
    assert _same(saved, {name: each for name, each in trainer.model.state_dict().items() if name in saved})
    _ours_are_whole(out)


def _nan_at(steps: range) -> type[PDecayTrainer]:
    class NaN(PDecayTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step + 1 in steps else loss

    return NaN


def test_steps_with_a_nan_loss_are_skipped_and_logged(
    make_args: MakeArgs, tokens: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = make_args(max_steps=20, target_sparsity=0.8)
    trainer = _nan_at(range(5, 8))(model=tiny_gpt2(), args=args, train_dataset=tokens)
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        trainer.train()
    trainer.save_model()
    assert "3 steps were skipped for NaN or infinite gradients." in caplog.text
    assert "3 steps were skipped" in (tmp_path / "out" / "README.md").read_text()
    counts = [line["skipped_steps"] for line in read_history(tmp_path / "out")]
    assert counts == [0, 0, 2, 3, 3, 3, 3, 3, 3, 3]
    logged = [entry.get("skipped_steps", 0) for entry in trainer.state.log_history if "loss" in entry]
    assert logged == counts
    assert all(torch.isfinite(each).all() for each in _weights(tmp_path / "out").values())
    assert trainer.measure_sparsity().sparsity == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"target_sparsity": 0.8}])
def test_every_step_has_a_nan_loss(
    options: dict[str, Any], make_args: MakeArgs, tokens: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = _nan_at(range(1, 21))(model=tiny_gpt2(), args=make_args(max_steps=20, **options), train_dataset=tokens)
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        trainer.train()
    trainer.save_model()
    assert "All 20 steps were skipped for NaN or infinite gradients, so nothing was learned." in caplog.text
    before, after = tiny_gpt2().state_dict(), _weights(tmp_path / "out")
    # Nothing has had a gradient, so a target prunes nothing either.
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert trainer.measure_sparsity().sparsity == 0


def test_overflows_of_a_scaled_loss_are_skipped(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    # Accelerate makes a scaler for fp16 on accelerators only, and takes one that is there on any device.
    args = make_args(max_steps=24, target_sparsity=0.8, save_strategy="steps", save_steps=12, warmup_steps=0)

    def run(folder: str, resume: str | None = None) -> PDecayTrainer:
        args.output_dir = str(tmp_path / folder)
        trainer = _nan_at(range(1, 4))(model=tiny_gpt2(), args=args, train_dataset=tokens)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=8)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        return trainer

    trainer = run("whole")
    assert trainer.accelerator.scaler.get_scale() < 2.0**16
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {21}  # three steps were not made
    assert trainer.measure_sparsity().sparsity == pytest.approx(0.8, abs=1e-3)
    assert all(torch.isfinite(each).all() for each in _weights(tmp_path / "whole").values())
    run("again", str(tmp_path / "whole" / "checkpoint-12"))
    assert _same(_weights(tmp_path / "whole"), _weights(tmp_path / "again"))


@pytest.mark.skipif(MAJOR < 5, reason="enable_jit_checkpoint came with transformers 5")
def test_sigterm_with_a_checkpoint_just_in_time(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    from transformers.trainer_jit_checkpoint import JITCheckpointCallback

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        # The Trainer waits a while before it saves; not here.
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer):
                thread.join()

    options = {"max_steps": 20, "target_sparsity": 0.8, "logging_steps": 2}
    whole = PDecayTrainer(
        model=tiny_gpt2(), args=make_args(**options, output_dir=str(tmp_path / "whole")), train_dataset=tokens
    )
    whole.train()
    whole.save_model()
    before = signal.getsignal(signal.SIGTERM)
    try:
        args = make_args(**options, enable_jit_checkpoint=True)
        stopped = PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=tokens, callbacks=[AtStep(9, terminate)])
        for callback in stopped.callback_handler.callbacks:
            if isinstance(callback, JITCheckpointCallback):
                callback.jit_manager.kill_wait = 0
        stopped.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.state.global_step < 20
    assert newest_whole(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-9")
    _ours_are_whole(tmp_path / "out")
    resumed = PDecayTrainer(model=tiny_gpt2(), args=make_args(**options), train_dataset=tokens)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert _same(_weights(tmp_path / "whole"), _weights(tmp_path / "out"))
    assert (tmp_path / "whole" / "sparsity.jsonl").read_text() == (tmp_path / "out" / "sparsity.jsonl").read_text()


def test_a_run_that_was_stopped_before_its_first_line_leaves_none(
    make_args: MakeArgs, tokens: Any, tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = control.should_save = state.global_step == 2

    options = {"max_steps": 8, "logging_steps": 4, "save_strategy": "steps", "save_steps": 100}
    PDecayTrainer(model=tiny_gpt2(), args=make_args(**options), train_dataset=tokens, callbacks=[Stop()]).train()
    assert (tmp_path / "out" / "sparsity.png").is_file()
    PDecayTrainer(model=tiny_gpt2(), args=make_args(**options), train_dataset=tokens).train(resume_from_checkpoint=True)
    assert [line["step"] for line in read_history(tmp_path / "out")] == [4, 8]


def test_save_strategies_and_limits(make_args: MakeArgs, tokens: Any, tmp_path: Path) -> None:
    def run(folder: str, **options: Any) -> tuple[PDecayTrainer, list[str]]:
        args = make_args(max_steps=12, output_dir=str(tmp_path / folder), **options)
        trainer = PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=tokens, eval_dataset=tokens)
        trainer.train()
        return trainer, sorted(each.name for each in (tmp_path / folder).glob("checkpoint-*"))

    trainer, saved = run("no", save_strategy="no")
    assert saved == []
    with pytest.raises(ValueError, match="has no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert run("epoch", save_strategy="epoch")[1] == ["checkpoint-12", "checkpoint-6"]
    assert run("limit", save_strategy="steps", save_steps=2, save_total_limit=1)[1] == ["checkpoint-12"]
    trainer, saved = run(
        "best",
        **{"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first is best, which the limit must spare
    )
    best = Path(trainer.state.best_model_checkpoint)
    assert saved == [best.name] == ["checkpoint-2"]
    kept = _weights(best)
    assert _same(kept, {name: each for name, each in trainer.model.state_dict().items() if name in kept})
    for folder in ("epoch", "limit", "best"):
        assert {fault(each) for each in (tmp_path / folder).glob("checkpoint-*")} == {None}
        _ours_are_whole(tmp_path / folder)
