"""Training with few bits: `--weight_bits` beside straight-through rounding, with and without zeros.

    python benchmarks/few_bits.py --data FOLDER                 # all runs without a result, then the table
    python benchmarks/few_bits.py --data FOLDER --minutes 30    # as many of them as begin in that time
    python benchmarks/few_bits.py --data FOLDER --table         # only the table
    python benchmarks/few_bits.py --time                        # how long a step takes, 1 minute

A Llama of 0.5 M weights learns Tiny Shakespeare by character (`FOLDER/tinyshakespeare/input.txt`). Each run appends a
line to `results/few_bits.jsonl` and is skipped from then on. For a seed all methods begin with the same model and see
the same rows, with the same Trainer, learning rate and schedule. The loss is that of the last tenth of the text.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).resolve().parent / "results"
CONTEXT, BATCH, RATE = 64, 16, 3e-3
METHODS = {
    "none": "no rounding",
    "ours": "`--weight_bits`",
    "qat": "torchao's QAT, `IntxFakeQuantizeConfig`, symmetric",
    "bitnet": "straight-through as in BitNet, blocks of 128",
}
INTEGERS = {4: "int4", 2: "int2", 1: "int1"}


@dataclass(frozen=True)
class Run:
    """The values that identify one run.

    Args:
        method: A key of ``METHODS``.
        bits: The width; None for none.
        target: Fraction of zeros, ``"2:4"``, or None for a dense model.
        seed: Seed of the model and of the order of the rows.
        steps: Optimizer steps.
        activation_bits: Width of the inputs of the rounded layers; None for no rounding.
    """

    method: str
    bits: float | None
    target: float | str | None
    seed: int
    steps: int
    activation_bits: float | None = None


def planned(steps: int) -> list[Run]:
    """Return the runs of the table, the most telling first."""
    dense = [("none", None), *(("ours", bits) for bits in (4, 2, 1.58, 1)), *(("qat", bits) for bits in (4, 2, 1))]
    dense += [("bitnet", 1.58), ("bitnet", 1)]
    sparse = [("none", None), *(("ours", bits) for bits in (4, 2, 1.58, 1)), ("qat", 4)]
    runs = []
    for seed in range(3):
        runs += [Run(*each, None, seed, steps) for each in dense]
        runs += [Run(*each, target, seed, steps) for target in (0.9, "2:4", 0.5, 0.8) for each in sparse]
        runs += [Run("ours", 1, target, seed, steps, activation_bits=4) for target in (None, "2:4")]
    return sorted(runs, key=lambda run: (run.seed > 0 and run.target not in (None, 0.9), run.seed))


def execute(run: Run, folder: Path) -> dict[str, Any]:
    """Make a run; return the line of the results file."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from hf_pdecay import PDecayTrainer, PDecayTrainingArguments

    text = (folder / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    places = {char: place for place, char in enumerate(sorted(set(text)))}
    ids = torch.tensor([places[char] for char in text])
    train, held_out = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    starts = torch.randint(
        len(train) - CONTEXT, (run.steps * BATCH,), generator=torch.Generator().manual_seed(run.seed)
    )
    rows = [{"input_ids": row, "labels": row} for row in (train[start : start + CONTEXT] for start in starts.tolist())]
    tests = held_out[: len(held_out) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    set_seed(run.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(places),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
        )
    )
    ours: dict[str, Any] = {"lambda_p": 0.0} if run.target is None else {"target_sparsity": run.target}
    if isinstance(run.target, str):
        ours = {"lp_rules": {".": {"group": run.target}}}
    if run.method == "ours":
        ours["weight_bits"] = run.bits
        ours["activation_bits"] = run.activation_bits
    elif run.method == "qat":
        _torchao(model, run.bits)
    elif run.method == "bitnet":
        _bitnet(model, one=run.bits == 1)
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as nothing:
        args = PDecayTrainingArguments(
            out,
            max_steps=run.steps,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            warmup_steps=run.steps // 10,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=128,
            use_cpu=True,
            seed=run.seed,
            report_to="none",
            save_strategy="no",
            logging_steps=25,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            one_shot="off",
            **ours,
        )
        stdout, sys.stdout = sys.stdout, nothing  # the Trainer prints its logs
        try:
            trainer = PDecayTrainer(
                model=model,
                args=args,
                train_dataset=rows,
                eval_dataset=[{"input_ids": row, "labels": row} for row in tests],
            )
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
            loss = trainer.evaluate()["eval_loss"]
        finally:
            sys.stdout = stdout
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return asdict(run) | {
        "loss": loss,
        "highest_train_loss": max(losses[len(losses) // 4 :]),
        "zeros": trainer.measure_sparsity().sparsity,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("hf-pdecay", "torch", "transformers", "torchao")},
    }


def _torchao(model: Any, bits: float | None, *, activations: bool = False) -> None:
    import torch
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    config = IntxFakeQuantizeConfig(getattr(torch, INTEGERS[int(bits or 0)]), group_size=128, is_symmetric=True)
    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if activations else None
    prepare = QATConfig(activation_config=inputs, weight_config=config, step="prepare")
    quantize_(model, prepare, filter_fn=lambda _, name: "proj" in name)


def _bitnet(model: Any, *, one: bool) -> None:
    """Replace the products by those of BitNet (arXiv 2310.11453, 2402.17764), with a scale for each block."""
    import types

    import torch

    def forward(self: Any, inputs: Any) -> Any:
        blocks = self.weight.view(-1, 128)
        scale = blocks.detach().abs().mean(1, keepdim=True)
        if one:
            codes = (blocks - blocks.mean(1, keepdim=True)).sign()
        else:
            codes = (blocks / scale).round().clamp(-1, 1)
        rounded = self.weight + ((codes * scale).view_as(self.weight) - self.weight).detach()
        return torch.nn.functional.linear(inputs, rounded)

    for name, module in model.named_modules():
        if name.endswith("proj"):
            module.forward = types.MethodType(forward, module)


def time_steps(rounds: int = 25) -> str:
    """Return how long a step of a Llama of 6.3 M weights takes by method, all methods in every round."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_pdecay import round_activations
    from hf_pdecay.low_bit.grid import grid_of
    from hf_pdecay.low_bit.model import RoundedModel

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    config = LlamaConfig(
        vocab_size=96, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8
    )
    ids = torch.randint(96, (4, 64))
    contenders: dict[str, tuple[str, float, bool, bool]] = {"no rounding": ("none", 4, False, False)}
    contenders["torchao's QAT, 4 bits"] = ("qat", 4, False, False)
    for bits in (4, 2, 1.58, 1):
        contenders[f"`--weight_bits {bits}`"] = ("ours", bits, False, False)
        contenders[f"`--weight_bits {bits}`, sparse"] = ("ours", bits, True, False)
    contenders["torchao's QAT, 4 bits, inputs of 8"] = ("qat", 4, False, True)
    contenders["`--weight_bits 4 --activation_bits 8`"] = ("ours", 4, False, True)
    steps = {}
    for name, (method, bits, sparse, inputs) in contenders.items():
        model = LlamaForCausalLM(config)
        if method == "qat":
            _torchao(model, bits, activations=inputs)
        if method == "ours":
            names = [each for each, _ in model.named_parameters() if "proj" in each]
            if sparse:
                for each, param in model.named_parameters():
                    if "proj" in each:
                        param.data.masked_fill_(torch.rand_like(param) < 0.9, 0)
            RoundedModel(model, dict.fromkeys(names, grid_of(bits, sparse=sparse)))
            if inputs:
                round_activations(model, {each.removesuffix(".weight"): 8 for each in names})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        steps[name] = model, optimizer
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (model, optimizer) in steps.items():
            start = time.process_time()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(each[3:]) for name, each in seconds.items()}
    rows = ["| method | ms of processor time | of torchao's QAT |", "|---|---:|---:|"]
    of = medians["torchao's QAT, 4 bits"]
    rows += [f"| {name} | {1000 * median:.1f} | {median / of:.2f} |" for name, median in medians.items()]
    return (
        "\n".join(rows)
        + f"\n\n4 rows of 64 tokens, {torch.get_num_threads()} thread(s), median of {rounds - 3} rounds.\n"
    )


def matches(line: Mapping[str, Any], run: Run) -> bool:
    """Whether a line of the results file is that of a run."""
    values = asdict(Run("", None, None, 0, 0)) | dict(line)
    return all(values[key] == value for key, value in asdict(run).items())


def table(results: Sequence[dict[str, Any]], runs: Sequence[Run]) -> str:
    """Return the table as Markdown: mean loss of the seeds, half of their range, and their number."""
    targets = [None, 0.5, 0.8, 0.9, "2:4"]
    names = ["no zeros", "50% zeros", "80%", "90%", "2:4"]
    rows = ["| method | bits | of inputs | " + " | ".join(names) + " |", "|---|---:|---:|" + "---:|" * len(names)]
    done = [line for line in results if any(matches(line, run) for run in runs)]
    for method, bits, inputs in dict.fromkeys((run.method, run.bits, run.activation_bits) for run in runs):
        cells = []
        for target in targets:
            same = [run for run in runs if (run.method, run.bits, run.activation_bits) == (method, bits, inputs)]
            losses = [line["loss"] for line in done for run in same if run.target == target and matches(line, run)]
            spread = f" ± {(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else ""
            cells.append(f"{statistics.mean(losses):.3f}{spread} ({len(losses)})" if losses else "")
        widths = " | ".join("" if each is None else f"{each:g}" for each in (bits, inputs))
        rows.append(f"| {METHODS[method]} | {widths} | " + " | ".join(cells) + " |")
    if done:
        versions = sorted({", ".join(f"{name} {value}" for name, value in line["versions"].items()) for line in done})
        hours = sum(line["seconds"] for line in done) / 3600
        rows.append(
            f"\nLoss of held-out text after {runs[0].steps} steps: mean of the seeds ± half of their range, and their "
            f"number. {len(done)} of {len(runs)} runs, {hours:.1f} hours of one core. {'; '.join(versions)}."
        )
    return "\n".join(rows) + "\n"


def main() -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of each run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this many minutes")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--time", action="store_true", help="only time steps")
    options = parser.parse_args()
    if options.time:
        (RESULTS / "few_bits_time.md").write_text(time_steps(), encoding="utf-8")
        print((RESULTS / "few_bits_time.md").read_text(encoding="utf-8"))
        return 0
    if options.data is None:
        parser.error("--data names the folder with tinyshakespeare/input.txt")
    path = RESULTS / "few_bits.jsonl"
    runs = planned(options.steps)

    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

    start = time.monotonic()
    logging.disable(logging.WARNING)
    for run in [] if options.table else runs:
        if any(matches(line, run) for line in read()) or time.monotonic() - start > 60 * options.minutes:
            continue
        line = execute(run, options.data)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{run}: loss {line['loss']:.4f}, {line['zeros']:.2%} zeros, {line['seconds']} s", flush=True)
    text = table(read(), runs)
    (RESULTS / "few_bits.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
