"""Loss against sparsity: adamw_lp beside the other ways to a sparse model, on real tasks with real seeds.

    python benchmarks/quality --data FOLDER                # makes the runs without a result, then draws
    python benchmarks/quality --data FOLDER --quick        # one task, one seed, one target: under ten minutes
    python benchmarks/quality --data FOLDER --only shakespeare --jobs 2 --minutes 60

`runs.yaml` lists the runs. Each run appends a line to `results/quality.jsonl` and is skipped from then on, so
you can fill the table in several sessions and on several machines. `--data` holds `tinyshakespeare/input.txt`,
`sst2/{train,dev,test}.tsv` and `fashion-mnist/*.gz`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml


HERE = Path(__file__).resolve().parent


def main() -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--quick", action="store_true", help="one task, one seed, one target")
    parser.add_argument("--only", action="append", help="a task, instead of all; may be given more than once")
    parser.add_argument("--methods", nargs="*", help="methods, instead of all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time; each uses one thread")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after this many minutes")
    parser.add_argument("--table", action="store_true", help="only write the table and the picture")
    options = parser.parse_args()

    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that train
    from quality import table
    from quality.runs import RESULTS, Run, planned, quick_runs, read

    config = yaml.safe_load((HERE / "runs.yaml").read_text(encoding="utf-8"))
    names = options.only or list(config["tasks"])
    path = RESULTS / ("quality_quick.jsonl" if options.quick else "quality.jsonl")
    if options.quick:
        path.unlink(missing_ok=True)

    def next_runs(results: list[dict[str, Any]]) -> list[Run]:
        if options.quick:
            return quick_runs(config)
        tasks = [planned(config, results, name) for name in names]
        runs = [run for choosing, _ in tasks for run in choosing] + [run for _, reported in tasks for run in reported]
        return [run for run in runs if options.methods is None or run.method in options.methods]

    if not options.table:
        from quality.training import perform

        perform(next_runs, path, options.data, options.jobs, time.time() + 60 * options.minutes)
    results = read(path)
    if options.quick:
        print(table.write(results, quick_runs(config), RESULTS / "quality_quick.md"))
        return 0
    reported = [run for name in config["tasks"] for run in planned(config, results, name)[1]]
    print(table.write(results, reported, RESULTS / "quality.md"))
    table.draw(results, reported, HERE.parents[1] / "docs" / "images" / "quality.png")
    return 0


if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)  # Python put this folder there; this makes it the package `quality`
    sys.exit(main())
