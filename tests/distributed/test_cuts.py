"""Cuts among sharded weights are those among whole ones, to the last weight; and so are the counts of what is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four processes found."""
    folder = tmp_path_factory.mktemp("cuts")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "tests.distributed.cuts_run", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("what", ["same", "exact", "counted"])
def test_shards_are_cut_as_whole_tensors_are(what: str, found: list[dict[str, Any]]) -> None:
    for results in found:
        cases = {name: case[what] for name, case in results.items() if name != "columns"}
        assert len(cases) == 33
        assert cases == dict.fromkeys(cases, True)


def test_as_many_go_where_shards_are_columns(found: list[dict[str, Any]]) -> None:
    for results in found:
        began = results["columns"][0][1]  # zeros that were there before any cut
        for asked, zeros in results["columns"]:
            assert zeros == max(asked, began)
        assert results["columns"] == found[0]["columns"]
