"""Perplexity and token accuracy of causal language models, as a metric for `evaluate` that can be fed batch by batch.

`evaluate` copies this file into its own cache and parses its import lines: one import on a line, no relative imports.
"""

import math
from typing import Any

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Token accuracy is the fraction of tokens that the model ranks first; perplexity is exp of the mean negative
log-likelihood (in nats) of the tokens. Each batch is reduced to three numbers, so neither logits nor tokens of a whole
evaluation set are held.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (array of int, any shape): the most probable token at each position.
    references (array of int, the same shape): the true token, already shifted to the position that predicts it.
    nll (array of float, the same shape, optional): negative log-likelihood of the true token, in nats.
    ignore_index (int): positions whose reference has this value are left out; -100 by default.
Returns:
    token_accuracy (float): NaN without tokens.
    loss (float): mean negative log-likelihood; only if every batch came with `nll`.
    perplexity (float): exp(loss), inf if that overflows.
    tokens (int): number of tokens counted.
Examples:
    >>> metric = evaluate.load("hf_pdecay/measurements/token_metrics")
    >>> metric.add_batch(predictions=[[1, 2]], references=[[1, 3]], nll=[[0.0, 2.0]])
    >>> metric.compute()  # doctest: +SKIP
    {'token_accuracy': 0.5, 'tokens': 2, 'loss': 1.0, 'perplexity': 2.718281828459045}
"""


class TokenMetrics(evaluate.Metric):
    """Token accuracy and perplexity, streaming."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            # The sums of a batch. Callers pass predictions, references and nll, see add_batch.
            features=datasets.Features(
                {
                    "tokens": datasets.Value("int64"),
                    "correct": datasets.Value("int64"),
                    "nll": datasets.Value("float64"),
                }
            ),
        )

    def add_batch(
        self, *, predictions: Any = None, references: Any = None, nll: Any = None, ignore_index: int = -100
    ) -> None:
        """Count one batch.

        Args:
            predictions: Most probable token at each position, integers of any shape.
            references: True token at each position, the same shape.
            nll: Negative log-likelihood of the true token in nats, the same shape.
            ignore_index: Positions with this reference are left out.

        Raises:
            ValueError: If the shapes differ or an input is missing.
        """
        if predictions is None or references is None:
            raise ValueError("Invalid batch: predictions and references must both be given")
        predictions = np.asarray(predictions)
        references = np.asarray(references)
        if predictions.shape != references.shape:
            raise ValueError(
                f"Invalid batch: predictions have the shape {predictions.shape}, references {references.shape}; "
                "they must be equal"
            )
        counted = references != ignore_index
        total = None  # of the negative log-likelihoods
        if nll is not None:
            nll = np.asarray(nll, dtype=np.float64)
            if nll.shape != references.shape:
                raise ValueError(
                    f"Invalid batch: nll has the shape {nll.shape}, references {references.shape}; they must be equal"
                )
            total = float(nll[counted].sum())
        correct = int((predictions == references)[counted].sum())
        super().add_batch(tokens=[int(counted.sum())], correct=[correct], nll=[total])

    def add(self, *, prediction: Any = None, reference: Any = None, nll: Any = None, ignore_index: int = -100) -> None:
        """Count one token or one sequence; arguments as in `add_batch`."""
        self.add_batch(predictions=prediction, references=reference, nll=nll, ignore_index=ignore_index)

    def compute(
        self, *, predictions: Any = None, references: Any = None, nll: Any = None, ignore_index: int = -100
    ) -> dict[str, Any] | None:
        """Add a last batch, if one is given as in `add_batch`, and return the results of all batches.

        Returns:
            `token_accuracy`, `tokens` and, if every batch came with `nll`, `loss` and `perplexity`; None on processes
            other than the first.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references, nll=nll, ignore_index=ignore_index)
        return super().compute()

    def _compute(self, tokens: list[int], correct: list[int], nll: list[float | None]) -> dict[str, Any]:
        count = sum(tokens)
        results: dict[str, Any] = {"token_accuracy": sum(correct) / count if count else math.nan, "tokens": count}
        totals = [total for total in nll if total is not None]
        if len(totals) == len(nll):
            loss = math.fsum(totals) / count if count else math.nan
            results["loss"] = loss
            with np.errstate(over="ignore"):
                results["perplexity"] = float(np.exp(loss))
        return results
