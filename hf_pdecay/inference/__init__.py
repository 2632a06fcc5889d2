"""Inference that makes use of the zeros of a model."""

from .choice import Choice, to_dense_inference, to_sparse_inference
from .sparse_linear import SparseLinear


__all__ = ["Choice", "SparseLinear", "to_dense_inference", "to_sparse_inference"]
