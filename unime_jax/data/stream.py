"""Groups of rows that come one after the other, without end and with faults among them."""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from unime_jax.data import buckets, pictures, prompts
from unime_jax.data.preprocess import Preprocessor
from unime_jax.data.rows import Picture, Row
from unime_jax.data.tiles import Layout
from unime_jax.types import Inputs, UserError

# Rows that wait until enough of their shape are together, and the encoded images they may hold.
WAITING_ROWS = 4096
WAITING_BYTES = 256 * 2**20
_CHUNK = 64  # rows whose images' headers are read together


@dataclasses.dataclass(frozen=True)
class Item:
    """A row to be embedded.

    Attributes:
      key: comes back with the row's vector, or with its fault.
      text: None for an image alone.
      image: None, encoded bytes, a path or a PIL image.
    """

    key: Hashable
    text: str | prompts.Slotted | None = None
    image: Any = None


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """A row whose shape is known; its text is dropped, its image is not decoded."""

    item: Item
    row: Row
    layout: Layout | None


class Stream:
    """Sorts an endless row of items into full groups, as `buckets.sort` does a list.

    Full groups leave at once; the others wait for more rows of their shape, at most WAITING_ROWS
    in all, so that memory does not grow with the input. Iterating yields (inputs, keys).

    Args:
      model: prepares the rows.
      items: in any number.
      instruction: put before every text.
      bad: called with the key of a row that cannot be embedded, and with the reason.

    Attributes:
      positions, real: of the groups so far, padding and padded rows included, and without.
    """

    def __init__(
        self,
        model: Preprocessor,
        items: Iterable[Item],
        *,
        instruction: str | None,
        bad: Callable[[Hashable, str], None],
    ):
        self._model, self._items = model, iter(items)
        self._instruction, self._bad = instruction, bad
        self._waiting: dict[int, _Waiting] = {}
        self.positions = self.real = 0

    @property
    def padded_share(self) -> float:
        """Of all positions, 0 to 1."""
        return 1 - self.real / self.positions if self.positions else 0.0

    def __iter__(self) -> Iterator[tuple[Inputs, list[Hashable]]]:
        with ThreadPoolExecutor() as pool:
            found = buckets.prepared(self._buckets(pool), self._prepare, self._pack, bad=self._fail)
            for inputs, members in found:
                rows = self._model.limits.padded(inputs.rows)
                self.positions += rows * inputs.tokens.shape[1]
                self.real += int(inputs.lengths.sum())
                yield inputs, [self._waiting.pop(member).item.key for member in members]

    def _buckets(self, pool: ThreadPoolExecutor) -> Iterator[buckets.Bucket]:
        """Yields full buckets as they come, the others where there is no room, and at the end."""
        sorter = buckets.Sorter(self._model.limits, self._model.longest, self._model.programs)
        count = size = 0  # of the rows that wait, and the bytes that they hold
        for number, found in enumerate(self._measured(pool)):
            self._waiting[number] = found
            count, size = count + 1, size + _held(found.item)
            bucket = sorter.add(self._model.shape_of(found.row, found.layout), number)
            while bucket or count > WAITING_ROWS or size > WAITING_BYTES:
                bucket = bucket or sorter.largest()
                count -= len(bucket.members)
                size -= sum(_held(self._waiting[member].item) for member in bucket.members)
                yield bucket
                bucket = None
        yield from sorter.rest()

    def _measured(self, pool: ThreadPoolExecutor) -> Iterator[_Waiting]:
        """Tokenises the items and reads their images' sizes, a few items at a time."""

        def measure(item: Item) -> _Waiting | str:
            try:
                layout = None
                if item.image is not None:
                    layout = self._model.layout(*pictures.size_of(item.image))
                row = self._model.tokenize(
                    item.text, layout is not None, self._instruction, layout=layout
                )
                self._model.shape_of(row, layout)
            except UserError as error:
                return str(error)
            return _Waiting(dataclasses.replace(item, text=None), row, layout)

        while chunk := list(itertools.islice(self._items, _CHUNK)):
            for item, found in zip(chunk, pool.map(measure, chunk), strict=True):
                if isinstance(found, str):
                    self._bad(item.key, found)
                else:
                    yield found

    def _prepare(self, member: int) -> Picture:
        return self._model.image(self._waiting[member].item.image)

    def _pack(self, bucket: buckets.Bucket, pictures: list[Picture | None]) -> Inputs:
        rows = [self._waiting[member].row for member in bucket.members]
        return self._model.group(
            list(zip(rows, pictures, strict=True)), tokens=bucket.tokens, tiles=bucket.tiles
        )

    def _fail(self, member: int, reason: str) -> None:
        self._bad(self._waiting.pop(member).item.key, reason)


def _held(item: Item) -> int:
    return len(item.image) if isinstance(item.image, bytes) else 0
