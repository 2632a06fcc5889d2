"""Makes our optimizers known to stock Hugging Face code, in memory and until :func:`unregister`.

The enum ``OptimizerNames`` gets their names, because ``TrainingArguments`` casts ``optim`` to it, and checks their
settings when it is made, before a script loads a model. ``Trainer.__init__`` puts the mixin before the class of a
Trainer with such an ``optim``, as torch's ``fully_shard`` does with a module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum
from typing import Any

import transformers
from aenum import extend_enum
from transformers import Trainer, TrainingArguments

from ..optim.optimizer_names import OPTIMIZERS
from ..terminal import get_logger
from .arguments import PDecayTrainingArguments, apply_given, check_settings
from .optimizer import name_of
from .trainer import PDecayTrainerMixin, check_arguments


logger = get_logger(__name__)

# Methods that PDecayTrainerMixin overrides; transformers must have all of them.
_METHODS = (
    "train",
    "create_optimizer",
    "get_optimizer_cls_and_kwargs",  # asked for its param groups
    "get_decay_parameter_names",
    "save_model",
    "create_model_card",
    "_save_rng_state",
    "_load_from_checkpoint",
    "_load_best_model",
)

_Init = Callable[..., None]

# The originals, while we are registered.
_stock_init: _Init | None = None  # of Trainer
_stock_post_init: _Init | None = None  # of TrainingArguments
_remind = False


def register(*, remind: bool = False) -> None:
    """Let stock ``TrainingArguments``, ``HfArgumentParser`` and every Trainer know ``optim="adamw_lp"``.

    ``optim_args`` holds the settings of the decay, such as ``"p_norm=0.8,target_sparsity=0.9"``;
    ``optim_target_modules`` says which modules' weights decay. Call it in each process that trains, before the
    arguments are parsed or made. A second call changes nothing; a Trainer that was made before is not affected.

        >>> import hf_pdecay
        >>> hf_pdecay.register()
        >>> args = TrainingArguments("out", optim="adamw_lp", optim_args="target_sparsity=0.9")
        >>> Trainer(model=model, args=args, train_dataset=dataset).train()

    Args:
        remind: Whether the first Trainer made with another optimizer says that none of ours is in use.

    Raises:
        RuntimeError: If this release of transformers has moved what is hooked into.
    """
    global _stock_init, _stock_post_init, _remind
    _remind = remind
    names = _names()
    for optimizer in OPTIMIZERS:
        if optimizer not in names._value2member_map_:
            extend_enum(names, optimizer.upper(), optimizer)
    if any(names(optimizer).value != optimizer for optimizer in OPTIMIZERS):
        raise _moved("OptimizerNames takes no new names")
    if _stock_init is None:
        _stock_init = Trainer.__init__
        Trainer.__init__ = _joining(_stock_init)  # type: ignore[method-assign]
        _stock_post_init = TrainingArguments.__post_init__
        TrainingArguments.__post_init__ = _checking(_stock_post_init)  # type: ignore[method-assign]


def unregister() -> None:
    """Undo :func:`register`; a Trainer that was made in between keeps our optimizer."""
    global _stock_init, _stock_post_init
    if _stock_init is None:
        return
    names = _names()
    for optimizer in OPTIMIZERS:
        name = optimizer.upper()
        # The map first: a name in it cannot be deleted.
        names._member_map_.pop(name)
        names._member_names_.remove(name)
        names._value2member_map_.pop(optimizer)
        if name in vars(names):
            delattr(names, name)
    stock, _stock_init = _stock_init, None
    if getattr(Trainer.__init__, "__wrapped__", None) is stock:
        Trainer.__init__ = stock  # type: ignore[method-assign]
    post_init, _stock_post_init = _stock_post_init, None
    if getattr(TrainingArguments.__post_init__, "__wrapped__", None) is post_init:
        TrainingArguments.__post_init__ = post_init  # type: ignore[assignment, method-assign]
    # Else another library has put itself around ours, which does nothing from now on.


def _joining(stock: _Init) -> _Init:
    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if _stock_init is None or isinstance(self, PDecayTrainerMixin):
            stock(self, *args, **kwargs)
            return
        check_arguments(kwargs.get("args", args[1] if len(args) > 1 else None))
        stock(self, *args, **kwargs)
        if name_of(self.args) in OPTIMIZERS:
            self.__class__ = _with_mixin(type(self))
            self._join()
        else:
            _say_unused(self.args)

    return init


def _checking(stock: _Init) -> _Init:
    @functools.wraps(stock)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if _stock_post_init is None or isinstance(self, PDecayTrainingArguments):  # which checks by itself
            stock(self, *args, **kwargs)
            return
        apply_given(self)
        stock(self, *args, **kwargs)
        check_settings(self)

    return post_init


def _with_mixin(trainer: type[Trainer]) -> type[Trainer]:
    """The class of a Trainer with the mixin before it, under the same name."""
    same = {name: getattr(trainer, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(trainer.__name__, (PDecayTrainerMixin, trainer), same)


def _say_unused(args: TrainingArguments) -> None:
    global _remind
    if _remind and args.process_index == 0:
        logger.warning(
            "hf_pdecay is registered and not in use, as optim=%r: nothing decays by p norm. Give --optim adamw_lp.",
            name_of(args),
        )
    _remind = False


def _names() -> type[Enum]:
    """The enum of transformers, after a check of all hooks."""
    from transformers import training_args

    names = getattr(training_args, "OptimizerNames", None)
    if not (isinstance(names, type) and issubclass(names, str) and issubclass(names, Enum)):
        raise _moved("transformers.training_args.OptimizerNames is not an enum of strings")
    for method in _METHODS:
        if not callable(getattr(Trainer, method, None)):
            raise _moved(f"Trainer.{method} is missing")
    return names


def _moved(what: str) -> RuntimeError:
    return RuntimeError(
        f"register() cannot hook into transformers {transformers.__version__}: {what}. It works with 4.57 to 5.24; "
        "take one of those, a newer hf-pdecay, or PDecayTrainer and PDecayTrainingArguments."
    )
