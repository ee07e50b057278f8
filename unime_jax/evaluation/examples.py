"""Picks what a report shows of single queries: sheets, failures, the cosines of 50 pairs."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from unime_jax import report
from unime_jax.benchmarks import caption_retrieval, mmeb
from unime_jax.data import pictures
from unime_jax.data.eval_items import Items, shown
from unime_jax.evaluation.encode import Encoder
from unime_jax.types import UserError

PAIRS = 50  # as UniME, Fig. 4
_PER_SET = 4  # examples and failures of a set that are kept
_LONG = 90  # letters that fit below a picture


@dataclasses.dataclass(frozen=True)
class Example:
    """A query and its nearest candidates, by number of the item.

    Attributes:
      name: of the set.
      query: the item that looks.
      right: the item that it should find.
      right_cosine: of it.
      rank: of it, from 0.
      top: the nearest ones.
      cosines: theirs.
      top_right: whether they are right.
      margin: how much nearer the right one is than the nearest wrong one.
    """

    name: str
    query: int
    right: int
    right_cosine: float
    rank: int
    top: tuple[int, ...]
    cosines: tuple[float, ...]
    top_right: tuple[bool, ...]
    margin: float


class Gallery:
    """Collects examples while sets are scored.

    Attributes:
      examples: evenly spread over a set's queries.
      failures: those whose right candidate is farthest behind.
      pairs: cosines of matching pairs, f32[N, N], by name of the set.
    """

    def __init__(self, items: Items):
        self._items = items
        self.examples: list[Example] = []
        self.failures: list[Example] = []
        self.pairs: dict[str, np.ndarray] = {}

    def take(self, name: str, answered: Sequence[Example], encoder: Encoder) -> None:
        """Keeps what may be shown of a set.

        Args:
          name: of the set.
          answered: all its queries, in order.
          encoder: of the vectors.
        """
        if not answered:
            return
        self.examples += [answered[i] for i in _spread(len(answered), _PER_SET)]
        lost = sorted((each for each in answered if each.rank > 0), key=lambda each: each.margin)
        self.failures += lost[:_PER_SET]
        couples = {each.right: each.query for each in answered}
        if len(couples) > 1:
            rights = np.array(list(couples), np.int64)[_spread(len(couples), PAIRS)]
            queries = np.array([couples[int(i)] for i in rights], np.int64)
            self.pairs[name] = encoder.vectors(queries) @ encoder.vectors(rights).T

    def sheet(self, chosen: Sequence[Example]) -> list[report.SheetRow]:
        """Reads the images of some examples and returns what `report.plot_sheet` draws."""
        rows = []
        for each in chosen:
            shown_cells = zip(each.top, each.cosines, each.top_right, strict=True)
            cells = [
                self._cell(number, cosine, right=right) for number, cosine, right in shown_cells
            ]
            missed = not any(each.top_right)
            if missed:
                cells.append(self._cell(each.right, each.right_cosine, right=True))
            query = _shortened(self._cell(each.query))
            rows.append(report.SheetRow(each.name, query, cells, each.rank, missed))
        return rows

    def _cell(self, number: int, cosine: float | None = None, *, right: bool = False):
        item = self._items[number]
        image = None
        if item.image is not None:
            try:
                content = pictures.load_rgb(item.image.load(), at_least=256)
                content.thumbnail((512, 512))
                image = np.asarray(content)
            except UserError:  # was readable a moment ago
                image = np.full((8, 8, 3), 255, np.uint8)
        return report.SheetCell(shown(item), image, cosine, right)


def _shortened(query: report.SheetCell) -> report.SheetCell:
    """Drops the task from a long query: what it asks stands behind a colon."""
    task, colon, asked = query.text.partition(": ")
    if len(query.text) < _LONG or not colon or len(task.split()) < 4:
        return query
    return dataclasses.replace(query, text=f"… {asked}")


def _spread(count: int, wanted: int) -> np.ndarray:
    """Returns up to `wanted` of `count` places, evenly spread."""
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(int))


def of_mmeb(name: str, task: mmeb.Task, outcome: mmeb.Outcome) -> list[Example]:
    """Returns the answers of one of MMEB's sets by number of the item."""
    found = []
    for answer in outcome.answers:
        candidates = task.candidates[answer.query]
        found.append(
            Example(
                name,
                int(task.queries[answer.query]),
                int(candidates[0]),
                answer.right,
                answer.rank,
                tuple(int(candidates[place]) for place in answer.top),
                answer.cosines,
                tuple(place == 0 for place in answer.top),
                answer.margin,
            )
        )
    return found


def of_captions(name: str, outcome: caption_retrieval.Outcome) -> list[Example]:
    """Returns the answers in one direction."""
    return [
        Example(
            name,
            answer.query,
            answer.right,
            answer.right_cosine,
            answer.rank,
            answer.top,
            answer.cosines,
            answer.top_right,
            answer.margin,
        )
        for answer in outcome.answers
    ]


def hardest(failures: Sequence[Example], count: int) -> list[Example]:
    """Returns the failures that are farthest behind, at most two of a set."""
    taken: dict[str, int] = {}
    chosen = []
    for each in sorted(failures, key=lambda failure: failure.margin):
        if taken.get(each.name, 0) < 2 and len(chosen) < count:
            taken[each.name] = taken.get(each.name, 0) + 1
            chosen.append(each)
    return chosen
