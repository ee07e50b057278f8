"""Benchmarks: what is embedded, and how it is scored."""
