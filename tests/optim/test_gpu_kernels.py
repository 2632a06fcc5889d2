"""The Triton kernels: the cases in tests/optim/gpu_cases/, in processes of their own.

Whether Triton interprets or compiles is settled when it is imported, for the whole process. So each class of cases runs
in one that has it so, and no other test notices. Where there is a GPU, they run on it too.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch


pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).parents[2]
ARITHMETIC = ["step.py::TestArithmetic"]
OTHERS = [
    "step.py::TestRounding",
    "launch.py::TestLaunches",
    "other.py::TestOthers",
    "eight_bit.py::TestEightBit",
]
UNITS = ["units.py::TestUnits", "units.py::TestByReference"]
TO_BASE = [
    "to_base.py::TestToBase",
    "to_base.py::TestUnitsToBase",
    "to_base.py::TestToBaseAround",
    "to_base.py::test_the_formula",
]
COMPILED = [
    "launch.py::TestCompiled",
    "eight_bit.py::TestCompiledEightBit",
    "units.py::TestCompiledUnits",
    "to_base.py::TestCompiledToBase",
]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    ("cases", "interpret", "gpu"),
    [
        (ARITHMETIC, True, False),
        (OTHERS, True, False),
        (UNITS, True, False),
        (TO_BASE, True, False),
        (COMPILED, False, False),
        pytest.param([*ARITHMETIC, *OTHERS, *UNITS, *TO_BASE], False, True, marks=needs_gpu),
    ],
    ids=str,
)
def test_kernel(cases: list[str], interpret: bool, gpu: bool, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": str(int(interpret)), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    report = tmp_path / "report.xml"
    # The interpreter divides by 0 and overflows in numpy, as a GPU does, but numpy warns of it.
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += [f"tests/optim/gpu_cases/{name}" for name in cases]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert report.exists(), done.stdout + done.stderr
    results = list(ElementTree.parse(report).iter("testcase"))
    failures = [
        f"{case.get('name')}\n{problem.text or problem.get('message')}"
        for case in results
        for problem in case
        if problem.tag in ("failure", "error")
    ]
    assert not failures, f"{len(failures)} of {len(results)} cases failed:\n\n" + "\n\n".join(failures)
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(case.find("skipped") is None for case in results)
