"""Scores of embeddings, in numpy.

Where the right candidate and a wrong one are equally similar, the model has not decided and loses:
a collapsed embedding scores 0 and not chance. A NaN anywhere counts against its row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped


class Precision(NamedTuple):
    """Precision@1 and how often a tie decided it.

    Attributes:
      value: share of queries whose best candidate is relevant and beats every other.
      ties: queries that lost only because an irrelevant candidate was exactly as similar.
    """

    value: float
    ties: int


def ranks(
    similarity: Float[np.ndarray, "Q C"],
    relevant: Int[np.ndarray, "Q"] | Bool[np.ndarray, "Q C"],
) -> Int[np.ndarray, "Q"]:
    """Returns the rank of each query's most similar relevant candidate, 0 for the first.

    Args:
      similarity: of queries and candidates.
      relevant: one candidate a query by index, or a mask; a query without any is never found,
        its rank is the largest integer.
    """
    mask = _mask(relevant, similarity.shape)
    best = np.where(mask, similarity, -np.inf).max(axis=1, initial=-np.inf)[:, None]
    # "not below" and not "at least": NaN, on either side, counts as ahead.
    ahead = (~mask & ~(similarity < best)).sum(axis=1)
    return np.where(mask.any(axis=1), ahead, np.iinfo(ahead.dtype).max)


def recall_at_k(
    similarity: Float[np.ndarray, "Q C"],
    relevant: Int[np.ndarray, "Q"] | Bool[np.ndarray, "Q C"],
    ks: Sequence[int],
) -> dict[int, float]:
    """Returns for each k the share of queries with a relevant candidate among their k nearest."""
    places = ranks(similarity, relevant)
    return {int(k): _share(places < k) for k in ks}


def precision_at_1(
    similarity: Float[np.ndarray, "Q C"],
    relevant: Int[np.ndarray, "Q"] | Bool[np.ndarray, "Q C"],
) -> Precision:
    """Returns Precision@1 with its ties; the metric of MMEB."""
    hit, tied, _ = first_places(similarity, relevant)
    return Precision(_share(hit), int(tied.sum()))


def first_places(
    similarity: Float[np.ndarray, "Q C"],
    relevant: Int[np.ndarray, "Q"] | Bool[np.ndarray, "Q C"],
) -> tuple[Bool[np.ndarray, "Q"], Bool[np.ndarray, "Q"], Int[np.ndarray, "Q"]]:
    """Returns for each query whether it is right at 1, whether a tie alone cost it, and `ranks`."""
    mask = _mask(relevant, similarity.shape)
    best = np.where(mask, similarity, -np.inf).max(axis=1, initial=-np.inf)[:, None]
    places = ranks(similarity, mask)
    lenient = (~mask & (similarity > best)).sum(axis=1) == 0
    nan = np.isnan(similarity).any(axis=1)
    return places == 0, lenient & (places > 0) & ~nan, places


def pair_accuracy(positive: Float[np.ndarray, "N"], negative: Float[np.ndarray, "N"]) -> float:
    """Returns the share of rows more similar to the right candidate than to the wrong one."""
    return _share(positive > negative)


def spearman(a: Shaped[np.ndarray, "N"], b: Shaped[np.ndarray, "N"]) -> float:
    """Returns the rank correlation of two lists of numbers; nan where one of them is constant."""
    a, b = (r - r.mean() for r in (_average_ranks(a), _average_ranks(b)))
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


def similarity_spearman(a: Float[np.ndarray, "N Ea"], b: Float[np.ndarray, "N Eb"]) -> float:
    """Returns the rank correlation of all cosines between two embeddings' different rows."""
    if len(a) < 2:
        return float("nan")
    return spearman(*(upper_triangle(x @ x.T) for x in (a, b)))


def upper_triangle(matrix: Shaped[np.ndarray, "N N"]) -> Shaped[np.ndarray, "M"]:
    """Returns the entries above the diagonal: every pair once."""
    return matrix[np.triu_indices(len(matrix), k=1)]


def _mask(relevant, shape) -> np.ndarray:
    relevant = np.asarray(relevant)
    if relevant.dtype == bool:
        return relevant
    return np.arange(shape[1])[None, :] == relevant[:, None]


def _average_ranks(values) -> np.ndarray:
    """Ranks from 0; equal values share the mean of their ranks. NaN has no rank."""
    values = np.asarray(values)
    if np.isnan(values).any():
        return np.zeros(len(values))
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[inverse]


def _share(hits) -> float:
    return float(np.mean(hits)) if len(hits) else float("nan")
