"""Quantises and dequantises weights with exact zeros, by one tool after the other; started by `zeros_survive.py`.

    python benchmarks/zeros_survive_cases.py GROUP

runs in an environment with the packages of the group and nothing of ours. Each line of its output is JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float32]
SHAPE = (256, 512)
SHARES = (0.5, 0.9)
DEAD_ROW, DEAD_BLOCK = 7, (slice(40, 41), slice(256, 512))


def sparse(share: float) -> Array:
    """A weight with exact zeros at random places, and a row and an aligned block of 256 that are wholly zero."""
    generator = np.random.default_rng(0)
    weight = generator.normal(0, 0.02, SHAPE).astype(np.float32)
    weight[generator.random(SHAPE) < share] = 0
    weight[DEAD_ROW], weight[DEAD_BLOCK] = 0, 0
    return weight


def counted(weight: Array, back: Array) -> dict[str, Any]:
    """What became of the zeros: the share that is kept, of the others that are new, and of dead rows and blocks."""
    zero = weight == 0
    dead = np.concatenate([back[DEAD_ROW], back[DEAD_BLOCK].reshape(-1)])
    return {
        "kept": float((back[zero] == 0).mean()),
        "new": float((back[~zero] == 0).mean()),
        "dead": "NaN" if np.isnan(dead).any() else "0" if not dead.any() else f"{np.abs(dead).max():.0e}",
    }


Case = Callable[[Array], Array]


def torch_cases() -> Iterator[tuple[str, str, Case]]:
    """Tools that quantise torch tensors and modules."""
    yield from _bitsandbytes()
    yield from _torchao()
    yield from _quanto()
    yield from _hqq()
    yield from _compressed_tensors()


def _in_layer(weight: Array) -> Any:
    """A model of one linear layer with a weight."""
    import torch
    from torch import nn

    module = nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    module.weight = nn.Parameter(torch.from_numpy(weight.copy()), requires_grad=False)
    return nn.Sequential(module)


def _bitsandbytes() -> Iterator[tuple[str, str, Case]]:
    import bitsandbytes.functional as bnb
    import torch

    def four(kind: str, compressed: bool) -> Case:
        def case(weight: Array) -> Array:
            given = torch.from_numpy(weight)
            found = bnb.quantize_4bit(given, quant_type=kind, compress_statistics=compressed)
            return np.array(bnb.dequantize_4bit(*found).float().numpy())

        return case

    for kind in ("nf4", "fp4"):
        yield "bitsandbytes", kind, four(kind, False)
        yield "bitsandbytes", f"{kind}, double quantisation", four(kind, True)

    def rows8(weight: Array) -> Array:
        codes, scales, _ = bnb.int8_vectorwise_quant(torch.from_numpy(weight).half())
        return np.array(bnb.int8_vectorwise_dequant(codes, scales).float().numpy())

    yield "bitsandbytes", "int8 rows (LLM.int8)", rows8

    def blocks8(weight: Array) -> Array:
        return np.array(bnb.dequantize_blockwise(*bnb.quantize_blockwise(torch.from_numpy(weight))).numpy())

    yield "bitsandbytes", "quantize_blockwise, 8 bits, on a CPU", blocks8


def _torchao() -> Iterator[tuple[str, str, Case]]:
    import torch
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    def ao(config: Any) -> Case:
        def case(weight: Array) -> Array:
            module = _in_layer(weight)
            quantize_(module, config)
            return np.array(module[0].weight.detach().dequantize().float().numpy())

        return case

    yield "torchao", "Int8WeightOnlyConfig", ao(Int8WeightOnlyConfig())
    for bits in (8, 4, 2):
        config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(32))
        yield "torchao", f"IntxWeightOnlyConfig, {bits} bits", ao(config)
    yield "torchao", "Float8WeightOnlyConfig", ao(Float8WeightOnlyConfig())
    yield "torchao", "NF4", lambda weight: to_nf4(torch.from_numpy(weight), 64, 256).get_original_weight().numpy()


def _quanto() -> Iterator[tuple[str, str, Case]]:
    from optimum import quanto

    def quantised(kind: Any) -> Case:
        def case(weight: Array) -> Array:
            module = _in_layer(weight)
            quanto.quantize(module, weights=kind)
            quanto.freeze(module)
            return np.array(module[0].weight.detach().dequantize().float().numpy())

        return case

    for name in ("qint8", "qint4", "qint2", "qfloat8"):
        yield "optimum-quanto", name, quantised(getattr(quanto, name))


def _hqq() -> Iterator[tuple[str, str, Case]]:
    import torch
    from hqq.core.quantize import Quantizer

    def half_quadratic(bits: int, axis: int) -> Case:
        def case(weight: Array) -> Array:
            options = {"nbits": bits, "group_size": 64, "axis": axis, "device": "cpu", "compute_dtype": torch.float32}
            found = Quantizer.quantize(torch.from_numpy(weight.copy()), **options)
            return np.array(Quantizer.dequantize(*found).float().numpy())

        return case

    for bits in (8, 4):
        yield "hqq", f"{bits} bits, axis 1", half_quadratic(bits, 1)
    yield "hqq", "4 bits, axis 0", half_quadratic(4, 0)


def _compressed_tensors() -> Iterator[tuple[str, str, Case]]:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    def packed(bits: int, symmetric: bool) -> Case:
        def case(weight: Array) -> Array:
            given = torch.from_numpy(weight)
            options = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 128}
            arguments = QuantizationArgs(**options)
            blocks = given.view(SHAPE[0], -1, 128)
            scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments)
            return np.array(fake_quantize(given, scale, zero, arguments).numpy())

        return case

    for bits in (8, 4):
        yield "compressed-tensors", f"int{bits}, symmetric (llm-compressor's QuantizationModifier)", packed(bits, True)
    yield "compressed-tensors", "int4, asymmetric", packed(4, False)


def gguf_cases() -> Iterator[tuple[str, str, Case]]:
    """llama.cpp's own quantisers, dequantised by gguf."""
    import xllamacpp
    from gguf import GGMLQuantizationType, quants

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def kind_of(name: str) -> Case:
        kind = GGMLQuantizationType[name]

        def case(weight: Array) -> Array:
            weight = np.ascontiguousarray(weight)
            codes = np.zeros(quants.quant_shape_to_byte_shape(weight.shape, kind), np.uint8)
            quantize(kind.value, weight.ctypes.data, codes.ctypes.data, 0, *weight.shape, None)
            return np.array(quants.dequantize(codes, kind))

        return case

    for name in ("Q8_0", "Q6_K", "Q5_0", "Q4_0", "Q3_K", "TQ2_0", "TQ1_0", "MXFP4"):
        yield "llama.cpp (GGUF)", name, kind_of(name)
    for name in ("Q5_K", "Q4_K", "Q5_1", "Q4_1", "Q2_K", "IQ4_NL", "IQ4_XS", "IQ3_S"):
        yield "llama.cpp (GGUF)", name, kind_of(name)


