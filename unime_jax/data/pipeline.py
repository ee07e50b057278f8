"""Batches of fixed shape, as a function of the step alone.

A batch holds fixed numbers of rows of each stratum: a data set and a bin of text length. So every
step has the same shapes (one compile), any step can be made at any time by any thread, and
resuming needs nothing but the step.
"""

import collections
import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Container, Iterator, Sequence

import numpy as np

from unime_jax.config_values import LENGTH_BINS
from unime_jax.data import bad_rows, batch_info, encoding, mixture, strata, text_keys
from unime_jax.data.ahead import ahead_of_time
from unime_jax.data.preprocess import Preprocessor
from unime_jax.data.rows import Drawn, Fault, Wanted
from unime_jax.data.sources import Example, Source, sides_of
from unime_jax.types import Batch, Inputs, UserError

SIDES = 3  # query, target, negatives
_FILE = -1  # the number of no source
_TRIES = 100  # rows to try in place of unreadable ones


class Batches:
    """Random access to batches; `batches[step]` is the same whoever asks, whenever.

    Args:
      data: sources; image-text pairs in both directions are two sources (`Pairs.directed`).
      preprocessor: of the backbone.
      batch_size: rows of a batch.
      seed: of the order of rows, augmentation and drawn texts.
      max_tokens: longest row, image features excluded; longer texts lose their end.
      bins: most length bins, for texts and for images each, 1 to 8.
      joint: all sides share their bins; else each has its own.
      weights: share of each source instead of its size.
      temperature: shares are proportional to size ** (1 / temperature).
      block: rows of a set come in multiples of it, at least one block of each set; 0: any number.
      other_texts: probability of one of a row's other texts in place of its own.
      features: f16[images, variants, P, D] in place of decoding images and running the tower.
      augment: decode images with a random flip and crop (without `features`).
      vectors: texts -> f32[n, E]. Rows without images are encoded and get vectors for each of
        their texts (stage 1); of rows with images the query is encoded, and the vectors stand for
        the target's text (alignment).
      max_bad_share: share of unreadable rows at which `__getitem__` raises UserError.
      faults: of rows that the sources left out when their files were read.
      cache: directory where the lengths of large sources are kept.
      progress: called with the number of rows just measured.

    Attributes:
      info: see `Info`.
      bad: unreadable rows met so far; another row of the stratum took the place of each.
      members: step -> stratum and member of every row of its batch.
    """

    def __init__(
        self,
        data: Sequence[Source],
        preprocessor: Preprocessor,
        *,
        batch_size: int,
        seed: int = 0,
        max_tokens: int = 64,
        bins: int = 1,
        joint: bool = True,
        weights: Sequence[int | float] | None = None,
        temperature: int | float = 1.0,
        block: int = 0,
        other_texts: int | float = 0.0,
        features: np.ndarray | None = None,
        augment: bool = False,
        vectors: Callable[[list[str]], np.ndarray] | None = None,
        max_bad_share: int | float = 0.01,
        faults: Sequence[str] = (),
        cache: pathlib.Path | None = None,
        progress: Callable[[int], None] = lambda rows: None,
    ):
        if not 1 <= bins <= LENGTH_BINS:
            raise UserError(f"config.data.length_bins={bins}: must be from 1 to {LENGTH_BINS}")
        self._data = list(data)
        self._preprocessor = preprocessor
        self._encoder = encoding.ItemEncoder(
            preprocessor, max_tokens=max_tokens, features=features, augment=augment
        )
        self._seed = seed
        self._other_texts = other_texts
        self._vectors = vectors
        self.bad = bad_rows.BadRows(sum(map(len, data)) + len(faults), max_bad_share)
        self.bad.add_all({(_FILE, n): (fault, "malformed") for n, fault in enumerate(faults)})
        names = [source.name for source in data]
        self._sets = {name: number for number, name in enumerate(dict.fromkeys(names))}
        per_source = mixture.shares(
            [len(source) for source in data],
            batch_size,
            weights=weights,
            temperature=temperature,
            block=block,
        )
        measured = {
            number: strata.measure(
                data[number],
                self._measure,
                cache=cache,
                key=f"{preprocessor.fingerprint} {max_tokens}",
                progress=progress,
            )
            for number, count in enumerate(per_source)
            if count
        }
        lengths = {number: found[:, :SIDES] for number, found in measured.items()}
        images = {number: self._has_image(number) for number in measured}
        self._strata, counts = strata.divide(lengths, images, per_source, bins, joint=joint)
        sizes = [len(stratum.members) for stratum in self._strata]
        self._mixture = mixture.Mixture(sizes, batch_size, weights=counts, seed=seed)
        self.members = self._mixture.rows
        lost = sum(int(found[:, SIDES].sum()) for found in measured.values())
        self.info = batch_info.describe(
            self._data,
            self._strata,
            self._mixture.counts,
            tiles=self._encoder.tiles,
            lost=lost,
            unused=[n for n, count in zip(names, per_source, strict=True) if not count],
        )

    def __getitem__(self, step: int) -> Batch:
        """Makes the batch of a step."""
        return self._with_problems(step)[0]

    def pack(self, rows: list[Drawn]) -> Batch:
        """Makes a batch of its rows, in order; items that nobody encoded are in no group."""
        groups = []
        for side in range(SIDES):
            found = [item for row in rows for item in row.sides[side]]
            groups.append(self._groups(found) if found else ((), None))
        (query, query_order), (target, target_order), (negative, negative_order) = groups
        return Batch(
            query,
            target,
            query_order,
            target_order,
            negative=negative,
            negative_order=negative_order,
            **self.facts(rows),
        )

    def facts(self, rows: list[Drawn]) -> dict[str, np.ndarray | None]:
        """Returns what a batch says of its rows beside their groups."""
        vectors = None
        if self._vectors is not None:
            columns = zip(*(row.texts for row in rows), strict=True)
            vectors = np.concatenate([self._vectors(list(column)) for column in columns])
        scores = [row.scores for row in rows]
        negatives = [row.negative_id for row in rows]
        named = negatives[0] and rows[0].sides[2]
        return {
            "vectors": None if vectors is None else vectors.astype(np.float32, copy=False),
            "target_ids": text_keys.numbers([row.target_id for row in rows]),
            "negative_ids": text_keys.numbers(negatives) if named else None,
            "scores": np.array(scores, np.float32) if scores[0] else None,
            "sets": np.array([row.set for row in rows], np.int32),
        }

    def rows_of(self, step: int) -> list[dict]:
        """Names the rows of a batch in order, those that took the place of known bad ones."""
        bad = {row for row, _ in self.bad.items()}
        named = []
        for stratum, member in self.members(step):
            source, members = self._strata[stratum].source, self._strata[stratum].members
            numbers = (int(members[(member + i) % len(members)]) for i in range(_TRIES))
            number = next(number for number in numbers if (source, number) not in bad)
            named.append(batch_info.name_row(self._data[source], number))
        return named

    def _with_problems(self, step: int) -> tuple[Batch, list]:
        """Returns a batch, and the bad rows that it met, each with its problem and kind."""
        met = {}

        def fault(attempt: int, row: tuple[int, int], error: UserError) -> None:
            del attempt
            met[row] = bad_rows.told(error)
            self.bad.add(row, *met[row])

        rows = enumerate(self.members(step))
        batch = self.pack([self.draw(step, place, *row, fault) for place, row in rows])
        return batch, list(met.items())

    def iterate(self, first: int, steps: int, **options) -> Iterator[Batch]:
        """Yields batches first..steps-1, made ahead of time; options as of `ahead_of_time`."""
        with contextlib.closing(
            ahead_of_time(self._with_problems, first, steps, **options)
        ) as made:
            for batch, problems in made:
                for row, problem in problems:
                    self.bad.add(tuple(row), *problem)
                yield batch

    def shapes(self) -> list[list[list[tuple[int, int]]]]:
        """Returns (T, C) of every item by place, then by side; all batches have the same."""
        found = []
        for stratum, count in zip(self._strata, self._mixture.counts, strict=True):
            sides = sides_of(self._data[stratum.source][int(stratum.members[0])])
            shapes = [
                [(tokens, self._encoder.tiles(item.image is not None)) for item in items if tokens]
                for tokens, items in zip(stratum.tokens, sides, strict=True)
            ]
            found += [shapes] * count
        return found

    # ---- one row

    def draw(
        self,
        step: int,
        place: int,
        stratum: int,
        member: int,
        fault: Fault,
        *,
        wanted: Wanted | None = None,
        bad: Container[int] = (),
    ) -> Drawn:
        """Makes one row of a batch; an unreadable one gives way to the next of its stratum.

        Args:
          step, place: of the batch, and of the row in it.
          stratum, member: which row stands there, as `members` says.
          fault: called with every unreadable row: attempt, (source, row), error.
          wanted: items to encode, by side; None: all of them.
          bad: attempts that are known to be unreadable.

        Raises:
          UserError: too many of them, or what `fault` raises.
        """
        found, problem = self._strata[stratum], ""
        for attempt in range(_TRIES):
            if attempt in bad:
                continue
            number = int(found.members[(member + attempt) % len(found.members)])
            example = self._data[found.source][number]
            rng = np.random.default_rng((self._seed, step, place))
            try:
                return self._draw(example, found, rng, wanted)
            except UserError as error:
                problem = str(error)
                fault(attempt, (found.source, number), error)
        raise UserError(f"{_TRIES} rows in a row are unreadable: {problem}")

    def _draw(
        self,
        example: Example,
        found: strata.Stratum,
        rng: np.random.Generator,
        wanted: Wanted | None,
    ) -> Drawn:
        example = self._with_other_text(example, found, rng)
        sides, texts, target_id = [], [], example.target_id
        given = sides_of(example)
        for side, (tokens, items) in enumerate(zip(found.tokens, given, strict=True)):
            made = []
            for number, item in enumerate(items if tokens else ()):
                needs_id = side == 1 and not target_id
                if wanted is None or wanted[side][number]:
                    encoded, content = self._encoder.encode(item.text, item.image, rng)
                else:
                    behind = (*items[number + 1 :], *sum(given[side + 1 :], ()))
                    encoded, content = None, self._encoder.skip(item, rng, needs_id, behind)
                made.append(((tokens, self._encoder.tiles(item.image is not None)), encoded))
                if needs_id:
                    target_id = text_keys.content_id(item.text, content)
            sides.append(made)
            texts += [item.text for item in items if item.image is None and item.text is not None]
        return Drawn(
            tuple(sides),
            texts,
            target_id,
            example.negative_id,
            example.scores,
            self._sets[self._data[found.source].name],
        )

    def _with_other_text(self, example: Example, found: strata.Stratum, rng) -> Example:
        """Draws another text of the row in place of its own, if one fits the stratum."""
        if not example.other_texts or rng.random() >= self._other_texts:
            return example
        on_target = example.target_text is not None
        fitting = example.other_texts
        if not (on_target and self._vectors):  # a vector has no length
            tokens = found.tokens[1] if on_target else found.tokens[0]
            lengths = [len(self._encoder.row(text, False).ids) for text in fitting]
            fitting = [text for text, n in zip(fitting, lengths, strict=True) if n <= tokens]
        if not fitting:
            return example
        text = fitting[rng.integers(len(fitting))]
        if not on_target:
            return dataclasses.replace(example, query_text=text)
        return dataclasses.replace(example, target_text=text, target_id=text_keys.compact_key(text))

    def _groups(self, sides: list[tuple]) -> tuple[tuple[Inputs | None, ...], np.ndarray]:
        """Packs one side of a batch into groups, and says where each row went."""
        by_shape = collections.defaultdict(list)
        for place, (shape, _) in enumerate(sides):
            by_shape[shape].append(place)
        groups, placed = [], []
        for shape, places in sorted(by_shape.items()):
            rows = [sides[place][1] for place in places if sides[place][1] is not None]
            groups.append(self.group(rows, shape) if rows else None)  # all are of other processes
            placed += places
        return tuple(groups), np.argsort(np.array(placed)).astype(np.int32)

    def group(self, rows: list[encoding.Encoded], shape: tuple[int, int]) -> Inputs:
        """Packs rows of one shape (T, C)."""
        return self._preprocessor.group(rows, tokens=shape[0], tiles=shape[1])

    # ---- lengths

    def _has_image(self, number: int) -> list[bool]:
        return [
            bool(side) and side[0].image is not None for side in sides_of(self._data[number][0])
        ]

    def _measure(self, example: Example) -> list[int]:
        """Returns the lengths of all sides in positions, after cutting, and how many were cut.

        A side that is not encoded has 0, several negatives the length of the longest.
        """
        lengths, lost = [], 0
        for side, items in enumerate(sides_of(example)):
            replaced = side > 0 and self._vectors is not None and example.query_image is not None
            longest = 0
            for item in () if replaced else items:
                row = self._encoder.row(item.text, item.image is not None)
                lost += row.lost > 0
                longest = max(longest, row.length(self._encoder.positions(item.image is not None)))
            lengths.append(longest)
        return [*lengths, lost]
