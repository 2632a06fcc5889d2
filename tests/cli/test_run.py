"""``hf-pdecay run`` in real processes, on scripts that know nothing of hf_pdecay."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from safetensors.torch import load_file

from hf_pdecay import SparsityReport
from hf_pdecay.cli.main import main

from ..helpers.launching import LEAVING
from ..helpers.local_files import bert, json_lines, llama, sentences, zeros_on_disk
from ..helpers.warm import ENVIRONMENT, ROOT, python


SCRIPTS = ROOT / "tests/helpers/scripts"
CONSOLE = Path(sys.executable).with_name("hf-pdecay")

# Of a run that was asked for several.
ONE = "This run has one process, though"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs Python in the test's own folder."""
    return lambda *words, **environment: python(*words, cwd=tmp_path, timeout=280, **environment)


@pytest.fixture
def training(tmp_path: Path) -> list[str]:
    options = {
        "model_name_or_path": llama(tmp_path / "model"),
        "output_dir": tmp_path / "out",
        "optim": "adamw_lp",
        "optim_args": "p_norm=0.8,target_sparsity=0.5",
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 20,
        "logging_steps": 5,
        "save_steps": 20,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
    }
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return json_lines(tmp_path / "data" / "train.jsonl", [{"text": sentence} for sentence in sentences(48)])


