"""From training to a smaller model: half of the neurons die, are removed, and the model runs without hf_pdecay.

    python benchmarks/structured.py --train_file input.txt     # about ten minutes on one core
    python benchmarks/structured.py --quick                    # two minutes, on Python's standard library

Trains a small Llama by `examples/train_clm.py` dense and to each target, with the same steps, seed and batches. The
command `hf-pdecay shrink` removes the dead units. A process that cannot import hf_pdecay then loads the trained and the
shrunk model, compares their logits and times them in turns.
"""

from __future__ import annotations

import argparse
import json
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
PACKAGES = ("torch", "transformers")
NEURONS = {"mlp": {"group": "neuron", "target_sparsity": 0.5}}
HEADS = {"attn": {"group": "head", "target_sparsity": 0.5}}
# Name, rules, and whether units die that can be removed.
RUNS: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("dense", {".*": "off"}, False),
    ("half of the single weights of the MLPs", {"mlp": {"target_sparsity": 0.5}, "attn": "off"}, False),
    ("half of the neurons", NEURONS | {"attn": "off"}, True),
    ("half of the neurons and heads", NEURONS | HEADS, True),
)

# Runs with -I, so that this project is not on its path, and refuses to import an installed one.
ELSEWHERE = """
import importlib.abc, json, sys, time
class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_pdecay":
            raise ModuleNotFoundError("hf_pdecay is not to be had")
sys.meta_path.insert(0, Refused())
import torch, transformers
torch.set_num_threads(int(sys.argv[3]))
models = [transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for folder in sys.argv[1:3]]
ids = torch.randint(0, models[0].config.vocab_size, (16, 64), generator=torch.Generator().manual_seed(0))
seconds = [[], []]
with torch.no_grad():
    logits = [model(ids).logits for model in models]
    for _ in range(30):
        for times, model in zip(seconds, models):
            begin = time.perf_counter()
            model(ids)
            times.append(time.perf_counter() - begin)
difference = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
weights = [sum(param.numel() for param in model.parameters()) for model in models]
assert "hf_pdecay" not in sys.modules
print(json.dumps({"difference": difference, "parameters": weights, "seconds": seconds}))
"""


def train(rules: dict[str, Any], steps: int, seed: int, folder: Path, text: str | None) -> dict[str, Any]:
    """Train once and return the loss and the fraction of dead units of each kind."""
    argv = [sys.executable, str(ROOT.parent / "examples/train_clm.py"), "--preset", "llama-tiny"]
    argv += ["--optim", "adamw_lp", "--sparsity_budget", "tensor", "--lp_rules", json.dumps(rules)]
    argv += ["--max_steps", str(steps), "--seed", str(seed), "--output_dir", str(folder), "--generate_tokens", "0"]
    argv += ["--max_eval_samples", "1500", "--learning_rate", "0.004", "--disable_tqdm", "true"]
    argv += [] if text is None else ["--train_file", text]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"train_clm.py failed:\n{done.stderr[-2000:]}")
    results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    return {"loss": results["eval_loss"]}


def shrunk(folder: Path, out: Path) -> dict[str, Any]:
    """Remove the dead units, and compare both models in a process without hf_pdecay."""
    words = [sys.executable, "-m", "hf_pdecay", "shrink", str(folder), str(out)]
    subprocess.run(words, check=True, capture_output=True)
    script = [sys.executable, "-I", "-c", ELSEWHERE, str(folder), str(out), str(torch.get_num_threads())]
    done = subprocess.run(script, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The shrunk model does not load without hf_pdecay:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    dense, small = result.pop("seconds")
    result["speedup"] = spread([one / other for one, other in zip(dense, small, strict=True)])
    result["bytes"] = [(model / "model.safetensors").stat().st_size for model in (folder, out)]
    return result


def row(name: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the cells of a row: means over the seeds, and their range if there are several."""
    losses = [run["loss"] for run in runs]
    loss = f"{sum(losses) / len(losses):.4f}"
    if len(losses) > 1:
        loss += f" ({min(losses):.4f}-{max(losses):.4f})"
    if "speedup" not in runs[0]:
        return [name, loss, "", "", "", ""]
    first = runs[0]
    speedup = first["speedup"]
    return [
        name,
        loss,
        f"{first['parameters'][1]:,} of {first['parameters'][0]:,}",
        f"{first['bytes'][1] / first['bytes'][0]:.1%}",
        f"{speedup['median']:.2f} ({speedup['q10']:.2f}-{speedup['q90']:.2f})",
        f"{max(run['difference'] for run in runs):.0e}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and 200 steps")
    parser.add_argument("--train_file", help="text to learn; Python's standard library by default")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each run (1000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds (0)")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of the tables (results here)")
    options = parser.parse_args(argv)
    begin = time.perf_counter()
    steps, seeds = (200, [0]) if options.quick else (options.steps, options.seeds)
    shown = [Path(word).name if "/" in word else word for word in argv]
    record: dict[str, Any] = {"benchmark": "structured", "command": command("structured.py", shown)}
    record |= {**conditions("cpu", PACKAGES), "steps": steps, "seeds": seeds, "runs": {}}
    for name, rules, shrinks in RUNS:
        record["runs"][name] = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                result = train(rules, steps, seed, Path(folder) / "out", options.train_file)
                if shrinks:
                    result |= shrunk(Path(folder) / "out", Path(folder) / "small")
            record["runs"][name].append(result)
            print(f"{name}, seed {seed}: {result['loss']:.4f}", file=sys.stderr, flush=True)
    record["seconds"] = time.perf_counter() - begin
    headings = ["target", "validation loss", "parameters left", "file", "times the sparse model", "logits differ by"]
    rows = [row(name, runs) for name, runs in record["runs"].items()]
    text = "\n\n".join(["# Half of the neurons, removed", describe(record), table(headings, rows)]) + "\n"
    write(record, text, options.output, "structured" + ("_quick" if options.quick else ""))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
