"""The trainer of sentence-transformers, by flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_pdecay import SparsityReport

from ..helpers.local_files import bert, run_example, sentences, zeros_on_disk


st = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.losses")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("registered")]


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return st.SentenceTransformer(str(bert(tmp_path / "bert")), device="cpu")  # with mean pooling


def _args(folder: Path, **options: Any) -> Any:
    return st.SentenceTransformerTrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        max_steps=20,
        save_steps=20,
        learning_rate=1e-3,
        optim="adamw_lp",
        optim_args="p_norm=0.8,target_sparsity=0.5",
        **options,
    )


def _pairs(**columns: Any) -> Dataset:
    return Dataset.from_dict({"anchor": sentences(48), "positive": sentences(48, 1), **columns})


def test_a_run_ends_sparse_and_loads_again(model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    loss = losses.MultipleNegativesRankingLoss(model)
    trainer = st.SentenceTransformerTrainer(model=model, args=_args(folder), train_dataset=_pairs(), loss=loss)
    trainer.train()
    trainer.save_model()
    zeros = zeros_on_disk(folder, "pooler")  # which mean pooling does not use
    assert zeros == pytest.approx(0.5, abs=1e-4)
    assert SparsityReport.load(folder / "sparsity.json").sparsity == zeros
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "- sentence-transformers\n" in card and "- hf-pdecay\n" in card
    assert card.count("## Sparsity") == 1 and f"{zeros:.2%} of the decayed weights" in card
    again = st.SentenceTransformer(str(folder), device="cpu")
    assert torch.equal(
        again.encode("a red boat", convert_to_tensor=True), model.encode("a red boat", convert_to_tensor=True)
    )


def test_weights_of_a_loss_are_trained_undecayed_and_learning_rates_by_name_hold(model: Any, tmp_path: Path) -> None:
    loss = losses.SoftmaxLoss(model, sentence_embedding_dimension=32, num_labels=2)
    before = {name: param.detach().clone() for name, param in loss.named_parameters()}
    trainer = st.SentenceTransformerTrainer(
        model=model,
        args=_args(tmp_path / "out", learning_rate_mapping={"layer.0": 1e-4}),
        train_dataset=_pairs(label=[number % 2 for number in range(48)]),
        loss=loss,
    )
    trainer.train()
    names = {id(param): name for name, param in loss.named_parameters()}
    groups = {names[id(param)]: group for group in trainer.optimizer.param_groups for param in group["params"]}
    assert groups.keys() == before.keys()  # each once, those of the loss with them
    for name, group in groups.items():
        assert group["initial_lr"] == (1e-4 if "layer.0" in name else 1e-3)
        assert group["decayed"] == (
            ".layer." in name and "Norm" not in name and "bias" not in name or "pooler.dense.weight" in name
        )
    assert not torch.equal(loss.classifier.weight, before["classifier.weight"])
    assert (loss.classifier.weight != 0).all()


def test_the_example(tmp_path: Path) -> None:
    run_example("sentence_embeddings", tmp_path / "out", 0.8, "pooler")
