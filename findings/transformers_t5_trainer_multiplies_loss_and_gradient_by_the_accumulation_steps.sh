#!/usr/bin/env bash
# transformers 5.24.0: the Trainer takes a model whose `forward` has **kwargs for one that divides its loss by
# `num_items_in_batch`, and then does not divide by `gradient_accumulation_steps` itself. T5ForConditionalGeneration has
# **kwargs and ignores the number, so its loss and gradient grow in proportion to the accumulation steps: the same 8 rows in
# 4 batches of 2 give 4 times the gradient of one batch of 8. A run that clips gradients hides it.
#
# Seen: 8 rows x 1 batches: loss 4.1, gradient norm 1.3; 2 rows x 4 batches: loss 16.4, gradient norm 5.3; ratio 4.00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
"$work/venv/bin/python" - 2>"$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
import tempfile

import torch
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments, set_seed

set_seed(0)
ids = torch.randint(2, 32, (8, 6))
rows = [{"input_ids": row, "attention_mask": torch.ones(6, dtype=torch.long), "labels": row} for row in ids]
config = T5Config(
    vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
)
norms = {}
for batch, steps in ((8, 1), (2, 4)):
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=1,
            max_grad_norm=1e9,  # only to have the norm logged
            optim="sgd",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(T5ForConditionalGeneration(config), args, train_dataset=rows)
        trainer.train()
    log = trainer.state.log_history[0]
    norms[batch] = float(log["grad_norm"])
    print(f"{batch} rows x {steps} batches: loss {float(log['loss']):.1f}, gradient norm {norms[batch]:.1f}")
ratio = norms[2] / norms[8]
print(f"ratio {ratio:.2f}")
assert 3.9 < ratio < 4.1
PY
