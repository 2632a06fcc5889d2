"""What is printed on a terminal: tables that fit it, names that stay whole, and lines above progress bars."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tqdm.auto import tqdm
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import hf_pdecay
from hf_pdecay import measure_sparsity
from hf_pdecay.cli.main import main
from hf_pdecay.cli.run_preview import preview
from hf_pdecay.sparsity.report import SparsityReport
from hf_pdecay.tables import NameTable
from hf_pdecay.terminal import get_logger, print_rich
from hf_pdecay.trainer.settings import DecaySettings


def printed(result: Any, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    print_rich(result, console)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def is_tidy(lines: list[str], names: list[str], width: int = 80) -> None:
    """Each name is whole on one line, and only a name makes a line longer than the terminal."""
    for name in names:
        assert any(name in line for line in lines), name
    for line in lines:
        assert len(line) <= width or line.split()[-1] in names, line


@pytest.fixture(scope="module")
def moe() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_report(moe: Qwen3MoeForCausalLM, width: int) -> None:
    report = measure_sparsity(moe)
    decayed = [tensor for tensor in report.tensors if tensor.decayed]
    assert len(decayed) <= 40  # by tensor, not by block
    lines = printed(report, width)
    is_tidy(lines, [tensor.name for tensor in decayed], width)
    for tensor in decayed:
        number = next(number for number, line in enumerate(lines) if tensor.name in line)
        assert f"{tensor.parameters:,}" in " ".join(lines[number : number + 2])


def test_a_report_with_names_beyond_the_line() -> None:
    module: torch.nn.Module = torch.nn.Linear(200, 300)
    for part in reversed("model.multi_modal_projector.language_model.layers.vision_tower.encoder.attention".split(".")):
        outer = torch.nn.Module()
        outer.add_module(part, module)
        module = outer
    report: SparsityReport = measure_sparsity(module)
    name = next(tensor.name for tensor in report.tensors if tensor.decayed)
    assert len(name) > 80
    is_tidy(printed(report), [name])
    # A console of the user's own folds it, and loses nothing.
    console = Console(width=80, file=io.StringIO())
    console.print(report)
    assert name in console.file.getvalue().replace("\n", "")  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [40, 80])
def test_a_preview(moe: Qwen3MoeForCausalLM, tmp_path: Any, width: int) -> None:
    moe.config.save_pretrained(tmp_path)
    pattern = r"model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)\.weight"
    settings = DecaySettings(target_sparsity=0.5, lp_rules={pattern: {"p_norm": 0.6}})
    result = preview(str(tmp_path), settings, max_steps=100, all_tensors=True)
    words = [str(tmp_path) + ":"]
    is_tidy(printed(result, width), [tensor.name for tensor in result.tensors] + [pattern] + words, width)


def test_a_table_with_more_numbers_than_fit() -> None:
    table = NameTable("Trials", ("trial", *(f"learning_rate_{number}" for number in range(9))))
    table.add_row("a-long-name-of-a-trial/7", *("0.12345",) * 9)
    lines = printed(table)
    is_tidy(lines, ["a-long-name-of-a-trial/7"])
    assert all(any(f"learning_rate_{number} 0.12345" in line for line in lines) for number in range(9))


def test_markup_in_names_is_kept() -> None:
    table = NameTable("Rules", ("rule", "tensors"))
    table.add_row("layers.[0-9].[bold].mlp", "1")
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    assert "layers.[0-9].[bold].mlp" in console.file.getvalue()  # type: ignore[attr-defined]


def test_lines_stand_above_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    logger = get_logger("hf_pdecay.some")
    logging.getLogger("hf_pdecay.some").addHandler(handler)
    table = NameTable("Exact zeros", ("tensor", "zeros"))
    table.add_row("lm_head.weight", "1")
    try:
        with tqdm(total=4, file=terminal) as bar:
            bar.update(1)
            logger.warning("%d steps were skipped.", 3)
            bar.update(1)
            print_rich(table)
    finally:
        logging.getLogger("hf_pdecay.some").removeHandler(handler)
    lines = [line.rpartition("\r")[2] for line in terminal.getvalue().split("\n")]
    assert "3 steps were skipped." in lines
    assert any("lm_head.weight" in line for line in lines)
    assert not any("%" in line and ("steps" in line or "tensor" in line) for line in lines)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_console_that_is_not_of_utf_8(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    table = NameTable("Groups", ("rule", "λ_p"))
    table.add_row("default", "0.01")
    print_rich(table)
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    console.flush()
    written = console.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "?_p" in written and "0.01" in written and "hf-pdecay run [SETTINGS] SCRIPT" in written
    assert console.errors == "strict"


def test_the_first_of_several_processes_logs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        get_logger("hf_pdecay.some").warning("of process %s", rank)
    assert [record.getMessage() for record in caplog.records] == ["of process 0"]


def test_every_logger_stands_above_progress_bars() -> None:
    files = [file for file in Path(hf_pdecay.__file__).parent.rglob("*.py") if file.name != "terminal.py"]
    assert not [str(file) for file in files if "getLogger(" in file.read_text(encoding="utf-8")]
