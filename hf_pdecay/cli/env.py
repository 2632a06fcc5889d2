"""``hf-pdecay env``: the facts about the machine that a bug report needs. It uses no network."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys

from .._version import __version__


_PACKAGES = "torch transformers accelerate datasets safetensors peft trl deepspeed torchao triton bitsandbytes".split()


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = "Prints versions, devices, the C++ compiler and the backend of the step. No network is used."


def run(options: argparse.Namespace) -> int:
    """Print a line for each fact."""
    sys.stdout.write("".join(f"- {fact}: {value}\n" for fact, value in describe().items()))
    return 0


def describe() -> dict[str, str]:
    """Return the facts by name; the first call on a machine compiles the step for the CPU."""
    import torch

    from ..optim.backends import MIN_COMPILED, BackendChoice

    facts = {"hf-pdecay": __version__, "python": platform.python_version(), "platform": platform.platform()}
    facts |= {package: _version(package) for package in _PACKAGES}
    kinds = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        devices = [module.get_device_name(number) for number in range(module.device_count())]
        if devices:
            kinds[kind] = ", ".join(f"{devices.count(device)} × {device}" for device in dict.fromkeys(devices))
    if torch.backends.mps.is_available():
        kinds["mps"] = platform.machine()
    facts["devices"] = "; ".join(f"{kind} ({devices})" for kind, devices in kinds.items())
    facts["CUDA of torch"] = torch.version.cuda or "none"
    facts["C++ compiler"] = _compiler()
    for kind in kinds:
        backend, reason = BackendChoice().choice(kind, MIN_COMPILED, decays=True)
        facts[f"backend auto on {kind}"] = f"{backend}, as {reason}"
    return facts


def _version(package: str) -> str:
    from importlib import metadata  # imported here, like torch, because --help imports this module

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = str(get_cpp_compiler())
        about = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    except (InvalidCxxCompiler, OSError):
        return "none found"
    return f"{compiler} ({about.splitlines()[0]})" if about else compiler
