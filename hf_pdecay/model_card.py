"""The model card: HF's training summary, with the sparsity that was measured."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .rules import strength
from .sparsity import SparsityReport


if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from transformers.modelcard import TrainingSummary

TAGS = ("hf-pdecay", "sparse", "p-norm-weight-decay")

# Between these stands what we add to a card that another library writes.
_ADDED_FROM, _ADDED_TO = "<!-- hf_pdecay -->", "<!-- /hf_pdecay -->"
_ADDED = re.compile(f"{_ADDED_FROM}.*?{_ADDED_TO}\n?", flags=re.DOTALL)

_TIMES = re.compile(r"_(runtime|samples_per_second|steps_per_second|model_preparation_time)$")
_SECRET = re.compile(r"(?:^|[-_])(?:token|password|secret|api[-_]?key)$", re.IGNORECASE)
_HUB_METRICS = {"loss": "loss", "accuracy": "accuracy", "perplexity": "perplexity", "f1": "f1"}


@dataclass
class SparsityCard:
    """What the card says, and its rendering.

    Args:
        summary: HF's summary of the training.
        report: Zeros of the model that lies beside the card.
        log_history: ``TrainerState.log_history``; the last evaluation in it becomes the model-index.
        param_groups: The optimizer's groups, for the table of p and λ_p.
        command: The command that made the model.
        picture: Name of the picture beside the card, if there is one.
        skipped_steps: Steps skipped for NaN or infinite gradients.
    """

    summary: TrainingSummary
    report: SparsityReport
    log_history: list[dict[str, Any]]
    param_groups: Iterable[Mapping[str, Any]] = ()
    command: str = field(default_factory=lambda: command_line())
    picture: str | None = None
    skipped_steps: int = 0

    def eval_results(self) -> list[EvalResult]:
        """The last evaluation and the sparsity, as the Hub's model-index wants them."""
        from huggingface_hub import EvalResult

        tasks, datasets, tags = (
            _first(value) for value in (self.summary.tasks, self.summary.dataset, self.summary.dataset_tags)
        )
        evaluations = [entry for entry in self.log_history if any(key.startswith("eval_") for key in entry)]
        measured = {
            key.removeprefix("eval_"): value
            for key, value in (evaluations[-1] if evaluations else {}).items()
            if key.startswith("eval_") and isinstance(value, (int, float)) and not _TIMES.search(key)
        }
        measured["sparsity"] = self.report.sparsity
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

        metadata = self.summary.create_metadata()
        metadata.pop("model-index", None)
        metadata["tags"] = list(dict.fromkeys([*metadata.get("tags", []), *TAGS]))
        task = _first(self.summary.tasks)
        if task:
            metadata["pipeline_tag"] = task
        data = ModelCardData(**metadata, model_name=self.summary.model_name, eval_results=self.eval_results())

        body = re.sub(r"\A---\n.*?\n---\n", "", self.summary.to_model_card(), flags=re.DOTALL)
        section = render_section(self.report, self.param_groups, self.command, self.picture, self.skipped_steps)
        before, heading, after = body.partition("\n## Model description")
        versions = "".join(
            f"- {name} {number}\n"
            for name, number in (
                ("hf_pdecay", __version__),
                ("Accelerate", version("accelerate")),
                ("Python", platform.python_version()),
            )
        )
        return f"---\n{data.to_yaml()}\n---\n{before}\n{section}{heading}{after}{versions}{_template('citation.md')}"


def render_section(
    report: SparsityReport,
    param_groups: Iterable[Mapping[str, Any]],
    command: str,
    picture: str | None,
    skipped_steps: int,
) -> str:
    """Return what a card says of the sparsity, as Markdown; for the arguments see :class:`SparsityCard`."""
    from jinja2 import Environment

    environment = Environment(keep_trailing_newline=True, autoescape=False)
    return environment.from_string(_template("model_card.md.jinja")).render(
        report=report,
        picture=picture,
        command=command,
        skipped_steps=skipped_steps,
        groups=[
            {
                **group,
                "tensors": len(group["params"]),
                "strength": strength(group),
                "parameters": sum(param.numel() for param in group["params"]),
            }
            for group in param_groups
            if "rule" in group
        ],
    )


def add_section(card: str, section: str) -> str:
    """Return a card that another library wrote, with our tags, and with a section at its end.

    Args:
        card: Markdown, with or without a YAML header; a section that was added before is replaced.
        section: From :func:`render_section`.
    """
    import yaml

    header = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    metadata = (yaml.safe_load(header[1]) if header else None) or {}
    tags = metadata.get("tags") or []
    metadata["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *TAGS]))
    body = _ADDED.sub("", card[header.end() :] if header else card).rstrip()
    text = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    added = f"{_ADDED_FROM}\n{section}{_template('citation.md')}\n{_ADDED_TO}\n"
    return f"---\n{text}---\n{body}\n\n{added}"


def command_line() -> str:
    """Return the command of this process, without what may be a secret."""
    prefix, given = _launched_by_run() or ([], sys.argv)
    words, hide = [], False
    for word in given:
        name, equals, _ = word.partition("=")
        secret = word.startswith("-") and bool(_SECRET.search(name))
        words.append("***" if hide else f"{name}=***" if secret and equals else word)
        hide = secret and not equals
    script = words[0] if words else ""
    if not prefix and script.endswith(".py"):
        prefix = ["python"]
    return shlex.join([*prefix, *words])


def _launched_by_run() -> tuple[list[str], list[str]] | None:
    """What stands before the script and its own words, if ``hf-pdecay run`` runs it."""
    words = sys.orig_argv
    for number, (word, after) in enumerate(zip(words, words[1:], strict=False)):
        module = word == "hf_pdecay" and words[number - 1] == "-m"
        if after == "run" and (module or Path(word).stem == "hf-pdecay"):
            return ["hf-pdecay", "run"], words[number + 2 :]
    return None


def _template(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _first(value: Any) -> str | None:
    if isinstance(value, (list, tuple)):
        return str(value[0]) if value else None
    return value or None


def picture_in(folder: Path, name: str) -> str | None:
    """Return the picture's name if it lies in the folder."""
    return name if (folder / name).is_file() else None
