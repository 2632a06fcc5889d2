"""How a run reaches the sparsity that was asked for."""
