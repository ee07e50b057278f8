"""What a run should know of its batches before it starts."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unime_jax.data import prompts
from unime_jax.data.sources import ImageRef, Source, sides_of
from unime_jax.data.strata import Stratum

SIDES = ("query", "target", "negatives")


@dataclasses.dataclass(frozen=True)
class Info:
    """What a run should know of its batches.

    Attributes:
      strata: a line for each source: set, direction, rows, rows a batch, lengths of each side.
      query_shapes, target_shapes, negative_shapes: (rows, T, C) of each group.
      sets: names of the data sets, as `Batch.sets` numbers them.
      rows: of all strata.
      padded_share: expected share of positions that are padding, 0 to 1.
      one_shape_share: what it would be if all rows of all sides had one shape.
      cut_texts, texts: how many are longer than max_tokens and lose their end, and how many are.
      unused: names of sources that give no row to a batch, for they are too small for it.
      tokens: positions of a batch, padding excluded, on average.
    """

    strata: list[str]
    query_shapes: list[tuple[int, int, int]]
    target_shapes: list[tuple[int, int, int]]
    negative_shapes: list[tuple[int, int, int]]
    sets: tuple[str, ...]
    rows: int
    padded_share: float
    one_shape_share: float
    cut_texts: int
    texts: int
    unused: list[str]
    tokens: float


@dataclasses.dataclass
class _Line:
    """Adds up the strata of a source."""

    rows: int = 0
    count: int = 0
    lengths: tuple[set[int], ...] = dataclasses.field(default_factory=lambda: (set(), set(), set()))

    def text(self, source: Source) -> str:
        known = [sorted(own) for own in self.lengths if any(own)]
        lengths = " and ".join("/".join(map(str, own)) for own in known)
        return (
            f"{source.name} ({getattr(source, 'direction', 'text')}): {self.rows} rows, "
            f"{self.count} a batch, length {lengths}"
        )


def describe(
    data: Sequence[Source],
    strata: Sequence[Stratum],
    counts: Sequence[int],
    *,
    tiles: Callable[[bool], int],
    lost: int,
    unused: list[str],
) -> Info:
    """Adds up what batches are made of.

    Args:
      data: the sources.
      strata: of them.
      counts: rows of a batch from each stratum.
      tiles: whether a side has an image -> C of its group.
      lost: texts that are cut.
      unused: names of sources without rows in a batch.
    """
    lines, shapes = {}, [collections.Counter() for _ in range(3)]
    real, padded, rows, positions, texts = 0.0, 0, 0, 0, 0
    for stratum, count in zip(strata, counts, strict=True):
        source = data[stratum.source]
        sides = sides_of(source[int(stratum.members[0])])
        tokens = np.array(stratum.tokens)
        number = np.array([len(side) for side in sides]) * (tokens > 0)
        for counter, side, padded_to in zip(shapes, sides, stratum.tokens, strict=True):
            if padded_to:
                counter[padded_to, tiles(side[0].image is not None)] += count * len(side)
        real += count * float((stratum.lengths.mean(0) * number).sum())
        padded += count * int((tokens * number).sum())
        positions += count * int(number.sum())
        rows += len(stratum.members)
        texts += len(stratum.members) * int(number.sum())
        line = lines.setdefault(stratum.source, _Line())
        line.rows += len(stratum.members)
        line.count += count
        for own, length in zip(line.lengths, stratum.tokens, strict=True):
            own.add(length)
    found = [[(number, *shape) for shape, number in sorted(counter.items())] for counter in shapes]
    longest = max(max(stratum.tokens) for stratum in strata)
    return Info(
        [line.text(data[number]) for number, line in lines.items()],
        *found,
        sets=tuple(dict.fromkeys(source.name for source in data)),
        rows=rows,
        padded_share=1 - real / padded,
        one_shape_share=1 - real / (positions * longest),
        cut_texts=lost,
        texts=texts,
        unused=unused,
        tokens=real,
    )


def name_row(
    source: Source, number: int, name_image: Callable[[ImageRef], str] = lambda image: image.name
) -> dict[str, Any]:
    """Returns what finds a row again: data set, number in it, texts and names of images."""
    named: dict[str, Any] = {"set": source.name, "row": number}
    for name, items in zip(SIDES, sides_of(source[number]), strict=True):
        for item in items:
            text, image = item.text, item.image
            if isinstance(text, prompts.Slotted):
                text = f"{text.before}<image>{text.after}"
            entry = {"text": text, "image": None if image is None else name_image(image)}
            entry = {key: value for key, value in entry.items() if value is not None}
            if name == "negatives":
                named.setdefault(name, []).append(entry)
            else:
                named[name] = entry
    return named
