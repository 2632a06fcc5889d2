"""Other engines for the same model, if they are installed; `inference.py` times them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


Call = Callable[[], Any]
# What an engine may raise for a model or a processor that it does not take.
_ERRORS = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, OSError)


def others(model: nn.Module, ids: Tensor, left_out: dict[str, str]) -> dict[str, tuple[Call, int]]:
    """Return a call for each of the other engines, and the bytes of its weights, 0 if not known.

    Args:
        model: Gives logits for token ids.
        ids: The token ids.
        left_out: Gets the names of the engines that cannot be used, with the reasons.
    """
    calls: dict[str, tuple[Call, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        exported, why = True, ""
        try:
            import onnxscript  # noqa: F401  which torch.onnx.export needs

            torch.onnx.export(model, (ids,), path, dynamo=True, verbose=False)
        except _ERRORS as error:
            exported, why = False, _first(error)
        for name, load in _OF_FILES.items():
            try:
                if not exported:
                    raise RuntimeError(why)
                calls[name] = load(path, ids), 0
            except _ERRORS as error:
                left_out[name] = _first(error)
    try:
        calls["torchao, int8 weight-only, compiled"] = _torchao(model, ids), 0
    except _ERRORS as error:
        left_out["torchao, int8 weight-only, compiled"] = _first(error)
    return calls


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _compiled(model: Any, ids: Tensor, precision: str) -> Call:
    import openvino as ov

    # The rate is for sparse weights. It works on 8-bit weights and processors with AMX, and is ignored elsewhere.
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.8,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.compile_model(model, "CPU", options)
    return lambda: compiled(ids.numpy())[0]


def _openvino(path: str, ids: Tensor) -> Call:
    import openvino as ov

    return _compiled(ov.convert_model(path), ids, "f32")


def _openvino_int8(path: str, ids: Tensor) -> Call:
    import nncf
    import openvino as ov

    return _compiled(nncf.compress_weights(ov.convert_model(path)), ids, "f32")


def _onnx(path: str, ids: Tensor) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # so that it does not disturb the others
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: ids.numpy()})[0]


def _onnx_int8(path: str, ids: Tensor) -> Call:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = str(Path(path).with_name("int8.onnx"))
    quantize_dynamic(path, target, weight_type=QuantType.QInt8, use_external_data_format=True)
    return _onnx(target, ids)


def _torchao(model: nn.Module, ids: Tensor) -> Call:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantized = copy.deepcopy(model).to(torch.bfloat16)  # torch's int8 kernels are for bfloat16 activations
    quantize_(quantized, Int8WeightOnlyConfig())
    torch._inductor.config.freezing = True
    compiled = torch.compile(quantized)
    compiled(ids)
    return lambda: compiled(ids)


# What reads an exported model.
_OF_FILES: dict[str, Callable[[str, Tensor], Call]] = {
    "OpenVINO, float32": _openvino,
    "OpenVINO, int8": _openvino_int8,
    "ONNX Runtime, float32": _onnx,
    "ONNX Runtime, int8": _onnx_int8,
}
