"""Says how it was run, and what its own workers see; then ends as its first argument says."""

from __future__ import annotations

import json
import sys
from multiprocessing import get_context

import neighbour  # noqa: F401  # lies beside this file


class Numbers:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> int:
        return number


def from_a_worker() -> list[int]:
    """Numbers from a process that is spawned, which imports this script to know their class."""
    if sys.argv[1] == "return":
        from torch.utils.data import DataLoader

        return [int(number) for number in DataLoader(Numbers(), num_workers=1, multiprocessing_context="spawn")]
    with get_context("spawn").Pool(1) as pool:
        return pool.map(Numbers().__getitem__, range(4))


def fail() -> None:
    raise ValueError("of the script's own")


if __name__ == "__main__":
    main = sys.modules["__main__"]
    sys.stdout.write(
        json.dumps(
            {
                "argv": sys.argv,
                "path": sys.path[0],
                "file": __file__,
                "main": main.__dict__ is globals(),
                "spec": getattr(__spec__, "name", None),
                "spawned": from_a_worker(),
            }
        )
    )
    if sys.argv[1] == "exit":
        sys.exit(7)
    if sys.argv[1] == "fail":
        fail()
