"""The model card: HF's training summary, with the sparsity that was measured."""

from __future__ import annotations

import copy
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..rules.table import lambda_text
from .card import add_section, add_tags, split_card
from .command_line import command_line
from .report import SparsityReport


if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from transformers import Trainer
    from transformers.modelcard import TrainingSummary

TAGS = ("hf-pdecay", "sparse", "p-norm-weight-decay")

_TIMES = re.compile(r"_(runtime|samples_per_second|steps_per_second|model_preparation_time)$")
_UNSEEN = 5e-5  # what does not show in a percentage of two digits
_HUB_METRICS = {"loss": "loss", "accuracy": "accuracy", "perplexity": "perplexity", "f1": "f1"}


@dataclass
class SparsitySection:
    """What a card says of the sparsity, and its rendering.

    Args:
        report: Zeros of the model that lies beside the card.
        param_groups: The optimizer's groups, for the table of p and λ_p.
        command: The command that made the model.
        picture: Name of the picture beside the card, if there is one.
        skipped_steps: Steps skipped for NaN or infinite gradients.
        trained: Whether these param groups, and the training that the summary tells of, are those of the model.
        adapter: Whether it is an adapter, whose base model does not lie beside the card.
        asked: Fraction of the decayed weights that was to be zero; None for no such target.
    """

    report: SparsityReport
    param_groups: Iterable[Mapping[str, Any]] = ()
    command: str = field(default_factory=command_line)
    picture: str | None = None
    skipped_steps: int = 0
    trained: bool = True
    adapter: bool = False
    asked: float | None = None

    def render(self) -> str:
        """Return it as Markdown."""
        from jinja2 import Environment

        environment = Environment(keep_trailing_newline=True, autoescape=False)
        return environment.from_string(_template("model_card.md.jinja")).render(
            report=self.report,
            picture=self.picture,
            command=self.command,
            skipped_steps=self.skipped_steps,
            trained=self.trained,
            adapter=self.adapter,
            asked=self.asked,
            missed=self.asked is not None and self.report.sparsity < self.asked - _UNSEEN,
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
    """A whole card, and its rendering.

    Args:
        summary: HF's summary of the training.
        section: What it says of the sparsity.
        log_history: ``TrainerState.log_history``; the last evaluation in it of the model that was saved becomes the
            model-index.
        best_step: The step whose checkpoint was loaded at the end of training, if one was.
        origin: What the first sentence says of it, up to "on", where HF's summary does not know; None for HF's.
    """

    summary: TrainingSummary
    section: SparsitySection
    log_history: list[dict[str, Any]]
    best_step: int | None = None
    origin: str | None = None

    def evaluation(self) -> dict[str, Any]:
        """The metrics of the last evaluation of the model that was saved, of all data sets, without ``eval_``."""
        # Evaluated in training was the model of that step; after it, the one that was loaded.
        ends = [number for number, entry in enumerate(self.log_history) if "train_runtime" in entry]
        every, later = (
            [entry for entry in self.log_history[begin:] if any(key.startswith("eval_") for key in entry)]
            for begin in (0, ends[-1] if ends else len(self.log_history))
        )
        at_best = [entry for entry in every if self.best_step is not None and entry.get("step") == self.best_step]
        entries = later or at_best or every
        return {
            key.removeprefix("eval_"): value
            for entry in entries
            if entry.get("step") == entries[-1].get("step")
            for key, value in entry.items()
            if key.startswith("eval_") and isinstance(value, (int, float)) and not _TIMES.search(key)
        }

    def eval_results(self) -> list[EvalResult]:
        """That evaluation and the sparsity, as the Hub's model-index wants them."""
        from huggingface_hub import EvalResult

        tasks, datasets, tags = (
            _first(value) for value in (self.summary.tasks, self.summary.dataset, self.summary.dataset_tags)
        )
        measured = {**self.evaluation(), "sparsity": self.section.report.sparsity}
        return [
            EvalResult(
                task_type=tasks or "other",
                dataset_type=tags or "unknown",
                dataset_name=datasets or "evaluation set of this run",
                metric_type=_HUB_METRICS.get(name, name),
                metric_name="exact zeros in decayed weights" if name == "sparsity" else name.replace("_", " "),
                metric_value=value,
            )
            for name, value in measured.items()
        ]

    def render(self) -> str:
        """Return the card as Markdown with its YAML header."""
        from huggingface_hub import ModelCardData

        summary = copy.copy(self.summary)
        evaluation = self.evaluation()
        summary.eval_results = {
            " ".join(part.capitalize() for part in name.split("_")): value for name, value in evaluation.items()
        } or None
        if not self.section.trained:
            summary.hyperparameters = None
        metadata = summary.create_metadata()
        metadata.pop("model-index", None)
        metadata["tags"] = list(dict.fromkeys([*metadata.get("tags", []), *TAGS]))
        task = _first(summary.tasks)
        if task:
            metadata["pipeline_tag"] = task
        data = ModelCardData(**metadata, model_name=summary.model_name, eval_results=self.eval_results())

        _, body = split_card(summary.to_model_card())
        if self.origin is not None:
            body = body.replace("This model was trained from scratch on", f"{self.origin} on", 1)
        before, heading, after = body.partition("\n## Model description")
        versions = "".join(
            f"- {name} {number}\n"
            for name, number in (
                ("hf_pdecay", __version__),
                ("Accelerate", version("accelerate")),
                ("Python", platform.python_version()),
            )
        )
        text = f"{before}\n{self.section.render()}{heading}{after}{versions}{_template('citation.md')}"
        return f"---\n{data.to_yaml()}\n---\n{text}"


def summary_of(trainer: Trainer, given: Mapping[str, Any]) -> TrainingSummary:
    """Return HF's summary of a training.

    Args:
        trainer: Whose training.
        given: What ``create_model_card`` was given.
    """
    from transformers.modelcard import TrainingSummary

    kwargs = dict(given)
    license = kwargs.pop("license", None)
    if not hasattr(trainer.model, "config"):  # a plain module, of which HF's summary would ask it
        kwargs.setdefault("finetuned_from", "")
    # With a licence given HF's summary does not ask the Hub for that of the base model.
    summary = TrainingSummary.from_trainer(trainer, license=license or "unknown", **kwargs)
    summary.license = license
    # What HF could not find out it passes on as empty names.
    summary.finetuned_from = summary.finetuned_from or None
    if summary.dataset_tags == [None]:
        summary.dataset_tags = summary.dataset_args = summary.dataset_metadata = None
        summary.dataset = None if summary.dataset == [None] else summary.dataset
    return summary


def origin_of(model: Any, *, adapter: bool) -> str | None:
    """What a card says of where a model comes from, where HF would say "from scratch" of one that was in a folder."""
    if adapter:
        base = getattr(model.active_peft_config, "base_model_name_or_path", None)
        return f"This adapter of {Path(base).name} was trained" if base else "This adapter was trained"
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    # There may have been weights in it, or a config alone.
    return "This model was trained" if path and os.path.isdir(path) else None


def settings_in_words(param_groups: Sequence[Mapping[str, Any]]) -> str:
    """What a card says after an optimizer's name: of its settings those that are neither the decay's nor rates."""
    settings = {name: value for group in param_groups for name, value in group.items()}
    shown = [f"{name}={settings[name]}" for name in ("betas", "momentum", "nesterov", "eps") if name in settings]
    return f" with {', '.join(shown)}" if shown else ""


def add_sparsity(card: str, section: SparsitySection) -> str:
    """Return a card that another library wrote with our tags, our section and the citation."""
    return add_section(add_tags(card, TAGS), section.render() + _template("citation.md"))


def _template(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _first(value: Any) -> str | None:
    if isinstance(value, (list, tuple)):
        return str(value[0]) if value else None
    return value or None
