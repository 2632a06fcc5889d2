"""A teacher with a release of transformers that it does not work with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hf_pdecay import PDecayTrainer
from hf_pdecay.trainer import distillation

from ..helpers.models import build


def test_an_old_release_is_refused(make_args: Callable[..., Any], tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if int(distillation.transformers.__version__.partition(".")[0]) >= 5:
        monkeypatch.setattr(distillation.transformers, "__version__", "4.57.6")
    with pytest.raises(ValueError, match=r"teacher='self' with transformers 4\.57.*it takes version 5 or later"):
        PDecayTrainer(model=build("llama"), args=make_args(teacher="self"), train_dataset=tokens)
