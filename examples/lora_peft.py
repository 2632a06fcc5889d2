"""Fine-tune a sparse causal LM with LoRA, remove the dead ranks, and merge without losing a zero of the base.

    python examples/train_clm.py --optim adamw_lp --target_sparsity 0.8 --output_dir base
    python examples/lora_peft.py --model_name_or_path base --train_file text.txt --output_dir adapter

The options are those of `train_clm.py`, and `--r`, `--rank_sparsity` and `--mask`. The base must have bytes as tokens.
The adapter goes to `--output_dir`, the merged model to its subfolder `merged`.
"""

import sys
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model
from rich.console import Console

import hf_pdecay as pd
import train_clm as clm
from options import arg, parse_options


@dataclass
class LoraArguments:
    """The adapter."""

    r: int = arg(16, help="Ranks of each layer at the start.")
    rank_sparsity: float = arg(0.5, help="Fraction of all ranks to die.")
    mask: bool = arg(True, help="Train with the zeros of the base, as in the merged model.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, shrink and merge; return the held-out losses and the sparsity of the merged model."""
    groups = (clm.ModelArguments, clm.DataArguments, pd.PDecayTrainingArguments, LoraArguments)
    model_args, data, args, lora = parse_options(sys.argv[1:] if argv is None else argv, groups, clm.default_options)
    args.batch_eval_metrics = True
    args.lp_rules = {"lora_": {"group": "rank", "target_sparsity": lora.rank_sparsity}}
    base = clm.load_model(model_args, None, data)
    model: Any = get_peft_model(base, LoraConfig(r=lora.r, lora_alpha=lora.r, target_modules="all-linear"))
    model = pd.mask_adapters(model) if lora.mask else model
    train, held_out, source = clm.load_documents(data)
    sets: dict[str, Any] = {"data_collator": clm.collate, **clm.causal_lm_hooks()}
    sets["train_dataset"] = clm.to_blocks(train, None, data.block_size, data.max_train_samples, source)
    sets["eval_dataset"] = clm.to_blocks(held_out, None, data.block_size, data.max_eval_samples, source)
    trainer = pd.PDecayTrainer(model=model, args=args, **sets)
    losses = {"base": trainer.evaluate()["eval_loss"]}
    trainer.train()
    Console().print(pd.rank_sparsity(model))
    pd.shrink_ranks(model).save_pretrained(args.output_dir)
    losses["adapter"] = trainer.evaluate()["eval_loss"]
    merged: Any = pd.merge_keep_zeros(model)
    trainer.model = trainer.model_wrapped = merged
    merged.save_pretrained(f"{args.output_dir}/merged")
    return losses | {"merged": trainer.evaluate()["eval_loss"], "sparsity": pd.measure_sparsity(merged).sparsity}


if __name__ == "__main__":
    Console().print(main())
