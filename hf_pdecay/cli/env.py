"""``hf-pdecay env``: the facts about the machine that a bug report needs. It uses no network."""

from __future__ import annotations

import argparse
import platform
import subprocess
from typing import TYPE_CHECKING

from .._version import __version__
from .command import add_json, show


if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


_PACKAGES = "torch transformers accelerate datasets safetensors peft trl deepspeed torchao triton bitsandbytes".split()


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = "Prints versions, devices, the C++ compiler and the backend of the step. No network is used."
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print a line for each fact."""
    return show(Facts(describe()), options)


class Facts(dict[str, str]):
    """The facts by name; prints as lines."""

    def to_dict(self) -> dict[str, str]:
        """Return plain JSON types."""
        return dict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a line for each fact, which a bug report takes as a list."""
        from rich.text import Text

        for fact, value in self.items():
            yield Text(f"- {fact}: {value}", no_wrap=True)


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
