"""The quality benchmark: `python benchmarks/quality --help`."""
