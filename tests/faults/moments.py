"""The moments of a run at which it can be killed: its steps, its file operations, and the middle of each write.

Everything that Python code, ``torch.save`` and safetensors write below the run's folder goes through :class:`CutFile`,
which hands on the first half of the bytes, lets the moment pass, and hands on the rest. A SIGKILL in between leaves a
file that is really cut. Moments are counted anew in each step, so that one of them is named by the step and the number.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers.modeling_utils
from transformers import TrainerCallback


_OPEN = open
_TORCH_SAVE = torch.save
_FILE_EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


@dataclass(frozen=True, order=True)
class Kill:
    """When a process is to die.

    Args:
        step: Steps that were finished or begun; 0 before the first.
        moment: Number of the moment in the step.
        rank: The process.
        alone: Whether the other processes are left alive.
    """

    step: int
    moment: int
    rank: int = 0
    alone: bool = True


class Moments:
    """Counts moments, notes them, and kills the process when the one that was asked for has come.

    Args:
        folder: Where the run's output goes; only what is written there counts.
        kill: When to die; None to live.
        before_death: Called just before, with what the process was about to do.
        notes: File that gets a line per moment.
    """

    def __init__(
        self, folder: Path, kill: Kill | None, before_death: Callable[[str], None], notes: Path | None
    ) -> None:
        self.folder = str(folder.resolve())
        self.kill = kill
        self.before_death = before_death
        self.notes = None if notes is None else _OPEN(notes, "w", encoding="utf-8")
        self.step = self.moment = 0
        self.phase = "train"
        self._inside = False

    def begin_life(self, step: int) -> None:
        """Begin after a number of steps; where the kill was to come in these, let it come soon."""
        self.begin_step(step)
        if self.kill is not None and step >= self.kill.step:
            # Only the first process writes files then.
            soon = 1 + self.kill.moment % (40 if self.kill.rank == 0 else 2)
            self.kill = replace(self.kill, step=step, moment=soon)

    def begin_step(self, step: int) -> None:
        self.step, self.moment = step, 0

    def __call__(self, label: str) -> None:
        if self._inside:
            return
        self.moment += 1
        if self.notes is not None:
            self.notes.write(f"{self.step}\t{self.moment}\t{self.phase}\t{label}\n")
            self.notes.flush()
        # A step that is made once more may have fewer moments than the first time, so the next one will do.
        if self.kill is not None and (self.step, self.moment) >= (self.kill.step, self.kill.moment):
            self._inside = True
            self.before_death(label)
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def saving(self) -> Any:
        self.phase = "save"
        try:
            yield
        finally:
            self.phase = "after"

    def holds(self, path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(self.folder)

    def watch_files(self) -> None:
        """Let file operations below the folder be moments, from now on and for good."""

        def audit(event: str, arguments: Sequence[Any]) -> None:
            # shutil.rmtree names files by their folder's descriptor.
            if event in _FILE_EVENTS and (self.holds(arguments[0]) or arguments[-1] not in (-1, None)):
                self(f"{event} {os.path.basename(str(arguments[0]))}")

        def cut_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode.strip("bt") == "r" or not self.holds(file):
                return _OPEN(file, mode, *args, **kwargs)
            self(f"open {os.path.basename(file)}")
            return CutFile(_OPEN(file, mode, *args, **kwargs), self, os.path.basename(file))

        def cut_torch_save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            if not self.holds(file):
                return _TORCH_SAVE(content, file, *args, **kwargs)
            with cut_open(file, "wb") as handle:
                _TORCH_SAVE(content, handle, *args, **kwargs)

        def cut_save_file(tensors: Any, file: Any, metadata: Any = None) -> None:
            with cut_open(file, "wb") as handle:
                handle.write(safetensors.torch.save(tensors, metadata))

        sys.addaudithook(audit)
        builtins.open = io.open = cut_open
        torch.save = cut_torch_save
        transformers.modeling_utils.safe_save_file = cut_save_file


class CutFile:
    """A file whose writes have a moment in the middle."""

    def __init__(self, file: Any, moments: Moments, name: str) -> None:
        self._file, self._moments, self._name = file, moments, name

    def write(self, content: Any) -> int:
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._moments(f"write {self._name}")
        self._file.write(content[half:])
        self._file.flush()
        return len(content)

    def __enter__(self) -> CutFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class StepMoments(TrainerCallback):
    """Moments between the file operations: the events of the training loop."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.moments.begin_life(state.global_step)
        self.moments("train begins")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.moments.begin_step(state.global_step + 1)
        self.moments("step begins")

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.moments("half of the gradients")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.moments.phase = "train"
        self.moments("before the optimizer's step")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.moments("after the optimizer's step")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.moments("step ends")

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.moments("logged")

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.moments("saved")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.moments("train ends")
