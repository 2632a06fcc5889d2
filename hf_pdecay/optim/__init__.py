"""Optimizers with weight decay for any p norm. Nothing here knows of transformers."""
