"""A few of the kills of ``make test-faults``."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from .moments import Kill


ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("layout", "kills"), [("single", 8), ("ddp", 2)])
def test_killed_runs_end_like_those_that_were_left_alone(layout: str, kills: int) -> None:
    command = [sys.executable, "-m", "tests.faults", "--layouts", layout, "--kills", str(kills), "--lives", "4"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert re.search(rf" {kills} / {kills} +yes ", done.stdout), done.stdout
    assert done.stdout.count(": killed rank ") == kills


def test_a_process_whose_partner_is_killed_ends(tmp_path: Path) -> None:
    # Without a launcher, which would end the other. It dies in a save, before it has written its random state.
    (tmp_path / "plan.json").write_text(json.dumps([asdict(Kill(step=6, moment=9, rank=1))]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        environment = {**ENVIRONMENT, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "tests.faults.run", str(tmp_path)]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        complaints = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == -9
    assert processes[0].returncode == 1, complaints[0][-2000:]
    assert re.search(r"Connection (closed|reset) by peer|Broken pipe", complaints[0]), complaints[0][-2000:]
    assert (tmp_path / "killed").read_text() == "rank 1, step 6, moment 9: open rng_state_1.pth\n"
    saved = {each.name for each in (tmp_path / "out" / "checkpoint-6").iterdir()}
    assert "rng_state_0.pth" in saved
    assert not saved & {"rng_state_1.pth", "trainer_state.json"}  # the first waits before it says that all is there
