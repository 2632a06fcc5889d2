"""The model card: the training summary of transformers, with the measured sparsity."""

from __future__ import annotations

import copy
import os
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..rules.table import lambda_text
from .card_text import add_section, add_tags, split_card
from .command_line import command_line
from .report import SparsityReport


if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from transformers import Trainer
    from transformers.modelcard import TrainingSummary

TAGS = ("hf-pdecay", "sparse", "p-norm-weight-decay")

_TIMES = re.compile(r"_(runtime|samples_per_second|steps_per_second|model_preparation_time)$")
_UNSEEN = 5e-5  # less than a percentage of two digits shows
_MEASURED = {"sparsity": "exact zeros in decayed weights", "unchanged": "weights equal to the base"}
_HUB_METRICS = {"loss": "loss", "accuracy": "accuracy", "perplexity": "perplexity", "f1": "f1"}


@dataclass
class SparsitySection:
    """The section of a card on sparsity.

    Args:
        picture: Name of the picture beside the card.
        skipped_steps: Steps skipped because of NaN or infinite gradients.
        trained: Whether this run trained the model.
        adapter: Whether the model is an adapter, whose base model is not beside the card.
        asked: Target fraction of zeros, or of unchanged weights, in all weights that decay to zero, or to the base.
        weight_bits: Bits of the weights that were rounded, by the name of the tensor.
        activation_bits: Bits of the inputs that are rounded, by the name of the layer.
    """

    report: SparsityReport
    param_groups: Iterable[Mapping[str, Any]] = ()
    command: str = field(default_factory=command_line)
    picture: str | None = None
    skipped_steps: int = 0
    trained: bool = True
    adapter: bool = False
    asked: float | None = None
    weight_bits: Mapping[str, float] = field(default_factory=dict)
    activation_bits: Mapping[str, float] = field(default_factory=dict)

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags of the card; a model with few changes need not have zeros."""
        dense = self.report.delta is not None and not self.report.decayed.tensors
        return tuple("delta" if dense and tag == "sparse" else tag for tag in TAGS)

    def render(self) -> str:
        """Return the section as Markdown."""
        from jinja2 import Environment

        environment = Environment(keep_trailing_newline=True, autoescape=False)
        return environment.from_string(_template("model_card.md.jinja")).render(
            **vars(self),
            of_weights=_by_width(self.weight_bits, "tensors"),
            of_inputs=_by_width(self.activation_bits, "layers"),
            missed=self.asked is not None and self.report.main.sparsity < self.asked - _UNSEEN,
            groups=[
                {
                    **group,
                    "tensors": len(group["params"]),
                    "strength": lambda_text(group),
                    "parameters": sum(param.numel() for param in group["params"]),
                }
                for group in (self.param_groups if self.trained else ())
                if "rule" in group
            ],
        )


@dataclass
class SparsityCard:
    """A whole card.

    Args:
        log_history: ``TrainerState.log_history``. Its last evaluation of the saved model becomes the model-index.
        best_step: The step whose checkpoint was loaded at the end of training; None for the last step.
        origin: Beginning of the first sentence, up to "on"; None for that of the summary.
    """

    summary: TrainingSummary
    section: SparsitySection
    log_history: list[dict[str, Any]]
    best_step: int | None = None
    origin: str | None = None

    def evaluation(self) -> dict[str, Any]:
        """The metrics of the last evaluation of the saved model, for all data sets, without ``eval_``."""
        # After training the loaded model is evaluated; during training, the model of the step.
        ends = [number for number, entry in enumerate(self.log_history) if "train_runtime" in entry]
        later = _evaluations(self.log_history[ends[-1] :]) if ends else []
        during = _evaluations(self.log_history)
        at_best = [entry for entry in during if self.best_step is not None and entry.get("step") == self.best_step]
        entries = later or at_best or during
        return {
            key.removeprefix("eval_"): value
            for entry in entries
            if entry.get("step") == entries[-1].get("step")
            for key, value in entry.items()
            if key.startswith("eval_") and isinstance(value, (int, float)) and not _TIMES.search(key)
        }

    def eval_results(self) -> list[EvalResult]:
        """The evaluation and the sparsity in the form of the Hub's model-index."""
        from huggingface_hub import EvalResult

        tasks, datasets, tags = (
            _first(value) for value in (self.summary.tasks, self.summary.dataset, self.summary.dataset_tags)
        )
        report = self.section.report
        measured = dict(self.evaluation())
        if report.delta is not None:
            measured["unchanged"] = report.delta.sparsity
        if report.delta is None or report.decayed.tensors:
            measured["sparsity"] = report.sparsity
        return [
            EvalResult(
                task_type=tasks or "other",
                dataset_type=tags or "unknown",
                dataset_name=datasets or "evaluation set of this run",
                metric_type=_HUB_METRICS.get(name, name),
                metric_name=_MEASURED.get(name, name.replace("_", " ")),
                metric_value=value,
            )
            for name, value in measured.items()
        ]

    def render(self) -> str:
        """Return the card as Markdown with its YAML header."""
        from huggingface_hub import ModelCardData

        summary = copy.copy(self.summary)
        summary.eval_results = {_capitalized(name): value for name, value in self.evaluation().items()} or None
        if not self.section.trained:
            summary.hyperparameters = None
        metadata = summary.create_metadata()
        metadata.pop("model-index", None)
        metadata["tags"] = list(dict.fromkeys([*metadata.get("tags", []), *self.section.tags]))
        task = _first(summary.tasks)
        if task:
            metadata["pipeline_tag"] = task
        data = ModelCardData(**metadata, model_name=summary.model_name, eval_results=self.eval_results())

        _, body = split_card(summary.to_model_card())
        if self.origin is not None:
            body = body.replace("This model was trained from scratch on", f"{self.origin} on", 1)
        before, heading, after = body.partition("\n## Model description")
        numbers = {"hf_pdecay": __version__, "Accelerate": version("accelerate"), "Python": platform.python_version()}
        versions = "".join(f"- {name} {number}\n" for name, number in numbers.items())
        text = f"{before}\n{self.section.render()}{heading}{after}{versions}{_template('citation.md')}"
        return f"---\n{data.to_yaml()}\n---\n{text}"


