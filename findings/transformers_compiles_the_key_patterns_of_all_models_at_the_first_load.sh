#!/usr/bin/env bash
# transformers 5.24.0: the first `save_pretrained` or `from_pretrained` of a process builds the renamings of checkpoint keys of
# all architectures, not those of the model: a GPT-2 of one layer, which has none of its own, compiles some 900 regular
# expressions, among them those of the experts of mixtures. That is most of the time of loading a small model whose file is
# in the system's cache (0.1 to 0.3 s), once in each process: a tool that starts a process for each small model pays it each
# time. The second call compiles none.
#
# Seen: first save: 905 patterns, 51 with "expert"; load after it: 23; second load: 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy==2.4.6
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work/model" 2>"$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
import re._compiler as compiler
import sys

import transformers

seen = []
compile_pattern = compiler.compile


def counted(pattern, flags=0):
    seen.append(str(pattern))
    return compile_pattern(pattern, flags)


compiler.compile = counted
sizes = {"n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 10, "n_positions": 8}
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
counts = []
for call in (model.save_pretrained, model.from_pretrained, model.from_pretrained):
    seen.clear()
    call(sys.argv[1])
    counts.append((len(seen), sum("expert" in pattern for pattern in seen)))
print(f"first save: {counts[0][0]} patterns, {counts[0][1]} with \"expert\"; load after it: {counts[1][0]}; "
      f"second load: {counts[2][0]}")
if not (counts[0][0] > 500 and counts[0][1] > 20 and counts[1][0] < 100 and counts[2][0] == 0):
    sys.exit("transformers behaves differently now")
PY
