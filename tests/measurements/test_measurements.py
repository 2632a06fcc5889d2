from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModel, BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_pdecay.measurements import MEASUREMENTS, load_measurement, measurement_path
from hf_pdecay.measurements.hooks import causal_lm_hooks, classification_hooks, reduce_causal_lm_logits


ROOT = Path(__file__).parents[2]


@pytest.fixture
def sparse_gpt2(tmp_path: Path) -> Path:
    """A saved GPT-2 in which a known half of the weights is zero, the tied embedding with them."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 32, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) < 0.5)
        model.transformer.h[0].mlp.c_fc.weight[0, :5] = 1e-15
    model.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def counted_by_hand(folder: Path, decayed: tuple[str, ...]) -> tuple[float, float, int]:
    tensors = load_file(folder / "model.safetensors")
    chosen = [array for name, array in tensors.items() if name.endswith(decayed)]
    zeros = [sum(int((array == 0).sum()) for array in group) for group in (chosen, tensors.values())]
    sizes = [sum(array.size for array in group) for group in (chosen, tensors.values())]
    return zeros[0] / sizes[0], zeros[1] / sizes[1], sizes[1]


class TestLoading:
    @pytest.mark.parametrize("name", MEASUREMENTS)
    def test_loads_by_name_and_by_path(self, name: str) -> None:
        assert load_measurement(name).name == name == evaluate.load(str(measurement_path(name))).name

    def test_an_unknown_name_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match="name='speed'; it must be one of classification, sparsity"):
            load_measurement("speed")

    @pytest.mark.slow
    def test_loads_with_empty_caches_in_many_processes_at_once(self, tmp_path: Path) -> None:
        code = (
            "from hf_pdecay.measurements import load_measurement\n"
            "metric = load_measurement('classification', keep_in_memory=False)\n"
            "print(metric.compute(predictions=[1, 0], references=[1, 1])['accuracy'])"
        )
        offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        environment = {**os.environ, **offline, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        for name in ("HF_MODULES_CACHE", "HF_EVALUATE_CACHE", "HF_METRICS_CACHE", "HF_DATASETS_CACHE"):
            environment.pop(name, None)
        command = [sys.executable, "-c", code]
        running = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        for process in running:
            out, err = process.communicate(timeout=300)
            assert (process.returncode, out.strip()) == (0, "0.5"), err


class TestSparsity:
    def test_counts_what_numpy_counts_in_the_files(self, sparse_gpt2: Path) -> None:
        decayed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        sparsity, model_sparsity, parameters = counted_by_hand(sparse_gpt2, decayed)
        results = load_measurement("sparsity").compute(data=[str(sparse_gpt2)])
        assert results["sparsity"] == [pytest.approx(sparsity, abs=1e-12)]
        assert results["model_sparsity"] == [pytest.approx(model_sparsity, abs=1e-12)]
        assert results["parameters"] == [parameters]  # the tied head is not in the file, and is counted once
        assert 0.4 < sparsity < 0.6

    def test_near_zeros_follow_the_threshold(self, sparse_gpt2: Path) -> None:
        measurement = load_measurement("sparsity")
        near, exact = (
            measurement.compute(data=[str(sparse_gpt2)], near_zero_threshold=threshold)["near_zero"][0]
            for threshold in (1e-13, 1e-20)
        )
        decayed = 2 * (16 * 48 + 16 * 16 + 2 * 16 * 64)
        assert round((near - exact) * decayed) == 5
        with pytest.raises(ValueError, match="near_zero_threshold: -1"):
            measurement.compute(data=[str(sparse_gpt2)], near_zero_threshold=-1)

    def test_takes_several_models_and_the_head_that_the_config_names(self, sparse_gpt2: Path, tmp_path: Path) -> None:
        shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 16}
        bert = BertForSequenceClassification(BertConfig(**shape, vocab_size=20, num_labels=3))
        bert.save_pretrained(tmp_path / "bert")
        results = load_measurement("sparsity").compute(data=[str(tmp_path / "bert"), str(sparse_gpt2)])
        assert results["sparsity"][0] == 0 < results["sparsity"][1]
        assert results["parameters"][0] == sum(parameter.numel() for parameter in bert.parameters())
        assert results["parameters"][0] > sum(p.numel() for p in AutoModel.from_config(bert.config).parameters())

    def test_what_is_no_model_is_named(self, tmp_path: Path) -> None:
        measurement = load_measurement("sparsity")
        with pytest.raises(ValueError, match="is not a transformers model"):
            measurement.compute(data=[str(tmp_path / "nowhere")])
        config = {"model_type": "gpt2", "architectures": ["NobodysModel"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="names NobodysModel"):
            load_measurement("sparsity").compute(data=[str(tmp_path)])


class TestTokenMetrics:
    def test_agrees_with_numpy_over_batches_of_any_shape(self) -> None:
        generator = np.random.default_rng(0)
        metric = load_measurement("token_metrics")
        hits: list[np.ndarray] = []
        losses: list[np.ndarray] = []
        for shape in ((4, 9), (1, 9), (7,)):
            references = generator.integers(0, 3, shape)
            references[..., -1] = -100
            predictions = generator.integers(0, 3, shape)
            nll = generator.exponential(size=shape)
            metric.add_batch(predictions=predictions, references=references, nll=nll)
            counted = references != -100
            hits.append((predictions == references)[counted])
            losses.append(nll[counted])
        results = metric.compute()
        loss = np.concatenate(losses).mean()
        assert results["tokens"] == 4 * 8 + 8 + 6
        assert results["token_accuracy"] == pytest.approx(np.concatenate(hits).mean())
        assert results["loss"] == pytest.approx(loss, rel=1e-12)
        assert results["perplexity"] == pytest.approx(math.exp(loss), rel=1e-12)

    def test_one_call_does_without_add_batch_and_forgets(self) -> None:
        metric = load_measurement("token_metrics")
        for _ in range(2):
            assert metric.compute(predictions=[1, 2], references=[1, 3]) == {"token_accuracy": 0.5, "tokens": 2}

    def test_without_all_likelihoods_there_is_no_perplexity(self) -> None:
        metric = load_measurement("token_metrics")
        metric.add_batch(predictions=[1], references=[1], nll=[0.5])
        metric.add_batch(predictions=[1], references=[2])
        assert set(metric.compute()) == {"token_accuracy", "tokens"}

    def test_the_disk_path_of_evaluate_works_too(self) -> None:
        metric = load_measurement("token_metrics", keep_in_memory=False)
        metric.add(prediction=[1, 1], reference=[1, 2], nll=[1.0, 3.0])
        assert metric.compute()["perplexity"] == pytest.approx(math.exp(2.0))

    def test_extremes(self) -> None:
        metric = load_measurement("token_metrics")
        assert metric.compute(predictions=[1], references=[1], nll=[1e5])["perplexity"] == math.inf
        assert math.isnan(metric.compute(predictions=[1], references=[-100])["token_accuracy"])

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            ({"predictions": [1]}, "must both be given"),
            ({"predictions": [1, 2], "references": [1]}, r"\(2,\), references \(1,\)"),
            ({"predictions": [1], "references": [1], "nll": [0.0, 1.0]}, "nll has the shape"),
        ],
    )
    def test_a_batch_that_does_not_fit_is_refused(self, batch: dict[str, list[float]], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_measurement("token_metrics").add_batch(**batch)


class TestClassification:
    @pytest.mark.parametrize("classes", [2, 3, 5])
    def test_agrees_with_scikit_learn(self, classes: int) -> None:
        generator = np.random.default_rng(classes)
        predictions, references = generator.integers(0, classes, (2, 200))
        results = load_measurement("classification").compute(predictions=predictions, references=references)
        assert results["accuracy"] == pytest.approx(accuracy_score(references, predictions))
        assert results["f1_macro"] == pytest.approx(f1_score(references, predictions, average="macro"))
        if classes == 2:
            assert results["f1"] == pytest.approx(f1_score(references, predictions))
        else:
            assert "f1" not in results

    def test_f1_by_hand(self) -> None:
        # class 1: 1 true positive, 1 false positive, 1 false negative
        results = load_measurement("classification").compute(predictions=[1, 1, 0, 0], references=[1, 0, 1, 0])
        assert results == {"accuracy": 0.5, "f1_macro": pytest.approx(0.5), "f1": pytest.approx(0.5)}

    def test_the_number_of_classes_decides_over_what_occurs(self) -> None:
        metric = load_measurement("classification")
        assert "f1" not in metric.compute(predictions=[0, 1], references=[0, 1], num_labels=3)
        with pytest.raises(ValueError, match="num_labels: 2, but the classes run from 0 to 2"):
            metric.compute(predictions=[0, 1], references=[0, 2], num_labels=2)


class TestHooks:
    def test_logits_become_predictions_and_likelihoods(self) -> None:
        logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([[-100, 1, 2, 3, 4], [0, 6, -100, 5, 0]])
        predictions, nll = reduce_causal_lm_logits((logits, "cache"), labels)
        assert predictions.tolist() == logits[:, :-1].argmax(-1).tolist()
        expected = -torch.log_softmax(logits.double(), -1)
        for row, column in ((0, 0), (0, 3), (1, 2)):
            assert nll[row, column] == pytest.approx(float(expected[row, column, labels[row, column + 1]]), rel=1e-5)
        assert nll[1, 1] == 0  # left out

    def test_the_causal_lm_hook_streams(self) -> None:
        from transformers import EvalPrediction

        compute = causal_lm_hooks()["compute_metrics"]
        labels = torch.tensor([[-100, 1, 2]])
        first = EvalPrediction((torch.tensor([[1, 2]]), torch.tensor([[0.0, 1.0]])), labels)
        last = EvalPrediction((torch.tensor([[0, 0]]), torch.tensor([[2.0, 3.0]])), labels)
        assert compute(first, compute_result=False) == {}
        assert compute(last, compute_result=True) == {"perplexity": pytest.approx(math.exp(1.5)), "token_accuracy": 0.5}

    def test_the_classification_hook(self) -> None:
        from transformers import EvalPrediction

        hooks = classification_hooks(2)
        scores = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
        predictions = hooks["preprocess_logits_for_metrics"](scores, torch.tensor([1, 1]))
        results = hooks["compute_metrics"](EvalPrediction(predictions.numpy(), np.array([1, 1])))
        assert results["accuracy"] == 0.5
        assert results["f1"] == pytest.approx(2 / 3)


def test_a_missing_package_is_named_as_pip_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.import_module

    def without_sklearn(name: str, *args: Any) -> Any:
        if name.split(".")[0] == "sklearn":
            raise ImportError(f"No module named {name!r}", name=name)
        return find(name, *args)

    monkeypatch.setattr(importlib, "import_module", without_sklearn)
    with pytest.raises(ImportError, match=r"pip install scikit-learn, or the extra 'hf-pdecay\[examples\]'"):
        load_measurement("classification")
