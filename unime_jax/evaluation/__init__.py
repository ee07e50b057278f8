"""Measures models on benchmarks: embeds each item once, scores, reports."""