def mlx_cases() -> Iterator[tuple[str, str, Case]]:
    """Apple's mlx, on its CPU backend."""
    import mlx.core as mx

    def settings(mode: str, bits: int, group: int) -> Case:
        def case(weight: Array) -> Array:
            options = {"group_size": group, "bits": bits, "mode": mode}
            parts = mx.quantize(mx.array(weight), **options)
            return np.array(mx.dequantize(*parts, **options).astype(mx.float32))

        return case

    for bits in (8, 4, 2):
        yield "mlx", f"affine, {bits} bits", settings("affine", bits, 64)
    for mode, bits, group in (("mxfp8", 8, 32), ("mxfp4", 4, 32), ("nvfp4", 4, 16)):
        yield "mlx", mode, settings(mode, bits, group)


def onnx_cases() -> Iterator[tuple[str, str, Case]]:
    """ONNX Runtime's quantisers: the product of the identity and the quantised weight gives the weight."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    def graph(weight: Array) -> Any:
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, SHAPE[1]])]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, SHAPE[0]])]
        held = [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")]
        node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
        made = helper.make_graph([node], "layer", inputs, outputs, held)
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    def run(model: Any) -> Array:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return np.array(session.run(None, {"x": np.eye(SHAPE[1], dtype=np.float32)})[0].T)

    def dynamic(kind: Any) -> Case:
        def case(weight: Array) -> Array:
            with tempfile.TemporaryDirectory() as folder:
                onnx.save(graph(weight), f"{folder}/a.onnx")
                quantize_dynamic(f"{folder}/a.onnx", f"{folder}/b.onnx", weight_type=kind)
                return run(onnx.load(f"{folder}/b.onnx"))

        return case

    yield "onnxruntime", "quantize_dynamic, int8", dynamic(QuantType.QInt8)
    yield "onnxruntime", "quantize_dynamic, uint8", dynamic(QuantType.QUInt8)

    def products(config: Any) -> Case:
        def case(weight: Array) -> Array:
            quantizer = nbits.MatMulNBitsQuantizer(graph(weight), algo_config=config)
            quantizer.process()
            return run(quantizer.model.model)

        return case

    for bits in (8, 4):
        config = nbits.DefaultWeightOnlyQuantConfig(block_size=128, is_symmetric=True, bits=bits)
        yield "onnxruntime", f"MatMulNBits, {bits} bits", products(config)
    yield "onnxruntime", "MatMulNBits by HQQ, 4 bits", products(nbits.HQQWeightOnlyQuantConfig(block_size=128, bits=4))


def openvino_cases() -> Iterator[tuple[str, str, Case]]:
    """NNCF's compression of an OpenVINO model: the product of the identity and the weight gives the weight."""
    import nncf
    import openvino as ov
    from openvino import opset13 as ops

    def mode(name: str) -> Case:
        def case(weight: Array) -> Array:
            given = ops.parameter([-1, SHAPE[1]], np.float32)
            model = ov.Model([ops.matmul(given, ops.constant(weight), False, True)], [given])
            options: dict[str, Any] = {} if name.startswith("INT8") else {"group_size": 32, "all_layers": True}
            packed = nncf.compress_weights(model, mode=getattr(nncf.CompressWeightsMode, name), **options)
            compiled = ov.Core().compile_model(packed, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            return np.array(compiled([np.eye(SHAPE[1], dtype=np.float32)])[0].T)

        return case

    for name in ("INT8_SYM", "INT8_ASYM", "INT4_SYM", "INT4_ASYM", "NF4"):
        yield "nncf (OpenVINO)", name, mode(name)


def coreml_cases() -> Iterator[tuple[str, str, Case]]:
    """Core ML Tools' optimisers of a converted model, decompressed by the same package."""
    import coremltools as ct
    from coremltools.converters.mil import Builder
    from coremltools.optimize import coreml as cto

    def built(weight: Array) -> Any:
        @Builder.program(input_specs=[Builder.TensorSpec(shape=(1, SHAPE[1]))])
        def program(x: Any) -> Any:
            return Builder.linear(x=x, weight=weight, name="layer")

        target = ct.target.iOS18
        return ct.convert(program, minimum_deployment_target=target, compute_precision=ct.precision.FLOAT32)

    def back(model: Any) -> Array:
        plain = cto.decompress_weights(model)
        found = cto.get_weights_metadata(plain, weight_threshold=SHAPE[0])
        return np.array(next(entry.val for entry in found.values() if entry.val.shape == SHAPE), dtype=np.float32)

    def optimised(change: Callable[[Any, Any], Any], options: Any) -> Case:
        return lambda weight: back(change(built(weight), cto.OptimizationConfig(global_config=options)))

    for bits in (8, 4):
        options = cto.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype=f"int{bits}", granularity="per_block", block_size=32, weight_threshold=0
        )
        yield "coremltools", f"linear, {bits} bits", optimised(cto.linear_quantize_weights, options)
    palette = cto.OpPalettizerConfig(mode="kmeans", nbits=4, weight_threshold=0)
    yield "coremltools", "palette, 4 bits", optimised(cto.palettize_weights, palette)

    def pruned_first(weight: Array) -> Array:
        config = cto.OpThresholdPrunerConfig(threshold=1e-12, minimum_sparsity_percentile=0.1, weight_threshold=0)
        model = cto.prune_weights(built(weight), cto.OptimizationConfig(global_config=config))
        both = cto.OptimizationConfig(global_config=palette)
        return back(cto.palettize_weights(model, both, joint_compression=True))

    yield "coremltools", "pruned, then palette with joint_compression", pruned_first


