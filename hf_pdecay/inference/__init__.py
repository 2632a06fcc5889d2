"""Faster inference with the zeros of a model."""
