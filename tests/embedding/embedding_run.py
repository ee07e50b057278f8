"""Runs the command on the rows of `conftest`."""

import numpy as np

from unime_jax import embed

ROW = 1e-5  # cosine distance of a row on one device and on eight, alone and among others
COUNT = 40
FAULTS = ['{"image": "no.png", "id": "gone"}', "{", '{"text": " "}', '{"image": "cut.png"}']


def run(root, output, *flags, input=None):
    source = root / "pairs" / "items.jsonl" if input is None else input
    arguments = ["--model", root / "student", "--input", source, "--output", output, *flags]
    embed.main(["embed", *map(str, arguments)])


def distance(actual, expected) -> float:
    return float(np.abs(1 - (actual * expected).sum(axis=1)).max())
