#!/usr/bin/env bash
# accelerate 1.15.0 with transformers 5.24.0: the Trainer's default sampler (`use_seedable_sampler`) shuffles epoch e of
# seed s by a generator with seed s + e. So the second epoch of seed 0 has the order of the first epoch of seed 1: runs of
# three epochs with seeds 0, 1 and 2 see 5 different orders, not 9. The spread over consecutive seeds, by which methods are
# compared, is that of runs that share most of their data order. Seeds further apart than the number of epochs share none.
#
# Seen: seed 0, epochs 2 and 3 are seed 1, epochs 1 and 2: True; 5 of 9 orders are different; with seeds 0, 10, 20: 9 of 9
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
"$work/venv/bin/python" - 2>"$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
import tempfile

import torch
from transformers import Trainer, TrainingArguments

EPOCHS = 3


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, number):
        self.seen += number.tolist()
        return {"loss": self.weight.square()}


def orders(seed):
    """The order of 64 rows in each epoch of a run."""
    model = Model()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, seed=seed, num_train_epochs=EPOCHS, per_device_train_batch_size=8, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        )  # fmt: skip
        Trainer(model, args, train_dataset=[{"number": torch.tensor(row)} for row in range(64)]).train()
    return [tuple(model.seen[64 * epoch : 64 * (epoch + 1)]) for epoch in range(EPOCHS)]


near = [orders(seed) for seed in (0, 1, 2)]
far = [orders(seed) for seed in (0, 10, 20)]
same = near[0][1:] == near[1][:2]
print(
    f"seed 0, epochs 2 and 3 are seed 1, epochs 1 and 2: {same}; {len(set(sum(near, [])))} of 9 orders are different; "
    f"with seeds 0, 10, 20: {len(set(sum(far, [])))} of 9"
)
assert same and len(set(sum(near, []))) == 5 and len(set(sum(far, []))) == 9
PY
