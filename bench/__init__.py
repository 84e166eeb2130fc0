"""Benchmarks: one table of cases, read by tests and by `python -m orthonorm bench`."""
