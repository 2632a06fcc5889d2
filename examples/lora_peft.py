"""Fine-tune a sparse causal LM with LoRA, cut the ranks that died, and merge without losing a zero of the base.

    python examples/train_clm.py --optim adamw_lp --target_sparsity 0.8 --output_dir base
    python examples/lora_peft.py --model_name_or_path base --train_file text.txt --output_dir adapter

The options are those of `train_clm.py`, and `--r`, `--rank_sparsity` and `--mask`. The adapter lies in `--output_dir`, the
merged model in `merged` in it.
"""

import sys
from dataclasses import dataclass

from peft import LoraConfig, get_peft_model
from rich.console import Console

from hf_pdecay import (
    PDecayTrainer,
    PDecayTrainingArguments,
    RankDecayCallback,
    cut_ranks,
    mask_adapters,
    measure_sparsity,
    merge_keep_zeros,
    rank_sparsity,
)
from options import arg, causal_lm_hooks, parse_options
from train_clm import DataArguments, ModelArguments, collate, default_options, load_documents, load_model, to_blocks


@dataclass
class LoraArguments:
    """The adapter."""

    r: int = arg(16, help="Ranks of each layer to begin with.")
    rank_sparsity: float = arg(0.5, help="Fraction of all ranks that is to die.")
    mask: bool = arg(True, help="Train with the base's zeros kept, as the merged model has them; a little slower.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, cut and merge; return the held-out losses and the sparsity of the merged model."""
    groups = (ModelArguments, DataArguments, PDecayTrainingArguments, LoraArguments)
    model_args, data, args, lora = parse_options(sys.argv[1:] if argv is None else argv, groups, default_options)
    args.lambda_p, args.batch_eval_metrics = 0.0, True  # ranks decay, not the weights one by one
    train, held_out, source = load_documents(data)
    base = load_model(model_args, None, data)
    parts = [to_blocks(texts, None, data.block_size, data.max_eval_samples, source) for texts in (train, held_out)]
    model = get_peft_model(base, LoraConfig(r=lora.r, lora_alpha=lora.r, target_modules="all-linear"))
    model = mask_adapters(model) if lora.mask else model
    sets = {"train_dataset": parts[0], "eval_dataset": parts[1], "data_collator": collate}
    trainer = PDecayTrainer(model=model, args=args, **sets, **causal_lm_hooks())
    RankDecayCallback(target_rank_sparsity=lora.rank_sparsity).attach(trainer)
    found = {"base": trainer.evaluate()["eval_loss"]}
    trainer.train()
    Console().print(rank_sparsity(model))
    cut_ranks(model).save_pretrained(args.output_dir)
    found["adapter"] = trainer.evaluate()["eval_loss"]
    trainer.model = trainer.model_wrapped = merged = merge_keep_zeros(model)
    merged.save_pretrained(f"{args.output_dir}/merged")
    return found | {"merged": trainer.evaluate()["eval_loss"], "sparsity": measure_sparsity(merged).sparsity}


if __name__ == "__main__":
    Console().print(main())
