"""Reports of measurements: the conditions, tables in Markdown, files."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hf_pdecay import __version__


# Ratio of quantiles of the baseline to itself above which figures are unreliable.
_NOISY = 1.3


def conditions(device: str, packages: Sequence[str]) -> dict[str, Any]:
    """Return the conditions of a benchmark: device, threads and versions, without host names or paths."""
    versions = {"python": platform.python_version(), "hf_pdecay": __version__}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    facts: dict[str, Any] = {"device": device, "name": device_name(device), "cores": os.cpu_count()}
    facts |= {"threads": torch.get_num_threads(), "memory_gb": round(memory_bytes() / 1e9)}
    if device == "cuda":
        facts["device_memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9)
    else:
        facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    return {"machine": facts, "versions": versions, "date": datetime.date.today().isoformat()}


def memory_bytes() -> int:
    """Return how much memory the machine has; psutil is needed on Windows only."""
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.virtual_memory().total)


def device_name(device: str) -> str:
    """Return the name of the processor or the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def command(script: str, argv: Sequence[str]) -> str:
    """Return the command of a run without its output folder."""
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word == "--output":
            skip = True
        elif not word.startswith("--output="):
            kept.append(word)
    return " ".join(["python", f"benchmarks/{script}", *kept])


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, padded so that it reads well as plain text: first column left, the others right."""
    columns = list(zip(headings, *rows, strict=True))
    widths = [max(3, *(len(cell) for cell in column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return " | ".join(["| " + first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([line(headings), rule, *(line(row) for row in rows)])


def describe(record: Mapping[str, Any]) -> str:
    """Return the conditions of a run as a few lines."""
    machine, versions = record["machine"], record["versions"]
    where = f"{machine['name']}, {machine['cores']} cores, {machine['threads']} threads, {machine['memory_gb']} GB"
    if "device_memory_gb" in machine:
        where += f", {machine['device_memory_gb']} GB on the device"
    if "instructions" in machine:
        where += f", {machine['instructions']}"
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"`{record['command']}`, {record['date']}\n\n{where}. {packages}."


def speed_table(size: Mapping[str, Any]) -> str:
    """Return the table of the steps of one size."""
    headings = ["optimizer", "ms", "ratio to fused AdamW", "10-90%", "GB/s", "of copy", "extra MB", "process MB"]
    headings += ["state B/weight", "visits"]
    rows = []
    for row in size["rows"]:
        name = row["name"] + (f" ({row['took']})" if row.get("took") else "")
        band = f"{row['ratio']['q10']:.2f}-{row['ratio']['q90']:.2f}"
        rows.append(
            [name, f"{row['median_ms']:.3g}", f"{row['ratio']['median']:.2f}", band, f"{row['gb_per_s']:.1f}"]
            + [f"{row['copy_fraction']:.0%}", megabytes(row["extra_bytes"]), megabytes(row["process_bytes"])]
            + [f"{row['state_bytes_per_weight']:.2f}", str(row["visits"])]
        )
    return table(headings, rows)


def megabytes(count: int | None) -> str:
    """Return bytes as megabytes, or a dash if they were not measured."""
    return "-" if count is None else f"{count / 1e6:.1f}"


def speed_text(record: Mapping[str, Any]) -> str:
    """Return the whole report of `step_speed.py` in Markdown."""
    parts = ["# Time and memory of an optimizer step", describe(record)]
    for size in record["sizes"]:
        parts += [
            f"## {size['name']}: {size['weights']:,} {size['dtype']} weights in {size['tensors']} tensors",
            f"{size['rounds']} rounds; each optimizer has {size['sharing']}. A copy ({size['copy']['name']}) moves "
            f"{size['copy']['gb_per_s']:.1f} GB/s.",
            speed_table(size),
        ]
        parts += [f"Left out: {name} ({why})." for name, why in size["left_out"].items()]
    parts += [f"Left out: {sentence}" for sentence in record["skipped_sizes"]]
    parts += ["## Notes", "\n".join(f"- {note}" for note in record["notes"])]
    parts += ["## In short", "\n".join(f"- {line}" for line in short_lines(record))]
    return "\n\n".join(parts) + "\n"


def short_lines(record: Mapping[str, Any]) -> list[str]:
    """Return the most important figures, one per line."""
    lines = []
    for size in record["sizes"]:
        ratios = ", ".join(f"p = {p}: {ratio:.2f}" for p, ratio in size["auto_ratios"].items())
        lines.append(f"{size['name']}: auto over fused AdamW: {ratios}")
        like = size.get("auto_over_checked")
        if like is not None:
            lines.append(
                f"{size['name']}: auto, p = 0.8, over fused AdamW that looks at the gradients too: "
                f"{like['median']:.2f} ({like['q10']:.2f}-{like['q90']:.2f})"
            )
        to_base = size.get("to_base_over_auto")
        if to_base is not None:
            lines.append(
                f"{size['name']}: decay to the base, p = 0.8, over decay to zero: "
                f"{to_base['median']:.2f} ({to_base['q10']:.2f}-{to_base['q90']:.2f})"
            )
        for key, around in (("", "with the AdamW that torch takes, as theirs"), ("_fused", "around fused AdamW")):
            faster = size.get("speed_up_over_authors" + key)
            if faster is not None:
                lines.append(
                    f"{size['name']}: {faster['median']:.1f} times as fast as the authors' algorithm {around} "
                    f"({faster['q10']:.1f}-{faster['q90']:.1f})"
                )
        noise = size["rows"][0]["ratio"]
        if noise["q90"] > _NOISY * noise["q10"]:
            lines.append(
                f"{size['name']}: the machine was busy, fused AdamW differs from itself by {noise['q10']:.2f}-"
                f"{noise['q90']:.2f} within rounds: run it again when nothing else runs"
            )
    return lines


def overhead_text(record: Mapping[str, Any]) -> str:
    """Return the whole report of `overhead.py` in Markdown."""
    parts = ["# What a whole run costs more", describe(record)]
    for model in record["models"]:
        headings = ["milliseconds a step", *model["runs"]]
        rows = [
            [label, *(f"{run[key]['median']:.3f}" for run in model["runs"].values())]
            for key, label in model["parts"].items()
        ]
        seconds = {"start_seconds": "start, seconds", "end_seconds": "end, seconds"}
        rows += [
            [label, *(f"{run[key]['median']:.2f}" for run in model["runs"].values())] for key, label in seconds.items()
        ]
        ratio, parts_sum = model["ratio"], model["overhead_by_parts"]
        parts += [
            f"## {model['name']}: {model['weights']:,} weights, batches of {model['batch']} x {model['block']} tokens",
            f"{model['repeats']} runs of each, {model['steps']} steps timed in each, a log event every "
            f"{model['logging_steps']}.",
            table(headings, rows),
            f"Ratio of the runs, pair by pair: {ratio['median']:.4f} (10-90%: {ratio['q10']:.4f}-{ratio['q90']:.4f}). "
            f"By the parts, without the noise of the model's own work: {1 + parts_sum:.4f}.",
        ]
    parts += ["## Notes", "\n".join(f"- {note}" for note in record["notes"])]
    return "\n\n".join(parts) + "\n"


def write(record: Mapping[str, Any], text: str, folder: Path, name: str) -> None:
    """Write a record as JSON and as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