def _check(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert done.returncode == 0, done.stderr[-4000:]
    zeros = zeros_on_disk(folder)
    assert zeros == pytest.approx(0.5, abs=1e-4)
    for place in (folder, folder / "checkpoint-20"):
        assert SparsityReport.load(place / "sparsity.json").sparsity == zeros
    lines = (folder / "sparsity.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 15, 20]
    assert "not in use" not in done.stderr


@pytest.fixture
def sft() -> Path:
    """TRL's own script, as it is installed."""
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    return Path(importlib.util.find_spec("trl").origin).parent / "scripts" / "sft.py"  # type: ignore


@pytest.mark.slow
@pytest.mark.parametrize("flags", [False, True])
def test_the_sft_script_of_trl(
    flags: bool, sft: Path, run: Run, training: list[str], texts: Path, tmp_path: Path
) -> None:
    script = sft
    if flags:
        for name in ("--optim", "--optim_args"):
            training[training.index(name) : training.index(name) + 2] = []
        training += ["--target_sparsity", "0.5", "--p_norm=0.8"]
    done = run("-m", "hf_pdecay", "run", script, *training, "--dataset_name", texts.parent, "--bf16", "false")
    _check(done, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"hf-pdecay run {script} --model_name_or_path" in card


@pytest.mark.slow
def test_a_script_like_run_clm_and_on_two_processes(run: Run, training: list[str], texts: Path, tmp_path: Path) -> None:
    words = ["-m", "hf_pdecay", "run", SCRIPTS / "clm_style.py", *training, "--train_file", texts]
    _check(run(*words), tmp_path / "out")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # plain transformers
    assert again.config.architectures == ["LlamaForCausalLM"]

    launch = ["-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]
    words[words.index("--output_dir") + 1] = str(tmp_path / "two")
    done = run(*launch, "--multi_gpu", *LEAVING, *words)
    _check(done, tmp_path / "two")
    assert ONE not in done.stderr
    # 20 steps of 4 rows of 48, and of twice as many.
    epochs = [json.loads((tmp_path / name / "trainer_state.json").read_text())["epoch"] for name in ("out", "two")]
    assert epochs == pytest.approx([20 / 12, 20 / 6])

    # Without GPUs and --multi_gpu Accelerate starts one process.
    for number, flags in enumerate(([], ["--cpu"])):
        words[words.index("--output_dir") + 1] = str(tmp_path / str(number))
        done = run(*launch, *flags, *words, CUDA_VISIBLE_DEVICES="")
        _check(done, tmp_path / str(number))
        assert done.stderr.count(ONE) == 1 and "--multi_gpu --num_processes 2` starts two" in done.stderr


@pytest.mark.slow
def test_few_bits_by_flag(run: Run, training: list[str], texts: Path, tmp_path: Path) -> None:
    flags = ["--weight_bits", "4"]
    done = run("-m", "hf_pdecay", "run", *flags, SCRIPTS / "clm_style.py", *training, "--train_file", texts)
    _check(done, tmp_path / "out")
    assert "- weight_bits: 4" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        values = max(len(block.unique()) for row in weight.view(-1, weight.shape[-1]) for block in row.split(128))
        assert (values <= 15) == ("proj" in name), name


@pytest.mark.slow
def test_epochs_too_short_for_the_target(run: Run, training: list[str], texts: Path) -> None:
    place = training.index("--max_steps")
    training[place : place + 2] = ["--num_train_epochs", "1"]
    done = run("-m", "hf_pdecay", "run", SCRIPTS / "clm_style.py", *training, "--train_file", texts)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "hf-pdecay run: Invalid max_steps: of 12 steps only" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_script_like_run_glue(run: Run, training: list[str], tmp_path: Path) -> None:
    rows = [{"sentence": sentence, "label": number % 2} for number, sentence in enumerate(sentences(48))]
    data = json_lines(tmp_path / "train.jsonl", rows)
    training[training.index("--model_name_or_path") + 1] = str(bert(tmp_path / "bert"))
    words = [*training, "--train_file", data, "--do_train", "--do_eval"]
    _check(run("-m", "hf_pdecay", "run", SCRIPTS / "glue_style.py", *words), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-classification" in card and "50.00% of the decayed weights" in card
    assert "eval_accuracy" in json.loads((tmp_path / "out" / "eval_results.json").read_text())


@pytest.mark.slow
def test_another_optimizer_is_said_once(run: Run, training: list[str], texts: Path, tmp_path: Path) -> None:
    training[training.index("--optim") + 1] = "adamw_torch"
    training[training.index("--optim_args") : training.index("--optim_args") + 2] = []
    done = run("-m", "hf_pdecay", "run", SCRIPTS / "clm_style.py", *training, "--train_file", texts)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("not in use, as optim='adamw_torch'") == 1
    assert not (tmp_path / "out" / "sparsity.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before the script", "among its arguments"])
def test_settings_as_flags(place: str, run: Run, training: list[str], texts: Path, tmp_path: Path) -> None:
    """The script knows neither the flags nor the optimizer."""
    for name in ("--optim", "--optim_args"):
        training[training.index(name) : training.index(name) + 2] = []
    flags = ["--target_sparsity", "0.5", "--p_norm=0.8"]
    first, last = (flags, []) if place == "before the script" else ([], flags)
    done = run("-m", "hf_pdecay", "run", *first, SCRIPTS / "clm_style.py", *training, *last, "--train_file", texts)
    _check(done, tmp_path / "out")


def _file_of(training: list[str], folder: Path, **settings: Any) -> Path:
    """A file of options without the optimizer; YAML contains JSON."""
    options = dict(zip((word.removeprefix("--") for word in training[::2]), training[1::2], strict=True)) | settings
    numbers = {"max_steps", "logging_steps", "save_steps", "per_device_train_batch_size"}
    values = {key: int(value) if key in numbers else value for key, value in options.items()}
    values |= {"learning_rate": 1e-3, "use_cpu": True, "bf16": False}
    file = folder / "options.json"
    file.write_text(json.dumps({key: value for key, value in values.items() if not key.startswith("optim")}))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--target_sparsity", "0.5"]])
def test_settings_in_the_config_of_trl(
    words: list[str], sft: Path, run: Run, training: list[str], texts: Path, tmp_path: Path
) -> None:
    # A setting on the command line wins over the file.
    settings: dict[str, Any] = {"target_sparsity": 0.25 if words else 0.5, "p_norm": 0.8, "p_norm_begin": None}
    config = _file_of(training, tmp_path, dataset_name=str(texts.parent), **settings)
    _check(run("-m", "hf_pdecay", "run", sft, "--config", config, *words), tmp_path / "out")


@pytest.mark.slow
def test_settings_in_the_file_of_a_script(run: Run, training: list[str], texts: Path, tmp_path: Path) -> None:
    file = _file_of(training, tmp_path, train_file=str(texts), target_sparsity=0.5)
    script = SCRIPTS / "clm_style.py"
    _check(run("-m", "hf_pdecay", "run", script, file), tmp_path / "out")
    wrong = _file_of(training, tmp_path, train_file=str(texts), target_sparsity=50)
    done = run("-m", "hf_pdecay", "run", script, wrong)
    assert done.returncode == 2 and "Was 0.5 meant?" in done.stderr.splitlines()[-1]
    wrong = _file_of(training, tmp_path, train_file=str(texts), target_sparsty=0.5)
    done = run("-m", "hf_pdecay", "run", script, wrong)
    assert done.returncode != 0 and "target_sparsty" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "words", "message"),
    [
        ("adamw_torch", ["--optim_args", "target_sparsity=0.5"], "does not read target_sparsity=0.5, .*'adamw_lp'"),
        ("sgd", ["--target_sparsity", "0.5"], "does not read --target_sparsity 0.5; give --optim sgd_lp"),
        ("adamw_lp", ["--optim_args", "target_sparsty=0.5"], "did you mean 'target_sparsity'"),
        ("adamw_lp", ["--target_sparsity", "50"], r"Was 0\.5 meant\?"),
        ("adamw_lp", ["--optim_args", "lp_rules=missing.json"], "missing.json"),
    ],
)
def test_settings_are_refused_before_anything_is_loaded(
    optim: str, words: list[str], message: str, run: Run, texts: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "no_model"  # would be the next error
    script = [SCRIPTS / "clm_style.py", "--output_dir", tmp_path / "out", "--train_file", texts, "--optim", optim]
    done = run("-m", "hf_pdecay", "run", *script, "--model_name_or_path", missing, *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(message, done.stderr.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target_sparsity", "50"], r"Was 0\.5 meant\?"),
        (["--optim", "sgd", "--target_sparsity", "0.5"], "give --optim sgd_lp"),
        (["--optim", "adamw_lp", "--optim_args", "target_sparsty=0.5"], "did you mean 'target_sparsity'"),
    ],
)
def test_the_sft_script_of_trl_refuses_settings_early(
    words: list[str], message: str, sft: Path, run: Run, tmp_path: Path
) -> None:
    missing = ["--model_name_or_path", tmp_path / "no_model", "--dataset_name", tmp_path / "no_data"]
    done = run("-m", "hf_pdecay", "run", sft, *missing, "--output_dir", tmp_path / "out", "--bf16", "false", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(message, done.stderr.splitlines()[-1])


@pytest.mark.slow
def test_an_optimizer_in_the_deepspeed_config_is_refused(run: Run, training: list[str], texts: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    config = texts.with_name("deepspeed.json")
    config.write_text(
        '{"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}, "train_micro_batch_size_per_gpu": "auto"}'
    )
    words = [*training, "--train_file", texts, "--deepspeed", config]
    done = run("-m", "hf_pdecay", "run", SCRIPTS / "clm_style.py", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "its entry 'optimizer' would take the place of optim='adamw_lp'" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize(("ending", "code"), [("exit", 7), ("fail", 1), ("return", 0)])
def test_a_script_is_run_as_python_runs_it(as_module: bool, ending: str, code: int, run: Run, tmp_path: Path) -> None:
    """The reference is Python itself."""

    def cold(*words: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **ENVIRONMENT}
        return subprocess.run(
            [*map(str, words)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    for name in ("probe.py", "neighbour.py"):
        (tmp_path / name).write_text((SCRIPTS / name).read_text())
    # Words that are ours, had they come before.
    words = [*(["-m", "probe"] if as_module else ["probe.py"]), ending, "-m", "--help", "--version"]
    plain = cold(sys.executable, *words)
    # The console script itself, once.
    installed = (ending, as_module) == ("fail", False)
    ours = cold(CONSOLE, "run", *words) if installed else run("-m", "hf_pdecay", "run", *words)
    assert plain.returncode == ours.returncode == code
    said, expected = (json.loads(done.stdout) for done in (ours, plain))
    assert said == expected
    assert said["path"] == str(tmp_path) and said["main"] and said["spawned"] == [0, 1, 2, 3]
    if ending == "fail":
        assert "ValueError: of the script's own" in ours.stderr
        assert "hf_pdecay" not in ours.stderr and "runpy" not in ours.stderr
        if not as_module:
            assert ours.stderr[ours.stderr.index("Traceback") :] == plain.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Name a script or module: hf-pdecay run SCRIPT"),
        (["-m"], "Name a script or module"),
        (["nowhere.py", "--lr", "1"], "'nowhere.py' does not exist; name a Python script"),
        (["."], "'.' is a folder; name a Python script"),
        (["-m", "nowhere_at_all"], "module 'nowhere_at_all' is not found"),
        (["-m", "nowhere_at_all.sft"], "module 'nowhere_at_all.sft' is not found"),
        (["-m", "email"], "module 'email' has no __main__"),
    ],
)
def test_what_cannot_be_run(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["run", *words]) == 2
    said: Any = capsys.readouterr()
    assert message in said.err and said.err.startswith("hf-pdecay run: ") and not said.out


@pytest.mark.parametrize("words", [["--optim", "adamw_lp", "script.py"], ["--optim=adamw_lp", "script.py"]])
def test_options_before_the_script(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", *words])
    assert ended.value.code == 2
    assert f"unrecognized arguments: {words[0]}; a script's own arguments come after" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["env", *words[:1]])
    assert capsys.readouterr().err.endswith(f"unrecognized arguments: {words[0]}\n")


def test_help_of_run_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--help"])
    assert ended.value.code == 0
    assert "hf-pdecay run [SETTINGS] SCRIPT ARGS" in capsys.readouterr().out


_PRINTS = """
from transformers import TrainingArguments
args = TrainingArguments("out")
print(args.optim.value, args.optim_args)
"""
_PARSER = "import argparse\nparser = argparse.ArgumentParser()\n"
_POSITIONAL = f"{_PARSER}parser.add_argument('data')\nparser.parse_args()\n{_PRINTS}"
_COMMANDS = f"""{_PARSER}
parser.add_subparsers().add_parser("fit").add_argument("--p_norm")
print(parser.parse_args().p_norm)
{_PRINTS}"""
_STARTING = f"""{_PARSER}
parser.add_argument("rest", nargs=argparse.REMAINDER)
print(parser.parse_args().rest)
{_PRINTS}"""
_OF_A_FILE = """
from transformers import HfArgumentParser, TrainingArguments
(args,) = HfArgumentParser(TrainingArguments).parse_dict({"target_sparsity": 0.9, "p_norm": 0.5})
print(args.optim.value, args.optim_args)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "script", "after", "printed"),
    [
        # A script that reads no flags.
        ("", _PRINTS, "--target_sparsity 0.9", "adamw_lp target_sparsity=0.9"),
        # A value of ours is no positional argument of the script.
        ("", _POSITIONAL, "--p-norm 0.5 data", "adamw_lp p_norm=0.5"),
        # A switch needs no value, and does not take the next flag for one.
        ("", _POSITIONAL, "data --keep_zeros --lambda_p 0", "adamw_lp keep_zeros=true,lambda_p=0"),
        ("--lambda-p 0 --keep_zeros", _POSITIONAL, "data", "adamw_lp keep_zeros=true,lambda_p=0"),
        # A flag of the script's own, of a command's parser, and words for another script.
        ("", _COMMANDS, "fit --p_norm 3 --target_sparsity=0.5", "3\nadamw_lp target_sparsity=0.5"),
        ("", _STARTING, "child.py --p_norm 3", "['child.py', '--p_norm', '3']\nadamw_torch"),
        # Keys of a file that HfArgumentParser reads; flags win.
        ("--p_norm 0.7", _OF_A_FILE, "", "adamw_lp p_norm=0.7,target_sparsity=0.9"),
    ],
)
def test_where_settings_may_stand(before: str, script: str, after: str, printed: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(script)
    done = run("-m", "hf_pdecay", "run", *before.split(), "script.py", *after.split())
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(printed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words", "code", "said"),
    [
        (_PRINTS, "--target_sparsty 0.9", 2, "nothing knows it; did you mean --target_sparsity?"),
        (_POSITIONAL.replace("parse_args", "parse_known_args"), "x --targetsparsity=0.9", 2, "mean --target_sparsity?"),
        (_PRINTS, "--target_sparsity", 2, "--target_sparsity has no value"),
        (_PRINTS, "--target_sparsity 90%", 2, "target_sparsity='90%'; it must be a number. Was 0.9 meant?"),
        ("", "--target_sparsity 0.9", 0, "script.py made no TrainingArguments, so nothing has read --target_spars"),
    ],
)
def test_settings_that_nothing_would_read(
    script: str, words: str, code: int, said: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(script)
    done = run("-m", "hf_pdecay", "run", "script.py", *words.split())
    assert done.returncode == code and "Traceback" not in done.stderr
    assert said in done.stderr.splitlines()[-1]
