"""Adapters of PEFT: merging that keeps a sparse base's zeros, and counting and cutting the ranks of LoRA that died.

LoRA adds ΔW = scaling · B A to a frozen weight W (https://huggingface.co/papers/2106.09685). ΔW is dense, whatever
zeros A and B have, so merging fills a sparse W in; and row r of A with column r of B is a term of its own, which is
nothing once either of the two is wholly zero.
"""

from __future__ import annotations


try:
    import peft as _  # noqa: F401
except ImportError as error:
    raise ImportError("Adapters take PEFT, which is not installed: pip install 'hf-pdecay[peft]'.") from error
