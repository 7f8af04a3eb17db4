"""Benchmarks, each run on its own: python -m bench.all, python -m bench.end_to_end. README.md has results."""
