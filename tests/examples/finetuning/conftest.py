"""What the tests of examples/finetune_llm.py share: its modules, a tokenizer, a data set, its command line."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


ROOT = Path(__file__).parents[3]
SIZE = 96
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": SIZE,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SHAPE | {"model_type": "llama"},
    "qwen3": SHAPE | {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "gpt2": SHAPE | {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": SHAPE | {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}
PAIRS = [(f"{n} + {n + 3} =", f" {2 * n + 3}" + "!" * (n % 7)) for n in range(120)]


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import their neighbours, as they do when they are run."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.fixture
def finetune_llm() -> ModuleType:
    return importlib.import_module("finetune_llm")


@pytest.fixture
def instructions() -> ModuleType:
    return importlib.import_module("instructions")


@pytest.fixture
def packing() -> ModuleType:
    return importlib.import_module("packing")


@pytest.fixture
def tokenizer(instructions: ModuleType) -> Any:
    return instructions.byte_tokenizer()


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs.jsonl", [{"prompt": prompt, "completion": answer} for prompt, answer in PAIRS])


def config_folder(tmp_path: Path, name: str) -> Path:
    (folder := tmp_path / name).mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return folder


@pytest.fixture
def options(tmp_path: Path, pairs_file: Path) -> Callable[..., list[str]]:
    """The command line of a short run on the CPU."""

    def make(model: str = "llama", **given: Any) -> list[str]:
        chosen = {"config_name": config_folder(tmp_path, model), "output_dir": tmp_path / "out", "max_steps": 20}
        chosen |= {"train_file": pairs_file, "use_cpu": "true", "disable_tqdm": "true", "learning_rate": 0.01}
        chosen |= {"logging_steps": 5, "per_device_train_batch_size": 4, **given}
        return [f"--{name}={value}" for name, value in chosen.items() if value is not None]

    return make
