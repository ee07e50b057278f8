"""Zero-shot retrieval of captions and images, in both directions, by recall at 1, 5 and 10.

A candidate that is the right one once more, in another place, is right as well. Where a wrong
candidate is exactly as near as the right one it counts as nearer.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from unime_jax.types import UserError

KS = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")
TOP = 5
_BLOCK = 256  # queries at a time


@dataclasses.dataclass(frozen=True)
class CaptionBenchmark:
    """One of the sets.

    Attributes:
      name: in results and in config.sets.
      title: in tables.
      length: of its captions: "short", "long", or "compositional" for SugarCrepe.
      folders: names that its directory may have, without regard to case and dashes.
    """

    name: str
    title: str
    length: str
    folders: tuple[str, ...]


SETS = (
    CaptionBenchmark(
        "flickr30k", "Flickr30K", "short", ("flickr30k", "flickr30ktest", "flickr", "flickr1ktest")
    ),
    CaptionBenchmark(
        "coco", "COCO", "short", ("coco", "cocotest", "coco2014", "coco2014test", "mscoco")
    ),
    CaptionBenchmark("sharegpt4v", "ShareGPT4V", "long", ("sharegpt4v",)),
    CaptionBenchmark("urban1k", "Urban1K", "long", ("urban1k", "urban200k")),
    CaptionBenchmark("sugarcrepe", "SugarCrepe", "compositional", ("sugarcrepe",)),
)


def choose(wanted: str) -> list[CaptionBenchmark]:
    """Returns the sets that a comma-separated list names; all for "".

    Raises:
      UserError: an unknown name.
    """
    words = [word.strip().lower() for word in wanted.split(",") if word.strip()]
    known = {name for each in SETS for name in (each.name, each.length)}
    for word in words:
        if word not in known:
            names = ", ".join(each.name for each in SETS)
            raise UserError(f"config.sets: no set {word!r}; there are {names}, short and long")
    return [each for each in SETS if not words or {each.name, each.length} & set(words)]


@dataclasses.dataclass(frozen=True)
class Answer:
    """How one query fared, by number of the item.

    Attributes:
      query: the item that looks.
      right: the nearest of the right candidates.
      right_cosine: of it.
      rank: of it, from 0.
      tied: whether it is not first only because another candidate is exactly as near.
      margin: how much nearer it is than the nearest wrong candidate; inf without one.
      top, cosines: the nearest candidates, best first.
      top_right: whether they are right.
    """

    query: int
    right: int
    right_cosine: float
    rank: int
    tied: bool
    margin: float
    top: tuple[int, ...]
    cosines: tuple[float, ...]
    top_right: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The answers in one direction.

    Attributes:
      answers: of the queries that could be scored.
      left_out: queries of which they or all right candidates have no vector.
      candidates: that have one; dropped: that have none.
    """

    answers: list[Answer]
    left_out: int
    candidates: int
    dropped: int

    def recall(self, k: int) -> float:
        """Returns recall at k, 0 to 1; nan without answers."""
        return float(np.mean([a.rank < k for a in self.answers])) if self.answers else float("nan")

    @property
    def ties(self) -> int:
        return sum(answer.tied for answer in self.answers)


def score(
    queries: Int[np.ndarray, "Q"],
    candidates: Int[np.ndarray, "C"],
    rights: Sequence[set[int]],
    vectors: Callable[[Int[np.ndarray, "N"]], Float[np.ndarray, "N E"]],
    same: Int[np.ndarray, "M"],
    usable: np.ndarray,
    first_places: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> Outcome:
    """Scores a direction.

    Args:
      queries, candidates: numbers of items; a candidate may stand there twice.
      rights: for each query the items that are right.
      vectors: unit rows of items.
      same: for each item the first one with the very same vector.
      usable: bool[M], whether an item has a vector.
      first_places: see `metrics.first_places`.
    """
    found = candidates[usable[candidates]]
    held = set(found.tolist())
    kept = [
        i
        for i, query in enumerate(queries.tolist())
        if usable[query] and any(right in held for right in rights[i])
    ]
    answers: list[Answer] = []
    if kept:
        columns, place = np.unique(same[found], return_inverse=True)
        matrix = vectors(columns)
    for start in range(0, len(kept), _BLOCK):
        block = kept[start : start + _BLOCK]
        similarity = (vectors(queries[block]) @ matrix.T)[:, place]
        relevant = np.stack([np.isin(found, list(rights[i])) for i in block])
        _, tied, ranks = first_places(similarity, relevant)
        for row, i in enumerate(block):
            found_rank = int(ranks[row]), bool(tied[row])
            answers.append(
                _answer(int(queries[i]), found, similarity[row], relevant[row], *found_rank)
            )
    return Outcome(answers, len(queries) - len(kept), len(found), len(candidates) - len(found))


def _answer(query: int, found, cosines, relevant, rank: int, tied: bool) -> Answer:
    best = int(np.argmax(np.where(relevant, cosines, -np.inf)))
    wrong = cosines[~relevant].max(initial=-np.inf)
    # Enough for TOP different items; wrong ones before right ones where they are equal.
    some = np.argpartition(-cosines, min(8 * TOP, len(cosines)) - 1)[: 8 * TOP]
    top: dict[int, int] = {}
    for at in some[np.lexsort((relevant[some], -cosines[some]))].tolist():
        top.setdefault(int(found[at]), at)
        if len(top) == TOP:
            break
    places = list(top.values())
    return Answer(
        query,
        int(found[best]),
        float(cosines[best]),
        rank,
        tied,
        float(cosines[best] - wrong),
        tuple(top),
        tuple(cosines[places].tolist()),
        tuple(relevant[places].tolist()),
    )


def both_ways(
    images: Int[np.ndarray, "N"], captions: Int[np.ndarray, "M"], owner: Int[np.ndarray, "M"]
) -> dict[str, tuple[np.ndarray, np.ndarray, list[set[int]]]]:
    """Returns queries, candidates and what is right, for each of DIRECTIONS.

    Args:
      images, captions: numbers of items.
      owner: the place in `images` that a caption belongs to.
    """
    own: list[set[int]] = [set() for _ in images]
    for caption, place in zip(captions.tolist(), owner.tolist(), strict=True):
        own[place].add(caption)
    return {
        "text_to_image": (captions, images, [{int(images[place])} for place in owner]),
        "image_to_text": (images, captions, own),
    }
