"""Benchmarks: python -m bench.kernels, python -m bench.end_to_end, python -m bench.big_model. bench/README.md
has results."""
