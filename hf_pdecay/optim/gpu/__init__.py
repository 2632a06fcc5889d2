"""The step as Triton kernels, for GPUs."""
