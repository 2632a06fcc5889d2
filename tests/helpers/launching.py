"""Several processes of this CPU, with gloo between them: modules of the tests run by torchrun, and any script.

``-m tests.helpers.launching SCRIPT ARGS…`` or ``-m tests.helpers.launching -m MODULE ARGS…``, under ``accelerate
launch`` or torchrun, runs its arguments as Python would, and ends by :func:`leave`.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from .warm import ADDRESS, become, python


# Between a launcher and the script that it launches.
LEAVING = ("-m", "tests.helpers.launching")


def launch(module: str, *arguments: object, processes: int | None = 2, timeout: float = 600.0) -> None:
    """Run a module on so many processes; None runs it without torchrun.

    Raises:
        AssertionError: With what the processes wrote, if one of them failed.
    """
    words: tuple[object, ...] = ("-m", module, *arguments)
    if processes is not None:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
        words = (*launcher, *LEAVING, *words)
    done = python(*words, timeout=timeout)
    if done.returncode != 0:
        # What torchrun adds comes last, and says no more than which process it was.
        said, _, verdict = done.stderr.partition("Failures:")
        raise AssertionError(f"{done.stdout[-3000:]}\n{said[-6000:]}\n{verdict[-1500:]}")


def leave() -> None:
    """End a process that has done its work, without the interpreter's own end.

    gloo's threads may still hold tensors that are Python objects. Let go of while the interpreter ends they abort the
    process now and then, also after ``destroy_process_group``: https://github.com/pytorch/pytorch/issues/190489.
    """
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_and_leave(words: list[str]) -> None:
    """Run a script, or ``-m`` and a module, with its arguments; a status other than 0 is left as it is."""
    module = words[0] == "-m"
    name, *sys.argv[1:] = words[1:] if module else words
    sys.argv[0] = name
    if not module:
        sys.path.insert(0, str(Path(name).parent))
    run = runpy.run_module if module else runpy.run_path
    try:
        run(name, run_name="__main__", **({"alter_sys": True} if module else {}))
    except SystemExit as ended:
        if ended.code:
            raise
    leave()


if __name__ == "__main__":
    if ADDRESS in os.environ:
        code = "import sys; from tests.helpers.launching import run_and_leave; run_and_leave(sys.argv[1:])"
        become(["-c", code, *sys.argv[1:]])
    run_and_leave(sys.argv[1:])
