"""Benchmarks: `python -m benchmarks` for the table, `python -m benchmarks.NAME` for the others."""
