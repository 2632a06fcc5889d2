"""Memory of large pages for what each call reads from beginning to end."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


_PAGE = 2 << 20  # bytes of a large page, as x86 and most of 64-bit ARM have it
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # of Linux


def in_large_pages(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor in memory for which Linux is asked for large pages.

    A processor then translates a five-hundredth of the addresses, and reads faster. A tensor that would fill fewer than
    two such pages, and all tensors on other systems, are returned as they are.
    """
    size = tensor.nbytes
    if _ADVICE is None or not tensor.is_cpu or size < 2 * _PAGE:
        return tensor
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _PAGE
    try:
        memory.madvise(_ADVICE, start, size // _PAGE * _PAGE)
    except OSError:  # a kernel without them
        return tensor
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return copy.copy_(tensor)