def llmcompressor_cases() -> Iterator[tuple[str, str, Case]]:
    """llm-compressor's GPTQ of one layer whose inputs have a few strong directions, as in trained models."""
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(place): place for place in range(256)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")
    sizes: dict[str, Any] = {
        "hidden_size": SHAPE[1],
        "intermediate_size": SHAPE[0],
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
    }
    rows = np.random.default_rng(0).integers(0, 256, (32, 64)).tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 64] * 32})

    def case(weight: Array) -> Array:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256, max_position_embeddings=64))
        model.model.layers[0].mlp.up_proj.weight.data = torch.from_numpy(weight.copy())
        model.model.embed_tokens.weight.data = torch.randn(256, 8) @ torch.randn(8, SHAPE[1]) + 0.1 * torch.randn(
            256, SHAPE[1]
        )
        with tempfile.TemporaryDirectory() as folder:  # it asks for the folder of the model
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            model = LlamaForCausalLM.from_pretrained(folder)
            layer = model.model.layers[0].mlp.up_proj
            recipe = [GPTQModifier(targets=["re:.*up_proj"], scheme="W4A16", ignore=["lm_head"])]
            settings = {"max_seq_length": 64, "num_calibration_samples": 32, "pipeline": "basic"}
            oneshot(model=model, dataset=data, recipe=recipe, processor=tokenizer, **settings)
        scheme = layer.quantization_scheme.weights
        back = fake_quantize(layer.weight.data, layer.weight_scale, layer.weight_zero_point, scheme)
        return np.array(back.detach().float().numpy())

    yield "llmcompressor", "GPTQModifier, W4A16", case


GROUPS = {
    "torch": torch_cases,
    "gguf": gguf_cases,
    "mlx": mlx_cases,
    "onnx": onnx_cases,
    "openvino": openvino_cases,
    "coreml": coreml_cases,
    "llmcompressor": llmcompressor_cases,
}
PACKAGE = {"llama.cpp (GGUF)": "xllamacpp", "nncf (OpenVINO)": "nncf"}


def main() -> int:
    """Print a line of JSON for each case of a group; return the exit code."""
    stdout, sys.stdout = sys.stdout, sys.stderr  # what the tools print must not stand within the JSON
    sys.stdout.flush()
    for tool, kind, case in GROUPS[sys.argv[1]]():
        line: dict[str, Any] = {"tool": tool, "type": kind, "version": version(PACKAGE.get(tool, tool))}
        try:
            with contextlib.redirect_stdout(sys.stderr):
                weights = {share: sparse(share) for share in SHARES}
                line["shares"] = {str(share): counted(weight, case(weight)) for share, weight in weights.items()}
        except Exception as error:  # a tool may fail in any way, and the others must go on
            line["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        stdout.write(json.dumps(line) + "\n")
        stdout.flush()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
