"""Runs that keep what the teacher said: what is kept, that it is found again, and whose it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_pdecay import PDecayTrainer
from hf_pdecay.trainer import teacher_cache
from hf_pdecay.trainer.distillation_loss import TOP, _distribution, kept_kl_sum, kl_sum, summary

from ..helpers.launching import LEAVING
from ..helpers.models import build
from ..helpers.reference.teacher64 import kept_kl64
from ..helpers.teacher_data import labelled_rows, masked_rows
from ..helpers.warm import python


pytestmark = pytest.mark.skipif(int(tf.__version__.partition(".")[0]) < 5, reason="a teacher takes transformers 5")

RUN = {"target_sparsity": 0.5, "lambda_p": None, "max_steps": 20, "logging_steps": 1, "teacher_hidden": 0.0}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """A folder with a Llama of other weights as the teacher, and one for its answers."""
    torch.manual_seed(5)
    model = build("llama")
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape))
    model.save_pretrained(tmp_path / "other")
    return {"teacher": str(tmp_path / "other"), "teacher_cache": str(tmp_path / "cache")}


def _padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows without their padding, padded to the longest of them."""
    longest = max(int(row["attention_mask"].sum()) for row in rows)
    return {key: torch.stack([row[key][:longest] if row[key].ndim else row[key] for row in rows]) for key in rows[0]}


def _run(make_args: Callable[..., Any], model: nn.Module | None = None, data: Any = None, **options: Any) -> Any:
    model = build("llama") if model is None else model
    data = masked_rows(32) if data is None else data
    args = make_args(**{**RUN, **options})
    collator = _padded if "attention_mask" in data[0] else None
    trainer = PDecayTrainer(model=model, args=args, train_dataset=data, data_collator=collator)
    trainer.train()
    return trainer


def _losses(trainer: Any) -> list[float]:
    return [line["loss_teacher"] for line in trainer.state.log_history if "loss_teacher" in line]


def _rows(trainer: Any) -> tuple[int, int]:
    return trainer._lesson.cache.computed, trainer._lesson.cache.found


@given(
    st.integers(1, 5),
    st.integers(2, 200),
    st.integers(-3, 3),
    st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_divergence_is_that_of_the_reference(
    tokens: int, classes: int, more: int, temperature: float, dtype: torch.dtype, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    student = (2 * torch.randn(tokens + 2, classes, generator=random)).to(dtype).requires_grad_()
    teacher = (2 * torch.randn(tokens, max(2, classes + more), generator=random)).to(dtype)
    places = torch.arange(tokens) + 1
    common = min(student.shape[1], teacher.shape[1])
    answers = summary(teacher[:, :classes])
    result = kept_kl_sum(student, answers, places, temperature)
    (0.25 * result).backward()
    expected = kept_kl64(student[places][:, :common], teacher[:, :common], temperature, TOP)
    (slope,) = torch.autograd.grad(0.25 * expected, student)
    # The logs have 11 bits. The cubic between two temperatures is near, and exact without one.
    near = 2e-2 if temperature != 1 and common > TOP else 2e-3
    torch.testing.assert_close(result.double(), expected.detach(), rtol=near, atol=near * temperature**2 * tokens)
    assert student.grad is not None
    torch.testing.assert_close(student.grad.float(), slope.float(), rtol=5e-2, atol=near * temperature)
    assert (student.grad[0] == 0).all() and (student.grad[-1] == 0).all()


def test_classes_that_a_teacher_rules_out_add_nothing() -> None:
    teacher = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    teacher[0, :90], teacher[1, :30] = -torch.inf, -torch.inf
    student = torch.randn(3, 100, requires_grad=True)
    for temperature in (1.0, 2.0):
        result = kept_kl_sum(student, summary(teacher), torch.arange(3), temperature)
        (slope,) = torch.autograd.grad(result, student)
        assert result.isfinite() and slope.isfinite().all() and (slope[0, :90] > 0).all()
    student.data[:, 50:] -= 1000.0  # nothing is left of what the teacher keeps, or of the rest
    student.data[2, :50] -= 3000.0
    result = kept_kl_sum(student, summary(teacher), torch.arange(3), 1.0)
    assert result.isfinite() and torch.autograd.grad(result, student)[0].isfinite().all()


def test_what_is_kept_says_nearly_all() -> None:
    """Distributions as of a language model, by Zipf's law."""
    random = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, 8193).log()
    teacher = -1.2 * ranks[torch.stack([torch.randperm(8192, generator=random) for _ in range(64)])]
    student = (teacher + torch.randn(teacher.shape, generator=random)).requires_grad_()
    kept = kept_kl_sum(student, summary(teacher), torch.arange(64), 1.0)
    whole = kl_sum(student, teacher.clone(), torch.ones(64, dtype=torch.bool), 1.0)
    ours, all_logits = (torch.autograd.grad(each, student)[0] for each in (kept, whole))
    assert kept < whole
    assert nn.functional.cosine_similarity(ours.flatten(), all_logits.flatten(), 0) > 0.95


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0, 4.0, 20.0])
def test_the_rest_is_known_at_any_temperature(temperature: float) -> None:
    for teacher in (-1.2 * torch.arange(1, 4097).log()[None], 3 * torch.randn(4, 4096)):
        _, rest = _distribution(summary(teacher), slice(None), temperature)
        exact = (teacher.double() / temperature).softmax(-1).sort(descending=True).values[:, TOP:].sum(-1)
        torch.testing.assert_close(rest.exp().double(), exact, rtol=2e-2, atol=2e-3)


