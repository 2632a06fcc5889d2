"""Runs with a teacher: the loss against a reference, how it is normalised, what is taught, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_pdecay import PDecayTrainer
from hf_pdecay.trainer.distillation_loss import entropies, error_sum, kl_sum

from ..helpers.launching import LEAVING
from ..helpers.local_files import llama, sentences
from ..helpers.models import build
from ..helpers.reference.teacher64 import error64, kl64
from ..helpers.teacher_data import labelled_rows, masked_rows
from ..helpers.warm import python


pytestmark = pytest.mark.skipif(int(tf.__version__.partition(".")[0]) < 5, reason="a teacher takes transformers 5")

TARGET = {"target_sparsity": 0.5, "p_norm": 0.8, "lambda_p": None, "max_steps": 20}


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.first:
            named = kwargs["model"].named_parameters()
            self.first = {name: param.grad.clone() for name, param in named if param.grad is not None}


@pytest.fixture
def other(tmp_path: Path) -> str:
    """A folder with a Llama of other weights."""
    torch.manual_seed(5)
    model = build("llama")
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape))
    model.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def _first_gradients(args: Any, model: nn.Module | None = None, data: Any = None) -> dict[str, Tensor]:
    seen = Gradients()
    model = build("llama") if model is None else model
    data = masked_rows(32) if data is None else data
    PDecayTrainer(model=model, args=args, train_dataset=data, callbacks=[seen]).train()
    return seen.first


def _logs(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss_teacher" in line]


@given(
    st.integers(1, 7),
    st.integers(2, 40),
    st.integers(-3, 3),
    st.floats(0.5, 5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_kl_is_that_of_the_reference(
    rows: int, classes: int, more: int, temperature: float, dtype: torch.dtype, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    student = (3 * torch.randn(rows, classes, generator=random)).to(dtype).requires_grad_()
    teacher = (3 * torch.randn(rows, max(2, classes + more), generator=random)).to(dtype)
    counts = torch.rand(rows, generator=random) < 0.7
    common = min(student.shape[1], teacher.shape[1])
    expected = kl64(student[:, :common], teacher[:, :common], counts, temperature)
    (slope,) = torch.autograd.grad(0.25 * expected, student) if counts.any() else (torch.zeros_like(student),)
    result = kl_sum(student, teacher.clone(), counts, temperature)
    (0.25 * result).backward()
    # One rounding of a gradient: its values are below 0.25 * temperature.
    exact = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float64: 1e-12}[dtype] * max(1, temperature)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(result.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, slope, rtol=exact, atol=exact)


def test_classes_that_a_teacher_rules_out_add_nothing() -> None:
    student = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 0.0, -torch.inf]])
    result = kl_sum(student, teacher, torch.tensor([True, True]), 1.0)
    result.backward()
    assert result.item() == pytest.approx(torch.tensor(1.5).log().item())
    assert student.grad is not None and student.grad.isfinite().all()


def test_chunks_are_no_different(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(33, 16, requires_grad=True), torch.randn(33, 16)
    counts = torch.arange(33) % 7 > 3
    whole = kl_sum(student, teacher.clone(), counts, 2.0)
    (slope,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr("hf_pdecay.trainer.distillation_loss._CHUNK", {"cpu": 16 * 2})
    pieces = kl_sum(student, teacher.clone(), counts, 2.0)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(torch.autograd.grad(pieces, student)[0], slope)
    exact = torch.distributions.Categorical(logits=teacher).entropy()
    torch.testing.assert_close(entropies(teacher), exact)


@given(st.integers(1, 5), st.integers(1, 12), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_hidden_error_is_that_of_the_reference(tokens: int, width: int, dtype: torch.dtype, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    student = torch.randn(2, tokens, width, generator=random).to(dtype).requires_grad_()
    teacher = (torch.randn(2, tokens, width, generator=random) + 2).to(dtype)
    weights = torch.rand(2, tokens, generator=random)
    expected = error64(student, teacher, weights)
    (slope,) = torch.autograd.grad(expected, student)
    result = error_sum(student, teacher, weights)
    result.backward()
    torch.testing.assert_close(result.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert student.grad is not None
    exact = 2e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(student.grad, slope, rtol=exact, atol=exact * 1e-2)


def test_tokens_of_a_teacher_that_are_zero_count_nothing() -> None:
    student = torch.ones(1, 2, 3, requires_grad=True)
    result = error_sum(student, torch.tensor([[[0.0] * 3, [2.0] * 3]]), torch.ones(1, 2))
    result.backward()
    assert result.item() == 0.25 and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_the_loss_of_a_run_is_its_formula(hidden: float, other: str, make_args: Callable[..., Any]) -> None:
    weights = {"teacher_task": 0.5, "teacher_logits": 2.0, "teacher_temperature": 2.0, "teacher_hidden": hidden}
    args = make_args(max_steps=1, logging_steps=1, teacher=other, seed=3, max_grad_norm=0.0, **weights)
    found = _first_gradients(args)

    model, teacher = build("llama").double(), tf.LlamaForCausalLM.from_pretrained(other).double()
    trainer = PDecayTrainer(model=build("llama"), args=args, train_dataset=masked_rows(32))
    batch = next(iter(trainer.get_train_dataloader()))
    ours, theirs = (each(**batch, output_hidden_states=True) for each in (model, teacher))
    counts = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    kl = kl64(ours.logits.flatten(0, 1), theirs.logits.flatten(0, 1).detach(), counts.flatten(), 2.0) / counts.sum()
    mask = batch["attention_mask"]
    layers = list(zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True))
    error = sum(error64(s, t.detach(), mask) for s, t in layers) / mask.sum() / len(layers)
    (0.5 * ours.loss + 2.0 * kl + hidden * error).backward()
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, param in model.named_parameters():
        torch.testing.assert_close(found[name].double(), param.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "bert-classifier", "t5"])
def test_accumulation_changes_no_gradient(kind: str, make_args: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = build(kind)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn(param.shape))
    model.save_pretrained(tmp_path / "teacher")
    data = labelled_rows(32, labels=2) if kind == "bert-classifier" else masked_rows(32)
    gradients = []
    for batch, steps in ((8, 1), (2, 4)):
        args = make_args(
            max_steps=1,
            max_grad_norm=0.0,
            teacher=str(tmp_path / "teacher"),
            teacher_task=float(kind == "llama"),  # the others' own loss is not that of all batches of a step
            teacher_hidden=1.0,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        )
        model = build(kind)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        model.config.attention_probs_dropout_prob = 0.0
        gradients.append(_first_gradients(args, model, data))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_a_dense_model_has_nothing_to_learn_from_itself(make_args: Callable[..., Any]) -> None:
    args = make_args(max_steps=1, logging_steps=1, teacher="self", teacher_task=0.0, max_grad_norm=0.0)
    assert all(gradient.abs().max() < 1e-7 for gradient in _first_gradients(args).values())
    trainer = PDecayTrainer(model=build("llama"), args=args, train_dataset=masked_rows(32))
    trainer.train()
    assert _logs(trainer)[0]["loss_teacher"] == 0 and _logs(trainer)[0]["loss_task"] > 1


def test_the_log_has_both_parts_and_evaluation_neither(make_args: Callable[..., Any]) -> None:
    args = make_args(
        **TARGET, teacher="self", teacher_task=0.5, gradient_accumulation_steps=2, per_device_train_batch_size=4
    )
    trainer = PDecayTrainer(model=build("llama"), args=args, train_dataset=masked_rows(32), eval_dataset=masked_rows(8))
    trainer.train()
    lines = _logs(trainer)
    assert len(lines) == 10 and all(line["loss_teacher"] > 0 for line in lines[1:])
    for line in lines:
        assert line["loss"] == pytest.approx(0.5 * line["loss_task"] + line["loss_teacher"], rel=1e-4)
    assert trainer.measure_sparsity().sparsity == pytest.approx(0.5, abs=1e-3)
    evaluated = trainer.evaluate()
    assert "eval_loss_teacher" not in evaluated
    with torch.no_grad():
        batch = {key: torch.stack([row[key] for row in masked_rows(8)]) for key in masked_rows(1)[0]}
        assert evaluated["eval_loss"] == pytest.approx(trainer.model.eval()(**batch).loss.item(), rel=1e-4)


def _vit() -> tuple[nn.Module, list[dict[str, Any]]]:
    model = build("vit")
    size = model.config.image_size
    pixels = torch.randn(32, model.config.num_channels, size, size, generator=torch.Generator().manual_seed(0))
    return model, [{"pixel_values": image, "labels": torch.tensor(number % 2)} for number, image in enumerate(pixels)]


def _resnet() -> tuple[nn.Module, list[dict[str, Any]]]:
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    pixels = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = [{"pixel_values": image, "labels": torch.tensor(number % 2)} for number, image in enumerate(pixels)]
    return tf.ResNetForImageClassification(config), data


_BERT = tf.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
KINDS: dict[str, Callable[[], tuple[nn.Module, list[dict[str, Any]]]]] = {
    "masked-lm": lambda: (build("bert"), masked_rows(32)),
    "classification": lambda: (build("bert-classifier"), labelled_rows(32, labels=2)),
    "questions": lambda: (
        tf.BertForQuestionAnswering(_BERT),
        labelled_rows(32, start_positions=5, end_positions=7),
    ),
    "t5": lambda: (build("t5"), masked_rows(32)),
    "vit": _vit,
    "resnet": _resnet,
    "mixtral": lambda: (build("mixtral"), masked_rows(32)),
    "mamba": lambda: (
        tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=8)),
        masked_rows(32),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_models(kind: str, make_args: Callable[..., Any]) -> None:
    model, data = KINDS[kind]()
    trainer = PDecayTrainer(model=model, args=make_args(**TARGET, teacher="self"), train_dataset=data)
    trainer.train()
    lines = _logs(trainer)
    assert len(lines) == 10 and all(0 <= line["loss_teacher"] < 50 for line in lines)
    assert lines[-1]["loss_teacher"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"teacher_dtype": "bfloat16"},
        {"label_smoothing_factor": 0.1},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"optim": "sgd_lp"},
        {"teacher_hidden": 0.0},
        {"teacher_logits": 0.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_a_run(options: dict[str, Any], make_args: Callable[..., Any]) -> None:
    args = make_args(**{**TARGET, "teacher": "self", **options})
    trainer = PDecayTrainer(model=build("llama"), args=args, train_dataset=masked_rows(32))
    trainer.train()
    assert 0 < _logs(trainer)[-1]["loss_teacher"] < 5


@pytest.mark.slow
def test_torch_compile(make_args: Callable[..., Any]) -> None:
    losses = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        args = make_args(**TARGET, teacher="self", **options)
        trainer = PDecayTrainer(model=build("llama"), args=args, train_dataset=masked_rows(32))
        trainer.train()
        losses.append([line["loss_teacher"] for line in _logs(trainer)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2, abs=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(make_args: Callable[..., Any], tmp_path: Path) -> None:
    def run(out: str, **kwargs: Any) -> Any:
        args = make_args(**TARGET, output_dir=out, teacher="self", save_strategy="steps", save_steps=8)
        trainer = PDecayTrainer(model=build("llama"), args=args, train_dataset=masked_rows(32))
        trainer.train(**kwargs)
        return trainer

    whole = run(str(tmp_path / "whole"))
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    resumed = run(str(tmp_path / "resumed"), resume_from_checkpoint=str(checkpoint))
    left, right = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert _logs(whole)[-1] == _logs(resumed)[-1]

    args = make_args(**TARGET, teacher="self")
    begun = PDecayTrainer(
        model=tf.LlamaForCausalLM.from_pretrained(checkpoint), args=args, train_dataset=masked_rows(32)
    )
    with pytest.raises(ValueError, match="teacher='self' has other weights than the teacher of the run"):
        begun.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "teacher.json").unlink()
    with pytest.raises(ValueError, match="had no teacher, so nobody knows its weights before training"):
        begun.train(resume_from_checkpoint=str(checkpoint))


def test_model_init_makes_a_teacher_with_each_model(make_args: Callable[..., Any]) -> None:
    made = iter(range(9))

    def init() -> nn.Module:
        torch.manual_seed(next(made))
        return tf.LlamaForCausalLM(build("llama").config)

    args = make_args(max_steps=1, logging_steps=1, teacher="self")
    trainer = PDecayTrainer(model_init=init, args=args, train_dataset=masked_rows(32))
    for _ in range(2):
        trainer.train()
        assert _logs(trainer)[-1]["loss_teacher"] == 0


def test_without_a_teacher_nothing_of_it_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys, hf_pdecay; from tests.helpers.models import tiny_gpt2\n"
        f"args = hf_pdecay.PDecayTrainingArguments({str(tmp_path)!r}, use_cpu=True, report_to='none')\n"
        "trainer = hf_pdecay.PDecayTrainer(model=tiny_gpt2(), args=args, train_dataset=[{}])\n"
        "assert type(trainer) is hf_pdecay.PDecayTrainer\n"
        "ours = ('distillation', 'distillation_loss', 'lesson', 'teacher', 'teacher_cache', 'sharded_teacher')\n"
        "assert not [name for name in ours if f'hf_pdecay.trainer.{name}' in sys.modules]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_two_processes_are_one(other: str, tmp_path: Path) -> None:
    words = ("-m", "tests.helpers.teacher_run")
    launcher = ("-m", "accelerate.commands.launch", "--main_process_port=0", "--multi_gpu", "--num_processes=2")
    alone = python(*words, str(tmp_path / "one"), other, "8")
    both = python(*launcher, *LEAVING, *words, str(tmp_path / "two"), other, "4")
    for done in (alone, both):
        assert done.returncode == 0, done.stderr[-3000:]
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("one", "two")]
    for left, right in zip(*(state["log_history"][:3] for state in states), strict=True):
        for key in ("loss", "loss_teacher", "loss_task", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=1e-3), key
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all((tensors[0][name] - tensors[1][name]).abs().max() < 1e-4 for name in tensors[0])


def test_self_is_read_from_the_folder_of_the_model(
    make_args: Callable[..., Any], other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_pdecay.trainer import teacher

    copied: list[int] = []
    cast = teacher._cast
    monkeypatch.setattr(teacher, "_cast", lambda param, to: copied.append(param.numel()) or cast(param, to))

    def run(**options: Any) -> Any:
        copied.clear()
        model = tf.LlamaForCausalLM.from_pretrained(other)
        with torch.no_grad():
            for param in model.parameters():
                param.add_(options.get("changed", 0))
        args = make_args(**TARGET, teacher="self", **{key: options[key] for key in options if key != "changed"})
        trainer = PDecayTrainer(model=model, args=args, train_dataset=masked_rows(32))
        trainer.train()
        return trainer

    mapped = run()
    assert not copied
    beside = run(output_dir=other)  # which the run may write to
    assert len(copied) == len(list(beside.model.parameters()))
    assert _logs(mapped) == _logs(beside)
    for options in ({"changed": 0.01}, {"teacher_dtype": "bfloat16"}):
        run(**options)
        assert len(copied) == len(list(beside.model.parameters()))


def _lora(model: nn.Module, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", **options}))


def test_adapters_learn_from_the_model_below_them(make_args: Callable[..., Any]) -> None:
    model = _lora(build("llama"), modules_to_save=["lm_head"], lora_dropout=0.3)
    args = make_args(max_steps=6, logging_steps=1, teacher="self", gradient_checkpointing=True)
    trainer = PDecayTrainer(model=model, args=args, train_dataset=masked_rows(32))
    before = {name: param.requires_grad for name, param in model.named_parameters()}
    params = sum(1 for _ in model.parameters())
    trainer.train()
    assert before == {name: param.requires_grad for name, param in model.named_parameters()}
    assert params == sum(1 for _ in trainer.model.parameters())
    assert _logs(trainer)[0]["loss_teacher"] == 0 < _logs(trainer)[-1]["loss_teacher"]


def test_a_trained_base_below_adapters_is_refused(make_args: Callable[..., Any]) -> None:
    model = _lora(build("llama"))
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm\.weight below them is trained too"):
        PDecayTrainer(model=model, args=make_args(teacher="self"), train_dataset=masked_rows(8))


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", ["plain", "packed", "lora", "smooth", "kept"])
def test_trl(kind: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model: Any = str(llama(tmp_path / "llama"))
    options: dict[str, Any] = {}
    if kind == "packed":
        options = {"packing": True, "padding_free": True, "model_init_kwargs": {"attn_implementation": "sdpa"}}
    taught_by = f",teacher=self,teacher_cache={tmp_path / 'cache'}" if kind == "kept" else ",teacher=self"
    if kind == "lora":
        model = _lora(tf.AutoModelForCausalLM.from_pretrained(model))
    if kind == "smooth":
        options = {"label_smoothing_factor": 0.1}
    logs = []
    for teacher in ("", taught_by):
        args = trl.SFTConfig(
            str(tmp_path / "out"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_steps=20,
            logging_steps=1,
            save_strategy="no",
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            max_length=32,
            optim="adamw_lp",
            optim_args="p_norm=0.8,lambda_p=0.01" + teacher,
            **options,
        )
        if kind == "lora":
            model = _lora(tf.AutoModelForCausalLM.from_pretrained(str(tmp_path / "llama")))
        tokenizer = tf.AutoTokenizer.from_pretrained(str(tmp_path / "llama"))
        data = Dataset.from_dict({"text": sentences(48)})
        trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        logs.append([line for line in trainer.state.log_history if "loss" in line])
    dense, taught = logs
    assert kind != "kept" or trainer._lesson.cache.computed == len(set(sentences(48)))
    assert taught[0]["loss_teacher"] == pytest.approx(0, abs=1e-6) and taught[-1]["loss_teacher"] > 0
    for key in ("loss", "entropy", "mean_token_accuracy", "grad_norm"):
        assert taught[0][key] == pytest.approx(dense[0][key], rel=1e-3, abs=1e-5), key


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
def test_a_run_without_labels_is_refused(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = Dataset.from_dict({"prompt": sentences(8), "chosen": sentences(8, 1), "rejected": sentences(8, 2)})
    args = trl.DPOConfig(
        *(str(tmp_path / "out"),),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_steps=2,
        optim="adamw_lp",
        optim_args="teacher=self,lambda_p=0.01",
    )
    trainer = trl.DPOTrainer(model=str(llama(tmp_path / "llama")), args=args, train_dataset=rows)
    with pytest.raises(ValueError, match="the batches of DPOTrainer have no labels"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": ""}, "teacher=''; it must be 'self', or a folder or name"),
        ({"teacher": "self", "teacher_task": -1}, "teacher_task=-1; it must be a finite number of at least 0"),
        ({"teacher": "self", "teacher_temperature": 0}, "teacher_temperature=0; it must be a finite number above 0"),
        ({"teacher": "self", "teacher_dtype": "int8"}, "teacher_dtype='int8'; it must be one of bfloat16"),
        ({"teacher": "self", "teacher_logits": 0, "teacher_hidden": 0}, "teaches nothing"),
        ({"teacher_logits": 2.0}, "teacher_logits=2.0 without a teacher has no effect"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], message: str, make_args: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make_args(**options)


def _refused(make_args: Callable[..., Any], message: str, model: Any = None, data: Any = None, **options: Any) -> None:
    kwargs = {key: options.pop(key) for key in ("processing_class",) if key in options}
    with pytest.raises(ValueError, match=message):
        PDecayTrainer(
            model=build("llama") if model is None else model,
            args=make_args(**options),
            train_dataset=masked_rows(8) if data is None else data,
            **kwargs,
        ).train()


def test_teachers_that_do_not_fit(
    make_args: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refused(make_args, "teacher='nowhere/none' is neither 'self' nor a model", teacher="nowhere/none")
    config = build("llama").config

    def save(name: str, kind: Any = tf.LlamaForCausalLM, **changes: Any) -> str:
        other = type(config)(**{**config.to_dict(), **changes})
        kind(other).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    wide = save("wide", vocab_size=96)
    _refused(make_args, "a vocabulary of 96 tokens and the model one of 64", teacher=wide)
    deep = save("deep", num_hidden_layers=3)
    message = r"teacher_hidden=1\.0 with teacher=.* has 3 layers of width 32 and the model 2 layers"
    _refused(make_args, message, teacher=deep, teacher_hidden=1.0)
    build("vit").save_pretrained(tmp_path / "vit")
    bert = build("bert-classifier")
    bert.save_pretrained(tmp_path / "bert")
    _refused(
        make_args,
        "has no weights for cls.* of a BertLMHeadModel, which would be random",
        teacher=str(tmp_path / "bert"),
    )
    _refused(make_args, "is a ViTConfig and the model a LlamaForCausalLM", teacher=str(tmp_path / "vit"))
    three = tf.BertForSequenceClassification(tf.BertConfig(**{**bert.config.to_dict(), "num_labels": 3}))
    data = labelled_rows(8, labels=3)
    _refused(make_args, "has 2 labels and the model 3", three, data, teacher=str(tmp_path / "bert"))
    regression = tf.BertForSequenceClassification(tf.BertConfig(**{**bert.config.to_dict(), "num_labels": 1}))
    data = [{**row, "labels": row["labels"].float()} for row in data]
    _refused(make_args, "they must be one class for each token or row", regression, data, teacher="self")
    _refused(make_args, "'decoder'|no logits|labels", tf.LlamaModel(config), masked_rows(8), teacher="self")

    quantized = build("llama")
    quantized.lm_head.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False)
    _refused(make_args, "with a quantized model", quantized, teacher="self")

    from types import SimpleNamespace

    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    _refused(make_args, r"takes 0\.0 GiB of memory on cpu, where 0\.0 GiB are free", teacher="self")


def test_tokenizers_are_compared(make_args: Callable[..., Any], tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama")
    model = tf.LlamaForCausalLM.from_pretrained(folder)
    ours = tf.AutoTokenizer.from_pretrained(folder)
    data = [{"input_ids": torch.arange(1, 9), "labels": torch.arange(1, 9)}] * 8
    model.resize_token_embeddings(len(ours) + 40)  # padding of the vocabulary alone
    args = make_args(teacher=str(folder), max_steps=2, logging_steps=1)
    trainer = PDecayTrainer(model=model, args=args, train_dataset=data, processing_class=ours)
    trainer.train()
    assert _logs(trainer)[0]["loss_teacher"] < 1e-6

    file = folder / "tokenizer.json"
    written = json.loads(file.read_text())
    vocabulary = written["model"]["vocab"]
    vocabulary["boat"], vocabulary["bird"] = vocabulary["bird"], vocabulary["boat"]
    file.write_text(json.dumps(written))
    _refused(
        make_args,
        "has another tokenizer than the model: '(boat|bird)' is token",
        model,
        data,
        teacher=str(folder),
        processing_class=ours,
    )


def test_a_teacher_of_another_depth_teaches_its_logits(make_args: Callable[..., Any], tmp_path: Path) -> None:
    config = build("llama").config
    config.num_hidden_layers = 3
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "deep")
    trainer = PDecayTrainer(
        model=build("llama"), args=make_args(teacher=str(tmp_path / "deep")), train_dataset=masked_rows(32)
    )
    trainer.train()
    assert trainer._lesson.hidden == 0 and _logs(trainer)[0]["loss_teacher"] > 0


def test_engines_are_refused(make_args: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hf_pdecay.trainer import distillation

    monkeypatch.setattr(distillation, "engine_of", lambda trainer: "DeepSpeed")
    _refused(make_args, "teacher='self' under DeepSpeed", teacher="self")
    trainer = PDecayTrainer(model=_lora(build("llama")), args=make_args(), train_dataset=masked_rows(8))
    trainer.is_fsdp_enabled = True
    monkeypatch.setattr(distillation, "engine_of", lambda trainer: "FSDP")
    settings = make_args(teacher="self", teacher_cache=str(tmp_path / "cache")).decay_settings
    with pytest.raises(ValueError, match="teacher='self' with adapters under FSDP"):
        distillation._check_run(trainer, settings)
    trainer.model = build("llama")
    with pytest.raises(ValueError, match="under FSDP, where all processes must ask the teacher at once"):
        distillation._check_run(trainer, settings)
