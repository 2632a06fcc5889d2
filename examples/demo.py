"""Compare dense AdamW with `adamw_lp` on the same steps, in a few minutes on two CPU cores.

    python examples/demo.py

Both runs train the small GPT-2 of `train_clm.py` on the source text of Python's standard library, from the same seed
and on the same batches. `demo_output` gets their folders, and the figures of the table as `results.json`.
"""

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

from rich.console import Console
from rich.table import Table

import train_clm
from hf_pdecay import __version__, measure_sparsity


OPTIMIZERS = {"dense": "adamw_torch", "sparse": "adamw_lp"}


def train(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one of the two models and return its figures."""
    argv = ["--optim", OPTIMIZERS[name], "--output_dir", str(folder), "--max_steps", str(options.max_steps)]
    argv += ["--seed", str(options.seed)]
    if name == "sparse":
        argv += [] if options.p_norm is None else ["--p_norm", str(options.p_norm)]
        given = options.lambda_p is not None
        argv += ["--lambda_p", str(options.lambda_p)] if given else ["--target_sparsity", str(options.target_sparsity)]
    argv += ["--max_eval_samples", str(options.max_eval_samples), "--generate_tokens", "0"]
    argv += ["--logging_steps", str(max(1, options.max_steps // 20))]
    trainer, tokenizer, data = train_clm.prepare(argv)
    metrics = train_clm.run(trainer, tokenizer, data)
    report = measure_sparsity(trainer.model)
    return {
        "command": "python examples/train_clm.py " + " ".join(argv),
        "validation_loss": metrics["eval_loss"],
        "perplexity": metrics["eval_perplexity"],
        "token_accuracy": metrics["eval_token_accuracy"],
        "sparsity": report.sparsity,
        "model_sparsity": report.model_sparsity,
        "parameters": report.model.parameters,
        "steps_per_second": metrics["train_steps_per_second"],
        "train_seconds": metrics["train_runtime"],
    }


def comparison(results: dict[str, dict[str, Any]], title: str) -> Table:
    """Return the table of both runs."""
    table = Table(title=title)
    table.add_column("")
    for name in results:
        table.add_column(f"{name} ({OPTIMIZERS[name]})", justify="right")
    rows = {
        "validation loss": ("validation_loss", ".4f"),
        "perplexity": ("perplexity", ".3f"),
        "token accuracy": ("token_accuracy", ".2%"),
        "exact zeros in decayed weights": ("sparsity", ".2%"),
        "exact zeros in the whole model": ("model_sparsity", ".2%"),
        "steps per second": ("steps_per_second", ".2f"),
    }
    for label, (key, form) in rows.items():
        table.add_row(label, *(format(figures[key], form) for figures in results.values()))
    return table


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="folder for everything")
    parser.add_argument("--max_steps", type=int, default=1000, help="steps of each run (1000)")
    parser.add_argument("--p_norm", type=float, help="p of the sparse run, instead of its default")
    parser.add_argument("--target_sparsity", type=float, default=0.9, help="fraction of zeros of the sparse run (0.9)")
    parser.add_argument("--lambda_p", type=float, help="lambda_p of the sparse run, instead of a target")
    parser.add_argument("--max_eval_samples", type=int, default=1500, help="validation blocks (1500)")
    parser.add_argument("--seed", type=int, default=42, help="seed of both runs (42)")
    options = parser.parse_args(argv)

    console = Console()
    begin = time.perf_counter()
    results = {}
    try:
        for name in OPTIMIZERS:
            console.rule(f"{name}: {OPTIMIZERS[name]}, {options.max_steps} steps")
            results[name] = train(name, options, options.output_dir / name)
    except (ValueError, OSError) as error:
        print("demo.py: error:", shorten(str(error), 600, placeholder=" ..."), file=sys.stderr)
        return 2
    seconds = time.perf_counter() - begin

    parameters = results["sparse"]["parameters"] / 1e6
    console.rule()
    console.print(comparison(results, f"A GPT-2 of {parameters:.2f} M parameters, {options.max_steps} steps each"))
    sparse = options.output_dir / "sparse"
    console.print(f"picture of sparsity: {sparse / 'sparsity.png'}", f"model card: {sparse / 'README.md'}", sep="\n")
    console.print(f"both runs took {seconds:.0f} seconds", highlight=False)
    packages = ("torch", "transformers", "accelerate", "datasets", "evaluate")
    record = {
        "command": " ".join(["python examples/demo.py", *(sys.argv[1:] if argv is None else argv)]),
        "seconds": seconds,
        "versions": {"python": platform.python_version(), "hf_pdecay": __version__}
        | {name: version(name) for name in packages},
        "settings": {**vars(options), "output_dir": str(options.output_dir)},
        "runs": results,
    }
    (options.output_dir / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
