"""Modules of the tests run by torchrun on several processes of this CPU, with gloo between them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent

# gloo's listener now and then ends its process when a connection to it breaks as it is made, on a machine under load:
# https://github.com/pytorch/pytorch/issues/188266. Nothing of the run has gone wrong then but its start.
_BROKEN_LISTENER = ("terminate called", "gloo::", "Signal 6")


def launch(module: str, *arguments: object, processes: int | None = 2, timeout: float = 600.0) -> None:
    """Run a module on so many processes; None runs it without torchrun.

    Raises:
        AssertionError: With what the processes wrote, if one of them failed.
    """
    command = [sys.executable, "-m"]
    if processes is not None:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command += [module, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        if not all(sign in done.stderr for sign in _BROKEN_LISTENER):
            break
    if done.returncode != 0:
        # What torchrun adds comes last, and says no more than which process it was.
        said, _, verdict = done.stderr.partition("Failures:")
        raise AssertionError(f"{done.stdout[-3000:]}\n{said[-6000:]}\n{verdict[-1500:]}")