def test_a_second_run_needs_no_teacher(
    make_args: Callable[..., Any], folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = _run(make_args, **folders, per_device_train_batch_size=8)
    assert _rows(first) == (32, 128)  # five epochs
    whole = _run(make_args, teacher=folders["teacher"], per_device_train_batch_size=8)
    assert _losses(first) == pytest.approx(_losses(whole), rel=2e-2)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(tf.LlamaForCausalLM, "from_pretrained", refuse)
    second = _run(make_args, **folders, per_device_train_batch_size=8)
    assert _rows(second) == (0, 160) and _losses(second) == _losses(first)
    left, right = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    for options in (
        {"seed": 9, "per_device_train_batch_size": 4},  # other batches, which are padded to other lengths
        {"teacher_temperature": 2.0, "teacher_task": 0.0},
        {"gradient_accumulation_steps": 2},
    ):
        assert _rows(_run(make_args, **folders, **options))[0] == 0
    with pytest.raises(AssertionError, match="loaded"):
        _run(make_args, **folders, data=masked_rows(33)[1:])


def test_only_tokens_with_a_label_are_kept(make_args: Callable[..., Any], folders: dict[str, str]) -> None:
    data = masked_rows(32)
    _run(make_args, data=data, **folders)
    files = sorted(Path(folders["teacher_cache"]).glob("*.safetensors"))
    assert sum(int(load_file(file)["sizes"][:, 0].sum()) for file in files) == sum(
        int((row["labels"][1:] != -100).sum()) for row in data
    )
    with safe_open(files[0], framework="pt") as file:
        assert file.get_slice("ids").get_shape()[1] == TOP
        assert file.get_slice("logs").get_dtype() == "F16"
    relabelled = [{**row, "labels": row["labels"].index_fill(0, torch.tensor([4]), -100)} for row in data]
    assert _rows(_run(make_args, data=relabelled, **folders))[0] == 32


class Mixing(tf.LlamaForCausalLM):
    """Reads a long row as one text."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("kind", ["sdpa", "eager", "mixing"])
def test_documents_of_a_long_row_are_rows(kind: str, make_args: Callable[..., Any], folders: dict[str, str]) -> None:
    masks = [row["attention_mask"].bool() for row in masked_rows(32)]
    data = [{"input_ids": row["input_ids"][mask].tolist()} for row, mask in zip(masked_rows(32), masks, strict=True)]
    config = build("llama").config
    config._attn_implementation = "sdpa" if kind == "mixing" else kind
    runs = []
    for seed, options in ((1, {"teacher": folders["teacher"]}), (1, folders), (21, folders)):
        torch.manual_seed(0)
        model = (Mixing if kind == "mixing" else tf.LlamaForCausalLM)(config)
        args = make_args(**{**RUN, **options}, per_device_train_batch_size=8, seed=seed)
        collator = tf.DataCollatorWithFlattening(return_flash_attn_kwargs=False)
        runs.append(PDecayTrainer(model=model, args=args, train_dataset=data, data_collator=collator))
        runs[-1].train()
    if kind == "mixing":
        assert _rows(runs[1]) == _rows(runs[2]) == (20, 0)
    else:
        assert _rows(runs[1]) == (32, 128) and _rows(runs[2]) == (0, 160)
    assert _losses(runs[1]) == pytest.approx(_losses(runs[0]), rel=2e-2)


_BERT = tf.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)


def _pixels() -> list[dict[str, Any]]:
    config = build("vit").config
    shape = (32, config.num_channels, config.image_size, config.image_size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": torch.tensor(number % 2)} for number, image in enumerate(pixels)]


KINDS: dict[str, Callable[[], tuple[nn.Module, list[dict[str, Any]]]]] = {
    "classification": lambda: (build("bert-classifier"), labelled_rows(32, labels=2)),
    "questions": lambda: (tf.BertForQuestionAnswering(_BERT), labelled_rows(32, start_positions=3, end_positions=4)),
    "t5": lambda: (build("t5"), masked_rows(32)),
    "vit": lambda: (build("vit"), _pixels()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_models(kind: str, make_args: Callable[..., Any], tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model, data = KINDS[kind]()
        options = {"teacher": "self", "teacher_cache": str(tmp_path / "cache"), "per_device_train_batch_size": 8}
        runs.append(_run(make_args, model, data, **options))
    rows = 160 * (2 if kind == "questions" else 1)
    assert _rows(runs[1]) == (0, rows) and _losses(runs[0]) == _losses(runs[1])
    assert kind == "questions" or _rows(runs[0]) == (rows // 5, rows * 4 // 5)
    assert _losses(runs[0])[-1] > 0


def test_a_killed_run_leaves_nothing_half_written(
    make_args: Callable[..., Any], folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(folders["teacher_cache"])
    monkeypatch.setattr(teacher_cache, "_FILE_ROWS", 8)
    save = teacher_cache.save_file
    saved = []

    def die(tensors: dict[str, Tensor], file: Path) -> None:
        if len(saved) == 2:
            file.write_bytes(b"half")
            raise KeyboardInterrupt
        saved.append(save(tensors, file))

    monkeypatch.setattr(teacher_cache, "save_file", die)
    with pytest.raises(KeyboardInterrupt):
        _run(make_args, **folders, per_device_train_batch_size=4)
    (cache / ".rows-0.safetensors.1.tmp").write_bytes(b"half")  # as kill -9 leaves it
    monkeypatch.setattr(teacher_cache, "save_file", save)
    assert len(list(cache.glob("rows-*"))) == 2
    assert _rows(_run(make_args, **folders, per_device_train_batch_size=4))[0] == 32 - 2 * 12
    monkeypatch.setattr(teacher_cache, "_OLD", -1.0)
    file = next(cache.glob("rows-*"))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{file.name} in .* cannot be read .*delete it"):
        _run(make_args, **folders)
    assert not list(cache.glob(".*"))


def test_answers_of_another_teacher_are_refused(
    make_args: Callable[..., Any], folders: dict[str, str], tmp_path: Path
) -> None:
    _run(make_args, **folders)
    for options in ({"teacher": "self"}, {"teacher_dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="has the answers of another teacher than teacher="):
            _run(make_args, **{**folders, **options})
    changed = tf.LlamaForCausalLM.from_pretrained(folders["teacher"])
    changed.lm_head.weight.data.mul_(1.01)
    changed.save_pretrained(folders["teacher"])
    with pytest.raises(ValueError, match="has the answers of another teacher"):
        _run(make_args, **folders)

    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="teacher_cache=.*cannot be a cache"):
        _run(make_args, teacher="self", teacher_cache=str(tmp_path / "file"))
    identity = Path(folders["teacher_cache"]) / teacher_cache.CACHE_FILE
    identity.write_text(json.dumps({**json.loads(identity.read_text()), "format": 2}))
    with pytest.raises(ValueError, match="has format 2 and this release reads 1"):
        _run(make_args, **folders)


def test_hidden_states_are_not_kept(
    make_args: Callable[..., Any], folders: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"teacher_hidden=1\.0 with teacher_cache=.*keeps no hidden states"):
        make_args(**folders, teacher_hidden=1.0)
    with pytest.raises(ValueError, match="teacher_cache='x' without a teacher has no effect"):
        make_args(teacher_cache="x")
    with pytest.raises(ValueError, match="teacher_cache=''; it must be a folder"):
        make_args(teacher="self", teacher_cache="")
    with caplog.at_level(logging.WARNING, logger="hf_pdecay"):
        trainer = _run(make_args, **folders, teacher_hidden=None)
    assert trainer._lesson.hidden == 0 and "teacher_hidden is 0, because teacher_cache keeps" in caplog.text


def test_rows_that_change_in_every_epoch_are_named(
    make_args: Callable[..., Any], folders: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    class Changing(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            return {**super().__getitem__(index), "input_ids": torch.randint(1, 64, (16,))}

    with caplog.at_level(logging.WARNING, logger="hf_pdecay"):
        _run(make_args, data=Changing(masked_rows(32)), **folders, per_device_train_batch_size=8)
    assert "its rows change in every epoch" in caplog.text


@pytest.mark.slow
def test_processes_share_a_cache(folders: dict[str, str], tmp_path: Path) -> None:
    words = ("-m", "tests.helpers.teacher_run")
    launcher = ("-m", "accelerate.commands.launch", "--main_process_port=0", "--multi_gpu", "--num_processes=2")
    found = []
    for out in ("one", "two"):
        options = (str(tmp_path / out), folders["teacher"], "4", folders["teacher_cache"])
        done = python(*launcher, *LEAVING, *words, *options)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads((tmp_path / out / "rows.json").read_text()))
    assert sum(computed for computed, _ in found[0]) == 24 and found[1] == [[0, 12], [0, 12]]
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
