"""Load compressed models straight into sparse layers, beside from_pretrained of the plain and the compressed folder.

    python benchmarks/loading.py

The models are GPT-2 small, and a Llama of about 300 MB, with random weights; a share of those in linear layers is zero.
Each load has a process of its own, forked from one that has imported the libraries, and all ways take turns. Two times
are taken: until the call returns, and until the model has given the first output, for 8 tokens, because plain weights
are read from the file when they are first used. The files are in the system's cache, or, for the first output once
more, dropped from it before each load. The memory is that of one more process, which is not forked: the peak beyond
what it had before; pages of a mapped file count. Takes about 6 minutes on 2 cores, and 5 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clocks import spread
from tables import command, conditions, describe, table, write


ROOT = Path(__file__).resolve().parent
WAYS = {"plain, from_pretrained": "plain", "compressed, from_pretrained": "small", "load_sparse_inference": "small"}
DTYPES = ("float32", "bfloat16")
ZEROS = (0.5, 0.8, 0.95)
ROUNDS, COLD_ROUNDS = 5, 1
TOKENS = 8
# hidden_size, intermediate_size: 69 and 151 million weights.
LLAMAS = {"float32": (768, 2048), "bfloat16": (1024, 4096)}


def make(kind: str, dtype: str, zeros: float, folder: Path) -> None:
    """Save a model plain and compressed."""
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
    compress(folder / "plain", folder / "small")


def load_once(way: str, folder: Path) -> dict[str, float]:
    """Load a model in this process; return seconds and bytes."""
    import transformers as tf

    import hf_pdecay

    began_with = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    begin, cpu = time.perf_counter(), time.process_time()
    if way == "load_sparse_inference":
        model = hf_pdecay.load_sparse_inference(folder)
    else:
        model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    returned = time.perf_counter() - begin
    with torch.no_grad():
        model(input_ids=torch.arange(TOKENS)[None])
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.sum()
    return {"returned": returned, "seconds": seconds, "cpu_seconds": cpu, "peak": _most_memory() - began_with}


def _most_memory() -> int:
    """The peak of this process's resident bytes. That of getrusage is not lower than the peak of its parent."""
    return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0])


def _ready() -> None:
    """Import what loading needs, and the modules of the models."""
    import transformers as tf

    import hf_pdecay.inference.loading

    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    _ = tf.AutoModelForCausalLM, tf.GPT2LMHeadModel, tf.LlamaForCausalLM, hf_pdecay.inference.loading


def in_a_process(way: str, folder: Path) -> dict[str, float]:
    """Load a model in a process that is forked from this one."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writing, json.dumps(load_once(way, folder)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = pipe.read()
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError(f"{way} of {folder} failed.")
    result: dict[str, float] = json.loads(found)
    return result


def peak(way: str, folder: Path) -> float:
    """Return the most bytes that loading a model takes beyond a new process that has imported the libraries."""
    words = [sys.executable, __file__, "--load", way, f"--folder={folder}"]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak"])


def forget(folder: Path) -> None:
    """Drop the files of a folder from the system's cache."""
    for file in folder.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def probe(file: Path) -> dict[str, float]:
    """Bytes for each second at which one thread hashes, reads mapped pages, and copies to new memory."""
    data = np.memmap(file, dtype=np.uint8, mode="r")
    rates = {"sha256": 0.0, "mapped": 0.0, "copied": 0.0}
    for _ in range(3):
        ways = {
            "sha256": lambda: hashlib.sha256(data.data),
            "mapped": lambda: np.memmap(file, dtype=np.uint8, mode="r")[:: resource.getpagesize()].sum(),
            "copied": lambda: np.array(data),
        }
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            rates[name] = max(rates[name], data.nbytes / (time.perf_counter() - begin))
    return rates


