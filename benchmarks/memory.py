"""The bytes that a step moves, and the memory that it takes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


MOMENTS = ("exp_avg", "exp_avg_sq")


class PeakMemory(TorchDispatchMode):
    """The peak of the bytes held by tensors that are made inside it.

    Memory that a kernel allocates outside torch tensors is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._holders: dict[int, int] = {}

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if self._holders[address] == 0:
            del self._holders[address]
            self.alive -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {storage for storage, _ in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _plain(result):
            address, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            if size == 0 or (address in given and address not in self._holders):
                continue
            if address not in self._holders:
                self._holders[address] = 0
                self.alive += size
                self.peak = max(self.peak, self.alive)
            self._holders[address] += 1
            weakref.finalize(tensor, self._release, address, size)
        return result


def _plain(tree: Any) -> list[Tensor]:
    """Tensors that hold memory; wrappers hold none, and the tensors that they wrap come separately."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not hasattr(leaf, "__tensor_flatten__")]


def _storages(tree: Any) -> Iterable[tuple[int, int]]:
    for tensor in _plain(tree):
        yield tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()


def extra_bytes(step: Callable[[], Any], device: str) -> int:
    """Return the peak of the bytes held by tensors that are made in a step."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        step()
    return memory.peak


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; for a wrapper (an 8-bit moment), those of the tensors in it."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def state_bytes(optimizer: Any) -> int:
    """Return the bytes of an optimizer's state."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor_bytes(value) for value in values if isinstance(value, Tensor))


def least_bytes(optimizer: Any, params: list[Tensor]) -> int:
    """Return the bytes that a step must move.

    Weights and both moments are read and written, gradients are read. What else an optimizer moves counts against it.
    """
    total = 0
    for param in params:
        moments = [optimizer.state[param].get(name) for name in MOMENTS]
        total += 3 * tensor_bytes(param) + 2 * sum(tensor_bytes(moment) for moment in moments if moment is not None)
    return total


def peak_rss_growth(step: Callable[[], Any]) -> int | None:
    """Return how far the resident memory of this process rose in a step; None if the system does not say.

    Call it in a process that gives freed memory back to the system, see `probes.py`.
    """
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        clear.write_text("5")  # the peak restarts here
    except OSError:
        return None
    before = _kilobytes(status, "VmRSS")
    step()
    return max(_kilobytes(status, "VmHWM") - before, 0) * 1024


def _kilobytes(status: Path, key: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])
