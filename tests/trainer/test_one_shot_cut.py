"""Runs that prune their model at once, from rows of their training data."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hf_pdecay import PDecayTrainer, PDecayTrainingArguments, decayable_parameter_names
from hf_pdecay.one_shot.own_text import own_rows
from hf_pdecay.trainer.one_shot_cut import _with_own

from ..helpers.models import build, tiny_gpt2


class _Watch(TrainerCallback):
    """Notes which weights are zero after each step."""

    def __init__(self) -> None:
        self.zeros: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.zeros.append({name: model.get_parameter(name) == 0 for name in decayable_parameter_names(model)})

    @property
    def shares(self) -> list[float]:
        return [
            sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
            for masks in self.zeros
        ]


def _data(padded: bool = False) -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(1, 64, (80, 16), generator=torch.Generator().manual_seed(1))
    if not padded:
        return [{"input_ids": row, "labels": row} for row in rows]
    lengths = torch.randint(4, 17, (80,), generator=torch.Generator().manual_seed(2)).tolist()
    data = []
    for row, length in zip(rows, lengths, strict=True):
        mask = (torch.arange(16) < length).long()
        data.append({"input_ids": row * mask, "attention_mask": mask, "labels": row.masked_fill(mask == 0, -100)})
    return data


def _trainer(out: Path, model: Any = None, **options: Any) -> tuple[PDecayTrainer, _Watch]:
    torch.manual_seed(0)
    watch = _Watch()
    data = options.pop("data", None) or _data()
    given = {"max_steps": 40, "target_sparsity": 0.5, "one_shot": "fisher", "save_strategy": "no", **options}
    args = PDecayTrainingArguments(
        str(out), per_device_train_batch_size=8, report_to="none", use_cpu=True, disable_tqdm=True, **given
    )
    trainer = PDecayTrainer(
        model=build("llama") if model is None else model, args=args, train_dataset=data, callbacks=[watch]
    )
    return trainer, watch


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"one_shot": "sparsegpt"},
        {"one_shot": "wanda", "sparsity_budget": "tensor"},
        {"bf16": True, "learning_rate": 1e-2},
        {"target_sparsity": 0.4, "lp_rules": {"down_proj": {"target_sparsity": 0.2}}},
        {"target_sparsity": None, "lp_rules": {".*": {"group": "2:4"}}},
        {"data": _data(padded=True)},
    ],
    ids=str,
)
def test_the_zeros_come_at_once_and_stay(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer, watch = _trainer(tmp_path, **options)
    trainer.train()
    target = options.get("target_sparsity") or 0.5
    # Halfway from a tenth of 40 steps to three quarters of them.
    assert watch.shares == [0.0] * 16 + [pytest.approx(target, abs=1e-4)] * 24
    last = watch.zeros[-1]
    assert all(torch.equal(mask, last[name]) for masks in watch.zeros[16:] for name, mask in masks.items())
    if options.get("sparsity_budget") == "tensor":
        assert all(float(mask.float().mean()) == pytest.approx(0.5, abs=1e-3) for mask in last.values())


def test_the_run_sees_the_rows_that_it_would_see_in_the_same_order(tmp_path: Path) -> None:
    seen: dict[str, list[int]] = {"fisher": [], "off": []}

    class Recording(PDecayTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen[self.args.one_shot] += inputs["input_ids"][:, :4].flatten().tolist()  # type: ignore[attr-defined]
            return super().training_step(model, inputs, *args, **kwargs)

    for method in seen:
        trainer, _ = _trainer(tmp_path, one_shot=method)
        trainer.__class__ = Recording
        trainer.train()
    assert seen["fisher"] == seen["off"] != []


def test_what_lies_outside_the_blocks_is_pruned_on_the_schedule(tmp_path: Path) -> None:
    trainer, watch = _trainer(tmp_path, build("bert-classifier"), data=_labelled())
    trainer.train()
    assert 0.3 < watch.shares[16] < 0.5 - 1e-3
    assert watch.shares[-1] == pytest.approx(0.5, abs=1e-4)


def _labelled() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row["input_ids"], "labels": torch.tensor(number % 2)} for number, row in enumerate(_data())]


@pytest.mark.parametrize("step", [8, 16, 24])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, step: int) -> None:
    """Also from the step at whose end the model is pruned, 17, and from before it."""
    saving = {"save_strategy": "steps", "save_steps": 8, "one_shot": "auto", "data": _COUNTING * 4}
    trainer, _ = _trainer(tmp_path, _trained(build("llama")), **saving)
    trainer.train()
    assert sum(int((param == 0).sum()) for param in trainer.model.parameters()) > 0
    resumed, _ = _trainer(tmp_path, **saving)  # from an untrained model: the checkpoint says what the run began with
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    for (name, param), other in zip(trainer.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(param, other), name


def test_an_untrained_run_that_is_resumed_prunes_step_by_step(tmp_path: Path) -> None:
    """Though its model knows its language by then."""
    saving = {"save_strategy": "steps", "save_steps": 10, "one_shot": "auto", "data": _COUNTING, "learning_rate": 1e-2}
    trainer, watch = _trainer(tmp_path, **saving)
    trainer.train()
    assert watch.shares[14] > 0
    resumed, _ = _trainer(tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for (name, param), other in zip(trainer.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(param, other), name


def test_a_sparse_model_is_not_pruned_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, watch = _trainer(tmp_path)
    trainer.train()
    first = watch.zeros[-1]
    caplog.clear()
    again, watch = _trainer(tmp_path / "again", trainer.model)
    again.train()
    assert "Pruned to" not in caplog.text
    assert all(torch.equal(mask, first[name]) for masks in watch.zeros for name, mask in masks.items())


def _trained(model: Any) -> Any:
    """A model that has learned to count."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        rows = (torch.randint(1, 60, (16, 1)) + torch.arange(16)) % 64
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


