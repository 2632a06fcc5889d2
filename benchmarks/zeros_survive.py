"""Which quantisers keep exact zeros: each tool quantises weights with zeros, and what comes back is counted.

    python benchmarks/zeros_survive.py                 # all groups; installs 3 GB on the first run
    python benchmarks/zeros_survive.py --only gguf mlx

The tools run in environments of their own, which this script makes in the folder for temporary files; nothing of ours
is installed there. The table goes to `results/zeros_survive.md` and into `docs/quantisation.md`. What each tool is
asked to do stands in `zeros_survive_cases.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from environments import python_with


HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs" / "quantisation.md"
BEGIN, END = "<!-- zeros_survive -->\n", "<!-- /zeros_survive -->\n"

GROUPS: dict[str, tuple[str, ...]] = {
    "torch": (
        *("torch==2.13.0", "bitsandbytes==0.50.2", "torchao==0.18.0", "optimum-quanto==0.2.7"),
        *("compressed-tensors==0.20.1", "hqq==0.2.8.post1"),
    ),
    "gguf": ("xllamacpp==2026.10.11549", "gguf==0.19.0", "numpy==2.4.6"),
    "mlx": ("mlx[cpu]==0.32.4", "numpy==2.4.6"),
    "onnx": ("onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0", "numpy==2.4.6", "torch==2.13.0"),
    "openvino": ("nncf==3.4.0", "openvino==2026.4.1"),
    "coreml": ("coremltools==9.0", "scikit-learn==1.7.2"),
    "llmcompressor": (
        *("torch==2.13.0", "llmcompressor==0.14.0", "transformers==5.17.0", "compressed-tensors==0.19.0"),
    ),
}

_OURS = "`hf-pdecay quantize`"
INSTEAD = {
    ("bitsandbytes", "quantize_blockwise, 8 bits, on a CPU"): "nf4, or int8 rows",
    ("torchao", "Float8WeightOnlyConfig"): "Int8WeightOnlyConfig, or `hf-pdecay shrink` first",
    ("torchao", "NF4"): "bitsandbytes' nf4",
    ("optimum-quanto", "qint4"): f"qint8, or {_OURS}",
    ("optimum-quanto", "qint2"): f"qint8, or {_OURS}",
    ("optimum-quanto", "qfloat8"): "qint8, or `hf-pdecay shrink` first",
    ("llama.cpp (GGUF)", "Q5_K"): "Q6_K, Q5_0",
    ("llama.cpp (GGUF)", "Q4_K"): "Q4_0, Q6_K",
    ("llama.cpp (GGUF)", "Q5_1"): "Q5_0",
    ("llama.cpp (GGUF)", "Q4_1"): "Q4_0",
    ("llama.cpp (GGUF)", "Q2_K"): "Q3_K",
    ("llama.cpp (GGUF)", "IQ4_NL"): "Q4_0",
    ("llama.cpp (GGUF)", "IQ4_XS"): "Q4_0",
    ("llama.cpp (GGUF)", "IQ3_S"): "Q3_K",
    ("onnxruntime", "MatMulNBits by HQQ, 4 bits"): "MatMulNBits without HQQ",
    ("coremltools", "palette, 4 bits"): "prune first, with joint_compression",
    ("llmcompressor", "GPTQModifier, W4A16"): "`hf-pdecay quantize --data`",
    **{("mlx", f"affine, {bits} bits"): "mxfp8" if bits == 8 else "mxfp4" for bits in (8, 4, 2)},
    **{("hqq", kind): f"{_OURS}, or torchao's Intx" for kind in ("8 bits, axis 1", "4 bits, axis 1", "4 bits, axis 0")},
}


def run(group: str) -> list[dict[str, Any]]:
    """Return what the tools of a group said of their cases."""
    python = python_with(GROUPS[group])
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [str(python), str(HERE / "zeros_survive_cases.py"), group]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{group}: {done.stderr[-2000:]}")
    return [json.loads(line) | {"group": group} for line in done.stdout.splitlines()]


def table(lines: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    rows = ["| tool | type | zeros kept, of 50% | of 90% | new zeros | dead row or block | use instead |"]
    rows.append("|---|---|---:|---:|---:|---|---|")
    before = ""
    for line in lines:
        tool = f"{line['tool']} {line['version']}"
        name, before = ("" if tool == before else tool), tool
        if "error" in line:
            rows.append(f"| {name} | {line['type']} | does not run here: {line['error'][:60]} | | | | |")
            continue
        half, most = (line["shares"][share] for share in ("0.5", "0.9"))
        kept = all(counts["kept"] == 1 for counts in (half, most))
        instead = "" if kept else INSTEAD.get((line["tool"], line["type"]), _OURS)
        dead = most["dead"] if most["dead"] in ("0", "NaN") else f"up to {most['dead']}"
        cells = (name, line["type"], _share(half["kept"]), _share(most["kept"]), f"{half['new']:.1%}", dead, instead)
        rows.append("| {} | {} | {} | {} | {} | {} | {} |".format(*cells))
    return "\n".join(rows) + "\n"


def _share(value: float) -> str:
    return "all" if value == 1 else f"{value:.3f}" if value < 0.9995 else "0.999"


def main() -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(GROUPS), default=list(GROUPS), help="groups of tools")
    options = parser.parse_args()
    file = RESULTS / "zeros_survive.json"
    earlier = json.loads(file.read_text(encoding="utf-8"))["lines"] if file.is_file() else []
    lines: list[dict[str, Any]] = []
    for group in GROUPS:
        lines += run(group) if group in options.only else [line for line in earlier if line["group"] == group]
    date = time.strftime("%Y-%m-%d")
    file.write_text(json.dumps({"date": date, "packages": GROUPS, "lines": lines}, indent=1) + "\n", encoding="utf-8")
    said = (
        "A weight of 256 × 512, N(0, 0.02), with 50% and 90% exact zeros at random places, a row and an aligned block "
        f"of 256 wholly zero; `python benchmarks/zeros_survive.py`, {date}, on a CPU.\n\n"
    )
    text = table(lines)
    (RESULTS / "zeros_survive.md").write_text(f"# Which quantisers keep exact zeros\n\n{said}{text}", encoding="utf-8")
    docs = DOCS.read_text(encoding="utf-8")
    head, rest = docs.split(BEGIN)
    DOCS.write_text(head + BEGIN + "\n" + said + text + "\n" + END + rest.split(END)[1], encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