def measure(kind: str, dtype: str, zeros: float, folder: Path, rounds: int) -> dict[str, Any]:
    """Load one model in all ways, in turns."""
    sizes = {name: (folder / name / "model.safetensors").stat().st_size for name in ("plain", "small")}
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in list(WAYS)[:: 1 if number % 2 else -1]:
            results[way].append(in_a_process(way, folder / WAYS[way]))
            if number < COLD_ROUNDS:
                forget(folder / WAYS[way])
                results[way][-1]["cold"] = in_a_process(way, folder / WAYS[way])["seconds"]
                in_a_process(way, folder / WAYS[way])
    rows = {}
    for way, found in results.items():
        row: dict[str, Any] = {"bytes": sizes[WAYS[way]], "peak": peak(way, folder / WAYS[way])}
        for key in ("returned", "seconds", "cpu_seconds", "cold"):
            pairs = [
                (each[key], base[key])
                for each, base in zip(found, results[next(iter(WAYS))], strict=True)
                if key in each
            ]
            row[key] = spread([mine for mine, _ in pairs])
            row[f"{key}_ratio"] = spread([mine / base for mine, base in pairs])
        rows[way] = row
    rates = probe(folder / "small" / "model.safetensors")
    return {"kind": kind, "dtype": dtype, "zeros": zeros, "rounds": rounds, "rates": rates, "rows": rows}


def report_text(record: dict[str, Any]) -> str:
    """Return the figures in Markdown."""
    rows = []
    for model in record["models"]:
        for way, row in model["rows"].items():
            ratio, returned = row["seconds_ratio"], row["returned_ratio"]
            rows.append(
                [f"{model['kind']}, {model['dtype']}, {way}", f"{model['zeros']:.0%}", f"{row['bytes'] / 1e6:.0f}"]
                + [f"{row['peak'] / 1e6:.0f}", f"{row['peak'] / row['bytes']:.2f}"]
                + [f"{1e3 * row['returned']['median']:.0f}", f"{returned['median']:.2f}"]
                + [f"{1e3 * row['seconds']['median']:.0f}", f"{ratio['median']:.2f}"]
                + [f"{ratio['q10']:.2f}-{ratio['q90']:.2f}", f"{row['cpu_seconds_ratio']['median']:.2f}"]
                + [f"{1e3 * row['cold']['median']:.0f}", f"{row['cold_ratio']['median']:.2f}"]
            )
    headings = ["model", "zeros", "file, MB", "peak, MB", "peak / file", "returned, ms", "ratio", "first output, ms"]
    headings += ["ratio", "10-90%", "ratio of CPU", "cold, ms", "ratio"]
    parts = ["# Loading compressed models into sparse layers", describe(record), table(headings, rows)]
    parts.append(
        "*zeros*: of the blocks' matrices; embeddings and head are dense. *peak*: the most resident memory of the "
        "process beyond that before the load, all weights read; some 25 MB are code and "
        "modules, with the plain folder too. *returned*: median until the call returns. *first output*: until the "
        f"model has computed {TOKENS} tokens. *cold*: the same, the files not in the system's cache. *ratio*: to the "
        "plain folder in the same round. *CPU*: of all threads of the process, until the first output."
    )
    rates = [model["rates"] for model in record["models"]]
    words = {"sha256": "SHA-256 of", "mapped": "pages mapped from", "copied": "copying"}
    probes = (f"{words[name]} {max(each[name] for each in rates) / 1e9:.1f} GB" for name in words)
    parts.append(f"One thread in a second, the best of all models: {', '.join(probes)} of the file, in the cache.")
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--load", choices=tuple(WAYS), help="load the model of a folder in this process")
    parser.add_argument("--make", metavar="MODEL", help="make one model in this process")
    parser.add_argument("--folder", type=Path, help="keep the models here")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the results")
    words = sys.argv[1:] if argv is None else list(argv)
    options = parser.parse_args(words)
    if options.load:
        _ready()
        print(json.dumps(load_once(options.load, options.folder)))
        return 0
    if options.make:
        kind, dtype, zeros = options.make.split("_")
        make(kind, dtype, float(zeros), options.folder / options.make)
        return 0
    record: dict[str, Any] = {
        **conditions("cpu", ["torch", "transformers", "safetensors", "numpy"]),
        "command": command("loading.py", [word for word in words if not word.startswith("--folder")]),
        "models": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        every = [(kind, dtype, zeros) for dtype in DTYPES for kind in ("llama", "gpt2") for zeros in ZEROS]
        for model in every:
            label = "_".join(map(str, model))
            if not (folder / label / "small").exists():
                subprocess.run([sys.executable, __file__, "--make", label, f"--folder={folder}"], check=True)
        _ready()
        for way, kept in WAYS.items():  # also compiles the C++ functions
            in_a_process(way, folder / "_".join(map(str, every[0])) / kept)
        for model in every:
            record["models"].append(measure(*model, folder / "_".join(map(str, model)), options.rounds))
            print(report_text({**record, "models": record["models"][-1:]}).split("\n\n")[3], flush=True)
            write(record, report_text(record), options.output, "loading")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