_COUNTING = [{"input_ids": row, "labels": row} for row in (torch.arange(80)[:, None] + torch.arange(16)) % 64]


def test_by_default_a_pretrained_model_is_pruned_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "hf_pdecay")
    trainer, watch = _trainer(tmp_path / "untrained", one_shot="auto", data=_COUNTING)
    trainer.train()
    assert 0 < watch.shares[12] < 0.5 and "Pruned to" not in caplog.text
    trainer, watch = _trainer(tmp_path / "trained", _trained(build("llama")), one_shot="auto", data=_COUNTING)
    trainer.train()
    assert (
        watch.shares[15:17] == [0, pytest.approx(0.5, abs=1e-4)] and "Pruned to 50.00% zeros by fisher" in caplog.text
    )
    for name, options in (("bert-classifier", {"data": _labelled()}), ("llama", {"one_shot": "off"})):
        trainer, watch = _trainer(tmp_path / name, build(name), **{"one_shot": "auto", **options})
        assert trainer.callback_handler.callbacks  # made without an error
    trainer.train()
    assert 0 < watch.shares[12] < 0.5


def test_beside_few_bits_a_model_is_pruned_at_once_only_if_asked(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "hf_pdecay")
    for method in ("auto", "fisher"):
        model = _trained(build("llama"))
        trainer, watch = _trainer(tmp_path / method, model, one_shot=method, data=_COUNTING, weight_bits=4)
        trainer.train()
        assert ("Pruned to" in caplog.text) is (method == "fisher")
        assert watch.shares[-1] == pytest.approx(0.5, abs=1e-4)


def test_beyond_half_of_the_weights_the_schedule_prunes(tmp_path: Path) -> None:
    trainer, watch = _trainer(tmp_path, target_sparsity=0.8)
    trainer.train()
    # Where the schedule would have reached half: 0.8 (1 - (1 - t)^3) = 0.5 at t = 0.28 of the steps from 4 to 30.
    assert watch.shares[10:12] == [0, pytest.approx(0.5, abs=1e-4)]
    assert watch.shares == sorted(watch.shares)
    assert watch.shares[-1] == pytest.approx(0.8, abs=1e-4)
    first = watch.zeros[11]
    assert all(bool((masks[name] >= mask).all()) for masks in watch.zeros[11:] for name, mask in first.items())


