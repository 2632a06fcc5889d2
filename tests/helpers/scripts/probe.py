"""Says how it was run, and what its own workers see; then ends as its first argument says."""

from __future__ import annotations

import json
import sys

import neighbour  # noqa: F401  # lies beside this file
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> int:
        return number


def fail() -> None:
    raise ValueError("of the script's own")


if __name__ == "__main__":
    main = sys.modules["__main__"]
    loader = DataLoader(Numbers(), num_workers=1, multiprocessing_context="spawn")
    sys.stdout.write(
        json.dumps(
            {
                "argv": sys.argv,
                "path": sys.path[0],
                "file": __file__,
                "main": main.__dict__ is globals(),
                "spec": getattr(__spec__, "name", None),
                "spawned": [int(each) for each in loader],
            }
        )
    )
    if sys.argv[1] == "exit":
        sys.exit(7)
    if sys.argv[1] == "fail":
        fail()
