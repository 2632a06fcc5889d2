"""What fewer bytes for the values cost: the loss of SmolLM2-135M with 50% zeros on GSM8K, by the sparse layers.

    python benchmarks/inference_loss.py --data FOLDER                 # prunes the model first, from 64 training rows
    python benchmarks/inference_loss.py --data FOLDER --model FOLDER  # a model that has zeros already

The model, the data and the rows are those of `llm.py`. A call has 64 tokens, so that all products are those of a few
rows: int8 values meet activations in 16 bits. No tuning: each form is applied once.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pdecay import prune_one_shot, to_sparse_inference
from llm import CALIBRATION, Data, loss, model_folder, zeros
from tables import command, conditions, describe, table, write


ROOT = Path(__file__).resolve().parent
TOKENS = 64
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"values": "bfloat16"},
    "float16": {"values": "float16"},
    "int8": {"values": "int8"},
    "int8, and the tied head in int8": {"values": "int8", "head": "int8"},
}


def short(rows: Sequence[dict[str, list[int]]], most: int) -> list[dict[str, list[int]]]:
    """Return the first parts of some rows, of 64 tokens each, that have a label."""
    parts = [
        {key: values[start : start + TOKENS] for key, values in row.items()}
        for row in rows
        for start in range(0, len(row["labels"]), TOKENS)
    ]
    return [part for part in parts if any(label != -100 for label in part["labels"][1:])][:most]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--model", help="folder of a causal language model, with its tokenizer")
    parser.add_argument("--rows", type=int, default=300, help="rows of 64 tokens")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args(argv)
    folder = str(model_folder(args.model))
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    data = Data(Path(args.data), AutoTokenizer.from_pretrained(folder))
    if zeros(dense) < 0.4:
        rows = torch.tensor([row["input_ids"] for row in data.train[:CALIBRATION]])
        prune_one_shot(dense, rows, sparsity=0.5)
    parts = short(data.test, args.rows)
    record = conditions("cpu", ("torch", "transformers"))
    given = ["FOLDER" if part in (args.data, args.model) else part for part in (sys.argv[1:] if argv is None else argv)]
    record["command"] = command("inference_loss.py", given)
    record |= {"zeros": zeros(dense), "rows": len(parts), "losses": {"dense float32": loss(dense, parts, 1, low=False)}}
    for name, options in FORMS.items():
        model = copy.deepcopy(dense)
        to_sparse_inference(model, rows=TOKENS, min_sparsity=0.01, **options)
        record["losses"][name] = loss(model, parts, 1, low=False)
        print(name, record["losses"][name], file=sys.stderr, flush=True)
    first = record["losses"]["dense float32"]
    lines = [
        [name, f"{value:.5f}", f"{math.exp(value):.4f}", f"{value - first:+.5f}"]
        for name, value in record["losses"].items()
    ]
    report = "\n\n".join(
        [
            "# The loss of sparse layers in fewer bytes",
            describe(record),
            f"{record['zeros']:.1%} zeros, {len(parts)} rows of {TOKENS} tokens of the test split, answers alone.",
            table(["values", "loss", "perplexity", "beyond dense"], lines),
        ]
    )
    print(report)
    write(record, report + "\n", args.output, "inference_loss")
    return 0


if __name__ == "__main__":
    sys.exit(main())
