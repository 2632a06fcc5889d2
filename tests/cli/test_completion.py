"""Shell completion, in a real bash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_pdecay.cli.main import main


pytest.importorskip("shtab")


def _completions(script: str, words: list[str]) -> list[str]:
    """What bash offers for the last of the words."""
    ask = f"""
{script}
COMP_WORDS=({" ".join(words)!s})
[ -z "{words[-1]}" ] && COMP_WORDS+=("")
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
function=$(complete -p hf-pdecay | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function
printf "%s\\n" "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    return [word.strip() for word in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["hf-pdecay", "com"], {"compress", "completion"}),
        (["hf-pdecay", "preview", "--target"], {"--target_sparsity"}),
        (["hf-pdecay", "compress", "--d"], {"--dtype"}),
        (["hf-pdecay", "run", "--sparsity_b"], {"--sparsity_begin", "--sparsity_budget"}),
    ],
)
def test_bash_completes(words: list[str], offered: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    assert offered == set(_completions(capsys.readouterr().out, words))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_a_script_names_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in ("preview", "estimate", "compress", "decompress", "shrink"))


def test_without_shtab_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install shtab" in capsys.readouterr().err


def test_a_progress_bar_is_drawn_on_a_terminal_alone(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from hf_pdecay.terminal import progress

    assert list(progress(iter("abc"), "Reading", 3)) == [*"abc"]
    assert capfd.readouterr() == ("", "")
