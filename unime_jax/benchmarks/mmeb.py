"""MMEB's evaluation: 36 sets in four meta-tasks, scored by Precision@1.

Every query has its own candidates, the right one first. Where another candidate is exactly as
similar the query is lost, so that a constant embedding scores 0 and not 100 %; how often that
happened is told.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from unime_jax.types import UserError

TASKS = ("classification", "vqa", "retrieval", "grounding")
SHORT = {"classification": "Cls", "vqa": "VQA", "retrieval": "Ret", "grounding": "Grd"}
_BLOCK = 16  # queries whose candidates are in memory together
TOP = 5


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """One of the sets.

    Attributes:
      name: of its directory.
      task: one of TASKS.
      in_distribution: whether it has a training set.
      candidates: of each query, as published.
    """

    name: str
    task: str
    in_distribution: bool
    candidates: int = 1000


SETS = (
    EvalSet("ImageNet-1K", "classification", True),
    EvalSet("N24News", "classification", True, 24),
    EvalSet("HatefulMemes", "classification", True, 2),
    EvalSet("VOC2007", "classification", True, 20),
    EvalSet("SUN397", "classification", True, 397),
    EvalSet("Place365", "classification", False, 365),
    EvalSet("ImageNet-A", "classification", False),
    EvalSet("ImageNet-R", "classification", False, 200),
    EvalSet("ObjectNet", "classification", False, 313),
    EvalSet("Country211", "classification", False, 211),
    EvalSet("OK-VQA", "vqa", True),
    EvalSet("A-OKVQA", "vqa", True),
    EvalSet("DocVQA", "vqa", True),
    EvalSet("InfographicsVQA", "vqa", True),
    EvalSet("ChartQA", "vqa", True),
    EvalSet("Visual7W", "vqa", True),
    EvalSet("ScienceQA", "vqa", False),
    EvalSet("VizWiz", "vqa", False),
    EvalSet("GQA", "vqa", False),
    EvalSet("TextVQA", "vqa", False),
    EvalSet("VisDial", "retrieval", True),
    EvalSet("CIRR", "retrieval", True),
    EvalSet("VisualNews_t2i", "retrieval", True),
    EvalSet("VisualNews_i2t", "retrieval", True),
    EvalSet("MSCOCO_t2i", "retrieval", True),
    EvalSet("MSCOCO_i2t", "retrieval", True),
    EvalSet("NIGHTS", "retrieval", True),
    EvalSet("WebQA", "retrieval", True),
    EvalSet("FashionIQ", "retrieval", False),
    EvalSet("Wiki-SS-NQ", "retrieval", False),
    EvalSet("OVEN", "retrieval", False),
    EvalSet("EDIS", "retrieval", False),
    EvalSet("MSCOCO", "grounding", True),
    EvalSet("RefCOCO", "grounding", False),
    EvalSet("RefCOCO-Matching", "grounding", False),
    EvalSet("Visual7W-Pointing", "grounding", False),
)
BY_NAME = {found.name: found for found in SETS}


def choose(wanted: str) -> list[EvalSet]:
    """Returns the sets that a comma-separated list names, in MMEB's order.

    Args:
      wanted: names of sets or of meta-tasks, "ind", "ood"; "": all.

    Raises:
      UserError: an unknown name.
    """
    if not wanted.strip(" ,"):
        return list(SETS)
    chosen = set()
    for word in filter(None, (part.strip() for part in wanted.split(","))):
        found = [each.name for each in SETS if _is_meant(each, word)]
        if not found:
            raise UserError(
                f"config.sets: MMEB has no set {word!r}; it has {', '.join(BY_NAME)}; groups are "
                f"{', '.join(TASKS)}, ind and ood"
            )
        chosen.update(found)
    return [each for each in SETS if each.name in chosen]


def _is_meant(each: EvalSet, word: str) -> bool:
    if word in BY_NAME:
        return word == each.name
    group = plain(word)
    if group in ("ind", "ood"):
        return each.in_distribution == (group == "ind")
    return group in (each.task, SHORT[each.task].lower(), plain(each.name))


def plain(name: str) -> str:
    """Returns a name without regard to case and to the kind of its dashes."""
    return name.lower().replace("_", "-")


# ---------------------------------------------------------------- one set


@dataclasses.dataclass(frozen=True)
class Task:
    """What is scored: queries and the candidates of each, by number of the item.

    Attributes:
      queries: int[Q].
      candidates: int[C] of each query, the right one first; one may stand there twice.
    """

    queries: Int[np.ndarray, "Q"]
    candidates: Sequence[Int[np.ndarray, "_"]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """How one query fared.

    Attributes:
      query: its place in the task.
      hit: whether a right candidate is nearer than every other.
      tied: whether it is lost only because another candidate is exactly as near.
      rank: of the right candidate, from 0.
      right: its cosine.
      top: the nearest candidates' places in the query's list, best first, each once.
      cosines: theirs.
    """

    query: int
    hit: bool
    tied: bool
    rank: int
    right: float
    top: tuple[int, ...]
    cosines: tuple[float, ...]

    @property
    def margin(self) -> float:
        """How much nearer the right candidate is than the nearest wrong one among the top."""
        wrong = [c for place, c in zip(self.top, self.cosines, strict=True) if place != 0]
        return self.right - wrong[0] if wrong else float("inf")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The answers of a set.

    Attributes:
      answers: of the queries that could be scored.
      left_out: queries of which they or the right candidate have no vector.
      dropped: wrong candidates without a vector, over all scored queries.
      chance: Precision@1 of a random order, ties aside.
    """

    answers: list[Answer]
    left_out: int
    dropped: int
    chance: float

    @property
    def precision(self) -> float:
        """Precision@1, 0 to 1; nan without answers."""
        return float(np.mean([a.hit for a in self.answers])) if self.answers else float("nan")

    @property
    def ties(self) -> int:
        return sum(answer.tied for answer in self.answers)


