"""Sorts rows of any length into a few shapes, and prepares one group ahead of its reader."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from unime_jax.types import Inputs, UserError

# Padded lengths: few, so that few shapes are compiled, and close enough that padding stays small.
LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
_STEP = 256  # of longer ones
# At most so many rows, positions and tiles in one group, for each device that shares it.
_ROWS, _TOKENS, _TILES = 64, 8192, 64


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Rows that will be one group.

    Attributes:
      tokens, tiles: T and C.
      members: the rows' numbers.
    """

    tokens: int
    tiles: int
    members: tuple[int, ...]


def padded_length(length: int, limit: int) -> int:
    """Returns the padded length of a row; `limit` is the longest that the model reads."""
    fitting = next((size for size in LENGTHS if size >= length), -(-length // _STEP) * _STEP)
    return min(fitting, limit)


def padded_rows(rows: int, devices: int = 1) -> int:
    """Returns how many rows a group is padded to: the same power of two on every device."""
    return devices << (-(-rows // devices) - 1).bit_length()


def full_rows(tokens: int, tiles: int, devices: int = 1) -> int:
    """Returns how many rows of one shape make a full group."""
    limit = max(1, min(_ROWS, _TOKENS // tokens, _TILES // max(tiles, 1)))
    # Groups are padded to `padded_rows`, so a full one should need no padding.
    return devices << (limit.bit_length() - 1)


def sort(shapes: Sequence[tuple[int, int]], devices: int = 1) -> list[Bucket]:
    """Puts rows of equal shape together, short ones first.

    Args:
      shapes: (T, C) of each row.
      devices: that a group's rows are spread over.
    """
    places = collections.defaultdict(list)
    for place, shape in enumerate(shapes):
        places[shape].append(place)
    buckets = []
    for (tokens, tiles), members in sorted(places.items()):
        rows = full_rows(tokens, tiles, devices)
        for start in range(0, len(members), rows):
            buckets.append(Bucket(tokens, tiles, tuple(members[start : start + rows])))
    return buckets


class Groups:
    """Groups of rows, made while they are read: at most two of them are in memory.

    Iterating yields (inputs, places of their rows). Images of the next group are prepared by
    threads while this one is used.

    Args:
      buckets: what the groups are made of.
      prepare: the image of a row, by its number; called from threads.
      pack: (bucket, prepared images) -> inputs.
      tokens: real positions of all rows.

    Attributes:
      rows: of all groups.
      padded_share: of all positions, 0 to 1.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        prepare: Callable[[int], Any],
        pack: Callable[[Bucket, list[Any]], Inputs],
        *,
        tokens: int,
    ):
        self._buckets, self._prepare, self._pack = buckets, prepare, pack
        self.rows = sum(len(bucket.members) for bucket in buckets)
        padded = sum(len(bucket.members) * bucket.tokens for bucket in buckets)
        self.padded_share = 1 - tokens / padded if padded else 0.0

    def __len__(self) -> int:
        return len(self._buckets)

    def __iter__(self) -> Iterator[tuple[Inputs, np.ndarray]]:
        for inputs, members in prepared(self._buckets, self._prepare, self._pack):
            yield inputs, np.array(members)


def prepared(
    buckets: Iterable[Bucket],
    prepare: Callable[[int], Any],
    pack: Callable[[Bucket, list[Any]], Inputs],
    *,
    bad: Callable[[int, str], None] | None = None,
) -> Iterator[tuple[Inputs, list[int]]]:
    """Yields each bucket as a group, with its rows; the next one's images are prepared meanwhile.

    Args:
      buckets: read one ahead.
      prepare, pack: see `Groups`.
      bad: called with a row whose image cannot be prepared and with the reason, and the group goes
        on without it; None: the fault is raised.
    """
    pool = ThreadPoolExecutor()
    try:
        started = map(lambda bucket: (bucket, _start(pool, bucket, prepare)), buckets)
        ahead = collections.deque(itertools.islice(started, 1))
        while ahead:
            ahead.extend(itertools.islice(started, 1))
            bucket, futures = ahead.popleft()
            images, members = [], []
            for member, future in zip(bucket.members, futures, strict=True):
                try:
                    images.append(future and future.result())
                    members.append(member)
                except UserError as error:
                    if bad is None:
                        raise
                    bad(member, str(error))
            if members:
                yield pack(dataclasses.replace(bucket, members=tuple(members)), images), members
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(pool: ThreadPoolExecutor, bucket: Bucket, prepare) -> list[Future | None]:
    if not bucket.tiles:
        return [None] * len(bucket.members)
    return [pool.submit(prepare, row) for row in bucket.members]
