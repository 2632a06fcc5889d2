"""What a model is made of: which weights are matrices, and which of their rows and columns make a unit."""
