"""Smaller models: dead neurons, attention heads and ranks are removed from the weights."""
