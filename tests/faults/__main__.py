"""Kill training runs at random moments, resume them, and compare them with runs that were left alone.

    python -m tests.faults --kills 20 --seed 0

Runs of one process are forked from this one, which has imported everything; runs of two are started by ``accelerate
launch``. A run is killed several times, one life after the other. The moments are drawn from those that an undisturbed
run went through, half of them in the middle of a save. The same seed gives the same kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from ..helpers.launching import LEAVING
from ..helpers.warm import ADDRESS, Server, python
from .compare import differences
from .moments import Kill
from .run import LOGGING_STEPS, STEPS, live


ROOT = Path(__file__).parents[2]
LAYOUTS = {"single": "one process", "ddp": "two processes (DDP)"}
# The phases of a run from which kills are drawn in turn.
PHASES = ("save", "train", "save", "after")
LIMIT = 240  # seconds after which a launch counts as hung


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--kills", type=int, default=20, help="in each layout")
    parser.add_argument("--lives", type=int, default=5, help="kills of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the folders of the runs")
    options = parser.parse_args()
    # Forked processes must not inherit threads, which do not live on in them.
    os.environ["OMP_NUM_THREADS"] = "1"
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    rows = []
    server = Server() if ADDRESS not in os.environ else None
    try:
        for layout in options.layouts:
            start = time.monotonic()
            survived, identical = campaign(work / layout, layout, options.kills, options.lives, options.seed)
            rows.append((LAYOUTS[layout], survived, options.kills, identical, time.monotonic() - start))
    finally:
        if server is not None:
            server.close()
        if options.keep:
            say(f"The runs are in {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    say(f"\n{'':22}{'kills survived / tried':>24}{'bit-identical':>16}{'seconds':>10}")
    for name, survived, tried, identical, seconds in rows:
        say(f"{name:22}{f'{survived} / {tried}':>24}{'yes' if identical else 'no':>16}{seconds:>10.0f}")
    return 0 if all(survived == tried and identical for _, survived, tried, identical, _ in rows) else 1


def campaign(work: Path, layout: str, kills: int, lives: int, seed: int) -> tuple[int, bool]:
    """Kill runs of one layout; returns the kills survived, and whether all ended like the one that was left alone."""
    whole = work / "whole"
    whole.mkdir(parents=True)
    if _lives(whole, layout) != 0:
        say(_tail(whole))
        raise SystemExit(f"{layout}: the run that is left alone failed")
    moments = {rank: _moments(whole / f"moments-{rank}") for rank in range(2 if layout == "ddp" else 1)}
    chance = random.Random(seed)
    survived, identical = 0, True
    for number, first in enumerate(range(0, kills, lives)):
        phases = [PHASES[each % len(PHASES)] for each in range(first, min(first + lives, kills))]
        plan = sorted(_draw(chance, moments, phase) for phase in phases)
        folder = work / f"killed-{number}"
        folder.mkdir()
        (folder / "plan.json").write_text(json.dumps([asdict(kill) for kill in plan]))
        status = _lives(folder, layout)
        noted = _killed(folder)
        for line, kill in zip(noted, plan, strict=False):
            others = "" if layout == "single" or kill.alone else ", and the other process"
            say(f"{LAYOUTS[layout]}, run {number}: killed {line}{others}")
        # A kill is survived by a life that goes on, to the next kill or to the end.
        survived += max(len(noted) - (status != 0), 0)
        if status != 0:
            say(f"{layout}, run {number}: ended with {status} after {len(noted)} kills\n{_tail(folder)}")
            identical = False
            continue
        differing = differences(whole / "out", folder / "out", STEPS, LOGGING_STEPS)
        if differing:
            say(f"{layout}, run {number}: differs in {'; '.join(differing)}")
            identical = False
    return survived, identical


def _draw(chance: random.Random, moments: dict[int, list[tuple[int, int, str, str]]], phase: str) -> Kill:
    rank = chance.choice(sorted(moments))
    some = [(label, step, moment) for step, moment, at, label in moments[rank] if at == phase and step]
    # What happens is drawn first: most moments are writes of the optimizer's state.
    what = chance.choice(sorted({label for label, _, _ in some}))
    step, moment = chance.choice([(step, moment) for label, step, moment in some if label == what])
    return Kill(step, moment, rank, alone=len(moments) == 1 or chance.random() < 0.5)


def _moments(file: Path) -> list[tuple[int, int, str, str]]:
    rows = [line.split("\t") for line in file.read_text().splitlines()]
    return [(int(step), int(moment), phase, label) for step, moment, phase, label in rows]


def _lives(folder: Path, layout: str) -> int:
    """Let a run live, again after each kill; returns the exit status of its last life."""
    while True:
        before = _killed(folder)
        status = _launch(folder) if layout == "ddp" else _fork(folder)
        if status == 0 or _killed(folder) == before:
            return status


def _killed(folder: Path) -> list[str]:
    return (folder / "killed").read_text().splitlines() if (folder / "killed").exists() else []


def _fork(folder: Path) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        with open(folder / "log", "ab") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        try:
            live(folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _launch(folder: Path) -> int:
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", 0)
    try:
        done = python(*launcher, *LEAVING, "-m", "tests.faults.run", folder, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return 1
    with open(folder / "log", "a") as log:
        log.write(done.stdout + done.stderr)
    return done.returncode


def _tail(folder: Path) -> str:
    return (folder / "log").read_text(errors="replace")[-3000:]


def say(text: str) -> None:
    """Print at once: a run that is left to itself writes into a pipe."""
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
