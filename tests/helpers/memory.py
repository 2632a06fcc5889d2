"""How much memory tensors hold."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.holders: dict[int, int] = {}

    def _release(self, address: int, size: int) -> None:
        self.holders[address] -= 1
        if self.holders[address] == 0:
            del self.holders[address]
            self.alive -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            address, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            if size == 0 or (address in given and address not in self.holders):
                continue
            if address not in self.holders:
                self.holders[address] = 0
                self.alive += size
                self.peak = max(self.peak, self.alive)
            self.holders[address] += 1
            weakref.finalize(tensor, self._release, address, size)
        return result
