"""Measure how much more a whole run with `adamw_lp` costs than one with torch's fused AdamW.

    python benchmarks/overhead.py --quick
    python benchmarks/overhead.py --model small --repeats 12

A: `Trainer` with `optim="adamw_torch_fused"`. B: `PDecayTrainer` with `adamw_lp`, logging the sparsity of each layer
every 10 steps. Same GPT-2, text (that of Python's standard library), seed and batches; runs go A B B A and so on.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import io
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from clocks import spread
from hf_pdecay import PDecayTrainer, PDecayTrainingArguments, SparsityCallback
from tables import command, conditions, overhead_text, write


ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent / "examples"))

import train_clm  # noqa: E402


LOGGING_STEPS = 10
DENSE, SPARSE = "adamw_torch_fused", "adamw_lp"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy")
PARTS = {
    "whole_ms": "whole step",
    "optimizer_ms": "optimizer.step()",
    "log_ms": "Trainer.log()",
    "callback_ms": "of it SparsityCallback",
}
NOTES = [
    "A run's time of a step is the median of its blocks of 10 steps, each with one log event. The first steps, which "
    "load and warm up, are excluded.",
    "start: from the call of train() to the first step; end: from the last step to its return, with the report, the "
    "picture and the card of adamw_lp. Both occur once per run.",
]


@dataclass(frozen=True)
class Model:
    """A GPT-2 and the batches that it learns from."""

    name: str
    layers: int
    heads: int
    width: int
    batch: int
    block: int
    repeats: int
    steps: int

    def build(self) -> GPT2LMHeadModel:
        """Return a new model for bytes."""
        shape: dict[str, Any] = {"n_layer": self.layers, "n_head": self.heads, "n_embd": self.width}
        shape |= {"n_positions": self.block, "vocab_size": 256, "bos_token_id": None, "eos_token_id": None}
        config = GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        return GPT2LMHeadModel(config)


MODELS = {
    model.name: model
    for model in (
        Model("tiny", 4, 4, 128, batch=16, block=64, repeats=12, steps=200),
        Model("small", 6, 6, 384, batch=8, block=128, repeats=8, steps=60),
        Model("gpt2", 12, 12, 768, batch=8, block=1024, repeats=4, steps=40),
    )
}
# On a CPU a step of the largest takes a minute; on a GPU a step of the smallest only waits for Python.
DEFAULT_MODELS = {"cpu": ("tiny", "small"), "cuda": ("small", "gpt2")}
QUICK_REPEATS, QUICK_STEPS = 6, 80


class Stopwatch(TrainerCallback):
    """Notes when each step begins, and when the last one ended."""

    def __init__(self) -> None:
        self.begins: list[float] = []
        self.last_end = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the time."""
        self.begins.append(time.perf_counter())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the time."""
        self.last_end = time.perf_counter()


@dataclass
class Spans:
    """Durations of a repeated event."""

    seconds: list[float] = field(default_factory=list)
    _begin: float = 0.0

    def start(self, *_: Any) -> None:
        """Begin one."""
        self._begin = time.perf_counter()

    def stop(self, *_: Any) -> None:
        """End it."""
        self.seconds.append(time.perf_counter() - self._begin)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are such spans."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.start()
            try:
                return function(*args, **kwargs)
            finally:
                self.stop()

        return timed


def make_trainer(optim: str, model: Model, data: Any, folder: str, steps: int, device: str) -> Trainer:
    """Return the Trainer of one of the two runs; everything but the optimizer and the logging is the same."""
    options: dict[str, Any] = {
        "output_dir": folder,
        "optim": optim,
        "max_steps": steps,
        "per_device_train_batch_size": model.batch,
        "learning_rate": 2e-3,
        "logging_steps": LOGGING_STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device != "cpu",
        "seed": 42,
    }
    set_seed(42)
    sets = {"model": model.build(), "train_dataset": data, "data_collator": train_clm.collate}
    if optim == DENSE:
        return Trainer(args=TrainingArguments(**options), **sets)
    args = PDecayTrainingArguments(**options, p_norm=0.8, lambda_p=0.017, sparsity_logging="layer")
    return PDecayTrainer(args=args, **sets)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discard what a run prints; printing still takes its time."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def run(optim: str, model: Model, data: Any, steps: int, device: str) -> dict[str, float]:
    """Train once and return the times: milliseconds a step, and the seconds of the start and the end."""
    # Blocks begin after a log event and end with the next; the last step is in none.
    total = LOGGING_STEPS + steps + 1
    with tempfile.TemporaryDirectory() as folder, silence():
        trainer = make_trainer(optim, model, data, folder, total, device)
        watch, steps_of_optimizer, logs, counts = Stopwatch(), Spans(), Spans(), Spans()
        trainer.callback_handler.callbacks.insert(0, watch)
        trainer.log = logs.around(trainer.log)  # type: ignore[method-assign]
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, SparsityCallback):
                callback.on_log = counts.around(callback.on_log)  # type: ignore[method-assign]
        optimizer = trainer.create_optimizer()
        optimizer.register_step_pre_hook(steps_of_optimizer.start)
        optimizer.register_step_post_hook(steps_of_optimizer.stop)
        begin = time.perf_counter()
        trainer.train()
        end = time.perf_counter()
    marks = watch.begins[LOGGING_STEPS::LOGGING_STEPS]
    blocks = [(later - earlier) / LOGGING_STEPS for earlier, later in zip(marks, marks[1:], strict=False)]
    events = slice(1, 1 + len(blocks))  # the first log event is before the first block
    return {
        "whole_ms": 1e3 * median(blocks),
        "optimizer_ms": 1e3 * median(steps_of_optimizer.seconds[LOGGING_STEPS:]),
        "log_ms": 1e3 * median(logs.seconds[events]) / LOGGING_STEPS,
        "callback_ms": 1e3 * median(counts.seconds[events] or [0.0]) / LOGGING_STEPS,
        "start_seconds": watch.begins[0] - begin,
        "end_seconds": end - watch.last_end,
    }


def load_data(model: Model, most: int | None = None) -> Any:
    """Return blocks of the demo's training text."""
    text, _ = train_clm.standard_library()
    return train_clm.to_blocks(text, None, model.block, most, "Python's standard library")


