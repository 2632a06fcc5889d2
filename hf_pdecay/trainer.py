"""The Trainer: optimizer creation, resuming, saving and the card. Everything else is ``transformers.Trainer``'s own."""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modelcard import TrainingSummary

from .arguments import PDecayTrainingArguments
from .callback import PICTURE_FILE, REPORT_FILE, SparsityCallback
from .checkpoints import (
    STATE_FILE,
    agreed_newest_whole,
    check_checkpoint,
    check_engine_of,
    check_optimizer_state,
    check_whole,
)
from .control import plan
from .control_callback import SparsityControlCallback
from .engines import check_engine, check_same, check_world_size, engine_of, whole_model
from .model_card import SparsityCard, picture_in
from .optim import AdamWLp
from .rules import build_param_groups, decayed_parameter_names, load_rules
from .search import SearchMixin
from .shards import group_params, is_sharded, settle
from .sparsity import SparsityReport, measure_sparsity, remove_leftovers, write_text


if TYPE_CHECKING:
    from torch import nn

    _Base = Trainer
else:
    _Base = object


class PDecayTrainerMixin(SearchMixin, _Base):
    """Weight decay for any p norm for a Trainer or a subclass of it; stands before it among the bases.

        class SparseSeq2SeqTrainer(PDecayTrainerMixin, Seq2SeqTrainer): ...

    With ``args.optim == "adamw_lp"`` in a :class:`PDecayTrainingArguments` it makes an :class:`~hf_pdecay.AdamWLp`,
    adds a :class:`SparsityCallback` as the first callback, and writes ``sparsity.json`` and the model card beside every
    model that it saves. With any other optimizer it changes nothing.

    Raises:
        ValueError: Before any training, if ``lp_rules`` match nothing, the checkpoint to resume from is of another
            model, FSDP or DeepSpeed is set up in a way that cannot work (:func:`.engines.check_engine`), or, with any
            optimizer, if several processes were started that do not find each other.
        OSError: If ``output_dir`` cannot be written to.
    """

    if TYPE_CHECKING:
        args: PDecayTrainingArguments
        model: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args", args[1] if len(args) > 1 else None)
        if isinstance(given, PDecayTrainingArguments):
            check_world_size(given)
        if isinstance(given, PDecayTrainingArguments) and given.uses_adamw_lp and given.should_save:
            _check_writable(Path(str(given.output_dir)))
        super().__init__(*args, **kwargs)
        self._card_kwargs: dict[str, Any] = {}
        if not self._decays:
            return
        check_engine(self)
        same = ("p_norm", "lambda_p", "lp_rules", "weight_decay", "optim_args", "skip_nonfinite")
        check_same({name: getattr(self.args, name) for name in same} | self.args.control_options)
        groups = self._param_groups(self.model)
        # The number of steps that epochs come to is known later, and is checked then.
        plan(groups, self.args.max_steps if self.args.max_steps > 0 else 1 << 40, **self.args.control_options)
        self._check_checkpoint(self.args.resume_from_checkpoint)
        SparsityCallback(self.args.sparsity_logging, self.args.near_zero_threshold).attach(self)
        SparsityControlCallback().attach(self)  # before the other, which then counts what was cut
        self.add_callback(_CardCallback(self))

    @property
    def _decays(self) -> bool:
        return isinstance(self.args, PDecayTrainingArguments) and self.args.uses_adamw_lp

    @property
    def _output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; takes what ``Trainer.train`` takes, and resumes only from a checkpoint that is whole.

        Raises:
            ValueError: If the checkpoint to resume from is cut short or of another model, or there is no whole one.
        """
        if self._decays:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = agreed_newest_whole(self._output_dir)
            self._check_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_checkpoint(self, folder: str | bool | None) -> None:
        if not isinstance(folder, str) or not os.path.isdir(folder):
            return  # the Trainer has a sentence for a folder that is not there
        check_checkpoint(self.model, folder)
        check_whole(folder)
        check_engine_of(folder, engine_of(self), self.args.world_size)
        check_optimizer_state(self._param_groups(self.model), folder)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the optimizer; an :class:`~hf_pdecay.AdamWLp` if that is what ``args.optim`` names."""
        if not self._decays or self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer() if model is None else super().create_optimizer(model)
        target = self.model if model is None else model
        self.optimizer = AdamWLp(
            self._param_groups(target),
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            p_norm=self.args.p_norm,
            lambda_p=self.args.lambda_p,
            skip_nonfinite=self.args.skip_nonfinite,
            **self.args.step_options,
        )
        if not self.is_deepspeed_enabled:  # which has stepped by the time that the Trainer learns of a norm
            self._share_grad_norm(self.optimizer)
        return self.optimizer

    def _share_grad_norm(self, optimizer: AdamWLp) -> None:
        """Let the optimizer know the norm that the Trainer clips by, so that it need not look for NaN itself."""
        clip = self.accelerator.clip_grad_norm_

        def clip_and_tell(*args: Any, **kwargs: Any) -> Any:
            optimizer.grad_norm = norm = clip(*args, **kwargs)
            return norm

        self.accelerator.clip_grad_norm_ = clip_and_tell

    def _param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return build_param_groups(
            model,
            p_norm=self.args.p_norm,
            lambda_p=self.args.lambda_p,
            weight_decay=self.args.weight_decay,
            keep_zeros=self.args.keep_zeros,
            rules=load_rules(self.args.lp_rules),
            weight_decay_names=self.get_decay_parameter_names(model),
            isolate_zero=self.is_deepspeed_enabled,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and beside it its sparsity and, unless it is a checkpoint, its card.

        Under FSDP2 that is a folder of the whole model, also where ``fsdp_state_dict_type`` shards checkpoints.
        """
        if self._decays and self.args.should_save and output_dir and _internal_call:
            # The checkpoint is whole once this is written, last. One that is written anew is not until then.
            (Path(output_dir) / STATE_FILE).unlink(missing_ok=True)
            remove_leftovers(output_dir)
        with whole_model(self) if self._decays and not _internal_call else nullcontext():
            super().save_model(output_dir, _internal_call=_internal_call)
        if not self._decays:
            return
        report = self._measured()
        if report is not None and self.args.should_save:
            folder = Path(output_dir) if output_dir else self._output_dir
            report.save(folder / REPORT_FILE)
            if not _internal_call:
                self._write_card(folder, report)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._decays:
            # trainer_state.json, which the first process writes next, then says that all processes are done.
            self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card into ``output_dir``; takes what ``Trainer.create_model_card`` takes."""
        if not self._decays:
            super().create_model_card(*args, **kwargs)
        else:
            self._card_kwargs.update(zip(("language", "license", "tags", "model_name"), args, strict=False))
            self._card_kwargs.update({key: value for key, value in kwargs.items() if value is not None})
            report = self._measured()
            if report is not None and self.is_world_process_zero():
                self._write_card(self._output_dir, report)

    def measure_sparsity(self) -> SparsityReport:
        """Count the zeros of the model; the decayed weights are those of the optimizer, once there is one.

        Under FSDP2 and ZeRO-3, where processes hold shards of the model, all of them must call.
        """
        settle(self.model)
        decayed = None
        if self.optimizer is not None and any("rule" in group for group in self.optimizer.param_groups):
            groups = self.optimizer.param_groups
            decayed = decayed_parameter_names(self.model, groups, group_params(self.optimizer))
        return measure_sparsity(self.model, decayed=decayed, near_zero_threshold=self.args.near_zero_threshold)

    def _measured(self) -> SparsityReport | None:
        """Count where this process is to write, or others need it in order to count."""
        settle(self.model)
        if self.args.should_save or any(is_sharded(param) for param in self.model.parameters()):
            return self.measure_sparsity()
        return None

    def _write_card(self, folder: Path, report: SparsityReport) -> None:
        kwargs = dict(self._card_kwargs)
        license = kwargs.pop("license", None)
        if not hasattr(self.model, "config"):  # a plain module, of which HF's summary would ask it
            kwargs.setdefault("finetuned_from", "")
        # With a licence given HF's summary does not ask the Hub for that of the base model.
        summary = TrainingSummary.from_trainer(self, license=license or "unknown", **kwargs)
        summary.license = license
        # What HF could not find out it passes on as empty names.
        summary.finetuned_from = summary.finetuned_from or None
        if summary.dataset_tags == [None]:
            summary.dataset_tags = summary.dataset_args = summary.dataset_metadata = None
            summary.dataset = None if summary.dataset == [None] else summary.dataset
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        summary.hyperparameters = {
            **(summary.hyperparameters or {}),
            "optimizer": f"adamw_lp with betas=({self.args.adam_beta1},{self.args.adam_beta2}) and "
            f"epsilon={self.args.adam_epsilon}",
            **_decay_settings(self.args),
        }
        card = SparsityCard(
            summary=summary,
            report=report,
            log_history=self.state.log_history,
            param_groups=groups,
            picture=picture_in(folder, PICTURE_FILE),
            skipped_steps=max((int(group.get("skipped_steps", 0)) for group in groups), default=0),
        )
        write_text(folder / "README.md", card.render())


class PDecayTrainer(PDecayTrainerMixin, Trainer):
    """``transformers.Trainer`` with weight decay for any p norm; see :class:`PDecayTrainerMixin`.

    Example:
        >>> args = PDecayTrainingArguments("out", p_norm=0.8, lambda_p=0.01)
        >>> trainer = PDecayTrainer(model=model, args=args, train_dataset=dataset)
        >>> trainer.train()
        >>> trainer.save_model()
    """


class _CardCallback(TrainerCallback):
    """Writes the card at the end of training, after all that other callbacks write."""

    def __init__(self, trainer: PDecayTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.create_model_card()


def _decay_settings(args: PDecayTrainingArguments) -> dict[str, Any]:
    """The settings of the decay that have an effect, for the card."""
    names = ["p_norm", "weight_decay", "keep_zeros"]
    control = ["sparsity_begin", "sparsity_end", "sparsity_schedule"]
    if args.p_norm_begin is not None:
        names += ["p_norm_begin", *control[:2]]
    names += (
        ["lambda_p"]
        if args.target_sparsity is None
        else ["target_sparsity", *control, "sparsity_budget", "sparsity_decay"]
    )
    return {name: getattr(args, name) for name in dict.fromkeys(names)}


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"Invalid output_dir: output_dir={str(folder)!r} cannot be written to ({error}); name a folder that can."
        ) from error
