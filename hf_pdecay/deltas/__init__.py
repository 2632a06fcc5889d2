"""Deltas: files of the weights in which a fine-tuned model differs from its base."""
