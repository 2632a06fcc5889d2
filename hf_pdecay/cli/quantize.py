"""``hf-pdecay quantize``: rounds the weights of a trained model to few bits, and keeps every zero."""

from __future__ import annotations

import argparse

from .command import add_calibration, add_folders, given_calibration, show


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Rounds the matrices of a trained model to codes of few bits times the scale of a block, without training. "
        "Every zero stays exactly zero. OUT is an ordinary model in the dtype of MODEL, which loads anywhere; or it "
        "holds the codes as another runtime reads them."
    )
    add_folders(parser)
    parser.add_argument("--bits", type=float, default=4, help="width of the codes: 8 to 2, or 1.58 for -1, 0 and 1 (4)")
    parser.add_argument(
        "--block", type=int, metavar="INPUTS", help="consecutive inputs that share a scale (128, and 32 in gguf)"
    )
    parser.add_argument(
        "--format",
        default="plain",
        help="plain: an ordinary model, in the dtype of MODEL (the default); with 8 or 4 bits also pack-quantized: for "
        "compressed-tensors in transformers, and vLLM; torchao: for torchao in transformers; gguf: Q8_0 or Q4_0, for "
        "llama.cpp",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="text like that of the model's use, .txt or .jsonl, maybe .gz: quantises by GPTQ, which spreads the error "
        "over the weights that are not zero; without it weights are rounded to nearest",
    )
    add_calibration(parser)


def run(options: argparse.Namespace) -> int:
    """Quantise a model and print what was quantised."""
    from ..one_shot.folder import quantize_folder

    report = quantize_folder(
        *(options.model, options.out, options.data),
        bits=options.bits,
        block=options.block,
        format=options.format,
        **given_calibration(options),
    )
    return show(report, options)
