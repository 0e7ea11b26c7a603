"""Benchmarks, shipped with the package."""
