"""What a step learns from a teacher: the model's outputs beside the teacher's, and the loss that they make.

The Trainer, or a subclass, computes its loss as ever. Hooks on the model that it calls ask for the hidden states and
look at the outputs, so that the model runs once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..terminal import get_logger
from .distillation_loss import error_sum, kept_kl_sum, kl_sum
from .fused_head import FUSED, with_fused_fields, without_fused_head
from .settings import DecaySettings
from .teacher import accepts, make_teacher, plain, same_hidden
from .teacher_cache import TeacherCache, documents_of, keys_of


if TYPE_CHECKING:
    from transformers import Trainer

logger = get_logger(__name__)

# Outputs that are distributions over classes, each with the name of its labels.
_LOGITS = {"logits": "labels", "start_logits": "start_positions", "end_logits": "end_positions"}
# Hidden states of all layers, each with the name of the mask of its tokens.
_HIDDEN = {
    "hidden_states": "attention_mask",
    "encoder_hidden_states": "attention_mask",
    "decoder_hidden_states": "decoder_attention_mask",
}
LABELS = (*_LOGITS.values(), "shift_labels")
# What a teacher is not given: it computes no loss, and keeps nothing for a next token.
_NOT_FOR_TEACHERS = (
    *LABELS,
    *("num_items_in_batch", FUSED, "output_hidden_states", "return_loss"),
)
_IGNORED = -100


class Lesson:
    """A teacher, and what is known of the step that learns from it."""

    def __init__(self, trainer: Trainer, model: nn.Module, settings: DecaySettings) -> None:
        self.cache = None if settings.teacher_cache is None else TeacherCache(settings.teacher_cache)
        self.teacher = make_teacher(trainer, model, settings, self.cache)
        self.inner = plain(model)
        ours = getattr(self.inner, "config", None)
        self.fits = same_hidden(ours, self.teacher.config) and accepts(model, "output_hidden_states")
        if settings.teacher_hidden is None and not self.fits:
            logger.warning("teacher_hidden is 0, because the teacher has another depth or width than the model.")
        elif settings.teacher_hidden is None and self.cache is not None:
            logger.warning("teacher_hidden is 0, because teacher_cache keeps no hidden states.")
        self.settings = settings
        self.seq2seq = bool(getattr(ours, "is_encoder_decoder", False))
        self.shifts = not self.seq2seq and _shifts(self.inner)
        self.takes_use_cache = accepts(model, "use_cache", by_name=True)
        self.counts: dict[str, Tensor | int] = {}
        self.sums: list[Tensor] = []  # of the teacher's and the ordinary loss since the last log
        self.steps = 0  # since then

    @property
    def hidden(self) -> float:
        """The weight of the hidden states."""
        weight = self.settings.teacher_hidden
        return float(self.fits and self.cache is None) if weight is None else weight

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[dict[str, Any]]:
        """Note the inputs and outputs of the first call of a model with gradients."""
        seen: dict[str, Any] = {}

        def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if seen or not torch.is_grad_enabled():
                return None
            seen["args"], seen["inputs"] = args, dict(kwargs)
            changed = dict(kwargs)
            if self.hidden:
                changed["output_hidden_states"] = True
            if kwargs.get(FUSED):
                changed = without_fused_head(changed)
            return args, changed

        def after(_: nn.Module, args: Any, outputs: Any) -> Any:
            if not seen or "outputs" in seen:
                return None
            seen["outputs"] = outputs
            return with_fused_fields(outputs, seen["inputs"]) if seen["inputs"].get(FUSED) else None

        handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after),
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def loss(
        self, trainer: Trainer, seen: Mapping[str, Any], labels: Mapping[str, Tensor], task: Tensor, items: Any
    ) -> Tensor:
        """Return the loss of a batch: the ordinary one and the teacher's, each times its weight."""
        outputs = seen.get("outputs")
        if seen.get("args"):
            raise ValueError(
                f"Invalid teacher: {type(trainer).__name__} gives {type(self.inner).__name__} its inputs by position, "
                "and a teacher needs their names; train without a teacher."
            )
        if not isinstance(outputs, Mapping):
            raise ValueError(
                f"Invalid teacher: {type(self.inner).__name__} returns a {type(outputs).__name__}, in which "
                "no logits are found; it must return a ModelOutput or dict."
            )
        inputs = {key: value for key, value in seen["inputs"].items() if key not in _NOT_FOR_TEACHERS}
        if self.seq2seq and "decoder_input_ids" not in inputs and "labels" in labels:
            inputs["labels"] = labels["labels"]  # from which the model makes the decoder's inputs

        @functools.cache
        def taught() -> Mapping[str, Any]:
            return self._ask(trainer, inputs)

        loss = torch.zeros((), device=task.device)
        if self.settings.teacher_logits:
            loss = loss + self.settings.teacher_logits * self._logits_loss(
                trainer, outputs, taught, inputs, labels, items
            )
        if self.hidden:
            loss = loss + self.hidden * self._hidden_loss(outputs, taught(), seen["inputs"], labels)
        if items is not None and trainer.args.average_tokens_across_devices:
            loss = loss * trainer.accelerator.num_processes  # as the Trainer does, because DDP averages
        self._note(loss, task, 1 if items is not None else trainer.current_gradient_accumulation_steps)
        return self.settings.teacher_task * task + loss

    def _ask(self, trainer: Trainer, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        options = {"output_hidden_states": True} if self.hidden else {}
        if self.takes_use_cache:
            options["use_cache"] = False
        with trainer.accelerator.autocast():
            answer: Mapping[str, Any] = self.teacher.call(**{**inputs, **options})
        return answer

    def _logits_loss(
        self,
        trainer: Trainer,
        outputs: Mapping[str, Any],
        taught: Callable[[], Mapping[str, Any]],
        inputs: Mapping[str, Any],
        labels: Mapping[str, Tensor],
        items: Any,
    ) -> Tensor:
        names = [name for name in _LOGITS if isinstance(outputs.get(name), Tensor)]
        if not names:
            raise ValueError(
                f"Invalid teacher: {type(self.inner).__name__} returns no logits to learn, only "
                f"{', '.join(outputs)}; set teacher_logits=0, or train without a teacher."
            )
        parts = []
        for name in names:
            ours = outputs[name]
            counts = self._counts(ours, labels.get("shift_labels"), labels.get(_LOGITS[name]))

            def ask(name: str = name, shape: torch.Size = ours.shape) -> Tensor:
                theirs: Tensor = taught()[name]
                if shape[:-1] != theirs.shape[:-1]:
                    raise ValueError(
                        f"Invalid teacher: the teacher's {name} have the shape {tuple(theirs.shape)} and the model's "
                        f"{tuple(shape)}; name a model with the same inputs, or set teacher_logits=0."
                    )
                return theirs

            if self.cache is None:
                total = kl_sum(ours, ask(), counts, self.settings.teacher_temperature)
            else:
                decoded = labels.get("labels") if self.seq2seq else None
                documents = self._documents(trainer, self.cache, inputs)
                total = self._kept_loss(self.cache, name, ours, counts, inputs, decoded, documents, ask)
            parts.append(total / (counts.sum().clamp(min=1) if items is None else items))
        return sum(parts[1:], parts[0]) / len(parts)

    def _kept_loss(
        self,
        cache: TeacherCache,
        name: str,
        ours: Tensor,
        counts: Tensor,
        inputs: Mapping[str, Any],
        decoded: Tensor | None,
        documents: Sequence[slice],
        ask: Callable[[], Tensor],
    ) -> Tensor:
        """The divergence from what the cache has, which waits for the device: rows are looked up on the CPU."""
        here = counts.cpu()
        places = here.reshape(-1).nonzero()[:, 0].to(ours.device)
        answers = cache.answers(
            list(keys_of(name, ours.shape[-1], here, inputs, decoded, documents)),
            [int(here[0, each].sum()) for each in documents] or here.reshape(here.shape[0], -1).sum(1).tolist(),
            lambda: ask().flatten(0, -2)[places],
            ours.shape[-1],
            ours.device,
        )
        return kept_kl_sum(ours, answers, places, self.settings.teacher_temperature)

    def _documents(self, trainer: Trainer, cache: TeacherCache, inputs: Mapping[str, Any]) -> list[slice]:
        """The documents of a batch that is one long row, if the teacher reads each by itself; none otherwise."""
        documents = documents_of(inputs)
        if not documents:
            return []
        kind = str(getattr(self.teacher.config, "_attn_implementation", None))
        if kind not in cache.apart:
            ids: Tensor = inputs["input_ids"]
            high, low = ids.max(), ids.min()
            changed = ids.clone()
            first, last = documents[0], documents[-1]
            changed[0, first] = torch.where(ids[0, first] == high, low, high)
            one, two = (self._ask(trainer, {**inputs, "input_ids": each})["logits"][0, last] for each in (ids, changed))
            cache.note_apart(kind, bool(high != low) and torch.allclose(one, two, rtol=1e-3, atol=1e-4))
        return documents if cache.apart[kind] else []

    def _counts(self, logits: Tensor, shifted: Tensor | None, labels: Tensor | None) -> Tensor:
        """Which distributions have a label."""
        if shifted is None and labels is not None and self.shifts and logits.ndim == 3:
            shifted = nn.functional.pad(labels[..., 1:], (0, 1), value=_IGNORED)
        target = labels if shifted is None else shifted
        if target is not None and target.shape == logits.shape[:-1] and not target.is_floating_point():
            return target != _IGNORED
        if target is not None and logits.ndim == 2 and logits.shape[-1] > 1 and target.shape == logits.shape[:1]:
            return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        raise ValueError(
            f"Invalid teacher_logits: teacher_logits={self.settings.teacher_logits!r} with logits of the shape "
            f"{tuple(logits.shape)} and labels of {None if target is None else tuple(target.shape)}; they must be one "
            "class for each token or row. Set teacher_logits=0, and learn the hidden states alone."
        )

    def _hidden_loss(
        self,
        outputs: Mapping[str, Any],
        taught: Mapping[str, Any],
        inputs: Mapping[str, Any],
        labels: Mapping[str, Tensor],
    ) -> Tensor:
        losses = []
        for name in _HIDDEN:
            ours, theirs = outputs.get(name), taught.get(name)
            if ours is None or theirs is None:
                continue
            if [each.shape for each in ours] != [each.shape for each in theirs]:
                raise ValueError(
                    f"Invalid teacher_hidden: teacher_hidden={self.hidden!r}, and the teacher has {name} of the shapes "
                    f"{_shapes(theirs)}, the model of {_shapes(ours)}; set teacher_hidden=0."
                )
            for student, teacher in zip(ours[1:], theirs[1:], strict=True):  # the first is the embedding
                if student.ndim != 3:  # maps of features: a row is as one token
                    student, teacher = student.flatten(1), teacher.flatten(1)
                weights = _token_weights(name, student, inputs, labels)
                total = self.counts[name] if name in self.counts else weights.sum()
                losses.append(error_sum(student, teacher, weights) / total)
        if not losses:
            raise ValueError(
                f"Invalid teacher_hidden: teacher_hidden={self.hidden!r}, and {type(self.inner).__name__} returns no "
                "hidden states; set teacher_hidden=0."
            )
        return torch.stack(losses).mean()

    def count(self, trainer: Trainer, batches: Sequence[Any], *, summed: bool) -> None:
        """Count the tokens, or rows, of all batches of a step, in all processes, for each kind of hidden states."""
        self.steps += 1
        self.counts = {}
        if not self.hidden or not summed:
            return
        counts = {name: sum(_weight_of(name, batch) for batch in batches) for name in _HIDDEN}
        if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
            device = trainer.args.device
            both = torch.stack([torch.as_tensor(count, device=device) for count in counts.values()])
            both = trainer.accelerator.gather(both[None]).sum(0)
            counts = dict(zip(counts, both, strict=True))
        self.counts = counts

    def _note(self, loss: Tensor, task: Tensor, steps: int) -> None:
        new = [part.detach() / steps for part in (loss, task)]
        self.sums = [old + part for old, part in zip(self.sums, new, strict=True)] if self.sums else new

    def means(self, trainer: Trainer) -> dict[str, float]:
        """Return the two parts of the loss, averaged over the steps since this was last asked, and all processes."""
        if not self.sums:
            return {}
        sums = trainer.accelerator.gather(torch.stack(self.sums)[None].float()).mean(0).tolist()
        steps, self.steps, self.sums = max(1, self.steps), 0, []
        return {"loss_teacher": sums[0] / steps, "loss_task": sums[1] / steps}


def _token_weights(name: str, hidden: Tensor, inputs: Mapping[str, Any], labels: Mapping[str, Tensor]) -> Tensor:
    """What each token of hidden states counts: 1, and 0 for padding; where tokens have no mask, a row counts 1."""
    mask = _mask(name, {**inputs, **labels})
    shape = hidden.shape[:-1]
    if mask is not None and mask.shape == shape:
        return mask
    if mask is not None and name in ("hidden_states", "encoder_hidden_states"):
        # Tokens that a model adds to those of the input, as an image's.
        return torch.ones(shape, device=hidden.device) * (mask.sum() / hidden[..., 0].numel())
    return torch.full(shape, shape[0] / max(1, hidden[..., 0].numel()), device=hidden.device)


def _weight_of(name: str, batch: Mapping[str, Any]) -> Tensor | int:
    """The sum of the weights of a batch's tokens."""
    mask = _mask(name, batch)
    if mask is not None:
        return mask.sum()
    first = next((value for value in batch.values() if isinstance(value, Tensor) and value.ndim), None)
    return 0 if first is None else first.shape[0]


def _mask(name: str, batch: Mapping[str, Any]) -> Tensor | None:
    """Which tokens count, as padding does not."""
    mask = batch.get(_HIDDEN[name])
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask != 0
    if name == "decoder_hidden_states":
        labels = batch.get("labels")
        return labels != _IGNORED if isinstance(labels, Tensor) and labels.ndim == 2 else None
    ids = batch.get("input_ids")
    return torch.ones_like(ids, dtype=torch.bool) if isinstance(ids, Tensor) and ids.ndim == 2 else None


def _shapes(states: Sequence[Tensor]) -> str:
    kinds = sorted({str(tuple(each.shape)) for each in states})
    return f"{len(states)} of {' and '.join(kinds)}"


def _shifts(model: nn.Module) -> bool:
    """Whether a model's loss compares the logits of a token with the label of the next."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    kind = getattr(model, "loss_type", None)
    return isinstance(model, nn.Module) and LOSS_MAPPING.get(kind or "ForCausalLM") is ForCausalLMLoss
