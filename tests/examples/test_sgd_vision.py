"""examples/sgd_vision.py: a convolutional network trained by SGD, as sparse as asked and still good."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ..helpers.warm import python


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_is_as_sparse_as_asked_and_reads_digits() -> None:
    script = ROOT / "examples" / "sgd_vision.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 60
    done = python(script, "--target_sparsity", "0.95", "--steps", "300")
    assert done.returncode == 0, done.stderr[-2000:]
    line = re.fullmatch(r"test accuracy (\S+), exact zeros in decayed weights (\S+)\n", done.stdout)
    assert line is not None, done.stdout
    # 600 steps to 90% zeros read 97.5% of them.
    assert float(line[1]) > 0.95 and float(line[2]) == 0.95