def summary_of(trainer: Trainer, given: Mapping[str, Any]) -> TrainingSummary:
    """Return the training summary of transformers; ``given`` holds the arguments of ``create_model_card``."""
    from transformers.modelcard import TrainingSummary

    kwargs = dict(given)
    license = kwargs.pop("license", None)
    if not hasattr(trainer.model, "config"):  # a plain module, which has no name of a base model
        kwargs.setdefault("finetuned_from", "")
    # With a licence, the summary does not ask the Hub for that of the base model.
    summary = TrainingSummary.from_trainer(trainer, license=license or "unknown", **kwargs)
    summary.license = license
    # The summary has empty names for what it does not know.
    summary.finetuned_from = summary.finetuned_from or None
    if summary.dataset_tags == [None]:
        summary.dataset_tags = summary.dataset_args = summary.dataset_metadata = None
        summary.dataset = None if summary.dataset == [None] else summary.dataset
    return summary


def origin_of(model: Any, *, adapter: bool) -> str | None:
    """The beginning of a card's first sentence; None for "trained from scratch", which is wrong for local models."""
    if adapter:
        base = getattr(model.active_peft_config, "base_model_name_or_path", None)
        return f"This adapter of {Path(base).name} was trained" if base else "This adapter was trained"
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    # The folder may hold weights, or only a config.
    return "This model was trained" if path and os.path.isdir(path) else None


def settings_in_words(param_groups: Sequence[Mapping[str, Any]]) -> str:
    """An optimizer's settings other than those of the decay and the learning rate, for the card."""
    settings = {name: value for group in param_groups for name, value in group.items()}
    shown = [f"{name}={settings[name]}" for name in ("betas", "momentum", "nesterov", "eps") if name in settings]
    return f" with {', '.join(shown)}" if shown else ""


def add_sparsity(card: str, section: SparsitySection) -> str:
    """Return a card that another library wrote with our tags, our section and the citation."""
    return add_section(add_tags(card, section.tags), section.render() + _template("citation.md"))


def _by_width(bits: Mapping[str, float], what: str) -> str:
    """``4 bits in 14 tensors and 8 bits in 2``, the most common width first; empty without any."""
    counts = [
        f"{width:g} bit{'s' * (width != 1)} in {count:,}" for width, count in Counter(bits.values()).most_common()
    ]
    return " and ".join([f"{count} {what}" if not place else count for place, count in enumerate(counts)])


def _evaluations(log_history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in log_history if any(key.startswith("eval_") for key in entry)]


def _capitalized(name: str) -> str:
    return " ".join(word.capitalize() for word in name.split("_"))


def _template(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _first(value: Any) -> str | None:
    if isinstance(value, (list, tuple)):
        return str(value[0]) if value else None
    return value or None
