"""Turns texts and images into rows of fixed shape, on the host."""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float16, Float32, UInt8

from unime_jax.data import pictures, prompts, tokenizer
from unime_jax.types import ImageSpec, Inputs, UserError

IMAGE_SLOT = -1
# Padded lengths of `bucket`: few, so that few shapes are compiled, and close enough that
# padding stays below a third.
LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_ROWS = 64
_ROW_TOKENS = 8192  # at most so many positions in one group of `bucket`

Tiles = UInt8[np.ndarray, "C S S 3"]
Features = Float16[np.ndarray, "C P D"] | Float32[np.ndarray, "C P D"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A tokenised prompt.

    Attributes:
      ids: token ids; `IMAGE_SLOT` once where the image belongs.
      start, stop: the user's text is ids[start:stop], the only part that may be cut.
      lost: tokens that were cut off already.
      skip: tokens at the front that a mean over tokens leaves out.
    """

    ids: tuple[int, ...]
    start: int
    stop: int
    lost: int = 0
    skip: int = 0

    @property
    def has_image(self) -> bool:
        return IMAGE_SLOT in self.ids

    def length(self, features: int) -> int:
        """Counts positions when an image takes `features` of them."""
        return len(self.ids) + (features - 1 if self.has_image else 0)

    def cut(self, limit: int, features: int) -> "Row":
        """Cuts the end of the user's text until the row has at most `limit` positions.

        Raises:
          UserError: prompt and image alone are longer.
        """
        extra = self.length(features) - limit
        if extra <= 0:
            return self
        if extra > self.stop - self.start:
            rest = self.length(features) - (self.stop - self.start)
            raise UserError(
                f"a row of {rest} tokens without its text does not fit into {limit}: "
                "raise the length (max_tokens)"
            )
        stop = self.stop - extra
        ids = self.ids[:stop] + self.ids[self.stop :]
        return Row(ids, self.start, stop, self.lost + extra, self.skip)


class Preprocessor:
    """Tokenizer, prompt and image transform of one backbone.

    Attributes:
      image_token_id: marks the image's place in rows given to `embed_rows`.
      image_spec: how images are prepared; None for a model that takes none.
      max_tokens: longest row, image features included.
    """

    image_token_id = IMAGE_SLOT

    def __init__(
        self,
        directory: str | pathlib.Path,
        image_spec: ImageSpec | None,
        *,
        prompt: str,
        max_tokens: int,
    ):
        self.image_spec = image_spec
        self.prompt = prompt
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer.Tokenizer(directory)

    @property
    def features(self) -> int:
        """Is the number of positions an image takes in a row."""
        return 0 if self.image_spec is None else self.image_spec.features

    def tokenize(self, text: str | None, has_image: bool, instruction: str | None = None) -> Row:
        """Tokenises a row's prompt; what looks like a special token in the text stays text."""
        if has_image and self.image_spec is None:
            raise UserError("this model takes no images: its image_spec is None")
        segments = prompts.render(self.prompt, text and text.strip(), has_image, instruction)
        ids, start, stop = self._tokenizer.encode(segments, IMAGE_SLOT)
        # Counted apart from the text, as the published code of NV-Embed counts it.
        skipped = prompts.skipped(self.prompt, instruction)
        skip = self._tokenizer.count(skipped) if skipped else 0
        return Row(tuple(ids), start, stop, skip=skip).cut(self.max_tokens, self.features)

    def image(self, source: Any, *, augment: np.random.Generator | None = None) -> Tiles:
        """Prepares an image: a PIL image, encoded bytes or a path.

        Args:
          source: the image; transparency becomes white, EXIF rotation is applied.
          augment: draws a horizontal flip and a crop of 70 to 100 % of the area, if given.

        Raises:
          UserError: not readable, or more than 100 MP.
        """
        if self.image_spec is None:
            raise UserError("this model takes no images: its image_spec is None")
        if self.image_spec.kind != "grid":
            raise UserError(f"unknown kind of image_spec: {self.image_spec.kind!r}")
        size = self.image_spec.size
        image = pictures.load_rgb(source, at_least=size)
        return pictures.square(image, size, augment)[None]

    def group(
        self,
        rows: Sequence[tuple[Row, Tiles | Features | None]],
        *,
        tokens: int,
        tiles: int,
    ) -> Inputs:
        """Packs rows into one group.

        Args:
          rows: tokenised rows, each with its image's tiles or its vision features, or None.
          tokens: T; longer texts are cut, prompt and image never.
          tiles: C, the same for all rows; 0 for text.

        Raises:
          UserError: a row that does not fit into T without its text, or has another C.
        """
        features = self.features if tiles else 0
        out_tokens = np.zeros((len(rows), tokens), np.int32)
        out_index = np.full((len(rows), tokens), -1, np.int32)
        lengths = np.zeros(len(rows), np.int32)
        for i, (row, image) in enumerate(rows):
            if row.has_image != (tiles > 0) or (image is None) != (tiles == 0):
                raise UserError(f"row {i}: rows with and without image do not mix in one group")
            if image is not None and len(image) != tiles:
                raise UserError(f"row {i}: {len(image)} tiles in a group of {tiles}")
            row = row.cut(tokens, features * tiles)
            ids, index = _expand(row.ids, features * tiles)
            lengths[i] = len(ids)
            out_tokens[i, : len(ids)] = ids
            out_index[i, : len(ids)] = index
        packed, feats = self._images([image for _, image in rows], tiles)
        skip = np.array([row.skip for row, _ in rows], np.int32)
        return Inputs(
            out_tokens, lengths, out_index, packed, feats, skip=skip if skip.any() else None
        )

    def _images(self, images: list, tiles: int) -> tuple[np.ndarray, np.ndarray | None]:
        size = 0 if self.image_spec is None else self.image_spec.size
        if not tiles:
            return np.zeros((len(images), 0, size, size, 3), np.uint8), None
        stacked = np.stack(images)
        if stacked.dtype == np.uint8:
            return stacked, None
        return np.zeros((len(images), tiles, 0, 0, 3), np.uint8), stacked

    def bucket(
        self,
        texts: Sequence[str | None],
        images: Sequence[Any],
        instruction: str | None = None,
    ) -> list[tuple[Inputs, np.ndarray]]:
        """Groups rows of any mixture by length, short ones first.

        Returns:
          Groups, each with the places its rows had in the lists given.

        Raises:
          UserError: an image that cannot be read, a row that is empty; names the row.
        """
        rows = []
        for i, (text, image) in enumerate(zip(texts, images, strict=True)):
            try:
                rows.append(self.tokenize(text, image is not None, instruction))
            except UserError as error:
                raise UserError(f"row {i}: {error}") from None
        return self._pack(rows, images)

    def embed_rows(
        self, token_rows: Sequence[Sequence[int]], images: Sequence[Any] | None = None
    ) -> list[tuple[Inputs, np.ndarray]]:
        """Groups rows that are tokenised already; `image_token_id` marks each image's place."""
        images = [None] * len(token_rows) if images is None else images
        rows = []
        for i, (ids, image) in enumerate(zip(token_rows, images, strict=True)):
            ids = tuple(int(token) for token in ids)
            slots = ids.count(IMAGE_SLOT)
            if not ids or slots != (image is not None):
                raise UserError(
                    f"row {i}: {len(ids)} tokens with {slots} image slots and "
                    f"{'an' if image is not None else 'no'} image"
                )
            row = Row(ids, 0, 0)
            if row.length(self.features) > self.max_tokens:
                raise UserError(
                    f"row {i} has {row.length(self.features)} positions, "
                    f"the model reads {self.max_tokens}"
                )
            rows.append(row)
        return self._pack(rows, images)

    def _pack(self, rows: list[Row], images: Sequence[Any]) -> list[tuple[Inputs, np.ndarray]]:
        buckets = collections.defaultdict(list)
        for i, row in enumerate(rows):
            length = row.length(self.features)
            fitting = next((size for size in LENGTHS if size >= length), length)
            buckets[min(fitting, self.max_tokens), int(row.has_image)].append(i)
        groups = []
        for (tokens, tiles), members in sorted(buckets.items()):
            step = max(1, min(_ROWS, _ROW_TOKENS // tokens))
            for start in range(0, len(members), step):
                part = members[start : start + step]
                packed = [(rows[i], self._tiles_of(i, images[i])) for i in part]
                groups.append((self.group(packed, tokens=tokens, tiles=tiles), np.array(part)))
        return groups

    def _tiles_of(self, row: int, image: Any) -> Tiles | None:
        if image is None:
            return None
        try:
            return self.image(image)
        except UserError as error:
            raise UserError(f"row {row}: {error}") from None


@functools.lru_cache(maxsize=64)
def _steps(count: int) -> tuple[int, ...]:
    return tuple(range(count))


def _expand(ids: tuple[int, ...], features: int) -> tuple[list[int], list[int]]:
    """Gives the image slot its positions: token 0, and the row of the features to take."""
    if IMAGE_SLOT not in ids:
        return list(ids), [-1] * len(ids)
    at = ids.index(IMAGE_SLOT)
    tokens = [*ids[:at], *[0] * features, *ids[at + 1 :]]
    index = [*[-1] * at, *_steps(features), *[-1] * (len(ids) - at - 1)]
    return tokens, index