def measure(model: Model, data: Any, repeats: int, steps: int, device: str) -> dict[str, Any]:
    """Run both repeatedly and return the figures."""
    runs: dict[str, list[dict[str, float]]] = {DENSE: [], SPARSE: []}
    for repeat in range(repeats):
        for optim in (DENSE, SPARSE) if repeat % 2 == 0 else (SPARSE, DENSE):
            runs[optim].append(run(optim, model, data, steps, device))
            print(f"{model.name}: {optim}: {runs[optim][-1]['whole_ms']:.2f} ms a step", file=sys.stderr, flush=True)
    middle = {
        optim: {key: median(run[key] for run in repeats) for key in repeats[0]} for optim, repeats in runs.items()
    }
    more = sum(middle[SPARSE][key] - middle[DENSE][key] for key in ("optimizer_ms", "log_ms"))
    pairs = zip(runs[SPARSE], runs[DENSE], strict=True)
    return {
        "name": model.name,
        "weights": sum(param.numel() for param in model.build().parameters()),
        "batch": model.batch,
        "block": model.block,
        "repeats": repeats,
        "steps": steps,
        "logging_steps": LOGGING_STEPS,
        "parts": PARTS,
        "runs": {
            optim: {key: spread([run[key] for run in repeats]) for key in repeats[0]} for optim, repeats in runs.items()
        },
        "ratio": spread([sparse["whole_ms"] / dense["whole_ms"] for sparse, dense in pairs]),
        "overhead_by_parts": more / middle[DENSE]["whole_ms"],
    }


def profile(model: Model, data: Any, steps: int, device: str) -> str:
    """Run `adamw_lp` under cProfile and return what of this package took the most time, callees included."""
    run(SPARSE, model, data, LOGGING_STEPS, device)  # imports and compiles
    profiler = cProfile.Profile()
    with profiler:
        run(SPARSE, model, data, steps, device)
    out = io.StringIO()
    pstats.Stats(profiler, stream=out).sort_stats("cumulative").print_stats("hf_pdecay|optim", 30)
    return out.getvalue()


def in_short(entry: dict[str, Any]) -> str:
    """Return the overhead on one model as a line."""
    low, middle, high = (f"{entry['ratio'][key] - 1:+.1%}" for key in ("q10", "median", "q90"))
    parts = f"{entry['overhead_by_parts']:+.1%}"
    return f"{entry['name']}: overhead of adamw_lp: {middle} by the runs ({low} to {high}), {parts} by the parts"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny model and few runs: under 3 minutes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (cpu)")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), help="models (those of the device; quick: tiny)")
    parser.add_argument("--repeats", type=int, help="runs of each of the two")
    parser.add_argument("--steps", type=int, help=f"steps timed in a run, in tens (quick: {QUICK_STEPS})")
    parser.add_argument("--profile", action="store_true", help="only run adamw_lp once and say where the time goes")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the tables (results here)")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; take --device cpu")
    for name, least in {"repeats": 1, "steps": LOGGING_STEPS}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value} must be at least {least}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    begin = time.perf_counter()
    names = ("tiny",) if options.quick else DEFAULT_MODELS[options.device]
    chosen = [MODELS[name] for name in options.model or names]
    if options.profile:
        for model in chosen:
            print(profile(model, load_data(model), options.steps or QUICK_STEPS, options.device))
        return 0
    record: dict[str, Any] = {"benchmark": "overhead", "command": command("overhead.py", argv), "quick": options.quick}
    record |= {**conditions(options.device, PACKAGES), "models": []}
    for model in chosen:
        repeats = options.repeats or (QUICK_REPEATS if options.quick else model.repeats)
        steps = options.steps or (min(QUICK_STEPS, model.steps) if options.quick else model.steps)
        record["models"].append(measure(model, load_data(model), repeats, steps, options.device))
        print(in_short(record["models"][-1]), flush=True)
    record["notes"] = NOTES
    record["seconds"] = time.perf_counter() - begin
    text = overhead_text(record)
    write(record, text, options.output, f"overhead_{options.device}" + ("_quick" if options.quick else ""))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
