"""Search p, the learning rate and the sparsity of a small model at once, and draw the front of loss and sparsity.

    python examples/hyperparameter_search.py --output_dir search --n_trials 20
    hf-pdecay report search

The options are those of `train_clm.py`, and `--n_trials`. By default it trains the small GPT-2 of `train_clm.py` on the
source text of Python's standard library. Each trial has a folder, `search/run-N`.
"""

import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console

import train_clm as clm
from hf_pdecay import (
    DIRECTIONS,
    PDecayTrainer,
    PDecayTrainingArguments,
    SearchReport,
    loss_and_sparsity,
    optuna_space,
    report,
)
from options import arg, parse_options


@dataclass
class SearchArguments:
    """The search."""

    n_trials: int = arg(20, help="Number of trials.")


def main(argv: list[str] | None = None) -> SearchReport:
    """Search, draw the front and return the report."""
    groups = (clm.ModelArguments, clm.DataArguments, PDecayTrainingArguments, SearchArguments)
    model_args, data, args, search = parse_options(sys.argv[1:] if argv is None else argv, groups, clm.default_options)
    args.batch_eval_metrics = True
    clm.load_model(model_args, None, data)  # sets the size of a block
    train, held_out, source = clm.load_documents(data)
    sets: dict[str, Any] = {"data_collator": clm.collate, **clm.causal_lm_hooks()}
    sets["train_dataset"] = clm.to_blocks(train, None, data.block_size, data.max_train_samples, source)
    sets["eval_dataset"] = clm.to_blocks(held_out, None, data.block_size, data.max_eval_samples, source)
    trainer = PDecayTrainer(model_init=lambda: clm.load_model(model_args, None, data), args=args, **sets)
    space = optuna_space(learning_rate=(3e-4, 1e-2), p_norm=(0.4, 1.2), target_sparsity=(0.3, 0.98))
    trainer.hyperparameter_search(
        space, loss_and_sparsity, n_trials=search.n_trials, direction=DIRECTIONS, backend="optuna"
    )
    result = report(str(args.output_dir))
    Console().print(result)
    return result  # type: ignore[return-value]


if __name__ == "__main__":
    main()
