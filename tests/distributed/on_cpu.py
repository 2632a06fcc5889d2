"""Engines on a CPU: ``… -m tests.distributed.on_cpu SCRIPT ARGS…``, under ``accelerate launch`` or torchrun.

Accelerate takes FSDP and DeepSpeed for matters of accelerators: on a CPU it leaves FSDP off without a word, and under
DeepSpeed each process alone. Here it is told otherwise, by patches of what it thinks of the processes; all else is what
runs on a GPU too.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import training_args

from tests.helpers.launching import run_and_leave


def fsdp_on_cpu() -> None:
    begin = AcceleratorState.__init__

    def believe(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
            AcceleratorState._shared_state["fsdp_plugin"] = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = believe  # type: ignore[method-assign]


def deepspeed_on_cpu() -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    prepare = PartialState._prepare_backend

    def with_gloo(self: Any, cpu: bool = False, *args: Any, **kwargs: Any) -> Any:
        return prepare(self, True, *args, **kwargs)

    PartialState._prepare_backend = with_gloo  # type: ignore[method-assign]
    # The Trainer asks this of GPUs only, unless use_cpu is set.
    training_args.is_torch_bf16_gpu_available = lambda: True


def tensor_parallel_on_cpu() -> None:
    # It asks for processes with a device each.
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None  # type: ignore[method-assign]


def main() -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        deepspeed_on_cpu()
    else:
        fsdp_on_cpu()
    run_and_leave(sys.argv[1:])


if __name__ == "__main__":
    main()
