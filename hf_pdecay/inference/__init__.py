"""Inference that makes use of the zeros of a model."""
