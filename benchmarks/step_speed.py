"""Time the optimizer's step against torch's fused AdamW and others, and measure its memory.

    python benchmarks/step_speed.py --quick
    python benchmarks/step_speed.py --device cuda --sizes 25M 7B-bf16
    python benchmarks/step_speed.py --plot benchmarks/results/step_speed_cpu.json

All optimizers step in every round, in a new random order, so that noise affects all of them. README.md beside this file
explains the columns.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clocks import spread
from contenders import (
    AUTHORS,
    AUTHORS_FUSED,
    BASELINE,
    CHECKED,
    DEFAULT_SIZES,
    P_NORMS,
    QUICK_SIZES,
    SIZES,
    TO_BASE,
    USUAL_P,
    Contender,
    Size,
    contenders_for,
    our_name,
)
from figure import plot_speed
from probes import compile_seconds, rss_growth
from tables import command, conditions, short_lines, speed_text, write
from timing import Entrant, NotEnoughMemoryError, Race, race


PACKAGES = ("torch", "triton", "torchao", "torch-optimi", "numpy")
ROOT = Path(__file__).resolve().parent
ROUNDS, QUICK_ROUNDS = 40, 12
QUICK_SECONDS = 20  # for the rounds of a size, should the machine be busy
# Above so many weights a round takes seconds, and the noise of single steps is small.
_MANY, _ROUNDS_OF_MANY = 100_000_000, 15


def row_of(entrant: Entrant, result: Race, size: Size, process_bytes: int | None) -> dict[str, Any]:
    """Return the measurements of one optimizer as plain numbers."""
    seconds = spread(entrant.all_seconds)["median"]
    copy = result.copy.least_bytes / spread(result.copy.all_seconds)["median"]
    contender = entrant.contender
    return {
        "name": entrant.name,
        "p_norm": contender.p_norm if contender else None,
        "backend": contender.backend if contender else None,
        "took": entrant.note,
        "median_ms": seconds * 1e3,
        "ratio": spread(result.ratios(entrant)),
        "gb_per_s": entrant.least_bytes / seconds / 1e9,
        "copy_fraction": entrant.least_bytes / seconds / copy,
        "extra_bytes": entrant.extra_bytes,
        "process_bytes": process_bytes,
        "state_bytes_per_weight": entrant.state_bytes / size.weights,
        "visits": len(entrant.all_seconds),
        "steps_per_visit": entrant.block,
    }


def measure(
    size: Size, device: str, rounds: int, quick: bool, copy_numel: int | None = None, rows: str = ""
) -> dict[str, Any]:
    """Race the optimizers on one size, those beside the baseline whose names have ``rows``, and return the figures.

    Raises:
        NotEnoughMemoryError: If the size does not fit.
    """
    limit = QUICK_SECONDS if quick else math.inf
    contenders = [one for one in contenders_for(size, device, quick) if one.name == BASELINE or rows in one.name]
    result = race(contenders, size, device, rounds, seconds=limit, copy_numel=copy_numel)
    copy = spread(result.copy.all_seconds)["median"]
    growth = process_growth(result, size, device, quick)
    usual = result.find(our_name(USUAL_P))
    checked, authors, fused = (result.find(name) for name in (CHECKED, AUTHORS, AUTHORS_FUSED))
    to_base = result.find(our_name(USUAL_P, note=TO_BASE))
    ratios = {f"{p:g}": entrant for p in P_NORMS if (entrant := result.find(our_name(p))) is not None}
    return {
        "name": size.name,
        "dtype": str(size.dtype).removeprefix("torch."),
        "tensors": len(size.shapes),
        "weights": size.weights,
        "rounds": result.rounds,
        "sharing": result.sharing,
        "copy": {"name": result.copy.name, "gb_per_s": result.copy.least_bytes / copy / 1e9},
        "rows": [row_of(entrant, result, size, growth.get(entrant.name)) for entrant in result.entrants],
        "left_out": result.left_out,
        "auto_over_checked": spread(result.ratios(usual, to=checked)) if usual and checked else None,
        "to_base_over_auto": spread(result.ratios(to_base, to=usual)) if usual and to_base else None,
        "auto_ratios": {p: spread(result.ratios(entrant))["median"] for p, entrant in ratios.items()},
        "speed_up_over_authors": spread(result.ratios(authors, to=usual)) if usual and authors else None,
        "speed_up_over_authors_fused": spread(result.ratios(fused, to=usual)) if usual and fused else None,
    }


def process_growth(result: Race, size: Size, device: str, quick: bool) -> Mapping[str, int | None]:
    """Measure how far a process grows in a step; to be quick, on the larger size and not with all of AdamWLp."""
    if device != "cpu" or size.name not in SIZES or (quick and size.weights < 10_000_000):
        return {}

    def wanted(contender: Contender) -> bool:
        slow = contender.backend == "reference" or "8-bit" in contender.name
        return not quick or contender.backend is None or (contender.p_norm == USUAL_P and not slow)

    present = [entrant.contender for entrant in result.entrants if entrant.contender is not None]
    return rss_growth(size, [contender.name for contender in present if wanted(contender)])


def save(record: dict[str, Any], begin: float, folder: Path) -> str:
    """Write the results so far, and return them as Markdown."""
    device, compiling = record["machine"]["device"], record.get("compile_seconds")
    record = record | {"notes": notes_on(device, compiling), "seconds": time.perf_counter() - begin}
    text = speed_text(record)
    write(record, text, folder, f"step_speed_{device}" + ("_quick" if record["quick"] else ""))
    return text


def notes_on(device: str, compiling: Mapping[str, float] | None) -> list[str]:
    """Return the notes that explain the figures."""
    notes = [
        "Visits last at least 10 ms, by several steps where one is shorter, after one that is not timed: 1M weights "
        "are in the cache for all optimizers alike. 25M weights and more are in no cache when a step begins, as the "
        "steps of the others lie in between.",
        "Gradients are fixed, weights stay away from 0, and the learning rate is tiny: no zeros, no denormals.",
        "Ratios are taken within rounds, to the median of the three visits of fused AdamW; its own row shows the "
        "noise. AdamWLp checks whether gradients are finite, AdamW does not. The row 'gradients not checked' has no "
        "check, as under a Trainer that clips gradients. In the row 'torch AdamW, fused, gradients checked' torch "
        "checks too, with the operation of its GradScaler.",
    ]
    if compiling is not None:
        notes.insert(
            0,
            f"Compiling, once: the first step takes {compiling['cold']:.1f} s more than the second with nothing "
            f"compiled before, and {compiling['warm']:.1f} s more in later processes. No time above contains it.",
        )
    if device == "cpu":
        notes += [
            "GB/s counts the bytes that a step must move (28 bytes a float32 weight). The copy counts what it "
            "reads and writes. Not counted: a CPU may read a line from memory before it writes to it, which costs the "
            "copy half as much traffic again and a step, which has read the line anyway, nothing. So steps can reach "
            "more than 100% of it.",
            "'extra MB' is the peak of torch tensors made in a step; it excludes memory that a C++ kernel "
            "allocates. 'process MB' is the rise of the resident memory's peak in a separate process, which includes "
            "it; a dash: not measured.",
        ]
    else:
        notes.append(
            "'extra MB' is torch.cuda.max_memory_allocated over what was allocated before the step. Times are of CUDA "
            "events around all steps of a visit, launches included where the host is slower than the device."
        )
    return notes


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, rows and rounds: under 2 minutes")
    parser.add_argument("--device", choices=list(DEFAULT_SIZES), default="cpu", help="where to run (cpu)")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="sizes of models (those of the device)")
    parser.add_argument("--rounds", type=int, help=f"rounds of each size ({ROUNDS}, quick {QUICK_ROUNDS})")
    parser.add_argument("--no-cold-start", action="store_true", help="do not time the first step, in two processes")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows with this in their name, as 'by' (all)")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the tables (results here)")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw the figure of an earlier run")
    parser.add_argument("--figure", type=Path, default=ROOT.parent / "docs/images/step_speed.png", help="its file")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; take --device cpu")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds} must be at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.plot is not None:
        plot_speed(json.loads(options.plot.read_text(encoding="utf-8")), options.figure)
        return 0
    begin = time.perf_counter()
    device, quick = options.device, options.quick
    record: dict[str, Any] = {"benchmark": "step_speed", "command": command("step_speed.py", argv), "quick": quick}
    record |= {**conditions(device, PACKAGES), "baseline": BASELINE, "sizes": [], "skipped_sizes": []}
    for name in options.sizes or (QUICK_SIZES if quick else DEFAULT_SIZES)[device]:
        size = SIZES[name]
        usual = QUICK_ROUNDS if quick else _ROUNDS_OF_MANY if size.weights >= _MANY else ROUNDS
        print(f"{name}: measuring, {time.perf_counter() - begin:.0f} s so far", file=sys.stderr, flush=True)
        try:
            record["sizes"].append(measure(size, device, options.rounds or usual, quick, rows=options.rows))
        except NotEnoughMemoryError as error:
            record["skipped_sizes"].append(str(error))
        save(record, begin, options.output)
    if not options.no_cold_start:
        record["compile_seconds"] = compile_seconds(device)
    text = save(record, begin, options.output)
    print(text.split("## In short")[0].rstrip(), "", *short_lines(record), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
