"""Makes the runs of the quality benchmark, several at a time, each in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from .methods import METHODS, Setting
from .runs import Run, find, read
from .tasks import TASKS
from .zeros import dead, fraction, spread


TEACHER: dict[str, Any] = {
    "method": "dense",
    "target": None,
    "knob": None,
    "learning_rate": 0.0001,
    "seed": 100,
    "end": 0.75,
}
"""The run that makes a teacher: dense, at the dense model's best learning rate, with the seed of tuning."""

TEACHERS = Path(__file__).parent / "teachers"
"""Teachers by task and steps. They are kept, so delete the folder if the task or its data change."""


def teacher_of(run: Run, data: str) -> str:
    """Return the folder of the teacher of a run: the dense model of its task, trained if it is not there.

    The teacher of a task ``..._teacher`` is that of the task without this ending.
    """
    task = run.task.removesuffix("_teacher")
    folder = TEACHERS / f"{task}_{run.steps}"
    if not folder.is_dir():
        line = execute(replace(run, task=task, **TEACHER), data, folder)
        print(f"{run.task} teacher: dev {line.get('dev_accuracy', line['dev_loss']):.4f}", flush=True)
    return str(folder)


def execute(run: Run, data: str, keep: Path | None = None) -> dict[str, Any]:
    """Train and evaluate the model of a run; return the line of the results file.

    Args:
        run: The run.
        data: Folder of the data sets.
        keep: Folder to write the model to; None for none.
    """
    teacher = teacher_of(run, data) if run.method.endswith("_taught") else None
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    task = TASKS[run.task](Path(data), run.seed, run.steps)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
        stdout, sys.stdout = sys.stdout, nothing  # the Trainer prints its logs
        try:
            arguments = {
                **task.arguments,
                "output_dir": folder,
                "learning_rate": run.learning_rate,
                "lr_scheduler_type": "cosine",
                "seed": run.seed,
                "report_to": "none",
                "save_strategy": "no",
                "logging_steps": run.steps,
                "disable_tqdm": True,
                "dataloader_pin_memory": False,
            }
            setting = Setting(run.target, run.knob, run.begin, run.end, arguments, teacher)
            trainer = METHODS[run.method](task, setting)
            if task.collate is not None:
                trainer.data_collator = task.collate
            if task.accuracy:
                trainer.compute_metrics = _accuracy
            begin = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - begin
            zeros = fraction(task.model)
            picture = spread(task.model) if isinstance(run.knob, (list, tuple)) else {}
            splits = {name: trainer.evaluate(getattr(task, name)) for name in ("dev", "test")}
            if keep is not None:
                trainer.save_model(str(keep))
        finally:
            sys.stdout = stdout
    scores = {
        f"{name}_{key}": figures[f"eval_{key}"]
        for name, figures in splits.items()
        for key in ("loss", "accuracy")
        if f"eval_{key}" in figures
    }
    return {
        **asdict(run),
        **scores,
        "sparsity": zeros,
        "dead": dead(task.model),
        **picture,
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("hf-pdecay", "torch", "transformers", "torchao")},
        },
    }


def _start_worker() -> None:
    torch.set_flush_denormal(True)  # the shrink factors of dying weights are denormal, which a CPU multiplies slowly


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def perform(
    next_runs: Callable[[list[dict[str, Any]]], Sequence[Run]], path: Path, data: str, jobs: int, until: float
) -> None:
    """Make runs, several at a time, and append their results to a file.

    Args:
        next_runs: Results so far → the runs to make; those that have a result are skipped.
        path: Results file.
        data: Folder of the data sets.
        jobs: How many runs are made at a time.
        until: Time of the clock, in seconds, after which no run starts.
    """
    running: dict[Future[dict[str, Any]], Run] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        while True:
            results = read(path)
            todo = [run for run in next_runs(results) if find(results, run) is None and run not in running.values()]
            while todo and len(running) < jobs and time.time() < until:
                run = todo.pop(0)
                running[pool.submit(execute, run, data)] = run
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run, line = running.pop(future), future.result()
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                score = (
                    f"accuracy {line['test_accuracy']:.4f}" if "test_accuracy" in line else f"{line['test_loss']:.4f}"
                )
                print(f"{run.task} {run.method} {run.target} {run.knob} seed {run.seed}: {score}", flush=True)
