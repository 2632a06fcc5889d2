"""Accuracy and F1 of classifiers, as a metric for `evaluate`.

`evaluate` copies this file into its own cache and parses its import lines: one import on a line, no relative imports.
"""

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score


_DESCRIPTION = """
Accuracy is the fraction of right predictions. F1 is the harmonic mean of precision and recall: the average over the
classes, and for two classes also that of the positive class.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of int): predicted classes.
    references (list of int): true classes.
    num_labels (int, optional): number of classes; by default the classes that occur are counted.
    pos_label (int): the positive class of a two-class task; 1 by default.
Returns:
    accuracy (float), f1_macro (float) and, for two classes, f1 (float).
Examples:
    >>> metric = evaluate.load("hf_pdecay/measurements/classification")
    >>> metric.compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])  # doctest: +SKIP
    {'accuracy': 0.75, 'f1_macro': 0.7333333333333334, 'f1': 0.6666666666666666}
"""


class Classification(evaluate.Metric):
    """Accuracy, macro F1 and binary F1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
            format="numpy",
            reference_urls=["https://scikit-learn.org/stable/modules/model_evaluation.html"],
        )

    def _compute(
        self, predictions: Any, references: Any, num_labels: int | None = None, pos_label: int = 1
    ) -> dict[str, float]:
        predictions = np.asarray(predictions)
        references = np.asarray(references)
        if not len(references):
            raise ValueError("Invalid predictions and references: both are empty; at least one pair is needed")
        present = np.union1d(predictions, references)
        if num_labels is not None and not (present.min() >= 0 and present.max() < num_labels):
            raise ValueError(
                f"Invalid num_labels: {num_labels}, but the classes run from {present.min()} to {present.max()}"
            )
        results = {
            "accuracy": float(accuracy_score(references, predictions)),
            # scikit-learn averages over the classes that occur or are predicted; the others have no F1.
            "f1_macro": float(f1_score(references, predictions, average="macro", zero_division=0)),
        }
        two_classes = num_labels == 2 if num_labels is not None else set(present.tolist()) <= {1 - pos_label, pos_label}
        if two_classes:
            positive = (references == pos_label, predictions == pos_label)
            results["f1"] = float(f1_score(*positive, zero_division=0))
        return results
