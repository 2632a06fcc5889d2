from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .helpers import warm


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


_server: warm.Server | None = None


def pytest_configure(config: pytest.Config) -> None:
    """Start what gives tests their processes, once for all workers; without a call it imports nothing."""
    global _server
    if warm.ADDRESS not in os.environ and hasattr(os, "fork"):
        _server = warm.Server()


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()  # or nanobind reports leaks at the end
    if _server is not None:
        _server.close()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take the libraries out of what is searched for garbage, as Accelerate has done at the start of each run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def precision_of_each_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a run in bfloat16 from handing its precision on: transformers 4.57 leaves it in the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture
def make_args(tmp_path: Path) -> Callable[..., Any]:
    """Arguments of a short run on the CPU that writes below the test's own folder."""

    def make(**overrides: Any) -> Any:
        from hf_pdecay import PDecayTrainingArguments

        # Another optimizer refuses settings that it does not read.
        decay = {"p_norm": 0.5, "lambda_p": 0.1} if overrides.get("optim", "adamw_lp").endswith("_lp") else {}
        return PDecayTrainingArguments(
            **{
                "output_dir": str(tmp_path / "out"),
                "use_cpu": True,
                "report_to": "none",
                "max_steps": 8,
                "logging_steps": 2,
                "save_strategy": "no",
                "learning_rate": 1e-2,
                **decay,
                "disable_tqdm": True,
                **overrides,
            }
        )

    return make


@pytest.fixture
def tokens() -> Any:
    """48 sequences of 16 tokens below 64, as inputs and labels of a causal LM."""
    import torch
    from datasets import Dataset

    rows = torch.randint(0, 64, (48, 16), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads, until the test ends."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has runs leave an empty file for their picture: drawing takes longer than training a tiny model."""

    def plot_sparsity(history: list[dict[str, Any]], path: Path, title: str = "") -> None:
        assert history
        path.write_bytes(b"")

    monkeypatch.setattr("hf_pdecay.sparsity.picture.plot_sparsity", plot_sparsity)


@pytest.fixture
def eager() -> Iterator[None]:
    """Runs what others compile, such as the steps of torchao's optimizers, uncompiled: faster for small tensors."""
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The launches of the first and of the second Triton kernel, which are done in Triton's interpreter or on a GPU."""
    from hf_pdecay.optim.gpu import step as gpu_step
    from tests.helpers.gpu_steps import DEVICE, INTERPRETED, Launches

    does = INTERPRETED or DEVICE == "cuda"
    prepare, update = Launches(gpu_step.prepare, does), Launches(gpu_step.update, does)
    monkeypatch.setattr(gpu_step, "prepare", prepare)
    monkeypatch.setattr(gpu_step, "update", update)
    return prepare, update


@pytest.fixture
def registered() -> Iterator[None]:
    """Our optimizers known to stock code, until the test ends."""
    import hf_pdecay

    hf_pdecay.register()
    yield
    hf_pdecay.unregister()


@pytest.fixture
def lora_beside_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep PEFT 0.18 from looking at torchao 0.18, from which it would import a name that is no longer there."""
    torchao = pytest.importorskip("torchao.quantization")
    peft = pytest.importorskip("peft")
    if peft.__version__.startswith("0.18.") and not hasattr(torchao, "LinearActivationQuantizedTensor"):
        monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
