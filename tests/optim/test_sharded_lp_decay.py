"""LpDecay on two processes equals LpDecay on one; see `tests/helpers/sharded_lp_decay_run.py`.

The arithmetic of an element does not depend on where it lies, but for the last bits of vectorised loops: 1e-6, and 1e-5
under FSDP2, whose gradients are averages of two.
"""

from __future__ import annotations

import pytest
import torch

from ..helpers.launching import launch
from .test_sharded_step import Ranks, close, result


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("sharded")
    launch("tests.helpers.sharded_lp_decay_run", folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_sharded_parameters_step_as_whole_ones(ranks: Ranks, base: str, rank: int) -> None:
    found = result(ranks, rank, f"trained {base}")
    close(found["weights"])
    assert bool((found["weights"]["even"][0] == 0).any()), "the test has something to find"
    assert found["skipped"] == [1, 1], "a bad gradient of one rank skips the step of all"
    assert found["dormant"] == {name: name == "zero" for name in found["dormant"]}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_fsdp2_reaches_the_target_as_one_process_does_and_resumes(ranks: Ranks, base: str, rank: int) -> None:
    found = result(ranks, rank, f"fsdp {base}")
    close(found["weights"], 1e-5)
    assert sum(int((sharded == 0).sum()) for sharded, _ in found["weights"].values()) == round(0.5 * 94)
    for name, (resumed, straight) in found["resumed"].items():
        assert torch.equal(resumed, straight), name


def test_processes_with_other_shards_step_the_same_parts(ranks: Ranks) -> None:
    first, second = (result(ranks, rank, "batched") for rank in (0, 1))
    assert first["weights"] != second["weights"], "the test has something to find"
    assert first["places"] == second["places"] == [[place] for place in range(6)]
