"""Encodes the items of training rows: cuts texts to a length, prepares images or their features."""

import functools
from collections.abc import Sequence

import numpy as np

from unime_jax.data import prompts
from unime_jax.data.preprocess import Preprocessor
from unime_jax.data.rows import Picture, Row
from unime_jax.data.sources import ImageRef, Item
from unime_jax.types import UserError

Text = str | prompts.Slotted | None
Encoded = tuple[Row, Picture | None]  # what `Preprocessor.group` takes


class ItemEncoder:
    """Encodes texts and images one at a time, images all in the same layout.

    Args:
      preprocessor: of the backbone.
      max_tokens: longest row, image features excluded; longer texts lose their end.
      features: f16[images, variants, P, D] in place of decoding images and running the tower.
      augment: decode images with a random flip and crop (without `features`).
    """

    def __init__(
        self,
        preprocessor: Preprocessor,
        *,
        max_tokens: int,
        features: np.ndarray | None,
        augment: bool,
    ):
        self._preprocessor = preprocessor
        self._max_tokens = max_tokens
        self._features = features
        self._augment = augment
        self._raw = prompts.TEMPLATES[preprocessor.prompt].raw
        self._remember()

    def _remember(self) -> None:
        # Texts recur from epoch to epoch and in both directions.
        self.row = functools.lru_cache(maxsize=1 << 16)(self._tokenize)

    def __getstate__(self):
        state = dict(self.__dict__)
        del state["row"]
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._remember()

    def _tokenize(self, text: Text, has_image: bool) -> Row:
        """Returns the tokens of a text with its image's place, cut to the length; `row` is this."""
        row = self._preprocessor.tokenize(self._worded(text), has_image, most=self._max_tokens)
        positions = self.positions(has_image)
        row = row.cut(self._max_tokens + positions, positions)
        self._preprocessor.check_length(row.length(positions))
        return row

    def _worded(self, text: Text) -> Text:
        """Takes the image's place out of a text where the prompt has its own."""
        if not self._raw and isinstance(text, prompts.Slotted):
            return f"{text.before}{text.after}".strip() or None
        return text

    def positions(self, has_image: bool) -> int:
        """Counts the positions that an item's image takes."""
        return self._preprocessor.fixed_layout.positions if has_image else 0

    def tiles(self, has_image: bool) -> int:
        """Counts the tiles of an item's image."""
        return self._preprocessor.fixed_layout.tiles if has_image else 0

    def encode(self, text: Text, image: ImageRef | None, rng) -> tuple[Encoded, bytes]:
        """Returns an encoded item, and the file of the image that was decoded for it.

        Raises:
          UserError: the image cannot be read.
        """
        row = self.row(text, image is not None)
        if image is None:
            return (row, None), b""
        if self._features is not None:
            variant = rng.integers(self._features.shape[1])
            features = np.asarray(self._features[image.number, variant])[None]
            if not features.any():  # what `tower_features` writes for such an image
                raise UserError(f"{image.name}: was unreadable when its features were computed")
            return (row, Picture(features, self._preprocessor.fixed_layout)), b""
        try:
            content = image.load()
            augment = rng if self._augment else None
            return (row, self._preprocessor.image(content, augment=augment)), content
        except UserError as error:
            kind, problem = type(error), str(error).removeprefix("image: ")
            named = problem if problem.startswith(image.name) else f"{image.name}: {problem}"
            raise kind(named) from None

    def skip(self, item: Item, rng, needs_content: bool, behind: Sequence[Item]) -> bytes:
        """Leaves an item to others, as if it was encoded; returns its image's file where needed.

        Args:
          item: that another process encodes.
          rng: of the row, in the same state afterwards as after `encode` if anything still draws.
          needs_content: the file is wanted.
          behind: items of the row that come after it.
        """
        if item.image is None:
            return b""
        if self._augment and self._features is None and any(other.image for other in behind):
            return self.encode(item.text, item.image, rng)[1]  # its size decides what it draws
        return item.image.load() if needs_content else b""
