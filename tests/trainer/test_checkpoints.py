"""Which checkpoints are whole, and what the Trainer does with those that are not."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from hf_pdecay import AdamWLp, PDecayTrainer, PDecayTrainingArguments
from hf_pdecay.trainer.checkpoints import check_whole, fault, newest_whole

from ..helpers.models import tiny_gpt2


MakeArgs = Callable[..., Any]

FILES = ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("run") / "out"
    rows = torch.randint(0, 64, (48, 16), generator=torch.Generator().manual_seed(0)).tolist()
    args = PDecayTrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        max_steps=12,
        logging_steps=2,
        save_strategy="steps",
        save_steps=4,
        learning_rate=1e-2,
        p_norm=0.5,
        lambda_p=0.1,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=data).train()
    return folder


@pytest.fixture
def out(run: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "out"))


def _cut(file: Path, keep: float = 0.5) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])


def test_what_the_trainer_saved_is_whole(run: Path) -> None:
    assert [fault(run / f"checkpoint-{step}") for step in (4, 8, 12)] == [None] * 3
    assert newest_whole(run) == str(run / "checkpoint-12")


@pytest.mark.parametrize("keep", [0.0, 1e-3, 0.5, 0.99])
@pytest.mark.parametrize("name", [*FILES, "training_args.bin"])
def test_a_file_that_is_cut(name: str, keep: float, out: Path) -> None:
    _cut(out / "checkpoint-12" / name, keep)
    flaw = fault(out / "checkpoint-12")
    assert flaw is not None and name in flaw
    assert newest_whole(out) == str(out / "checkpoint-8")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing(name: str, out: Path) -> None:
    (out / "checkpoint-12" / name).unlink()
    flaw = fault(out / "checkpoint-12")
    assert flaw is not None and ("weights" if name == "model.safetensors" else name) in flaw


def test_the_order_in_which_the_trainer_writes(out: Path) -> None:
    # Whatever the number of files that a killed process had written, the folder is not whole before the last.
    order = ["config.json", "model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
    whole, folder = out / "checkpoint-12", out / "checkpoint-16"
    folder.mkdir()
    for name in order:
        assert fault(folder) is not None
        shutil.copy(whole / name, folder)
    assert fault(folder) is not None
    shutil.copy(whole / "trainer_state.json", folder)
    assert fault(folder) is None


def test_shards(out: Path) -> None:
    folder = out / "checkpoint-12"
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, shard_names in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in shard_names}, folder / shard)
        weight_map |= dict.fromkeys(shard_names, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert fault(folder) is None
    (folder / "model-00002-of-00002.safetensors").rename(out / "aside")
    assert fault(folder) == "model-00002-of-00002.safetensors is missing, which model.safetensors.index.json names"
    (out / "aside").rename(folder / "model-00002-of-00002.safetensors")
    _cut(folder / "model-00001-of-00002.safetensors")
    assert fault(folder) == "model-00001-of-00002.safetensors is cut short"
    _cut(index)
    assert fault(folder) == "model.safetensors.index.json is cut short"


def test_the_random_states_of_several_processes(out: Path) -> None:
    folder = out / "checkpoint-12"
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert fault(folder) == "rng_state_1.pth is missing"  # of one process alone the name would be another
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert fault(folder) is None
    (folder / "rng_state_0.pth").unlink()
    assert fault(folder) == "rng_state_0.pth is missing"


def test_the_model_alone_is_whole(out: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (out / "checkpoint-12" / name).unlink()
    assert fault(out / "checkpoint-12") is None


def test_the_mark_of_the_sigterm_handler(out: Path) -> None:
    (out / "checkpoint-12" / "checkpoint-is-incomplete.txt").write_text("Checkpoint started at step 12")
    assert newest_whole(out) == str(out / "checkpoint-8")


def test_numbers_not_names_are_ordered(out: Path) -> None:
    (out / "checkpoint-8").rename(out / "checkpoint-100")
    (out / "checkpoint-4").rename(out / "checkpoint-9-old")
    assert newest_whole(out) == str(out / "checkpoint-100")


def test_the_folder_of_the_run_names_the_checkpoints_in_it(out: Path, make_args: MakeArgs, tokens: Any) -> None:
    _cut(out / "checkpoint-12" / "optimizer.pt")
    trainer = PDecayTrainer(model=tiny_gpt2(), args=make_args(max_steps=12), train_dataset=tokens)
    names = "with the checkpoints checkpoint-4, checkpoint-8, checkpoint-12 in it"
    with pytest.raises(ValueError, match=f"is the folder of a run, {names}. Name '{out}/checkpoint-8'"):
        trainer.train(resume_from_checkpoint=str(out))
    trainer.save_model()
    trainer.save_state()  # the folder looks like a checkpoint of the model alone now
    with pytest.raises(ValueError, match=f"Name '{out}/checkpoint-8'"):
        trainer.train(resume_from_checkpoint=str(out))


def test_it_resumes_from_the_newest_whole_one_and_says_so(
    run: Path, out: Path, make_args: MakeArgs, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _cut(out / "checkpoint-12" / "optimizer.pt")
    trainer = PDecayTrainer(model=tiny_gpt2(), args=make_args(max_steps=12), train_dataset=tokens)
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        trainer.train(resume_from_checkpoint=True)
    assert "Taking checkpoint-8; left out as not whole: checkpoint-12 (optimizer.pt is cut short)." in caplog.text
    assert (out / "sparsity.jsonl").read_text().count("\n") == 6
    assert fault(out / "checkpoint-12") == "optimizer.pt is cut short"  # nothing is deleted


def test_one_that_is_named_is_refused(out: Path, make_args: MakeArgs, tokens: Any) -> None:
    _cut(out / "checkpoint-12" / "model.safetensors")
    named = str(out / "checkpoint-12")
    sentence = (
        r"^Invalid resume_from_checkpoint: .*checkpoint-12' is not a whole checkpoint: model.safetensors is cut "
        r"short\. The newest whole one beside it is checkpoint-8, which resume_from_checkpoint=True takes\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        PDecayTrainer(model=tiny_gpt2(), args=make_args(resume_from_checkpoint=named), train_dataset=tokens)
    trainer = PDecayTrainer(model=tiny_gpt2(), args=make_args(), train_dataset=tokens)
    with pytest.raises(ValueError, match=sentence):
        trainer.train(resume_from_checkpoint=named)


def test_there_is_no_whole_one(out: Path, make_args: MakeArgs, tokens: Any) -> None:
    for step in (4, 8, 12):
        (out / f"checkpoint-{step}" / "trainer_state.json").unlink()
    trainer = PDecayTrainer(model=tiny_gpt2(), args=make_args(), train_dataset=tokens)
    with pytest.raises(ValueError, match=r"no whole checkpoint: checkpoint-12 \(trainer_state.json.*Start anew"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="Name a whole one"):
        check_whole(out / "checkpoint-4")
    for step in (4, 8, 12):
        shutil.rmtree(out / f"checkpoint-{step}")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=True, and output_dir=.* has no checkpoint\. Start"):
        trainer.train(resume_from_checkpoint=True)
    assert newest_whole(out / "nowhere") is None


@pytest.mark.parametrize("as_class", [True, False])
def test_the_groups_of_an_optimizer_that_is_passed_in_are_its_own(
    as_class: bool, make_args: MakeArgs, tokens: Any, tmp_path: Path
) -> None:
    def trainer(**overrides: Any) -> PDecayTrainer:
        # 6 steps are an epoch: a shuffled one that transformers 4.57 resumes goes on with other batches.
        args = make_args(max_steps=12, save_strategy="steps", save_steps=6, **overrides)
        model, settings = tiny_gpt2(), {"lr": 1e-2, "lambda_p": 0.1}
        given: dict[str, Any] = {"optimizers": (None if as_class else AdamWLp(model.parameters(), **settings), None)}
        if as_class:
            given["optimizer_cls_and_kwargs"] = AdamWLp, settings
        return PDecayTrainer(model=model, args=args, train_dataset=tokens, **given)

    whole, resumed = trainer(), trainer(output_dir=str(tmp_path / "again"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_that_is_written_anew_is_not_whole_until_it_is(
    out: Path, make_args: MakeArgs, tokens: Any
) -> None:
    # Its old files are whole, but of other settings than the new ones.
    class Stopped(PDecayTrainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            raise KeyboardInterrupt

    args = make_args(max_steps=12, save_strategy="steps", save_steps=4, learning_rate=1e-3)
    (out / "checkpoint-8" / ".sparsity.json.123.tmp").write_text("{")
    trainer = Stopped(model=tiny_gpt2(), args=args, train_dataset=tokens)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    assert fault(out / "checkpoint-8") == "trainer_state.json, which is written last, is missing"
    assert not list((out / "checkpoint-8").glob(".*"))
    assert fault(out / "checkpoint-12") is None


def test_a_run_resumes_if_its_files_have_none_of_the_model_s_names(
    make_args: MakeArgs, tokens: Any, tmp_path: Path
) -> None:
    """transformers saves LLaVA under the names from before its parts moved."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
    text = sizes | {"model_type": "llama", "vocab_size": 64}
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)
    tf.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "model")

    def run(resume: str | None) -> dict[str, torch.Tensor]:
        model = tf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
        args = make_args(save_strategy="steps", save_steps=4)
        PDecayTrainer(model=model, args=args, train_dataset=tokens).train(resume_from_checkpoint=resume)
        return dict(model.state_dict())

    whole = run(None)
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert not load_file(checkpoint / "model.safetensors").keys() & whole.keys()
    resumed = run(str(checkpoint))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