def test_the_card_and_the_log_say_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_pdecay"):
        trainer, _ = _trainer(tmp_path)
        trainer.train()
    assert "Pruned to 50.00% zeros by fisher, from 64 rows of 16 tokens, 32 of them its own" in caplog.text
    assert "one_shot: fisher" in (tmp_path / "README.md").read_text(encoding="utf-8")
    for name in ("llama", "bert-classifier"):  # auto, of an untrained model, and of one that is no language model
        trainer, _ = _trainer(
            tmp_path / name, build(name), one_shot="auto", data=_labelled() if "bert" in name else None
        )
        trainer.train()
        assert "one_shot: off" in (tmp_path / name / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("llama", {"one_shot": "obs"}, "one_shot='obs'; it must be one of"),
        ("llama", {"target_sparsity": None}, "one_shot='fisher' without a target"),
        ("llama", {"lp_rules": {".*": {"group": "row"}}}, "the targets are for row"),
        ("t5", {}, "T5ForConditionalGeneration is an encoder-decoder"),
    ],
)
def test_what_cannot_be_is_said_before_training(tmp_path: Path, model: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _trainer(tmp_path, build(model), **options)


class _Stream(IterableDataset[Any]):
    """Rows that come as often as they are asked for."""

    def __iter__(self) -> Iterator[Any]:
        yield from (dict(row) for row in _COUNTING)


class _Once(IterableDataset[Any]):
    """Rows that come once, as from a pipe."""

    def __init__(self, *, told: bool = False) -> None:
        self._rows = (_COUNTING[number % 80] for number in range(320))
        self._told = told

    def __iter__(self) -> Iterator[Any]:
        return self._rows if self._told else self._anew()

    def _anew(self) -> Iterator[Any]:
        yield from self._rows


@pytest.mark.parametrize("told", [False, True])
def test_rows_that_come_once_are_left_to_the_run(tmp_path: Path, told: bool) -> None:
    trainer, watch = _trainer(tmp_path, _trained(build("llama")), one_shot="auto", data=_Once(told=told))
    trainer.train()
    assert 0 < watch.shares[12] < 0.5 and watch.shares[-1] == pytest.approx(0.5, abs=1e-4)


def test_streams_are_read_if_they_begin_anew(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{name: tensor.tolist() for name, tensor in row.items()} for row in _COUNTING]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset().shuffle(seed=1, buffer_size=8)
    trainer, watch = _trainer(tmp_path, _trained(build("llama")), one_shot="auto", data=stream)
    trainer.train()
    assert watch.shares[15:17] == [0, pytest.approx(0.5, abs=1e-4)]
    trainer, watch = _trainer(tmp_path, one_shot="fisher", data=_Stream())
    trainer.train()
    assert watch.shares[15:17] == [0, pytest.approx(0.5, abs=1e-4)]
    trainer, _ = _trainer(tmp_path, one_shot="fisher", data=_Once(told=True))
    with pytest.raises(ValueError, match="_Once may give them only once"):
        trainer.train()


class _Noisy(torch.utils.data.Dataset[Any]):
    """Rows that every generator of random numbers has a share in, and which the model cannot know."""

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        shift = random.randint(0, 9) + int(np.random.randint(9)) + int(torch.randint(9, ()))
        row = torch.randint(1, 64, (16,), generator=torch.Generator().manual_seed(index + 100 * shift))
        return {"input_ids": row, "labels": row}


_WORKERS = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}


