"""Prompts, preprocessing, sources, mixtures and the input pipeline (host side, numpy)."""
