"""Sorts rows of any length into a few shapes, and prepares one group ahead of its reader."""

import bisect
import collections
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from unime_jax.types import Inputs, UserError

# Padded lengths: few, so that few shapes are compiled, and close enough that padding stays small.
LENGTHS = (
    *(16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256),
    *(320, 384, 448, 512, 640, 768, 896, 1024),
)
_STEP = 256  # of longer ones
_REMEMBERED = 1 << 16  # rows of past calls whose groups are known
_SORTS = threading.Lock()  # threads may share programs, which are copied and pickled without one
_AGAIN = 8  # a shape that was compiled before costs so many times less than a new one


@dataclasses.dataclass(frozen=True)
class Limits:
    """How large groups are.

    Attributes:
      rows, tokens, tiles: at most so many rows, positions and tiles in one group, for each device
        that shares it.
      devices: that the rows of a group are spread over.
      program: how many positions cost about as much as one more shape that must be compiled.
    """

    rows: int = 64
    tokens: int = 8192
    tiles: int = 64
    devices: int = 1
    program: int = 8192

    def full(self, tokens: int, tiles: int) -> int:
        """Returns how many rows of one shape make a full group."""
        limit = max(1, min(self.rows, self.tokens // tokens, self.tiles // max(tiles, 1)))
        # Groups are padded to `padded`, so a full one should need no padding.
        return self.devices << (limit.bit_length() - 1)

    def padded(self, rows: int) -> int:
        """Returns how many rows a group is padded to: the same power of two on every device."""
        return self.devices << (-(-rows // self.devices) - 1).bit_length()


LIMITS = Limits()


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


class Sorter:
    """Sorts rows of any length into groups of few shapes, one row after the other.

    A full group has the shape of its rows, unless padding its rows to a longer shape is cheaper
    than another program: until that has cost an eighth of what a program does, it takes one that is
    known, or the next power of two, which serves other lengths as well.

    Args:
      limits: of the groups.
      longest: no row is padded to more positions; None: to as many as it takes.
      programs: those there are; the groups' are added. None: there are none.
    """

    def __init__(
        self,
        limits: Limits = LIMITS,
        longest: int | None = None,
        programs: "Programs | None" = None,
    ):
        self._limits, self._longest = limits, longest
        self._waiting: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
        self._programs = Programs(limits.program) if programs is None else programs

    def add(self, shape: tuple[int, int], member: int) -> Bucket | None:
        """Takes a row of a shape (T, C); returns its group, if that is full now."""
        self._waiting[shape].append(member)
        full = len(self._waiting[shape]) == self._limits.full(*shape)
        return self._leave(shape) if full else None

    def largest(self) -> Bucket:
        """Lets the largest group go, though it is not full."""
        return self._leave(max(self._waiting, key=lambda shape: len(self._waiting[shape])))

    def rest(self) -> list[Bucket]:
        """Lets all go that are waiting, in few groups: short rows may go with longer ones."""
        left, self._waiting = self._waiting, collections.defaultdict(list)
        return gather(left, self._limits, self._programs)

    def _leave(self, shape: tuple[int, int]) -> Bucket:
        tokens, tiles = shape
        members = self._waiting.pop(shape)
        rows = self._limits.padded(len(members))
        power = 1 << (tokens - 1).bit_length()
        if self._longest is not None:
            power = min(power, self._longest)
        there = self._programs.fitting(tokens, tiles, rows)
        longer = [] if there is None else [there]
        if power >= tokens and self._limits.full(power, tiles) >= rows:
            longer.append(power)
        found = min(longer, default=tokens)
        if (found - tokens) * rows > self._programs.allowance(tokens, tiles):
            found = tokens
        self._programs.use(found, tiles, rows, [tokens] * rows)
        return Bucket(found, tiles, tuple(members))


Call = tuple[int, tuple[tuple[int, int], ...]]  # the rows' contents, hashed; their shapes (T, C)


class Programs:
    """Knows which shapes (T, C, padded rows) there are programs for, and what their lack has cost.

    What rows of a shape were padded by pays for the next program of their own: few calls of many
    rows, and many calls of few, come to about as little padding.

    Attributes:
      cost: of one more, in positions.
    """

    def __init__(self, cost: int, known: Iterable[tuple[int, int, int]] = ()):
        self.cost = cost
        self._calls: dict[Call, list[Bucket]] = {}
        self._rows = 0  # of all these calls
        self._lengths: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
        # Positions that rows of a shape (T, C) were padded by.
        self._padding: collections.Counter[tuple[int, int]] = collections.Counter()
        for tokens, tiles, rows in known:
            self.use(tokens, tiles, rows, [])

    def use(self, tokens: int, tiles: int, rows: int, lengths: Iterable[int]) -> None:
        """Notes that rows of some lengths are read by a program, which there is from then on."""
        there = self._lengths[tiles, rows]
        if tokens not in there:
            bisect.insort(there, tokens)
            self._padding[tokens, tiles] = 0
        for length in lengths:
            self._padding[length, tiles] += tokens - length

    def allowance(self, tokens: int, tiles: int) -> int:
        """Returns by how many positions rows may still be padded to save a program of their own."""
        return self.cost // _AGAIN - self._padding[tokens, tiles]

    def fitting(self, tokens: int, tiles: int, rows: int) -> int | None:
        """Returns the least length of at least so many tokens that there is a program for."""
        lengths = self._lengths[tiles, rows]
        place = bisect.bisect_left(lengths, tokens)
        return lengths[place] if place < len(lengths) else None

    def remembered(self, call: "Call") -> list[Bucket] | None:
        """Returns the groups that the same rows got before, whatever was spent meanwhile."""
        return self._calls.get(call)

    def remember(self, call: "Call", groups: list[Bucket]) -> None:
        """Keeps the groups of a new call's rows; the oldest calls are forgotten, this one never."""
        self._calls[call] = groups
        self._rows += len(call[1])
        while self._rows > _REMEMBERED and len(self._calls) > 1:
            oldest = next(iter(self._calls))
            del self._calls[oldest]
            self._rows -= len(oldest[1])

    def best(self, tokens: int, tiles: int, rows: int) -> tuple[int, int]:
        """Returns what a group costs at least, and its length then."""
        price = max(0, self.cost - self._padding[tokens, tiles])
        own = tokens * rows + price, tokens
        there = self.fitting(tokens, tiles, rows)
        return own if there is None else min(own, (there * rows, there))


def sort(
    shapes: Sequence[tuple[int, int]],
    limits: Limits = LIMITS,
    longest: int | None = None,
    programs: Programs | None = None,
    content: int = 0,
) -> list[Bucket]:
    """Puts rows of equal shape together, then what is left of each shape; short ones first.

    Args:
      shapes: (T, C) of each row, in any order.
      limits, longest, programs: see `Sorter`.
      content: tells rows of the same shapes apart. The same rows in the same order get the same
        groups again, unless many others came between; in another order, groups of the same shapes.
    """
    programs = Programs(limits.program) if programs is None else programs
    order = sorted(range(len(shapes)), key=shapes.__getitem__)
    ordered = tuple(shapes[place] for place in order)
    with _SORTS:
        found = programs.remembered((content, ordered))
        if found is None:
            sorter = Sorter(limits, longest, programs)
            full = [sorter.add(shape, place) for place, shape in enumerate(ordered)]
            found = [*filter(None, full), *sorter.rest()]
            found.sort(key=lambda bucket: (bucket.tokens, bucket.tiles))
            programs.remember((content, ordered), found)
    return [
        dataclasses.replace(bucket, members=tuple(order[place] for place in bucket.members))
        for bucket in found
    ]


def gather(
    left: dict[tuple[int, int], list[int]], limits: Limits, programs: Programs
) -> list[Bucket]:
    """Puts rows that fill no group into few groups: short ones may go with longer ones.

    Args:
      left: the rows of each shape (T, C).
      limits: of the groups.
      programs: of the groups before; those of these are added.
    """
    buckets, used = [], []
    for tiles in sorted({tiles for _, tiles in left}):
        rows = [
            (tokens, member)
            for (tokens, other), members in sorted(left.items())
            if other == tiles
            for member in members
        ]
        stop = len(rows)
        for start in reversed(_cuts([tokens for tokens, _ in rows], tiles, limits, programs)):
            members = tuple(member for _, member in rows[start:stop])
            _, tokens = programs.best(rows[stop - 1][0], tiles, limits.padded(len(members)))
            buckets.append(Bucket(tokens, tiles, members))
            used.append(
                (tokens, tiles, limits.padded(len(members)), [n for n, _ in rows[start:stop]])
            )
            stop = start
    for use in used:  # after all are cut: what one of them spends would move the cuts of others
        programs.use(*use)
    return buckets


def _cuts(lengths: list[int], tiles: int, limits: Limits, programs: Programs) -> list[int]:
    """Returns where groups begin that cost least, of rows that are sorted by length.

    A group costs its positions, padding included, and what its program costs unless it is known.
    """
    cost_of = functools.cache(lambda tokens, rows: programs.best(tokens, tiles, rows)[0])
    # Of the first i rows: the least cost, and where the last of their groups begins.
    best, begins = [0], [0]
    for stop, tokens in enumerate(lengths, 1):
        costs = [
            (best[start] + cost_of(tokens, limits.padded(stop - start)), start)
            for start in range(max(0, stop - limits.full(tokens, tiles)), stop)
        ]
        cost, start = min(costs)
        best.append(cost)
        begins.append(start)
    cuts, stop = [], len(lengths)
    while stop:
        stop = begins[stop]
        cuts.append(stop)
    return cuts[::-1]


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
