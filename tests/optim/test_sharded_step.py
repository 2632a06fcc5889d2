"""The step of sharded parameters on two processes equals that of whole ones on one; see `tests/helpers/sharded_run.py`.

The arithmetic of an element does not depend on where it lies, so that float32 agrees to the bit under "compiled"; the
stated tolerance of FSDP2, whose gradients are averages of two, is 1e-5.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..helpers.launching import launch


BACKENDS = ["compiled", "foreach"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("sharded")
    launch("tests.helpers.sharded_run", folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def close(found: dict[str, tuple[torch.Tensor, torch.Tensor]], tolerance: float = 1e-6) -> None:
    for name, (sharded, whole) in found.items():
        error = ((sharded - whole).abs() / (1 + whole.abs())).max().item()
        assert error <= tolerance, f"{name}: differs by {error:.2g}"
        assert torch.equal(sharded == 0, whole == 0), f"{name}: zeros in other places"


def result(ranks: Ranks, rank: int, case: str) -> dict[str, Any]:
    found: dict[str, Any] = ranks[rank][case]
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize("case", ["trained compiled", "trained foreach", "replicated weights"])
def test_training_equals_that_of_one_process(ranks: Ranks, case: str) -> None:
    for rank in range(2):
        found = result(ranks, rank, case)
        close(found["weights"])
        zeros = {name: int((sharded == 0).sum()) for name, (sharded, _) in found["weights"].items()}
        assert zeros["even"] > 0 and zeros["uneven"] > 0, "the test has something to find"
        if case != "trained foreach":
            # Eight steps of six sharded and six whole tensors, each in one call of the C++ function.
            assert found["calls"] == [6, 6] * 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_a_tensor_that_is_zero_on_all_ranks_sleeps(ranks: Ranks, backend: str) -> None:
    for rank in range(2):
        found = result(ranks, rank, f"trained {backend}")
        assert found["dormant"] == {name: name == "zero" for name in found["dormant"]}
        sharded, _ = found["weights"]["zero on one rank"]
        assert bool((sharded[4:] == 0).all()) and bool((sharded[:4] != 0).any()), "zeros stay zero"
        woken, _ = found["first"]["zero"]
        assert bool((woken != 0).all()), "a wholly zero tensor learns"


@pytest.mark.parametrize("case", ["skipped compiled", "skipped foreach", "skipped inf"])
def test_bad_gradient_of_one_rank_skips_the_step_of_all(ranks: Ranks, case: str) -> None:
    for rank in range(2):
        found = result(ranks, rank, case)
        assert found["skips"] == 1 and found["counts"] == [1] * 6
        for name, (sharded, _) in found["before"].items():
            assert torch.equal(sharded, found["after"][name][0]), name
            assert not torch.equal(sharded, found["later"][name][0]), name
        close(found["after"])
        close(found["later"])


def test_steps_do_again_what_the_last_one_did(ranks: Ranks) -> None:
    """As with whole tensors, and on all ranks alike; what has changed is noticed."""
    for rank in range(2):
        found = result(ranks, rank, "followed")
        anew = ["first", "zeros wake", "replicated gradients", "after these"]
        anew += ["gradients under way", "and no more", "weights elsewhere"]
        assert [name for name, same in found["plans"].items() if not same] == anew
        assert "modified by an inplace operation" in found["raised"]
        for name, (sharded, whole) in found["weights"].items():
            assert torch.equal(sharded, whole), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_of_a_sharded_run_continues(ranks: Ranks, backend: str) -> None:
    for rank in range(2):
        close(result(ranks, rank, f"resumed {backend}")["weights"])


def test_fsdp2_equals_one_process(ranks: Ranks) -> None:
    for rank in range(2):
        close(result(ranks, rank, "fsdp")["weights"], 1e-5)


def test_fsdp2_with_bfloat16_moments_is_near_one_process(ranks: Ranks) -> None:
    """The moments round by other bits there: a tenth of a step of 0.02."""
    for rank in range(2):
        found = result(ranks, rank, "fsdp bfloat16")
        assert found["dtype"] == torch.bfloat16
        for sharded, whole in found["weights"].values():
            torch.testing.assert_close(sharded, whole, rtol=0.02, atol=0.002)


def test_8bit_moments_of_shards_are_refused(ranks: Ranks) -> None:
    for rank in range(2):
        assert ranks[rank]["fsdp 8bit"]["error"].startswith("ValueError: Invalid moments: moments='8bit' with sharded")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["summand", "sharded", "replicated"])
def test_gradient_of_another_placement_is_understood_or_refused(ranks: Ranks, case: str, backend: str) -> None:
    """Its local part is another part than that of the weight, or a summand of it."""
    for rank in range(2):
        found = ranks[rank][f"{case} {backend}"]
        if "error" in found:
            assert found["error"].startswith("ValueError"), found["error"]
        else:
            close(found["weights"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_the_change_of_a_sharded_weight(ranks: Ranks, backend: str) -> None:
    for rank in range(2):
        assert "modified by an inplace operation" in result(ranks, rank, f"stale {backend}")["raised"]
