"""Batches of fixed shape, as a function of the step alone.

A batch holds fixed numbers of rows of each stratum: a data set and a bin of text length. So every
step has the same shapes (one compile), any step can be made at any time by any thread, and
resuming needs nothing but the step.
"""

import collections
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from unime_jax.data import bad_rows, mixture, text_keys
from unime_jax.data.preprocess import Picture, Preprocessor, Row
from unime_jax.data.sources import Example, Source
from unime_jax.types import Batch, Inputs, UserError

SIDES = 3  # query, target, negative
_TRIES = 100  # rows to try in place of unreadable ones


@dataclasses.dataclass(frozen=True)
class Stratum:
    """Rows of one source whose texts have about the same length.

    Attributes:
      source: its number.
      members: rows of the source.
      tokens: padded length of query, target and negative; 0: a side that is not encoded.
    """

    source: int
    members: np.ndarray
    tokens: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One row of a batch.

    Attributes:
      sides: of query, target and negative: its shape (T, C) and what `Preprocessor.group` takes;
        None where a side is not encoded.
      texts: of the sides that are texts.
      target_id, negative_id: as in `Example`.
    """

    sides: list[tuple | None]
    texts: list[str]
    target_id: str
    negative_id: str


@dataclasses.dataclass(frozen=True)
class Info:
    """What a run should know of its batches.

    Attributes:
      strata: one line each: set, direction, rows, rows a batch, lengths.
      query_shapes, target_shapes, negative_shapes: (rows, T, C) of each group.
      rows: of all strata.
      padded_share: expected share of positions that are padding, 0 to 1.
      cut_texts: texts that are longer than max_tokens and lose their end.
      tokens: positions of a batch, padding excluded, on average.
    """

    strata: list[str]
    query_shapes: list[tuple[int, int, int]]
    target_shapes: list[tuple[int, int, int]]
    negative_shapes: list[tuple[int, int, int]]
    rows: int
    padded_share: float
    cut_texts: int
    tokens: float


class Batches:
    """Random access to batches; `batches[step]` is the same whoever asks, whenever.

    Args:
      data: sources; image-text pairs in both directions are two sources (`Pairs.directed`).
      preprocessor: of the backbone.
      batch_size: rows of a batch.
      seed: of the order of rows, augmentation and drawn texts.
      max_tokens: longest row, image features excluded; longer texts lose their end.
      bins: quantile bins of text length in each source, 1 to 4.
      weights: share of each source instead of its size.
      temperature: shares are proportional to size ** (1 / temperature).
      other_texts: probability of one of a row's other texts in place of its own.
      features: f16[images, variants, P, D] in place of decoding images and running the tower.
      augment: decode images with a random flip and crop (without `features`).
      vectors: texts -> f32[n, E]. Rows without images are encoded and get vectors for each of
        their texts (stage 1); of rows with images the query is encoded, and the vectors stand for
        the target's text (alignment).
      max_bad_share: share of unreadable rows at which `__getitem__` raises UserError.

    Attributes:
      info: see `Info`.
      bad: unreadable rows met so far; another row of the stratum took the place of each.
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
        weights: Sequence[int | float] | None = None,
        temperature: int | float = 1.0,
        other_texts: int | float = 0.0,
        features: np.ndarray | None = None,
        augment: bool = False,
        vectors: Callable[[list[str]], np.ndarray] | None = None,
        max_bad_share: int | float = 0.01,
    ):
        if not 1 <= bins <= 4:
            raise UserError(f"config.data.length_bins={bins}: 1 to 4")
        self._data = list(data)
        self._preprocessor = preprocessor
        self._seed = seed
        self._max_tokens = max_tokens
        self._other_texts = other_texts
        self._features = features
        self._augment = augment
        self._vectors = vectors
        self.bad = bad_rows.BadRows(sum(map(len, data)), max_bad_share)
        # Texts recur from epoch to epoch and in both directions.
        self._row = functools.lru_cache(maxsize=1 << 18)(self._tokenize)
        per_source = mixture.shares(
            [len(source) for source in data], batch_size, weights=weights, temperature=temperature
        )
        self._strata, counts = self._stratify(per_source, bins)
        sizes = [len(stratum.members) for stratum in self._strata]
        self._mixture = mixture.Mixture(sizes, batch_size, weights=counts, seed=seed)
        self.info = self._describe()

    def __getitem__(self, step: int) -> Batch:
        """Makes the batch of a step."""
        rows = [self._example(step, i, *row) for i, row in enumerate(self._mixture.rows(step))]
        groups = []
        for side in range(SIDES):
            found = [row.sides[side] for row in rows]
            groups.append(self._groups(found) if found[0] else ((), None))
        (query, query_order), (target, target_order), (negative, negative_order) = groups
        vectors = None
        if self._vectors is not None:
            columns = zip(*(row.texts for row in rows), strict=True)
            vectors = np.concatenate([self._vectors(list(column)) for column in columns])
        return Batch(
            query,
            target,
            query_order,
            target_order,
            None if vectors is None else vectors.astype(np.float32, copy=False),
            _ids([row.target_id for row in rows]),
            negative,
            negative_order,
            _ids([row.negative_id for row in rows]) if negative else None,
        )

    def dataset(self, steps: int):
        """Returns the first `steps` batches as a grain.MapDataset."""
        import grain

        return grain.MapDataset.range(steps).map(self.__getitem__)

    def iterate(self, first: int, steps: int, *, threads: int = 2, ahead: int = 4) -> Iterator:
        """Yields batches first..steps-1, made ahead of time by some threads."""
        import grain

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        return iter(self.dataset(steps)[first:].to_iter_dataset(options))

    # ---- one row

    def _tokenize(self, text: str | None, has_image: bool) -> Row:
        row = self._preprocessor.tokenize(text, has_image)
        positions = self._positions(has_image)
        return row.cut(self._max_tokens + positions, positions)

    def _positions(self, has_image: bool) -> int:
        return self._preprocessor.fixed_layout.positions if has_image else 0

    def _tiles(self, has_image: bool) -> int:
        return self._preprocessor.fixed_layout.tiles if has_image else 0

    def _example(self, step: int, place: int, stratum: int, member: int) -> Drawn:
        """Makes one row; an unreadable one gives way to the next of its stratum."""
        found = self._strata[stratum]
        for attempt in range(_TRIES):
            number = int(found.members[(member + attempt) % len(found.members)])
            example = self._data[found.source][number]
            rng = np.random.default_rng((self._seed, step, place))
            try:
                return self._draw(example, found, rng)
            except UserError as error:
                self.bad.add((found.source, number), str(error))
        raise UserError(f"{_TRIES} rows in a row are unreadable: {self.bad.problems()[-1]}")

    def _draw(self, example: Example, found: Stratum, rng: np.random.Generator) -> Drawn:
        example = self._with_other_text(example, found, rng)
        sides, texts = [], []
        for tokens, (text, image) in zip(found.tokens, _sides(example), strict=True):
            shape = tokens, self._tiles(image is not None)
            sides.append((shape, self._side(text, image, rng)) if tokens else None)
            if text is not None and image is None:
                texts.append(text)
        return Drawn(sides, texts, example.target_id, example.negative_id)

    def _with_other_text(self, example: Example, found: Stratum, rng) -> Example:
        """Draws another text of the row in place of its own, if one fits the stratum."""
        if not example.other_texts or rng.random() >= self._other_texts:
            return example
        on_target = example.target_text is not None
        fitting = example.other_texts
        if not (on_target and self._vectors):  # a vector has no length
            tokens = found.tokens[1] if on_target else found.tokens[0]
            fitting = [text for text in fitting if len(self._row(text, False).ids) <= tokens]
        if not fitting:
            return example
        text = fitting[rng.integers(len(fitting))]
        if not on_target:
            return dataclasses.replace(example, query_text=text)
        return dataclasses.replace(example, target_text=text, target_id=text_keys.compact_key(text))

    def _side(self, text, image, rng) -> tuple[Row, Picture | None]:
        row = self._row(text, image is not None)
        if image is None:
            return row, None
        if self._features is not None:
            variant = rng.integers(self._features.shape[1])
            features = np.asarray(self._features[image.number, variant])[None]
            return row, Picture(features, self._preprocessor.fixed_layout)
        try:
            return row, self._preprocessor.image(
                image.load(), augment=rng if self._augment else None
            )
        except UserError as error:
            raise UserError(f"{image.name}: {error}") from None

    def _groups(self, sides: list[tuple]) -> tuple[tuple[Inputs, ...], np.ndarray]:
        """Packs one side of a batch into groups, and says where each row went."""
        by_shape = collections.defaultdict(list)
        for place, (shape, _) in enumerate(sides):
            by_shape[shape].append(place)
        groups, placed = [], []
        for shape, places in sorted(by_shape.items()):
            rows = [sides[place][1] for place in places]
            groups.append(self._preprocessor.group(rows, tokens=shape[0], tiles=shape[1]))
            placed += places
        return tuple(groups), np.argsort(np.array(placed)).astype(np.int32)

    # ---- strata

    def _stratify(self, per_source: list[int], bins: int) -> tuple[list[Stratum], list[int]]:
        """Cuts the sources into strata; returns them and the rows a batch takes of each.

        All sources share the same bins, so that a batch has few shapes.
        """
        used = [number for number, count in enumerate(per_source) if count]
        self._lost = 0
        lengths = {
            number: np.array([self._measure(self._data[number][i]) for i in range(size)])
            for number in used
            if (size := len(self._data[number]))
        }
        edges = mixture.bin_edges(
            np.concatenate([lengths[number].sum(1) for number in used]),
            np.concatenate(
                [np.full(len(lengths[n]), per_source[n] / len(lengths[n])) for n in used]
            ),
            bins,
        )
        parts = []  # (source, bin, members, rows a batch)
        for number in used:
            total = lengths[number].sum(1)
            rows = np.argsort(total, kind="stable")
            where = np.searchsorted(edges, total[rows])
            members = mixture.fill_up(rows, where, len(edges), per_source[number])
            shares = mixture.shares(list(map(len, members)), per_source[number])
            parts += [(number, i, *row) for i, row in enumerate(zip(members, shares, strict=True))]
        parts = [part for part in parts if len(part[2])]
        longest = collections.defaultdict(int)  # (bin, side, has image) -> tokens
        for number, i, members, _ in parts:
            for side, image in enumerate(self._has_image(number)):
                key = (i, side, image)
                longest[key] = max(longest[key], int(lengths[number][members, side].max()))
        strata = []
        for number, i, members, _ in parts:
            sides = enumerate(self._has_image(number))
            padded = [
                -(-longest[i, side, image] // mixture.ROUND) * mixture.ROUND
                for side, image in sides
            ]
            strata.append(Stratum(number, members, tuple(padded)))
        self._lengths = [lengths[number][members] for number, _, members, _ in parts]
        return strata, [part[3] for part in parts]

    def _has_image(self, number: int) -> list[bool]:
        return [image is not None for _, image in _sides(self._data[number][0])]

    def _measure(self, example: Example) -> list[int]:
        """Returns the lengths of all sides in positions, after cutting; 0: not encoded."""
        lengths = []
        for side, (text, image) in enumerate(_sides(example)):
            replaced = side > 0 and self._vectors is not None and example.query_image is not None
            if replaced or (text is None and image is None):
                lengths.append(0)
                continue
            row = self._row(text, image is not None)
            self._lost += row.lost > 0
            lengths.append(row.length(self._positions(image is not None)))
        return lengths

    def _describe(self) -> Info:
        lines, shapes, real, padded = [], [collections.Counter() for _ in range(SIDES)], 0.0, 0
        for stratum, lengths, count in zip(
            self._strata, self._lengths, self._mixture.counts, strict=True
        ):
            source = self._data[stratum.source]
            images = self._has_image(stratum.source)
            for counter, tokens, image in zip(shapes, stratum.tokens, images, strict=True):
                if tokens:
                    counter[tokens, self._tiles(image)] += count
            real += count * lengths.mean(0).sum()
            padded += count * sum(stratum.tokens)
            direction = getattr(source, "direction", "text")
            known = " and ".join(str(tokens) for tokens in stratum.tokens if tokens)
            lines.append(
                f"{source.name} ({direction}): {len(stratum.members)} rows, {count} a batch, "
                f"length {known}"
            )
        found = [
            [(rows, tokens, tiles) for (tokens, tiles), rows in sorted(counter.items())]
            for counter in shapes
        ]
        rows = sum(len(stratum.members) for stratum in self._strata)
        return Info(lines, *found, rows, float(1 - real / padded), self._lost, float(real))


def _sides(example: Example) -> tuple[tuple, tuple, tuple]:
    """Returns text and image of query, target and negative."""
    return (
        (example.query_text, example.query_image),
        (example.target_text, example.target_image),
        (example.negative_text, None),
    )


def _ids(names: list[str]) -> np.ndarray:
    return np.array([zlib.crc32(name.encode()) & 0x7FFFFFFF for name in names], np.int32)
