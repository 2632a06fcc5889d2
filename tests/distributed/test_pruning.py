"""Cuts among sharded weights are those among whole ones, to the last weight; and so are the counts of what is left."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.launching import launch


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four processes found."""
    folder = tmp_path_factory.mktemp("pruning")
    launch("tests.distributed.pruning_run", folder, processes=4)
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
