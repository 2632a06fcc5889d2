"""``hf-pdecay estimate``: the memory and communication that training a model needs."""

from __future__ import annotations

import argparse

from .command import add_config, add_json, add_max_steps, show


def register(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Bytes per parameter and per GPU for weights, gradients, moments and master weights under each "
        "layout, and what hf_pdecay adds in memory and communication. Weights are not loaded."
    )
    add_config(parser, nargs="?")
    parser.add_argument("--parameters", type=float, metavar="N", help="number of parameters in place of a model: 8e9")
    parser.add_argument("--layout", default="all", help="single, ddp, fsdp2, zero2, zero3 or all (all)")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (8); single takes one")
    parser.add_argument("--mixed_precision", default="bf16", help="as in the accelerate config: bf16 or no (bf16)")
    parser.add_argument("--dtype", default="float32", help="of the weights as loaded: float32 or bfloat16 (float32)")
    parser.add_argument("--moments", help="float32, bfloat16 or 8bit; by default the dtype of the weights stepped")
    add_max_steps(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the estimate."""
    from .model_size import from_parameters, from_pretrained
    from .training_estimate import Setup, estimate

    if (options.model is None) == (options.parameters is None):
        raise ValueError("Name a folder with config.json, or give --parameters N, such as 8e9: one of the two.")
    setup = Setup(options.gpus, options.mixed_precision, options.dtype, options.moments, options.max_steps)
    size = from_pretrained(options.model) if options.parameters is None else from_parameters(options.parameters)
    return show(estimate(size, setup, options.layout), options)
