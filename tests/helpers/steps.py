"""What the tests of the optimizer's step share: options, small helpers, and Python in another process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from hf_pdecay import AdamWLp


ROOT = Path(__file__).parents[2]
BACKENDS = ["compiled", "foreach", "reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MOMENT_NAMES = ("exp_avg", "exp_avg_sq")
PLAIN = [torch.float32, torch.float64]
OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "p_norm": 0.8,
    "lambda_p": 0.5,
    "keep_zeros": False,
    "maximize": False,
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(moment: torch.Tensor) -> torch.Tensor:
    """The values of a moment, also of one in 8 bit."""
    return moment if type(moment) is torch.Tensor else moment.dequantize()


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the bits of a tensor, so that NaN equals NaN and 0 differs from -0."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().clone().contiguous().view(kinds[tensor.element_size()])


def snapshot(optimizer: AdamWLp) -> list[torch.Tensor]:
    """The bits of all weights and all state."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            found += [bits(param), *(bits(state[name]) for name in ("step", "exp_avg", "exp_avg_sq") if name in state)]
    return found


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, whose messages of the log go to stderr."""
    head = "import logging; logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s')\n"
    return subprocess.run(
        [sys.executable, "-c", head + code, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def some_run(optimizer: AdamWLp, *seeds: int) -> None:
    for seed in seeds:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = normal(*param.shape, seed=seed).to(param.dtype)
        optimizer.step()
