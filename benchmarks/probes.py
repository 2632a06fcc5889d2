"""Measurements in a fresh process: how long compiling takes, and how far the process grows in a step.

    python benchmarks/probes.py first_step cpu
    python benchmarks/probes.py rss '{"size": "25M", "names": ["torch AdamW, fused"]}'

`step_speed.py` runs these two and reads the JSON that they print.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hf_pdecay
from contenders import SIZES, Size, contenders_for, ours
from memory import peak_rss_growth
from timing import make_params


def first_step(device: str) -> dict[str, float]:
    """Time the first and the second step of AdamWLp in this process, imports of the package excluded."""
    params = make_params(Size("few", ((512, 512),)), device)
    optimizer = ours(0.8).make(params)
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {"first": seconds[0], "second": seconds[1]}


def rss(size: Size, names: Sequence[str]) -> dict[str, int | None]:
    """Measure how far this process grows in the third step of each optimizer named."""
    params = make_params(size, "cpu")
    growth: dict[str, int | None] = {}
    for contender in contenders_for(size, "cpu"):
        if contender.name in names:
            optimizer = contender.make(params)
            for _ in range(2):
                optimizer.step()
            growth[contender.name] = peak_rss_growth(optimizer.step)
    return growth


def compile_seconds(device: str) -> dict[str, float]:
    """Return what the first step costs more than the second, with nothing compiled before and in the next process."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
        steps = [_in_a_process(["first_step", device], caches) for _ in range(2)]
    return {name: step["first"] - step["second"] for name, step in zip(("cold", "warm"), steps, strict=True)}


def rss_growth(size: Size, names: Sequence[str]) -> dict[str, int | None]:
    """Run :func:`rss` in a process whose allocator gives large blocks back at once, so that no step reuses old ones."""
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return _in_a_process(["rss", json.dumps({"size": size.name, "names": list(names)})], allocator)


def _in_a_process(arguments: list[str], variables: dict[str, str]) -> Any:
    root = str(Path(hf_pdecay.__file__).parents[1])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *arguments],
        env={**os.environ, **variables, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"probes.py {arguments[0]} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv: Sequence[str]) -> None:
    """Run a probe and print its result as JSON."""
    probe, argument = argv
    if probe == "first_step":
        print(json.dumps(first_step(argument)))
    else:
        asked = json.loads(argument)
        print(json.dumps(rss(SIZES[asked["size"]], asked["names"])))


if __name__ == "__main__":
    main(sys.argv[1:])
