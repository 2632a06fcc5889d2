"""``hf-pdecay env``: what a bug report should say of the machine. Nothing is asked of a network."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from .._version import __version__
from ..optim.backends import MIN_COMPILED, Backend


_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "peft",
    "trl",
    "deepspeed",
    "torchao",
    "triton",
    "bitsandbytes",
)


def describe() -> dict[str, str]:
    """Return versions, devices, the C++ compiler, and the backend that ``auto`` takes on each kind of device, and why.

    The first call on a machine compiles the step for the CPU, as the first step of a run would.
    """
    found = {"hf-pdecay": __version__, "python": platform.python_version(), "platform": platform.platform()}
    found |= {name: _version(name) for name in _PACKAGES}
    kinds = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        names = [module.get_device_name(number) for number in range(module.device_count())]
        if names:
            kinds[kind] = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    if torch.backends.mps.is_available():
        kinds["mps"] = platform.machine()
    found["devices"] = "; ".join(f"{kind} ({what})" for kind, what in kinds.items())
    found["CUDA of torch"] = torch.version.cuda or "none"
    found["C++ compiler"] = _compiler()
    for kind in kinds:
        name, reason = Backend().choice(kind, MIN_COMPILED, decays=True)
        found[f"backend auto on {kind}"] = f"{name}, as {reason}"
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        name = str(get_cpp_compiler())
        said = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout
    except (InvalidCxxCompiler, OSError):
        return "none found"
    return f"{name} ({said.splitlines()[0]})" if said else name
