"""Training with few bits: weights are rounded to codes in each forward pass, and the run ends with a rounded model."""
