"""The newcomer's benchmarks: sentences beside a teacher, and small picture-caption retrieval.

Data comes in as plain lists, models as two callables, and out come vectors and retrieval problems,
which the caller scores; baselines stand beside the models.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

EmbedTexts = Callable[[Sequence[str]], np.ndarray]  # N texts -> f32[N, E], unit rows
EmbedImages = Callable[[Sequence[Any]], np.ndarray]  # N encoded images -> f32[N, E], unit rows


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Queries that look for their candidates.

    Attributes:
      similarity: f32[Q, C].
      relevant: bool[Q, C]; several candidates may be right.
    """

    similarity: np.ndarray
    relevant: np.ndarray

    def subset(self, queries: Bool[np.ndarray, "Q"]) -> "Retrieval":
        """Keeps some queries and all candidates: numbers stay comparable."""
        return Retrieval(self.similarity[queries], self.relevant[queries])


# ---------------------------------------------------------------- sentences


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Texts held out of training.

    Attributes:
      heldout: sentences whose similarities are compared with the teacher's.
      glosses: definitions; row i belongs to examples[i].
      examples: sentences that use the word defined.
    """

    heldout: Sequence[str]
    glosses: Sequence[str]
    examples: Sequence[str]

    def texts(self) -> list[str]:
        return [*self.heldout, *self.glosses, *self.examples]


@dataclasses.dataclass(frozen=True)
class SentenceVectors:
    """Unit rows of `Sentences`, field by field."""

    heldout: np.ndarray
    glosses: np.ndarray
    examples: np.ndarray

    def gloss_to_example(self) -> Retrieval:
        """Returns the task to find each gloss's own example among all."""
        own = np.eye(len(self.glosses), dtype=bool)
        return Retrieval(self.glosses @ self.examples.T, own)


def embed_sentences(data: Sentences, embed_texts: EmbedTexts) -> SentenceVectors:
    """Embeds all texts in one call."""
    vectors = embed_texts(data.texts())
    ends = np.cumsum([len(data.heldout), len(data.glosses)])
    return SentenceVectors(*np.split(vectors, ends))


def idf_mean(
    table: Float[np.ndarray, "V D"],
    rows: Sequence[Sequence[int]],
    corpus: Iterable[Sequence[int]],
) -> Float[np.ndarray, "N D"]:
    """Embeds token rows by the mean of their input embeddings, rare tokens weighing more.

    What a model's first layer knows without any other: the baseline of a text embedding.

    Args:
      table: input embeddings.
      rows: token ids; a row of unknown weight or none at all becomes zero.
      corpus: token rows of the training texts, for the document frequencies.
    """
    seen, documents = np.zeros(len(table)), 0
    for row in corpus:
        seen[np.unique(np.asarray(row, int))] += 1
        documents += 1
    weight = np.log((documents + 1) / (seen + 1))
    sums = np.zeros((len(rows), table.shape[1]), np.float32)
    for i, row in enumerate(rows):
        ids = np.asarray(row, int)
        sums[i] = weight[ids] @ table[ids]
    return unit(sums)


# ---------------------------------------------------------------- pictures and captions


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pictures with captions.

    Attributes:
      images: encoded.
      captions: one each.
      keys: equal for captions that count as the same.
      seen: whether all of a caption's words occur in training.
    """

    images: Sequence[bytes]
    captions: Sequence[str]
    keys: Sequence[str]
    seen: Sequence[bool]

    def __len__(self) -> int:
        return len(self.captions)


@dataclasses.dataclass(frozen=True)
class PairVectors:
    """Unit rows of the images and of the captions of `Pairs`."""

    images: np.ndarray
    captions: np.ndarray

    def retrievals(self, keys: Sequence[str]) -> dict[str, Retrieval]:
        """Returns the tasks "image to text" and "text to image"; equal keys are all right."""
        keys = np.asarray(keys)
        same = keys[:, None] == keys[None, :]
        similarity = self.images @ self.captions.T
        return {
            "image to text": Retrieval(similarity, same),
            "text to image": Retrieval(similarity.T, same),
        }


def embed_pairs(data: Pairs, embed_texts: EmbedTexts, embed_images: EmbedImages) -> PairVectors:
    """Embeds both sides."""
    return PairVectors(embed_images(data.images), embed_texts(data.captions))


# ---------------------------------------------------------------- baselines


def chance_recall(relevant: Bool[np.ndarray, "Q C"], ks: Sequence[int]) -> dict[int, float]:
    """Returns what recall at k a random order reaches on average."""
    total = relevant.shape[1]
    recall = {}
    for k in ks:
        missed = []
        for right in relevant.sum(axis=1):
            # No right one among k draws without replacement.
            draws = np.arange(min(k, total))
            missed.append(np.prod(np.clip(total - right - draws, 0, None) / (total - draws)))
        recall[int(k)] = float(1 - np.mean(missed))
    return recall


@dataclasses.dataclass(frozen=True)
class Ridge:
    """A linear map from image features to caption vectors; made by `fit_ridge`.

    Attributes:
      weights: f64[D, E].
      feature_mean, feature_scale, target_mean: taken off before and put back after.
      strength: of the penalty, in units of the mean feature variance (1 after scaling).
    """

    weights: np.ndarray
    feature_mean: np.ndarray
    feature_scale: np.ndarray
    target_mean: np.ndarray
    strength: float

    def predict(self, features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N E"]:
        """Returns unit rows."""
        scaled = (features - self.feature_mean) / self.feature_scale
        return unit((scaled @ self.weights + self.target_mean).astype(np.float32))


def fit_ridge(
    features: Float[np.ndarray, "N D"],
    targets: Float[np.ndarray, "N E"],
    quality: Callable[[Ridge], float],
    strengths: Sequence[float] = tuple(np.logspace(-3, 2, 11)),
) -> Ridge:
    """Fits caption vectors by ridge regression on image features.

    Args:
      features: pooled features of the training images.
      targets: unit vectors of their captions.
      quality: scores a fitted map on held-out validation pairs; the best strength is kept.
      strengths: penalties to try, in units of the features' variance.
    """
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
    x = ((features - mean) / scale).astype(np.float64)
    y_mean = targets.mean(axis=0)
    # One decomposition serves all strengths.
    values, basis = np.linalg.eigh(x.T @ x / len(x))
    projected = basis.T @ (x.T @ (targets - y_mean) / len(x))
    best, best_quality = None, -np.inf
    for strength in strengths:
        weights = basis @ (projected / (np.maximum(values, 0) + strength)[:, None])
        ridge = Ridge(weights, mean, scale, y_mean, float(strength))
        score = quality(ridge)
        if best is None or score > best_quality:
            best, best_quality = ridge, score
    return best


def unit(rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Scales rows to length 1; a zero row stays zero."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1)


def spread(count: int, wanted: int) -> Int[np.ndarray, "M"]:
    """Returns up to `wanted` of `count` places, evenly spread, always the same."""
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(int))
