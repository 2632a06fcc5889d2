"""Load compressed models straight into sparse layers, beside from_pretrained of the plain and the compressed folder.

    python benchmarks/loading.py

The models are GPT-2 small, and a Llama of about 300 MB, with random weights; a share of those in linear layers is zero.
Each load has a process of its own, which has imported the libraries, and all ways take turns. The seconds are those of
the load and of one read of all weights, because plain weights are read from the file when they are first used. The
memory is the process's peak beyond what it had before; pages of a mapped file count. Takes about 15 minutes on 2 cores,
and 1 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clocks import spread
from tables import command, conditions, describe, table, write


ROOT = Path(__file__).resolve().parent
WAYS = {"plain, from_pretrained": "plain", "compressed, from_pretrained": "small", "load_sparse_inference": "small"}
DTYPES = ("float32", "bfloat16")
ZEROS = (0.5, 0.8, 0.95)
ROUNDS = 5
# hidden_size, intermediate_size: 69 and 151 million weights.
LLAMAS = {"float32": (768, 2048), "bfloat16": (1024, 4096)}


def make(kind: str, dtype: str, zeros: float, folder: Path) -> dict[str, int]:
    """Save a model plain and compressed; return the bytes of both."""
    import transformers as tf

    from hf_pdecay import compress

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    if kind == "llama":
        hidden, inner = LLAMAS[dtype]
        sizes: Any = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 8, "vocab_size": 8000}
        model: Any = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=hidden // 64))
    else:
        model = tf.GPT2LMHeadModel(tf.GPT2Config())
    torch.set_default_dtype(torch.float32)
    blocks = model.model.layers if kind == "llama" else model.transformer.h
    with torch.no_grad():
        for param in blocks.parameters():
            if param.ndim == 2:
                param.mul_(torch.rand(param.shape) >= zeros)
                param.add_(0.0)
    model.save_pretrained(folder / "plain")
    report = compress(folder / "plain", folder / "small")
    return {"plain": report.before, "small": report.after}


def load_once(way: str, folder: Path) -> dict[str, float]:
    """Load a model in this process; return seconds and bytes."""
    import transformers as tf

    import hf_pdecay
    import hf_pdecay.inference.loading

    _quiet()
    # These import the modules of the models.
    auto, _ = tf.AutoModelForCausalLM, (tf.GPT2LMHeadModel, tf.LlamaForCausalLM)
    began_with = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    begin, cpu = time.perf_counter(), time.process_time()
    if way == "load_sparse_inference":
        model = hf_pdecay.load_sparse_inference(folder)
    else:
        model = auto.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.sum()
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "peak": _most_memory() - began_with,
    }


def _most_memory() -> int:
    """The peak of this process's resident bytes. That of getrusage is not lower than the peak of its parent."""
    return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0])


def _quiet() -> None:
    from transformers import utils

    utils.logging.set_verbosity_error()
    utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def in_a_process(way: str, folder: Path) -> dict[str, float]:
    """Load a model in a new process."""
    words = [sys.executable, __file__, "--load", way, "--folder", str(folder)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(kind: str, dtype: str, zeros: float, folder: Path, rounds: int) -> dict[str, Any]:
    """Load one model in all ways, in turns."""
    sizes = make(kind, dtype, zeros, folder)
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in list(WAYS)[:: 1 if number % 2 else -1]:
            results[way].append(in_a_process(way, folder / WAYS[way]))
    rows = {}
    for way, found in results.items():
        row: dict[str, Any] = {"bytes": sizes[WAYS[way]], "peak": max(each["peak"] for each in found)}
        for key in ("seconds", "cpu_seconds"):
            row[key] = spread([each[key] for each in found])
            plain = results[next(iter(WAYS))]
            row[f"{key}_ratio"] = spread([each[key] / base[key] for each, base in zip(found, plain, strict=True)])
        rows[way] = row
    return {"kind": kind, "dtype": dtype, "zeros": zeros, "rounds": rounds, "rows": rows}


def report_text(record: dict[str, Any]) -> str:
    """Return the figures in Markdown."""
    rows = []
    for model in record["models"]:
        for way, row in model["rows"].items():
            ratio, cpu = row["seconds_ratio"], row["cpu_seconds_ratio"]
            rows.append(
                [f"{model['kind']}, {model['dtype']}, {way}", f"{model['zeros']:.0%}", f"{row['bytes'] / 1e6:.0f}"]
                + [f"{row['peak'] / 1e6:.0f}", f"{row['peak'] / row['bytes']:.2f}"]
                + [f"{1e3 * row['seconds']['median']:.0f}", f"{ratio['median']:.2f}"]
                + [f"{ratio['q10']:.2f}-{ratio['q90']:.2f}", f"{1e3 * row['cpu_seconds']['median']:.0f}"]
                + [f"{cpu['median']:.2f}"]
            )
    headings = ["model", "zeros", "file, MB", "peak, MB", "peak / file", "ms", "ratio", "10-90%", "CPU, ms", "ratio"]
    parts = ["# Loading compressed models into sparse layers", describe(record), table(headings, rows)]
    parts.append(
        "*zeros*: of the blocks' matrices; embeddings and head are dense. *peak*: the most resident memory of the "
        "process beyond that before the load, the greatest of the rounds. *ms*: median, load and one read of all "
        "weights. *ratio*: to the plain folder in the same round. *CPU*: of all threads of the process."
    )
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--load", choices=tuple(WAYS), help="load one folder in this process")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the results")
    words = sys.argv[1:] if argv is None else list(argv)
    options = parser.parse_args(words)
    if options.load:
        print(json.dumps(load_once(options.load, options.folder)))
        return 0
    import hf_pdecay

    _quiet()
    record: dict[str, Any] = {
        **conditions("cpu", ["torch", "transformers", "safetensors", "numpy"]),
        "command": command("loading.py", words),
        "models": [],
    }
    with tempfile.TemporaryDirectory() as name:
        make("llama", "float32", 0.9, Path(name) / "first")
        hf_pdecay.load_sparse_inference(Path(name) / "first" / "small")  # compiles the C++ functions
        for dtype in DTYPES:
            for kind in ("llama", "gpt2"):
                for zeros in ZEROS:
                    folder = Path(name) / f"{kind}_{dtype}_{zeros}"
                    record["models"].append(measure(kind, dtype, zeros, folder, options.rounds))
                    shutil.rmtree(folder)
                    print(report_text({**record, "models": record["models"][-1:]}).split("\n\n")[3], flush=True)
                    write(record, report_text(record), options.output, "loading")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
