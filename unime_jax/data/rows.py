"""Tokenised prompts and prepared images, before they are packed into groups."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float16, Float32

from unime_jax.data.tiles import Layout, Tiles
from unime_jax.types import UserError

IMAGE_SLOT = -1

Features = Float16[np.ndarray, "C P D"] | Float32[np.ndarray, "C P D"]

# Which items of a training row are encoded here, by side.
Wanted = Sequence[Sequence[bool]]
# Called with an unreadable row: attempt, (source, row), error.
Fault = Callable[[int, tuple[int, int], UserError], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A prepared image.

    Attributes:
      tiles: what the vision tower reads, or the features it gave for them.
      layout: of them in the row.
    """

    tiles: Tiles | Features
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Row:
    """A tokenised prompt.

    Attributes:
      ids: token ids; `IMAGE_SLOT` once where the image belongs.
      start, stop: the user's text is ids[start:stop], the only part that may be cut.
      lost: tokens that were cut off already, at least so many.
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

    def length(self, positions: int) -> int:
        """Counts positions when the image, if there is one, takes so many of them."""
        return len(self.ids) + (positions - 1 if self.has_image else 0)

    def cut(self, limit: int, positions: int) -> "Row":
        """Cuts the end of the user's text until the row has at most `limit` positions.

        Raises:
          UserError: prompt and image alone are longer.
        """
        extra = self.length(positions) - limit
        if extra <= 0:
            return self
        if extra > self.stop - self.start:
            rest = self.length(positions) - (self.stop - self.start)
            image = f", {positions} of them its image's," if self.has_image else ""
            raise UserError(
                f"a row of {rest} positions without its text{image} does not fit into {limit}: "
                "raise the length (max_tokens)" + (", or make images smaller" if image else "")
            )
        stop = self.stop - extra
        ids = self.ids[:stop] + self.ids[self.stop :]
        return Row(ids, self.start, stop, self.lost + extra, self.skip)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One row of a batch.

    Attributes:
      sides: of query, target and negatives: what `Preprocessor.group` takes, each with its shape
        (T, C); a query and a target, or none where a side is not encoded. None for an item that
        another process encodes.
      texts: of the sides that are texts.
      target_id: as in `Example`, found if it is not given.
      negative_id: as in `Example`.
      scores: as in `Example`.
      set: number of the row's data set.
    """

    sides: tuple[list[tuple], ...]
    texts: list[str]
    target_id: str
    negative_id: str
    scores: tuple[float, ...]
    set: int


def without_padding(token_rows, attention_mask) -> list[np.ndarray]:
    """Keeps the real tokens of padded rows, wherever the padding is."""
    try:
        token_rows = np.asarray(token_rows)
        mask = np.asarray(attention_mask).astype(bool)
    except ValueError:  # of numpy, for lists of different lengths
        raise UserError("attention_mask: it and token_rows have one length for all rows") from None
    if mask.ndim != 2 or mask.shape != np.shape(token_rows):
        raise UserError(
            f"attention_mask has shape {mask.shape}, token_rows {np.shape(token_rows)}; they must "
            "be equal"
        )
    for row, real in enumerate(mask):
        places = np.flatnonzero(real)
        if len(places) and places[-1] - places[0] >= len(places):
            raise UserError(f"row {row}: attention_mask has a gap between real tokens")
    return [ids[real] for ids, real in zip(token_rows, mask, strict=True)]
