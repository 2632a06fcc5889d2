"""From blocks to torch's tensors."""

from __future__ import annotations

import torch

from .container import FormatError
from .format import decode


_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),  # since torch 2.7
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


def to_tensor(blob: torch.Tensor, limit: int, what: str) -> torch.Tensor:
    """Decode a block.

    Args:
        blob: Its bytes, in any shape, on any device.
        limit: How many bytes the tensor may have at most.
        what: Name for errors.

    Returns:
        The tensor, on the block's device.

    Raises:
        FormatError: If the block is damaged or forged, the tensor too large, or of a dtype that this torch lacks.
    """
    data, head = decode(blob.detach().cpu().reshape(-1).numpy(), limit, what)
    dtype = _DTYPES[head.dtype]
    if dtype is None:
        raise FormatError(f"{what} has the dtype {head.dtype}, which torch {torch.__version__} does not have.")
    if not data.size:
        return torch.empty(head.shape, dtype=dtype, device=blob.device)
    return torch.from_numpy(data).view(dtype).reshape(head.shape).to(blob.device)
