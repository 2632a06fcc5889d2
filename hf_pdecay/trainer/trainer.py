"""The Trainer: optimizer creation, resuming and saving; everything else is done by ``transformers.Trainer``."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.training_args import OptimizerNames

from ..files import remove_leftovers
from ..low_bit.inputs import rounded_inputs
from ..one_shot.methods import METHODS, OFF
from ..optim.decay_optimizer import DecayOptimizer
from ..optim.optimizer_names import OPTIMIZERS
from ..optim.shards import settle
from ..sparsity.file_names import REPORT_FILE, RUN_FILES, STATE_FILE
from ..sparsity.report import SparsityReport
from ..target.control import plan_target
from ..terminal import get_logger
from .arguments import PDecayTrainingArguments, check_settings, check_unused, settings_of
from .base_model import BaseCallback, BaseModel, base_of, check_to_base, write_run_delta
from .card import CardCallback, write_card
from .checkpoints import agreed_newest_whole, check_whole
from .engines import check_engine, check_same, check_structured, check_world_size, engine_of, whole_model
from .few_bits import check_widths, round_model_of, round_stated_inputs, rounds
from .gradient_norm import share_grad_norm
from .measuring import all_must_count, measure
from .optimizer import build_optimizer, name_of, param_groups_of
from .resume_checks import check_checkpoint, check_engine_of, check_optimizer_state, other_settings
from .saved_names import load_converted, without_tied
from .search import Search, check_read, folded
from .settings import DecaySettings
from .sparsity_callback import SparsityCallback
from .target_callback import SparsityControlCallback
from .training_flags import DecayFields


if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..target.budgets import Budget

    _Base = Trainer
else:
    _Base = object

logger = get_logger(__name__)


class PDecayTrainerMixin(_Base):
    """Weight decay for any p norm for a Trainer or a subclass of it; stands before it among the bases.

        class SparseSeq2SeqTrainer(PDecayTrainerMixin, Seq2SeqTrainer): ...

    With ``args.optim == "adamw_lp"``, or another name of ``OPTIMIZERS``, it makes that optimizer, adds a
    :class:`SparsityCallback` as the first callback, and writes ``sparsity.json`` and the model card beside every model
    that it saves. With any other optimizer it changes nothing. Its ``args`` are a :class:`PDecayTrainingArguments`; any
    others work after :func:`hf_pdecay.register`.

    Raises:
        ValueError: Before any training, if ``lp_rules`` or ``optim_target_modules`` match nothing, the checkpoint to
            resume from is of another model, FSDP or DeepSpeed is set up in a way that cannot work, or, with any
            optimizer, several processes were started that do not find each other.
        OSError: If ``output_dir`` cannot be written to.
    """

    if TYPE_CHECKING:
        args: TrainingArguments
        model: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_arguments(kwargs.get("args", args[1] if len(args) > 1 else None))
        super().__init__(*args, **kwargs)
        self._join()
        if self._decays:
            self._check_checkpoint(self.args.resume_from_checkpoint)

    def _join(self) -> None:
        """Check the settings of the decay, and add the callbacks, to a complete Trainer of any class."""
        self._card_arguments: dict[str, Any] = {}
        self._given_optimizer = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        if not self._decays:
            return
        self._check_given()
        settings = self._settings
        if self.train_dataset is None and not any(param.requires_grad for param in self.model.parameters()):
            self._attach(settings)  # evaluation only; training is checked when it starts
            round_stated_inputs(self.model)
            return
        check_engine(self, settings.optim, settings.options.get("moments"))
        check_same(asdict(settings) | {"optim": name_of(self.args), "weight_decay": self.args.weight_decay})
        groups = param_groups_of(self.model, self.args, settings, new=self._find_base())
        check_structured(self, groups, settings.optim, settings.options.get("backend", "auto"))
        budgets = plan_target(groups, self._expected_steps(), settings)
        self._attach(settings, self._planned_one_shot(budgets))
        if self._base is not None:
            BaseCallback(self).attach(self)
        if settings.teacher is not None:
            from .distillation import distil

            distil(self, settings)
        if rounds(settings):
            round_model_of(self, settings)
        else:
            round_stated_inputs(self.model)

    def _find_base(self) -> Collection[str]:
        """Find the base to which weights of this run decay, if they do; return the names of what it has not."""
        settings = self._settings
        self._base = None
        if settings.to_base:
            check_to_base(self, settings)
            self._base = base_of(self.model, settings)
        return frozenset() if self._base is None else self._base.new

    def _planned_one_shot(self, budgets: Sequence[Budget]) -> str:
        asked = self._settings.one_shot
        if budgets and asked != OFF:
            from .one_shot_cut import planned_method

            return planned_method(self.model, asked, budgets, engine_of(self))
        if asked in METHODS:
            raise ValueError(f"Invalid one_shot: one_shot={asked!r} without a target; give one.")
        return OFF

    def _check_given(self) -> None:
        """Refuse settings of the decay beside an optimizer of the user's own that does not read them."""
        if self.optimizer is not None and not any("p_norm" in group for group in self.optimizer.param_groups):
            check_unused(self.args, type(self.optimizer).__name__)
        kind = self.optimizer_cls_and_kwargs[0] if self.optimizer_cls_and_kwargs is not None else None
        if isinstance(kind, type) and issubclass(kind, Optimizer) and not issubclass(kind, DecayOptimizer):
            check_unused(self.args, kind.__name__)

    def _expected_steps(self) -> int | None:
        """Steps of the run; None where only a subclass's own data loader knows them, which is checked as it starts."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        stock = type(self).get_train_dataloader is Trainer.get_train_dataloader
        if not stock or isinstance(self.train_dataset, dict) or not has_length(self.train_dataset):
            return None
        steps = math.ceil(len(self.train_dataset) / self.get_total_train_batch_size(self.args))
        return max(1, math.ceil(self.args.num_train_epochs * max(1, steps)))

    def _attach(self, settings: DecaySettings, one_shot: str = OFF) -> None:
        counter = SparsityCallback(settings.sparsity_logging, settings.near_zero_threshold).attach(self)
        counter.saved_weights = lambda: self._saved_weights()  # of the class that the Trainer has then
        # Before the other, which then counts pruned weights.
        self._control_callback = SparsityControlCallback(one_shot).attach(self)
        self.add_callback(CardCallback(self._write_final_card))

    @property
    def _decays(self) -> bool:
        return name_of(self.args) in OPTIMIZERS

    @property
    def _settings(self) -> DecaySettings:
        """The settings of the decay; a file of rules that stock arguments name is read once."""
        if isinstance(self.args, PDecayTrainingArguments):
            return self.args.decay_settings
        key = self.args.optim_args, self.args.optim_target_modules, name_of(self.args)
        if self._settings_read is None or self._settings_read[0] != key:
            self._settings_read = key, DecaySettings.from_optim_args(*key)
        return self._settings_read[1]

    _settings_read: tuple[Any, DecaySettings] | None = None
    _search: Search | None = None  # the one that runs
    _base: BaseModel | None = None  # to which weights decay
    _delta_beside: Path | None = None  # the folder in which a call within save_model has written a delta
    _control_callback: SparsityControlCallback | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as ``Trainer.train`` does; resume only from a whole checkpoint of this model, else raise ValueError."""
        if self._decays:
            # A subclass's `train` gets the argument by position or by name, as it was given.
            resume = kwargs.get("resume_from_checkpoint", args[0] if args else None)
            if resume is True:
                resume = agreed_newest_whole(str(self.args.output_dir))
                if "resume_from_checkpoint" in kwargs:
                    kwargs["resume_from_checkpoint"] = resume
                else:
                    args = (resume, *args[1:])
            self._check_checkpoint(resume, warn=True)
        return super().train(*args, **kwargs)

    def _check_checkpoint(self, folder: str | bool | None, *, warn: bool = False) -> None:
        if not isinstance(folder, str) or not os.path.isdir(folder):
            return  # the Trainer explains that the folder is missing
        check_checkpoint(self.model, folder)
        check_whole(folder)
        check_engine_of(folder, engine_of(self), self.args.world_size)
        if not rounds(self._settings):
            check_widths(Path(folder), {}, rounded_inputs(self.model))
        if self._given_optimizer:
            if self.optimizer is not None:
                check_optimizer_state(self.optimizer.param_groups, folder)
            return
        settings = self._settings
        groups = param_groups_of(self.model, self.args, settings, **self._grouping(self.model))
        check_optimizer_state(groups, folder)
        if not warn:
            return
        budgets = plan_target(groups, None, settings)
        targeted = {id(group) for budget in budgets for group, _ in budget.members}
        controlled = [number for number, group in enumerate(groups) if id(group) in targeted]
        for sentence in other_settings(groups, folder, controlled, annealed=settings.p_norm_begin is not None):
            if self.is_world_process_zero():
                logger.warning(sentence)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        if self._decays and not engine_of(self):
            load_converted(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._decays and not engine_of(self) and self.state.best_model_checkpoint:
            load_converted(self.model, self.state.best_model_checkpoint)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the optimizer that ``args.optim`` names."""
        if not self._decays or self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            given: Optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
            if self._decays and not any("p_norm" in group for group in given.param_groups):
                check_unused(self.args, type(given).__name__)  # it may have come after the Trainer was made
                logger.warning(
                    "optim=%r is not in use: the Trainer was given a %s, so no weight decays by p norm.",
                    name_of(self.args),
                    type(given).__name__,
                )
            return given
        method = getattr(super().create_optimizer, "__func__", None)
        if method is not None and method not in (Trainer.create_optimizer, PDecayTrainerMixin.create_optimizer):
            logger.warning(
                "optim=%r: %s is not asked for an optimizer or its param groups, since p-norm decay needs its own. "
                "Rules by name go into lp_rules, learning rates by group into get_optimizer_cls_and_kwargs.",
                name_of(self.args),
                method.__qualname__,
            )
        model = self.model if model is None else model
        self.optimizer = optimizer = build_optimizer(model, self.args, self._settings, **self._grouping(model))
        share_grad_norm(self, optimizer)
        return optimizer

    def _grouping(self, model: nn.Module) -> dict[str, Any]:
        """How this Trainer divides the parameters, for ``param_groups_of``."""
        return {
            "weight_decay_names": self.get_decay_parameter_names(model),
            "isolate_zero": self.is_deepspeed_enabled,
            "theirs": self._their_groups(model),
            "new": frozenset() if self._base is None else self._base.new,
        }

    def _their_groups(self, model: nn.Module) -> Sequence[Mapping[str, Any]] | None:
        """The param groups that a subclass of Trainer would give to AdamW in place of Hugging Face's."""
        plain = copy.copy(self.args)
        plain.optim, plain.optim_args, plain.optim_target_modules = OptimizerNames.ADAMW_TORCH, None, None
        _, kwargs = super().get_optimizer_cls_and_kwargs(plain, model)  # type: ignore[arg-type]
        groups = next((kwargs[key] for key in ("params", "model", "optimizer_dict") if key in kwargs), None)
        return groups if isinstance(groups, list) else None

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], Any] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Search as ``Trainer.hyperparameter_search`` does; each trial has its own folder, with its sparsity and card.

        Raises:
            ValueError: If the objectives do not fit the directions, or a value of a trial is out of its range.
        """
        args = (n_trials, direction, *args)
        if not self._decays:
            check_read(self.args, hp_space)
            return super().hyperparameter_search(hp_space, compute_objective, *args, **kwargs)
        self._search = search = Search(self, self.measure_sparsity, hp_space, compute_objective, direction)
        if not kwargs.get("load_if_exists"):
            search.start_anew()
        try:
            return super().hyperparameter_search(search.space, search.evaluate, *args, **kwargs)
        finally:
            search.end()
            self._search = None

    def _hp_search_setup(self, trial: Any) -> None:
        if isinstance(trial, dict):  # values of Ray Tune; optuna asks the space for them
            trial = folded(self.args, trial, self._search.optim_args if self._search else self.args.optim_args)
        super()._hp_search_setup(trial)
        if not self._decays:
            check_settings(self.args)  # a space may have set what this optimizer does not read
        if self._search is not None and trial is not None:
            self._search.enter(super()._get_output_dir, trial)
        if self._decays and self._control_callback is not None:
            groups = param_groups_of(self.model, self.args, self._settings, new=self._find_base())
            budgets = plan_target(groups, None, self._settings)
            self._control_callback.one_shot = self._planned_one_shot(budgets)
        if self._decays and rounds(self._settings):
            round_model_of(self, self._settings)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial if self._search is None else None)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card into ``output_dir``, or add our section to that of a subclass with its own, such as TRL's."""
        if not self._decays or self._writes_own_card:
            super().create_model_card(*args, **kwargs)
        else:
            self._card_arguments.update(zip(("language", "license", "tags", "model_name"), args, strict=False))
            self._card_arguments.update({key: value for key, value in kwargs.items() if value is not None})
        if self._decays:
            report = self._measured()
            if report is not None and self.is_world_process_zero():
                self._write_card(Path(str(self.args.output_dir)), report)

    def _write_final_card(self) -> None:
        if self._decays:
            self.create_model_card()

    @property
    def _writes_own_card(self) -> bool:
        return getattr(super().create_model_card, "__func__", None) is not Trainer.create_model_card

    def _write_card(self, folder: Path, report: SparsityReport) -> None:
        write_card(self, folder, report, self._settings, self._card_arguments, extend=self._writes_own_card)

    def measure_sparsity(self) -> SparsityReport:
        """Count the zeros of the model, and of the optimizer's decayed weights once there is one.

        Under FSDP2 and ZeRO-3, where processes hold shards of the model, all of them must call.
        """
        settings = self._settings if self._decays else settings_of(self.args)
        return measure(self.model, self.optimizer, (settings or DecayFields).near_zero_threshold, self._saved_weights())

    def _saved_weights(self) -> Iterable[tuple[str, Tensor]]:
        """The weights that would be saved now, by name, where they are not those of the model."""
        return ()

    def _measured(self) -> SparsityReport | None:
        """Count the zeros if this process writes, or holds shards that others need to count."""
        settle(self.model)
        if self.args.should_save or all_must_count(self.model, self.optimizer):
            return self.measure_sparsity()
        return None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, its sparsity and, unless it is a checkpoint, its card; under FSDP2 the whole model."""
        if self._decays and self.args.should_save and output_dir and _internal_call:
            # This file, which is written last, marks a checkpoint as whole.
            (Path(output_dir) / STATE_FILE).unlink(missing_ok=True)
            remove_leftovers(output_dir, RUN_FILES)
        if not _internal_call:
            self._delta_beside = None
        with whole_model(self) if self._decays and not _internal_call else nullcontext():
            if _internal_call:
                super().save_model(output_dir, _internal_call=True)
            else:  # a subclass may not take the argument
                super().save_model(output_dir)
        if not self._decays:
            return
        report = self._measured()
        if report is not None and self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            report.save(folder / REPORT_FILE)
            if not _internal_call:
                self._write_card(folder, report)
            # push_to_hub calls it within, before it uploads; a checkpoint has a folder of its own.
            if report.delta is not None and (output_dir is None if _internal_call else self._delta_beside != folder):
                write_run_delta(folder, self._base or base_of(self.model, self._settings), report)
                self._delta_beside = folder if _internal_call else None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is not None and self._base is not None:
            state_dict = without_tied(self.model, state_dict)
        super()._save(output_dir, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._decays:
            # The first process writes trainer_state.json next, which means that all processes are done.
            self.accelerator.wait_for_everyone()


class PDecayTrainer(PDecayTrainerMixin, Trainer):
    """``transformers.Trainer`` with weight decay for any p norm; see :class:`PDecayTrainerMixin`.

    Example:
        >>> args = PDecayTrainingArguments("out", p_norm=0.8, lambda_p=0.01)
        >>> trainer = PDecayTrainer(model=model, args=args, train_dataset=dataset)
        >>> trainer.train()
        >>> trainer.save_model()
    """


def check_arguments(args: Any) -> None:
    """Check, before a Trainer is made, what would fail later: settings, processes, and whether it can write."""
    decays = isinstance(args, TrainingArguments) and name_of(args) in OPTIMIZERS
    if isinstance(args, TrainingArguments):
        check_settings(args)
    if decays or isinstance(args, PDecayTrainingArguments):
        check_world_size(args)
    if decays and args.should_save:
        folder = Path(str(args.output_dir))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OSError(
                f"Invalid output_dir: output_dir={str(folder)!r} cannot be written to ({error}); name a folder that "
                "can."
            ) from error