Rank = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


def score(
    task: Task,
    vectors: Callable[[Int[np.ndarray, "N"]], Float[np.ndarray, "N E"]],
    same: Int[np.ndarray, "M"],
    usable: np.ndarray,
    rank: Rank,
    progress: Callable[[int], None] = lambda queries: None,
) -> Outcome:
    """Scores a set.

    Args:
      task: see `Task`.
      vectors: unit rows of items.
      same: for each item the first one with the very same vector. A product of matrices may round
        equal columns differently; computed once, they are exactly as similar.
      usable: bool[M], whether an item has a vector.
      rank: (similarity, relevant) -> hit, tied, rank of each query, see `metrics.first_places`.
      progress: called with the number of queries just scored.
    """
    kept = [
        i
        for i, (query, found) in enumerate(zip(task.queries, task.candidates, strict=True))
        if usable[query] and usable[found[0]]
    ]
    answers, dropped, chances = [], 0, []
    for start in range(0, len(kept), _BLOCK):
        block = kept[start : start + _BLOCK]
        lists = [task.candidates[i] for i in block]
        items = np.unique(np.concatenate([same[found[usable[found]]] for found in lists]))
        similarity = vectors(task.queries[block]) @ vectors(items).T
        for row, (i, found) in enumerate(zip(block, lists, strict=True)):
            # The right candidate again, under another place of the list, is right as well.
            places = np.flatnonzero(usable[found])
            relevant = found[places] == found[0]
            cosines = similarity[row, np.searchsorted(items, same[found[places]])]
            hit, tied, place = (x[0] for x in rank(cosines[None], relevant[None]))
            answers.append(_answer(i, bool(hit), bool(tied), int(place), found, places, cosines))
            dropped += len(found) - len(places)
            chances.append(relevant.mean())
        progress(len(block))
    chance = float(np.mean(chances)) if chances else float("nan")
    return Outcome(answers, len(task.queries) - len(kept), dropped, chance)


def _answer(query, hit, tied, place, found, places, cosines) -> Answer:
    """Keeps the nearest candidates, each once; where cosines are equal the wrong one goes first."""
    wrong = found[places] != found[0]
    order = np.lexsort((~wrong, -cosines))
    top: dict[int, int] = {}
    for at in order:
        top.setdefault(int(found[places[at]]), int(at))
        if len(top) == TOP:
            break
    shown = list(top.values())
    return Answer(
        query,
        hit,
        tied,
        place,
        float(cosines[0]),
        tuple(0 if not wrong[at] else int(places[at]) for at in shown),
        tuple(float(cosines[at]) for at in shown),
    )


# ---------------------------------------------------------------- means


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over sets.

    Attributes:
      value: of Precision@1, 0 to 1; nan where no set of it was measured.
      measured, sets: how many of its sets were.
    """

    value: float
    measured: int
    sets: int

    @property
    def complete(self) -> bool:
        return self.measured == self.sets


MEANS = (*TASKS, "ind", "ood", "mean_of_4", "mean_of_36")
LABELS = {**SHORT, "ind": "IND", "ood": "OOD", "mean_of_4": "mean of 4", "mean_of_36": "mean of 36"}


def means(precision: Mapping[str, float]) -> dict[str, Mean]:
    """Averages sets, each with equal weight.

    Args:
      precision: of the sets that were measured, by name.

    Returns:
      Keys of MEANS: the meta-tasks, in and out of distribution, `mean_of_36` over all sets (the
      leaderboard's score) and `mean_of_4` over the four meta-tasks (the paper's "Overall").
    """
    groups = {task: [each for each in SETS if each.task == task] for task in TASKS}
    groups["ind"] = [each for each in SETS if each.in_distribution]
    groups["ood"] = [each for each in SETS if not each.in_distribution]
    groups["mean_of_36"] = list(SETS)
    found = {}
    for name, sets in groups.items():
        values = [precision[each.name] for each in sets if each.name in precision]
        value = float(np.mean(values)) if values else float("nan")
        found[name] = Mean(value, len(values), len(sets))
    tasks = [found[task].value for task in TASKS if found[task].measured]
    found["mean_of_4"] = Mean(
        float(np.mean(tasks)) if tasks else float("nan"), found["mean_of_36"].measured, len(SETS)
    )
    return {name: found[name] for name in MEANS}
