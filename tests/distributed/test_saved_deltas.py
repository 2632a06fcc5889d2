"""Deltas that runs on several processes write: what is unchanged is counted from the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_pdecay import decompress

from .layout_run import model
from .test_layouts import LAYOUTS, Layout, run_in


pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_target_holds_in_the_files(layout: Layout, tmp_path: Path) -> None:
    model(0).save_pretrained(tmp_path / "base")
    moved = model(0)
    with torch.no_grad():
        for param in moved.parameters():
            param += 0.01
    moved.save_pretrained(tmp_path / "moved")
    to_base = {"decay_to": "base", "target_sparsity": 0.9, "max_steps": 60}
    cases = [{"name": "out", "base": str(tmp_path / "base"), **to_base}]
    if not layout.name.startswith("ZeRO"):
        cases.append({"name": "from", "base": str(tmp_path / "moved"), "base_from": str(tmp_path / "base"), **to_base})
    run_in(tmp_path, layout, *cases)
    old = load_file(tmp_path / "base" / "model.safetensors")
    for case in cases:
        out = tmp_path / str(case["name"])
        new = load_file(out / "model.safetensors")
        same = sum(int((old[name] == new[name]).sum()) for name in new)
        total = sum(tensor.numel() for tensor in new.values())
        assert abs(same - 0.9 * total) <= 5e-4 * total
        decompress(out / "delta", tmp_path / f"plain_{out.name}")
        plain = load_file(tmp_path / f"plain_{out.name}" / "model.safetensors")
        assert all(torch.equal(plain[name], new[name]) for name in new)
