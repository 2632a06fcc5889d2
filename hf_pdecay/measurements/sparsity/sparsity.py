"""Exact zeros of saved models, as a measurement for `evaluate`.

`evaluate` copies this file into its own cache and parses its import lines: one import on a line, no relative imports.
"""

from pathlib import Path
from typing import Any

import datasets
import evaluate
import transformers

from hf_pdecay import measure_sparsity
from hf_pdecay.sparsity.defaults import NEAR_ZERO_THRESHOLD
from hf_pdecay.storage.untrusted import auto_config, model_class, on_meta


_DESCRIPTION = """
Sparsity is the fraction of weights that are exactly zero. Each model folder is loaded with the architecture that its
config.json names, and its weights are counted: those that weight decay applies to by default (the matrices of linear
and convolutional layers) and those of the whole model, shared tensors once.
"""

_KWARGS_DESCRIPTION = """
Args:
    data (list of str): folders, or names on the Hub, of models in the transformers format.
    near_zero_threshold (float): magnitude below which weights are near zero, exact zeros included; 1e-13 by
        default, as in the paper.
Returns:
    sparsity (list of float): exact zeros among the decayed weights, a fraction for each model.
    model_sparsity (list of float): exact zeros among all weights.
    near_zero (list of float): weights below the threshold among the decayed weights.
    parameters (list of int): number of all weights.
Examples:
    >>> sparsity = evaluate.load("hf_pdecay/measurements/sparsity")
    >>> sparsity.compute(data=["path/to/model"])  # doctest: +SKIP
    {'sparsity': [0.91], 'model_sparsity': [0.87], 'near_zero': [0.91], 'parameters': [842240]}
"""

_CITATION = """
@article{outmezguine2024decoupled,
  title = {Decoupled Weight Decay for Any p Norm},
  author = {Outmezguine, Nadav Joseph and Levi, Noam},
  journal = {arXiv preprint arXiv:2404.10824},
  year = {2024}
}
"""


class Sparsity(evaluate.Measurement):
    """Counts exact zeros in saved models."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"data": datasets.Value("string")}),
            reference_urls=["https://huggingface.co/papers/2404.10824"],
        )

    def _compute(self, data: list[str], near_zero_threshold: float = NEAR_ZERO_THRESHOLD) -> dict[str, list[Any]]:
        if not near_zero_threshold >= 0:
            raise ValueError(f"Invalid near_zero_threshold: {near_zero_threshold}; it must be 0 or more")
        results: dict[str, list[Any]] = {"sparsity": [], "model_sparsity": [], "near_zero": [], "parameters": []}
        for name in data:
            report = measure_sparsity(_load_model(name), near_zero_threshold=near_zero_threshold)
            results["sparsity"].append(report.sparsity)
            results["model_sparsity"].append(report.model_sparsity)
            results["near_zero"].append(
                (report.decayed.zeros + report.decayed.near_zeros) / max(report.decayed.parameters, 1)
            )
            results["parameters"].append(report.model.parameters)
        return results


def _load_model(name: str) -> transformers.PreTrainedModel:
    """Load `name` with the class that its configuration names, so that heads are counted as well."""
    try:
        config = auto_config(name)
        cls = model_class(config.architectures)
        if cls is None and config.architectures:
            raise ValueError(f"its config.json names {config.architectures[0]}, unknown to transformers")
        on_meta(cls or transformers.AutoModel.from_config, config, name)
    except ValueError as error:
        hint = error if Path(name).exists() else "the folder does not exist"
        raise ValueError(f"Invalid data: {name!r} is not a transformers model ({hint})") from error
    return (cls or transformers.AutoModel).from_pretrained(name)
