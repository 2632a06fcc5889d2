"""Decodes blocks to torch's tensors."""

from __future__ import annotations

import torch

from .container import DTYPES, FormatError
from .encoding import decode


def to_tensor(blob: torch.Tensor, limit: int, what: str) -> torch.Tensor:
    """Decode a block of any shape to a tensor on its device; ``limit`` and ``what`` as for ``encoding.decode``."""
    data, head = decode(blob.detach().cpu().reshape(-1).numpy(), limit, what)
    dtype = getattr(torch, DTYPES[head.dtype][1], None)
    if dtype is None:  # float8_e8m0fnu came in torch 2.7
        raise FormatError(f"{what} has the dtype {head.dtype}, which torch {torch.__version__} does not have.")
    if not data.size:
        return torch.empty(head.shape, dtype=dtype, device=blob.device)
    return torch.from_numpy(data).view(dtype).reshape(head.shape).to(blob.device)
