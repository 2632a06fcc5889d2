#!/usr/bin/env bash
# torch 2.13.0: `torch.save` and `copy.deepcopy` take tensors of uint16, uint32 and uint64, as for columns of a sparse matrix,
# and plain `pickle.dumps` writes them too. `pickle.loads` of what it wrote fails: a tensor of these dtypes names an untyped
# storage, and the loader asks it for a dtype. So such a tensor cannot go through anything that pickles: a
# `multiprocessing.Queue` in spawned workers, joblib, Ray, or `dist.broadcast_object_list`. int16 works; its bits can be read
# without a sign.
#
# Seen: uint16, uint32, uint64: pickle.loads raises AttributeError, torch.save works; int16: both work
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - 2>"$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
import io
import pickle

import torch


def survives(dtype, way):
    tensor = torch.arange(3).to(dtype)
    try:
        return torch.equal(way(tensor), tensor)
    except AttributeError as error:
        assert "dtype" in str(error)
        return False


def by_torch(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


def by_pickle(tensor):
    return pickle.loads(pickle.dumps(tensor))


for dtype, expected in ((torch.uint16, False), (torch.uint32, False), (torch.uint64, False), (torch.int16, True)):
    found = survives(dtype, by_pickle), survives(dtype, by_torch)
    print(f"{dtype}: pickle {found[0]}, torch.save {found[1]}")
    assert found == (expected, True)
PY
