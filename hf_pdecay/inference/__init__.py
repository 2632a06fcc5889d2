"""Inference that makes use of the zeros of a model."""

from .choice import Choice, to_dense_inference, to_sparse_inference
from .semi_structured import SemiStructuredLinear
from .sparse_linear import SparseLinear


__all__ = ["Choice", "SemiStructuredLinear", "SparseLinear", "to_dense_inference", "to_sparse_inference"]
