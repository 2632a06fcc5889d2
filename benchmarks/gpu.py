"""Run everything that needs a GPU, part by part, in one process; a part that fails does not stop the others.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only step semi_structured

Starting Python and importing torch takes a large fraction of a short measurement, so it happens once. Each part writes
the same files to benchmarks/results/ as it does when run by itself, and its time is printed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[1]
# The most important first: name, module beside this file or "pytest", arguments.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "step": (
        "step_speed",
        ("--device", "cuda", "--sizes", "25M", "1B", "7B-bf16", "1M", "--rounds", "12", "--no-cold-start"),
    ),
    "overhead": ("overhead", ("--device", "cuda", "--repeats", "3", "--steps", "40")),
    "tests": ("pytest", ("-q", "-p", "no:cacheprovider", str(ROOT / "tests/optim/test_on_gpu.py"))),
    "semi_structured": ("semi_structured", ("--rounds", "6")),
    "kernels": (
        "pytest",
        ("-q", "-p", "no:cacheprovider", str(ROOT / "tests/optim/test_gpu_kernels.py"), "-k", "False-True"),
    ),
    "shrink": ("shrink", ("--device", "cuda")),
}


def entry(module: str) -> Callable[[Sequence[str]], int | None]:
    """Return the function that runs a part, given its arguments."""
    if module == "pytest":
        import pytest

        return lambda arguments: int(pytest.main(list(arguments)))
    main_function: Callable[[Sequence[str]], int | None] = importlib.import_module(module).main
    return main_function


def run(names: Sequence[str]) -> dict[str, str]:
    """Run parts; return how each ended, and after how long."""
    ended = {}
    for name in names:
        module, arguments = PARTS[name]
        print(f"== {name}: {module} {' '.join(arguments)}", flush=True)
        begin = time.perf_counter()
        try:
            code = entry(module)(arguments)
            result = "done" if not code else f"ended with code {code}"
        except Exception:  # of any kind: the other parts still run
            traceback.print_exc()
            result = "failed"
        except SystemExit as error:  # argparse, or a benchmark that finds no GPU
            result = f"ended with code {error.code}"
        ended[name] = f"{result} after {time.perf_counter() - begin:.0f} s"
        print(f"== {name}: {ended[name]}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen parts; return 0 if all finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="parts to run (all)")
    options = parser.parse_args(argv)
    ended = run(options.only or list(PARTS))
    print(*(f"{name}: {result}" for name, result in ended.items()), sep="\n")
    return int(not all(result.startswith("done") for result in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
