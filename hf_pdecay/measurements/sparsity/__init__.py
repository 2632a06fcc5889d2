"""The `sparsity` module of `evaluate`; load it with `hf_pdecay.measurements.load_measurement`."""
