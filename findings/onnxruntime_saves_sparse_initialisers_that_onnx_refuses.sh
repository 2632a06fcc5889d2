#!/usr/bin/env bash
# onnxruntime 1.32.0: an optimised model with a sparse initialiser is saved with indices of 16 bits (more if the tensor
# is larger). onnx 1.23.2 demands 64 bits, so its checker refuses the file that onnxruntime wrote. Strict shape
# inference of onnx fails on the valid model too, because it does not know the shape of a sparse initialiser.
#
# Seen: saved indices INT16, checker refuses: True; strict shape inference of the valid model fails: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, checker, helper, shape_inference

generator = np.random.default_rng(0)
weight = generator.normal(size=(64, 64)).astype(np.float32)
weight[generator.random(weight.shape) < 0.95] = 0
places = np.flatnonzero(weight)
values = helper.make_tensor("W", TensorProto.FLOAT, [len(places)], weight.ravel()[places])
indices = helper.make_tensor("places", TensorProto.INT64, [len(places)], places.astype(np.int64))
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "W"], ["y"])],
    "product",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])],
    sparse_initializer=[helper.make_sparse_tensor(values, indices, [64, 64])],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
checker.check_model(model)
onnx.save(model, "valid.onnx")
options = onnxruntime.SessionOptions()
options.optimized_model_filepath = "saved.onnx"
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
session = onnxruntime.InferenceSession("valid.onnx", options, providers=["CPUExecutionProvider"])
x = generator.normal(size=(1, 64)).astype(np.float32)
assert np.abs(session.run(None, {"x": x})[0] - x @ weight).max() < 1e-4
saved = onnx.load("saved.onnx")
dtype = TensorProto.DataType.Name(saved.graph.sparse_initializer[0].indices.data_type)


def refuses(check) -> bool:
    try:
        check()
    except (checker.ValidationError, shape_inference.InferenceError):
        return True
    return False


refused = refuses(lambda: checker.check_model(saved))
strict = refuses(lambda: shape_inference.infer_shapes(model, strict_mode=True))
print(f"saved indices {dtype}, checker refuses: {refused}; strict shape inference of the valid model fails: {strict}")
assert dtype != "INT64" and refused and strict
PY
