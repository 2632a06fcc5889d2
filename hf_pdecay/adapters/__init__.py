"""Adapters of PEFT: merging that keeps the zeros of a sparse base, and dead ranks of LoRA.

LoRA adds ΔW = scaling · B A to a frozen weight W (https://huggingface.co/papers/2106.09685). ΔW is dense even if A and
B have zeros, so merging fills the zeros of a sparse W. Row r of A and column r of B form one term of B A; the rank is
dead if either is wholly zero.
"""

from __future__ import annotations


try:
    import peft as _  # noqa: F401
except ImportError as error:
    raise ImportError("Adapters need PEFT, which is not installed: pip install 'hf-pdecay[peft]'.") from error
