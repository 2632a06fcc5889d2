from __future__ import annotations

import subprocess
import sys

import pytest

import hf_pdecay

from .helpers.warm import python


def _loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_loads_nothing_heavy() -> None:
    loaded = _loaded_after("import hf_pdecay")
    assert not loaded & {"torch", "transformers", "matplotlib", "rich", "datasets", "evaluate", "jinja2"}
    assert not loaded & {"argparse", "hf_pdecay.cli.main"}


def test_the_optimizer_needs_torch_alone() -> None:
    loaded = _loaded_after("from hf_pdecay import AdamWLp")
    assert "torch" in loaded
    assert not loaded & {"transformers", "matplotlib", "rich", "datasets", "evaluate", "accelerate"}
    assert not loaded & {"torch._inductor.codecache", "triton", "torchao"}  # which a step may need


def test_the_trainer_loads_no_drawing_and_no_measuring() -> None:
    # Beyond what transformers loads: that is forgotten first, and what is imported again comes back.
    code = """
import sys
from transformers import Trainer
names = {"matplotlib", "evaluate", "jinja2", "pandas", "rich"}
for module in [*sys.modules]:
    if module.partition(".")[0] in names:
        del sys.modules[module]
from hf_pdecay import PDecayTrainer, PDecayTrainingArguments, SparsityCallback
print(*names & sys.modules.keys())
"""
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_without_peft() -> None:
    hidden = "import sys; sys.modules['peft'] = None"
    done = python("-c", f"{hidden}; from hf_pdecay import *")
    assert done.returncode == 0, done.stderr
    failed = python("-c", f"{hidden}; from hf_pdecay import shrink_ranks")
    assert failed.returncode != 0 and "pip install 'hf-pdecay[peft]'" in failed.stderr


def test_help_of_the_command_line_loads_nothing_heavy() -> None:
    loaded = _loaded_after("from hf_pdecay.cli.main import main")
    assert not loaded & {"torch", "transformers", "rich", "hf_pdecay.cli.training_estimate"}


def test_public_names() -> None:
    for name in hf_pdecay.__all__:
        assert getattr(hf_pdecay, name) is not None
    assert set(hf_pdecay.__all__) <= set(dir(hf_pdecay))
    assert {"shrink_ranks", "mask_adapters", "merge_keep_zeros", "rank_sparsity"} <= set(dir(hf_pdecay))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_pdecay.nothing
