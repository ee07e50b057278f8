"""Divides the making of batches among processes: each decodes the rows that its devices hold."""

import collections
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Container, Iterator
from typing import Any

import jax
import numpy as np

from unime_jax.data import bad_rows
from unime_jax.data.ahead import ahead_of_time
from unime_jax.data.pipeline import SIDES, Batches
from unime_jax.data.rows import Drawn
from unime_jax.types import Batch, UserError

NAMES = ("query", "target", "negative")
# An unreadable row: place in the batch, which attempt at it, (source, row), `bad_rows.told`.
_Fault = tuple[int, int, tuple[int, int], tuple[str, str]]


class SharedBatches:
    """Batches of which this process makes its own rows; together they are those of `Batches`.

    Groups hold the process's rows alone, in order, and are None where it has none; all else of a
    batch is whole. A row that any process cannot read gives way to the next one everywhere, as if
    one process made all.

    Args:
      batches: whole ones.
      own: rows of a group -> bool[rows], those that this process holds, one at least. Groups of one
        shape are one, whatever side they are of, the query's rows first (`chunks.merge`).
      exchange: text -> what every process gives, in their order; all processes call it alike.

    Attributes:
      sizes: rows, T and C of the groups of each side, of all processes together.
    """

    def __init__(
        self,
        batches: Batches,
        own: Callable[[int], np.ndarray],
        exchange: Callable[[str], list[str]],
    ):
        self._batches, self._exchange = batches, exchange
        shapes = batches.shapes()
        self.sizes: dict[str, list[tuple[int, int, int]]] = {}
        self._wanted: list[list[list[bool]]] = [[[] for _ in range(SIDES)] for _ in shapes]
        # Of every item that is made here: its group and its place among the group's rows here.
        self._spots: dict[tuple[int, int, int], tuple[int, int]] = {}
        items = [collections.defaultdict(list) for _ in NAMES]
        for place, sides in enumerate(shapes):
            for side in range(SIDES):
                for number, shape in enumerate(sides[side]):
                    items[side][shape].append((place, number))
        rows = sum(
            (collections.Counter({k: len(v) for k, v in one.items()}) for one in items),
            collections.Counter(),
        )
        left = {shape: own(count) for shape, count in rows.items()}
        for side, name in enumerate(NAMES):
            groups = sorted(items[side].items())
            self.sizes[name] = [(len(found), *shape) for shape, found in groups]
            for group, (shape, found) in enumerate(groups):
                mine, left[shape] = np.split(left[shape], [len(found)])
                here = (np.cumsum(mine) - 1).tolist()
                for spot, held, (place, number) in zip(here, mine.tolist(), found, strict=True):
                    self._spots[side, place, number] = group, spot
                    self._wanted[place][side].append(held)

    def __getstate__(self):
        """Leaves the way to other processes behind: workers make rows and ask nobody."""
        return {name: value for name, value in self.__dict__.items() if name != "_exchange"}

    def iterate(self, first: int, steps: int, **options) -> Iterator[Batch]:
        """Yields this process's part of batches first..steps-1; options as of `ahead_of_time`.

        Raises:
          UserError: in all processes alike, whoever met the reason.
        """
        made = ahead_of_time(self._begin, first, steps, **options)
        with contextlib.closing(made):
            for step, begun in enumerate(made, first):
                yield self._agree(step, *begun)

    def _begin(self, step: int) -> tuple[Batch | None, list[_Fault], str]:
        """Makes what this process can of a batch, and says what it could not read.

        What ends the run is told, not raised: the others wait for this process.
        """
        faults: list[_Fault] = []
        try:
            members = enumerate(self._batches.members(step))
            rows = [self._draw(step, place, row, faults) for place, row in members]
            return self._batches.pack(rows), faults, ""
        except UserError as error:
            return None, faults, str(error)

    def _draw(
        self,
        step: int,
        place: int,
        row: tuple[int, int],
        faults: list[_Fault],
        bad: Container[int] = (),
    ) -> Drawn:
        def fault(attempt: int, where: tuple[int, int], error: UserError) -> None:
            faults.append((place, attempt, where, bad_rows.told(error)))

        return self._batches.draw(step, place, *row, fault, wanted=self._wanted[place], bad=bad)

    def _agree(self, step: int, batch: Batch | None, faults: list[_Fault], end: str) -> Batch:
        """Replaces what any process cannot read, until nobody finds more."""
        known: dict[int, set[int]] = collections.defaultdict(set)  # place -> unreadable attempts
        while True:
            said = [json.loads(text) for text in self._exchange(json.dumps([faults, end]))]
            news = set()  # places
            for place, attempt, row, problem in sorted(one for found, _ in said for one in found):
                if attempt not in known[place]:  # processes that share a row all tell of it
                    known[place].add(attempt)
                    news.add(place)
                    self._batches.bad.add(tuple(row), *problem)
            for _, other in said:
                if other:
                    raise UserError(other)
            if not news:
                return batch
            faults, members = [], self._batches.members(step)
            try:
                for place in sorted(news):
                    row = self._draw(step, place, members[place], faults, known[place])
                    batch = self._put(batch, place, row)
            except UserError as error:
                end = str(error)

    def _put(self, batch: Batch, place: int, row: Drawn) -> Batch:
        """Returns the batch with another row at a place."""
        changes: dict[str, Any] = {name: list(getattr(batch, name)) for name in NAMES}
        for side, name in enumerate(NAMES):
            for number, (shape, encoded) in enumerate(row.sides[side]):
                if encoded is not None:
                    group, at = self._spots[side, place, number]
                    one = self._batches.group([encoded], shape)
                    changes[name][group] = jax.tree.map(
                        functools.partial(_with_row, at), changes[name][group], one
                    )
        changes = {name: tuple(groups) for name, groups in changes.items()}
        for name, values in self._batches.facts([row]).items():
            whole = getattr(batch, name)
            for number in range(0 if values is None else len(values)):
                # Vectors are those of all queries, then of all targets, and so on.
                whole = _with_row(number * len(self._wanted) + place, whole, values[number:])
            changes[name] = whole
        return dataclasses.replace(batch, **changes)


def _with_row(at: int, whole: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Returns an array with its row at a place replaced by the first of another."""
    whole = np.array(whole)
    whole[at] = row[0]
    return whole
