"""SugarCrepe: is an image nearer to its caption than to one with an object, attribute or relation
replaced, swapped or added. Ties lose."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Int

FILES = (
    "replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att",
)  # fmt: skip
KINDS = ("replace", "swap", "add")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The score of one file.

    Attributes:
      hits: bool, of the rows that could be scored.
      ties: rows lost only because both captions are exactly as near.
      left_out: rows of which the image or a caption has no vector.
    """

    hits: np.ndarray
    ties: int
    left_out: int

    @property
    def accuracy(self) -> float:
        """Share of rows, 0 to 1; nan without rows."""
        return float(np.mean(self.hits)) if len(self.hits) else float("nan")


def score(
    images: Int[np.ndarray, "N"],
    captions: Int[np.ndarray, "N"],
    negatives: Int[np.ndarray, "N"],
    vectors: Callable[[Int[np.ndarray, "N"]], Float[np.ndarray, "N E"]],
    same: Int[np.ndarray, "M"],
    usable: np.ndarray,
) -> Outcome:
    """Scores a file; rows are numbers of items, the rest is as in `caption_retrieval.score`."""
    rows = np.stack([images, captions, negatives])
    kept = usable[rows].all(axis=0)
    if not kept.any():
        return Outcome(np.zeros(0, bool), 0, len(images))
    image, caption, negative = (vectors(side) for side in rows[:, kept])
    # Elementwise and in one order: equal vectors give equal cosines.
    right, wrong = (np.einsum("ne,ne->n", image, side) for side in (caption, negative))
    tied = (same[captions] == same[negatives])[kept] | (right == wrong)
    return Outcome((right > wrong) & ~tied, int(tied.sum()), int((~kept).sum()))


def means(accuracy: Mapping[str, float]) -> dict[str, float]:
    """Averages the files of each kind, each with equal weight; only where all are there."""
    found = {}
    for kind in KINDS:
        names = [name for name in FILES if name.startswith(kind)]
        if all(name in accuracy for name in names):
            found[kind] = float(np.mean([accuracy[name] for name in names]))
    return found
