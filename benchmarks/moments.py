"""Savings and costs of moments of fewer bits: memory of the optimizer and loss curves, same steps, same seeds.

    python benchmarks/moments.py                 # about 25 minutes on two cores
    python benchmarks/moments.py --quick         # 3 minutes
    python benchmarks/moments.py --plot benchmarks/results/moments.json

Each run trains the small GPT-2 of `examples/train_clm.py` on the source text of Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import train_clm  # noqa: E402
from hf_pdecay import measure_sparsity  # noqa: E402
from hf_pdecay.optim.moments import MOMENTS, is_quantized  # noqa: E402


def train(moments: str, seed: int, steps: int, eval_samples: int) -> dict[str, Any]:
    """Train once and return the loss curve, the loss at the end, the zeros and the bytes of the optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--optim", "adamw_lp", "--optim_args", f"moments={moments}", "--p_norm", "0.8", "--lambda_p", "0.017"]
        argv += ["--max_steps", str(steps), "--seed", str(seed), "--output_dir", folder, "--generate_tokens", "0"]
        argv += ["--max_eval_samples", str(eval_samples), "--logging_steps", str(max(1, steps // 40))]
        trainer, tokenizer, data = train_clm.prepare(argv)
        metrics = train_clm.run(trainer, tokenizer, data)
        curve = [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line]
    weights = sum(param.numel() for param in trainer.model.parameters())
    optimizer: Any = trainer.optimizer
    return {
        "moments": moments,
        "seed": seed,
        "curve": curve,
        "validation_loss": metrics["eval_loss"],
        "sparsity": measure_sparsity(trainer.model).sparsity,
        "steps_per_second": metrics["train_steps_per_second"],
        "bytes_per_weight": state_bytes(optimizer.state.values()) / weights,
    }


def state_bytes(states: Any) -> int:
    """Bytes of both moments, including the scales and tables of quantised ones."""
    total = 0
    for state in states:
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state[name]
            parts = [moment.codes, moment.scale, moment.qmap] if is_quantized(moment) else [moment]
            total += sum(part.numel() * part.element_size() for part in parts)
    return total


def table(runs: list[dict[str, Any]]) -> str:
    """Return the Markdown table: mean and spread over the seeds."""
    lines = [
        "| moments | bytes per weight | validation loss | exact zeros | loss, differences to float32 by seed |",
        "|---|---:|---:|---:|---|",
    ]
    base = {run["seed"]: run["validation_loss"] for run in runs if run["moments"] == "float32"}
    for moments in MOMENTS:
        seeds = [run for run in runs if run["moments"] == moments]
        if not seeds:
            continue
        losses, zeros = [run["validation_loss"] for run in seeds], [run["sparsity"] for run in seeds]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        gaps = ", ".join(f"{run['validation_loss'] - base[run['seed']]:+.4f}" for run in seeds)
        lines.append(
            f"| {moments} | {seeds[0]['bytes_per_weight']:.2f} | {statistics.mean(losses):.4f} ± {spread:.4f} | "
            f"{statistics.mean(zeros):.2%} | {gaps} |"
        )
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss curves, the mean over the seeds and its range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for moments, style in zip(MOMENTS, ("-", "--", ":"), strict=True):
        curves = [run["curve"] for run in runs if run["moments"] == moments]
        if not curves:
            continue
        steps = [step for step, _ in curves[0]]
        losses = [[curve[k][1] for curve in curves] for k in range(len(steps))]
        (line,) = axes.plot(steps, [statistics.mean(values) for values in losses], style, label=moments)
        axes.fill_between(
            steps, [min(values) for values in losses], [max(values) for values in losses], alpha=0.15, lw=0
        )
        line.set_linewidth(1.8)
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title="Training loss by what the moments are kept as")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and 200 steps")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each run (1000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds (1 2 3)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--plot", type=Path, help="only draw the figure of these results")
    options = parser.parse_args(argv)
    picture = Path("docs/images/moments.png")
    if options.plot:
        plot(json.loads(options.plot.read_text(encoding="utf-8"))["runs"], picture)
        return 0
    steps, seeds, samples = (200, [1], 200) if options.quick else (options.steps, options.seeds, 1500)
    runs = [train(moments, seed, steps, samples) for seed in seeds for moments in MOMENTS]
    name = "moments_quick" if options.quick else "moments"
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/moments.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": date.today().isoformat(),
        "device": f"CPU ({platform.machine()}), {torch.get_num_threads()} threads",
        "versions": {package: version(package) for package in ("torch", "transformers", "torchao")},
        "steps": steps,
        "runs": runs,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    text = f"`{record['command']}`, {record['date']}, {record['device']}, {versions}\n\n{table(runs)}\n"
    (options.output / f"{name}.md").write_text(text, encoding="utf-8")
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
