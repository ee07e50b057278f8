"""Pieces of a step that are alike: one of a kind is compiled, the others follow from it.

The programs of two groups with as many tiles, both encoded at once or both chunk by chunk, differ
in sizes alone: the larger takes more memory, weights are gathered once a pass over the layers, and
embeddings once a row.
"""

import collections
import dataclasses
import re

from unime_jax.planning.collectives import Collective
from unime_jax.planning.pieces import Found, Piece


def kinds(pieces: list[Piece], devices: int) -> list[list[Piece]]:
    """Puts pieces together that are alike, the one that takes most memory first.

    Args:
      pieces: of a step.
      devices: that rows are split over.
    """
    found = collections.defaultdict(list)
    for piece in pieces:
        group = piece.group
        found[None if group is None else (group[2], piece.passes(devices) > 1)].append(piece)

    def size(piece: Piece) -> int:
        return _positions(piece, devices) if piece.group else 0

    alike = [sorted(kind, key=size, reverse=True) for kind in found.values()]
    return sorted(alike, key=lambda kind: size(kind[0]), reverse=True)


def _positions(piece: Piece, devices: int) -> int:
    """Counts the positions that a device encodes at a time."""
    return -(-piece.share(devices) // piece.passes(devices)) * piece.group[1]


def follow(found: Found, piece: Piece, devices: int) -> Found:
    """Returns what a piece takes, from what the largest of its kind takes.

    What it works with is said to be as much, which it is at most.
    """
    like, passes = found.piece, piece.passes(devices)
    chunked = passes > 1
    rows = piece.share(devices) / like.share(devices)
    # Chunks keep features, which go by the tile; all rows at once keep what goes by the position.
    kept = found.kept * rows * (1.0 if chunked else piece.group[1] / like.group[1])
    moved = []
    for one in found.compiled.moved:
        calls, size = one.calls, one.bytes
        if chunked and one.loop == like.passes(devices):
            calls = round(calls * passes / one.loop)
            size *= passes / one.loop
        elif _by_row(one, like, devices):
            size *= rows
        moved.append(dataclasses.replace(one, calls=calls, bytes=size))
    held = min(kept, found.compiled.beside)
    beside = found.compiled.beside if like.passes(devices) > 1 else held + found.work
    peak = found.compiled.arguments + beside
    compiled = dataclasses.replace(found.compiled, moved=moved, seconds=0.0, peak=peak)
    return dataclasses.replace(found, piece=piece, compiled=compiled, kept=kept, like=like)


def _by_row(moved: Collective, piece: Piece, devices: int) -> bool:
    """Says whether an array that devices exchange has the rows of a group on one of its axes."""
    share = piece.share(devices)
    sizes = {int(size) for size in re.findall(r"[\[,](\d+)(?=[\],])", moved.shape)}
    return moved.loop == 1 and bool(sizes & {share, share * devices})