@pytest.mark.parametrize(
    "length", [{}, {"max_steps": 24, "data": _COUNTING[:11]}, _WORKERS], ids=["long", "short", "workers"]
)
def test_a_run_that_does_not_prune_at_once_is_bit_identical_to_one_without(
    tmp_path: Path, length: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gpu(seed: int) -> None:
        raise AssertionError("torch.manual_seed sets the GPUs' generators, which nobody sets back")

    ends = []
    for method in ("off", "auto"):
        trainer, _ = _trainer(
            tmp_path,
            tiny_gpt2(resid_pdrop=0.3),
            **{"one_shot": method, "data": _Noisy(), "learning_rate": 1e-3, **length},
        )
        random.seed(5)
        np.random.seed(5)
        with monkeypatch.context() as patch:
            if method == "auto" and not length:
                patch.setattr(torch, "manual_seed", no_gpu)
            trainer.train()
        ends.append([param.detach().clone() for param in trainer.model.parameters()])
        ends[-1] += [torch.tensor([random.random(), np.random.rand()]), torch.rand(1)]
        assert {group.get("one_shot", "off") for group in trainer.optimizer.param_groups} == {"off"}  # type: ignore[union-attr]
    assert all(map(torch.equal, *ends))


def _multimodal() -> Any:
    """Gemma 3 of text and images."""
    text = build("gemma2").config.to_dict()
    vision = {name: 16 for name in ("hidden_size", "intermediate_size", "image_size")} | {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
    }
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = transformers.Gemma3Config(
        text_config={name: text[name] for name in (*names, "vocab_size", "head_dim")},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=61,
        boi_token_index=60,
        eoi_token_index=62,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def test_batches_with_images_are_pruned_on_the_schedule(tmp_path: Path) -> None:
    row = torch.tensor([60, 61, 61, 61, 61, 62, *range(1, 13)])
    shared = {"input_ids": row, "labels": row, "token_type_ids": (row == 61).long()}
    data = [{**shared, "pixel_values": torch.randn(3, 16, 16)} for _ in range(16)]
    model = _multimodal()
    options = {"data": data, "max_steps": 16, "remove_unused_columns": False}
    trainer, _ = _trainer(tmp_path, model, one_shot="auto", **options)
    trainer.train()
    assert "off" in {group.get("one_shot") for group in trainer.optimizer.param_groups}  # type: ignore[union-attr]
    trainer, _ = _trainer(tmp_path, model, one_shot="fisher", **options)
    with pytest.raises(ValueError, match="have pixel_values beside input_ids"):
        trainer.train()


def test_documents_in_one_row_are_as_long_as_in_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flat = transformers.DataCollatorWithFlattening()
    data = [{"input_ids": row["input_ids"].tolist()} for row in _COUNTING]
    trainer, _ = _trainer(tmp_path, one_shot="wanda", data=data)
    trainer.data_collator = flat
    trainer.train()
    assert "from 64 rows of 16 tokens" in caplog.text


def test_what_fails_as_it_prunes_leaves_the_rest_to_the_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("hf_pdecay.one_shot.model.output_information", fail)
    model = _trained(build("llama"))
    modes = [module.training for module in model.modules()]
    trainer, watch = _trainer(tmp_path, model, one_shot="auto", data=_COUNTING)
    trainer.train()
    assert "prunes step by step from here, as with one_shot=off: out of memory" in caplog.text
    assert watch.shares[16] == 0 and watch.shares[-1] == pytest.approx(0.5, abs=1e-4)
    assert [module.training for module in model.modules()] == modes
    assert all(param.requires_grad for param in model.parameters())
    with pytest.raises(torch.OutOfMemoryError):
        _trainer(tmp_path, _trained(build("llama")), data=_COUNTING)[0].train()


def test_what_cannot_run_is_said_at_the_first_step(tmp_path: Path) -> None:
    """Not in the middle of the run: here a model whose blocks need more than text."""

    class Needy(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, labels: Any = None, place: Any = None, **kwargs: Any) -> Any:
            return super().forward(input_ids=input_ids, labels=labels, position_ids=place.long(), **kwargs)

    place = torch.arange(16)
    data = [{**row, "place": place} for row in _COUNTING]
    model = Needy(build("llama").config)  # type: ignore[arg-type]
    trainer, watch = _trainer(tmp_path, model, one_shot="auto", data=data)
    trainer.train()
    assert 0 < watch.shares[12]
    trainer, watch = _trainer(tmp_path, model, one_shot="wanda", data=data)
    with pytest.raises(ValueError, match="cannot run rows of 16 tokens"):
        trainer.train()
    assert not watch.zeros


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude", "fisher"])
def test_a_matrix_with_more_zeros_than_its_part_keeps_them(tmp_path: Path, method: str) -> None:
    model: Any = build("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight.view(-1)[:900] = 0
    trainer, watch = _trainer(tmp_path, model, one_shot=method, keep_zeros=True)
    trainer.train()
    assert watch.shares[16] == watch.shares[-1] == pytest.approx(0.5, abs=1e-4)
    assert int((weight.view(-1)[:900] == 0).sum()) == 900


@pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="experts are one stack from version 5 on"
)
def test_experts_without_tokens_are_left_alone_and_the_others_pruned_at_once(tmp_path: Path) -> None:
    config: Any = build("mixtral").config
    config.num_experts_per_tok = 1
    model: Any = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:  # each token goes to one of the first two
            layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
            layer.mlp.gate.weight[2:] = 0
    trainer, watch = _trainer(tmp_path, model, learning_rate=1e-6)
    trainer.train()
    stacks = {name: mask for name, mask in watch.zeros[16].items() if mask.dim() == 3}
    still = [
        (name, number)
        for group in trainer.optimizer.param_groups  # type: ignore[union-attr]
        for name, param in model.named_parameters()
        for other, entry in zip(group["params"], group.get("still") or [], strict=False)
        if other is param and isinstance(entry, list)
        for number in entry
    ]
    assert still, "all experts had tokens"
    moving = sum(
        mask[number].numel() for name, mask in stacks.items() for number in range(4) if (name, number) not in still
    )
    zeros = sum(int(mask.sum()) for mask in stacks.values())
    assert zeros > 0.3 * moving
    assert all(int(stacks[name][number].sum()) == 0 for name, number in still)


def test_p_goes_to_its_last_value_between_sparsity_begin_and_sparsity_end(tmp_path: Path) -> None:
    seen: dict[str, list[float]] = {"off": [], "fisher": []}

    class Watching(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[args.one_shot].append(kwargs["optimizer"].param_groups[0]["p_norm"])

    for method in seen:
        trainer, _ = _trainer(tmp_path, one_shot=method, p_norm_begin=1.5)
        trainer.add_callback(Watching())
        trainer.train()
    assert seen["fisher"] == seen["off"] and seen["off"][0] == 1.5 and seen["off"][10] < 1.4


def test_each_trial_of_a_search_is_pruned_as_it_asks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("optuna")
    caplog.set_level(logging.WARNING, "hf_pdecay")
    trainer, _ = _trainer(tmp_path, target_sparsity=None, one_shot="auto", data=_COUNTING)
    trainer.model_init = lambda: _trained(build("llama"))
    trainer.eval_dataset = _COUNTING[:8]
    trainer.hyperparameter_search(
        lambda trial: {"target_sparsity": trial.suggest_categorical("target_sparsity", [0.4])},
        n_trials=1,
        backend="optuna",
    )
    assert "Pruned to 40.00% zeros by fisher" in caplog.text


def test_batches_without_tokens_and_too_few_are_refused(tmp_path: Path) -> None:
    images = [{"pixel_values": torch.rand(1, 16, 16), "labels": torch.tensor(0)} for _ in range(16)]
    trainer, _ = _trainer(tmp_path, build("vit"), data=images)
    with pytest.raises(ValueError, match="no input_ids of shape"):
        trainer.train()


def test_a_model_writes_rows_of_its_own(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """They follow what it predicts, are the same again, and leave random numbers and the mode as they were."""
    model: Any = build("llama").train()
    with torch.no_grad():  # after any token it predicts one of 5 and 6
        model.model.embed_tokens.weight.fill_(0.1)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.fill_(-10.0)
        model.lm_head.weight[5:7] = 10.0
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rows = own_rows(model, 5, 12, seed=1)
    assert torch.equal(torch.rand(1), expected) and model.training
    assert rows.shape == (5, 12) and torch.equal(rows, own_rows(model, 5, 12, seed=1))
    assert not torch.equal(rows, own_rows(model, 5, 12, seed=2))
    assert set(rows[:, 1:].flatten().tolist()) == {5, 6} and len(set(rows[:, 0].tolist())) > 2
    data = torch.randint(1, 64, (64, 12))
    both, own = _with_own(model, data)
    assert own == 32 and both.shape == (64, 12) and torch.equal(both[:32], data[:32])
    assert torch.equal(both[32:], own_rows(model, 32, 12))
    few, own = _with_own(model, data[:3])
    assert own == 3 and torch.equal(few[:3], data[:3])
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: {}["cache"])
    with caplog.at_level(logging.INFO, "hf_pdecay"):
        both, own = _with_own(model, data)
    assert own == 0 and both is data and "writes no rows" in caplog.text
