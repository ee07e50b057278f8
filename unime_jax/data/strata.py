"""Divides sources into strata: rows of one source whose sides have about the same lengths.

Each side of a row is put into one of a few length bins, chosen so that padding is least; rows with
equal bins on all sides are a stratum, which gives a fixed number of rows to every batch. All
sources share the bins of a side, and all sides may, so that a batch has few shapes.
"""

import collections
import contextlib
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int32

from unime_jax.data import mixture
from unime_jax.data.sources import Example, Source


@dataclasses.dataclass(frozen=True)
class Stratum:
    """Rows of one source that are padded alike.

    Attributes:
      source: its number.
      members: rows of the source.
      tokens: padded length of query, target and negatives; 0: a side that is not encoded.
      lengths: real ones of the members' sides.
    """

    source: int
    members: np.ndarray
    tokens: tuple[int, int, int]
    lengths: Int32[np.ndarray, "N 3"]


def measure(
    source: Source,
    lengths_of: Callable[[Example], Sequence[int]],
    *,
    cache: pathlib.Path | None = None,
    key: str = "",
    progress: Callable[[int], None] = lambda rows: None,
) -> Int32[np.ndarray, "N M"]:
    """Applies `lengths_of` to every row of a source.

    Args:
      source: rows.
      lengths_of: a row -> a few numbers.
      cache: directory where results are kept, if it can be written; used for sources with a
        `fingerprint`.
      key: what else the result depends on.
      progress: called with the number of rows just measured.
    """
    path = None
    if cache is not None and (mark := getattr(source, "fingerprint", "")):
        path = cache / f"{hashlib.sha256(f'{mark} {key}'.encode()).hexdigest()[:24]}.npy"
        known = _load(path, len(source))
        if known is not None:
            progress(len(source))
            return known
    found = []
    for start in range(0, len(source), 1024):
        numbers = range(start, min(start + 1024, len(source)))
        read = getattr(source, "__getitems__", None)
        examples = read(numbers) if read else [source[i] for i in numbers]
        found += [lengths_of(example) for example in examples]
        progress(len(numbers))
    lengths = np.array(found, np.int32)
    if path is not None:
        _keep(path, lengths)
    return lengths


def _load(path: pathlib.Path, rows: int) -> np.ndarray | None:
    """Reads kept lengths; None where there are none, or the file is damaged."""
    try:
        found = np.load(path, allow_pickle=False)
    except Exception:  # numpy parses headers with Python's own tokenizer
        return None
    good = isinstance(found, np.ndarray) and found.dtype == np.int32 and found.ndim == 2
    return found if good and len(found) == rows else None


def _keep(path: pathlib.Path, lengths: np.ndarray) -> None:
    part = path.with_suffix(f".{os.getpid()}.part.npy")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(part, lengths)
        part.replace(path)
    except OSError:  # no place to keep them: the next run measures anew
        with contextlib.suppress(OSError):
            part.unlink()


def divide(
    lengths: dict[int, np.ndarray],
    has_image: dict[int, Sequence[bool]],
    per_source: Sequence[int],
    bins: int,
    *,
    joint: bool = True,
) -> tuple[list[Stratum], list[int]]:
    """Divides sources into strata.

    Args:
      lengths: of each source in use, by number: int[N, sides], 0 for a side that is not encoded.
      has_image: of each source, whether its sides have images: they never share a bin with texts.
      per_source: rows that a batch takes of each source.
      bins: most bins of a side, for texts and for images each.
      joint: the bins of all sides are the same: groups of either side have the same few shapes.

    Returns:
      The strata, and the rows that a batch takes of each, at least 1.
    """
    sides = next(iter(lengths.values())).shape[1]

    kinds = {}  # (source, side) -> of rows that share bins
    for number, measured in lengths.items():
        for side in range(sides):
            shared = joint and measured[:, side].any()  # what is not encoded has a bin of its own
            kinds[number, side] = -1 if shared else side, bool(has_image[number][side])

    sharing = collections.defaultdict(list)  # kind -> lengths, and how often a batch has each
    for number, measured in lengths.items():
        often = np.full(len(measured), per_source[number] / len(measured))
        for side in range(sides):
            sharing[kinds[number, side]].append((measured[:, side], often))
    edges = {}
    for key, found in sharing.items():
        rows, often = (np.concatenate(column) for column in zip(*found, strict=True))
        edges[key] = mixture.bin_edges(rows, often, bins)
    found, counts = [], []  # (source, members, bin of each side)
    for number, measured in lengths.items():
        own = [edges[kinds[number, side]] for side in range(sides)]
        least = -(-len(measured) // per_source[number])
        cells = _cells(np.arange(len(measured)), measured, own, least)
        found += [(number, members, places) for members, places in cells]
        counts += mixture.shares([len(members) for members, _ in cells], per_source[number])
    longest = collections.defaultdict(int)
    for number, members, places in found:
        for side, place in enumerate(places):
            key = kinds[number, side], place
            longest[key] = max(longest[key], int(lengths[number][members, side].max()))
    strata = []
    for number, members, places in found:
        tokens = tuple(
            -(-longest[kinds[number, side], place] // mixture.ROUND) * mixture.ROUND
            for side, place in enumerate(places)
        )
        strata.append(Stratum(number, members, tokens, lengths[number][members]))
    return strata, counts


def _cells(
    rows: np.ndarray, lengths: np.ndarray, edges: list[np.ndarray], least: int, side: int = 0
) -> list[tuple[np.ndarray, tuple[int, ...]]]:
    """Splits rows by the bin of one side, each part by the next side, `least` rows a cell."""
    if side == len(edges):
        return [(np.sort(rows), ())]
    rows = rows[np.argsort(lengths[rows, side], kind="stable")]
    where = np.searchsorted(edges[side], lengths[rows, side])
    parts = mixture.fill_up(rows, where, len(edges[side]), max(1, len(rows) // least))
    return [
        (members, (place, *more))
        for place, part in enumerate(parts)
        if len(part)
        for members, more in _cells(part, lengths, edges, least, side + 1)
    ]
