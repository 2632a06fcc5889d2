"""A setting is defined once: a field that is added to a copy of the package is known wherever settings are given."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_pdecay import AdamWLp, measure_sparsity
from hf_pdecay.trainer.settings import DecaySettings
from hf_pdecay.trainer.training_flags import SETTINGS


ROOT = Path(__file__).parents[2]

# The new fields, and the fields that they are put before.
ADDED = {
    "target/settings.py": ('    new_share: float = setting(0.25, "A share, NEW.")\n', "    keep_zeros: bool"),
    "trainer/training_flags.py": (
        '    new_count: int | None = setting(None, "A count, NEW.")\n',
        "    skip_nonfinite: bool",
    ),
}

LOOK = """
import json, sys
import torch
from transformers import HfArgumentParser
sys.path.insert(0, "docs")
import hooks
from hf_pdecay import AdamWLp, PDecayTrainingArguments, SparsityControl
from hf_pdecay.cli.main import main
from hf_pdecay.trainer.settings import DecaySettings

parser = HfArgumentParser(PDecayTrainingArguments)
(args,) = parser.parse_args_into_dataclasses(["--output_dir", "out", "--new_share", "0.5", "--new_count", "7"])
settings = DecaySettings.from_optim_args("new_share=0.5,new_count=7,target_sparsity=0.5")
optimizer = AdamWLp([torch.nn.Parameter(torch.ones(2, 2))])
SparsityControl(optimizer, 100, new_share=0.5)
try:
    SparsityControl(optimizer, 100, new_count=7)
    refused = False
except TypeError:
    refused = True
result = {
    "help": parser.format_help(),
    "args": [args.new_share, args.new_count],
    "optim_args": [settings.new_share, settings.new_count],
    "card": settings.effective,
    "refused": refused,
    "table": hooks.with_settings(open("docs/usage.md").read()),
}
print(json.dumps(result))
main(["preview", "--help"])  # which ends the process
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a copy of the package, with a field more in each class of settings, makes of the two fields."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "hf_pdecay", folder / "hf_pdecay", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "docs").symlink_to(ROOT / "docs")
    for name, (field, before) in ADDED.items():
        file = folder / "hf_pdecay" / name
        text = file.read_text(encoding="utf-8")
        assert before in text
        file.write_text(text.replace(before, field + before, 1), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, _, rest = done.stdout.partition("\n")
    return {**json.loads(first), "preview": rest}


@pytest.mark.parametrize("where", ["help", "preview", "table"])
def test_a_new_field_is_explained(where: str, seen: dict[str, str]) -> None:
    for name, explanation in (("new_share", "A share, NEW."), ("new_count", "A count, NEW.")):
        assert name in seen[where] and explanation in seen[where]


def test_a_new_field_is_read(seen: dict[str, object]) -> None:
    assert seen["args"] == seen["optim_args"] == [0.5, 7]


def test_the_control_takes_the_fields_of_a_target_alone(seen: dict[str, object]) -> None:
    assert seen["refused"] is True  # new_count; new_share was taken


def test_the_card_has_a_new_field(seen: dict[str, dict[str, object]]) -> None:
    assert seen["card"]["new_share"] == 0.5 and seen["card"]["new_count"] == 7


def test_what_the_page_says_is_what_the_class_says() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import hooks  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    made = dict(re.findall(r"^(\| `(\w+)` .*)$", hooks.settings_table(), flags=re.MULTILINE))
    page = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- settings -->\n(.*?)<!-- end", page, flags=re.DOTALL)
    rows = dict(re.findall(r"^(\| `(\w+)` .*)$", table, flags=re.MULTILINE))
    assert rows and rows.items() <= made.items(), "python docs/hooks.py writes the table anew"


def test_defaults_below_the_trainer_are_the_same() -> None:
    def default(function: object, name: str) -> object:
        return inspect.signature(function).parameters[name].default  # type: ignore[arg-type]

    assert default(AdamWLp, "p_norm") == SETTINGS["p_norm"].default
    assert default(AdamWLp, "lambda_p") == DecaySettings().strength and SETTINGS["lambda_p"].default is None
    assert default(measure_sparsity, "near_zero_threshold") == SETTINGS["near_zero_threshold"].default
