"""One run by flag to 90% zeros and 4 bits, its compressed file, and the loss of what plain transformers loads of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_pdecay.cli.main import main
from hf_pdecay.storage.compressed_file import CompressedFile


ROOT = Path(__file__).resolve().parents[2]
EVALUATE = """
import sys
sys.path.insert(0, sys.argv[1])
import train_clm
trainer, *_ = train_clm.prepare(sys.argv[2:])
print("loss", repr(trainer.evaluate()["eval_loss"]))
"""


@pytest.mark.slow
def test_the_file_of_a_run_to_90_percent_zeros_and_4_bits(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))))
    shared = ["--train_file", str(text), "--max_eval_samples", "32", "--generate_tokens", "0", "--use_cpu", "true"]
    # The script's own model has other defaults than a model from a folder, and the loss depends on the batch size.
    shared += ["--block_size", "64", "--per_device_eval_batch_size", "32"]
    words = [*shared, "--weight_bits", "4", "--target_sparsity", "0.9", "--max_steps", "100", "--report_to", "none"]
    script = ROOT / "examples" / "train_clm.py"
    subprocess.run([sys.executable, str(script), *words, "--output_dir", str(tmp_path / "out")], check=True)
    printed = json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_loss"]
    for option, most in (("--zstd", 1.0), ("--no-zstd", 1.6)):
        small = tmp_path / option
        assert main(["compress", str(tmp_path / "out"), str(small), option]) == 0
        file = CompressedFile(small / "model.safetensors")
        heads = {name: file.head(name) for name in file.keys()}
        coded = {name: head for name, head in heads.items() if head is not None and head.codes is not None}
        assert len(coded) == 16  # all matrices of the blocks
        stored = sum(file.header.entries[name].size for name in coded)
        weights = sum(head.numel for head in coded.values())
        zeros = 1 - sum(head.values for head in coded.values()) / weights
        assert zeros == pytest.approx(0.9, abs=0.001)
        assert 8 * stored / weights <= most, option
        again = [*shared, "--model_name_or_path", str(small), "--output_dir", str(tmp_path / "x")]
        found = subprocess.run(
            [sys.executable, "-c", EVALUATE, str(script.parent), *again], check=True, capture_output=True, text=True
        )
        assert f"loss {printed!r}" in found.stdout.splitlines()
        print(f"{option}: {8 * stored / weights:.3f} bits for each weight")  # noqa: T201
