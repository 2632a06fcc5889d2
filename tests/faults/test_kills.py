"""A few of the kills of ``make test-faults``."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from ..helpers.warm import python
from .moments import Kill


pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("layout", "kills"), [("single", 8), ("ddp", 2)])
def test_killed_runs_end_like_those_that_were_left_alone(layout: str, kills: int) -> None:
    done = python("-m", "tests.faults", "--layouts", layout, "--kills", kills, "--lives", 4)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert re.search(rf" {kills} / {kills} +yes ", done.stdout), done.stdout
    assert done.stdout.count(": killed rank ") == kills


def test_a_process_whose_partner_is_killed_ends(tmp_path: Path) -> None:
    # Without a launcher, which would end the other. It dies in a save, before it has written its random state.
    (tmp_path / "plan.json").write_text(json.dumps([asdict(Kill(step=6, moment=9, rank=1))]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def run(rank: str) -> subprocess.CompletedProcess[str]:
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return python("-m", "tests.faults.run", tmp_path, timeout=240, **environment)

    with ThreadPoolExecutor() as pool:
        left, killed = pool.map(run, ("0", "1"))
    assert killed.returncode == -9
    assert left.returncode == 1, left.stderr[-2000:]
    assert re.search(r"Connection (closed|reset) by peer|Broken pipe", left.stderr), left.stderr[-2000:]
    assert (tmp_path / "killed").read_text() == "rank 1, step 6, moment 9: open rng_state_1.pth\n"
    saved = {each.name for each in (tmp_path / "out" / "checkpoint-6").iterdir()}
    assert "rng_state_0.pth" in saved
    assert not saved & {"rng_state_1.pth", "trainer_state.json"}  # the first waits before it says that all is there
