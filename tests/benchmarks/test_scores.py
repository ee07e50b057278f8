"""MMEB, caption retrieval and SugarCrepe: scores as a plain reading of their definitions."""

import numpy as np
import pytest

from unime_jax import metrics
from unime_jax.benchmarks import caption_retrieval, mmeb, sugarcrepe
from unime_jax.types import UserError

ITEMS, WIDTH = 60, 4


def world(seed: int, *, equal: int = 12):
    """Coarse vectors, so that different items are often exactly as near, and some are equal."""
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-1, 2, (ITEMS, WIDTH)).astype(np.float32)
    copies = rng.integers(0, ITEMS, (equal, 2))
    vectors[copies[:, 0]] = vectors[copies[:, 1]]
    first: dict[bytes, int] = {}
    same = np.array([first.setdefault(row.tobytes(), i) for i, row in enumerate(vectors)])
    return rng, vectors, same


@pytest.mark.parametrize("seed", range(8))
def test_precision_at_1_is_the_plain_reading(seed):
    rng, vectors, same = world(seed)
    usable = rng.random(ITEMS) > 0.1
    queries = rng.integers(0, ITEMS, 40)
    lists = [rng.integers(0, ITEMS, rng.integers(1, 9)) for _ in queries]
    found = mmeb.score(
        mmeb.Task(queries, lists), lambda i: vectors[i], same, usable, metrics.first_places
    )
    hits, ties, left_out, dropped = [], 0, 0, 0
    for query, candidates in zip(queries, lists, strict=True):
        if not (usable[query] and usable[candidates[0]]):
            left_out += 1
            continue
        wrong = [c for c in candidates if c != candidates[0]]
        dropped += sum(not usable[c] for c in wrong)
        wrong = [float(vectors[query] @ vectors[c]) for c in wrong if usable[c]]
        right = float(vectors[query] @ vectors[candidates[0]])
        hits.append(all(right > other for other in wrong))
        ties += not hits[-1] and right == max(wrong)
    assert [answer.hit for answer in found.answers] == hits
    assert (found.precision, found.ties) == (np.mean(hits), ties)
    assert (found.left_out, found.dropped) == (left_out, dropped)
    for answer in found.answers:  # best first, each item once, the right one last among equals
        candidates = lists[answer.query]
        items = [candidates[place] for place in answer.top]
        assert len(set(items)) == len(items) <= 5
        assert list(answer.cosines) == sorted(answer.cosines, reverse=True)
        assert (answer.top[0] == 0) == answer.hit


def test_the_right_candidate_twice_is_right_twice():
    vectors = np.eye(3, dtype=np.float32)
    task = mmeb.Task(np.array([0, 0]), [np.array([0, 1, 0]), np.array([1, 0, 1])])
    usable, same = np.ones(3, bool), np.arange(3)
    found = mmeb.score(task, lambda i: vectors[i], same, usable, metrics.first_places)
    assert [answer.hit for answer in found.answers] == [True, False]
    assert found.chance == pytest.approx(2 / 3)


def test_equal_vectors_tie_whatever_a_product_of_matrices_rounds():
    rng = np.random.default_rng(0)
    row = rng.standard_normal(3072).astype(np.float32)
    vectors = np.tile(row / np.linalg.norm(row), (37, 1))
    task = mmeb.Task(np.arange(5), [np.arange(5, 37)] * 5)
    same = np.zeros(37, int)
    found = mmeb.score(task, lambda i: vectors[i], same, np.ones(37, bool), metrics.first_places)
    assert found.precision == 0 and found.ties == 5


def test_means_weigh_sets_and_tasks_equally():
    rng = np.random.default_rng(1)
    scores = {each.name: float(rng.random()) for each in mmeb.SETS}
    found = mmeb.means(scores)
    by_task = [
        np.mean([scores[each.name] for each in mmeb.SETS if each.task == task])
        for task in mmeb.TASKS
    ]
    assert [found[task].value for task in mmeb.TASKS] == pytest.approx(by_task)
    assert found["mean_of_4"].value == pytest.approx(np.mean(by_task))
    assert found["mean_of_36"].value == pytest.approx(np.mean(list(scores.values())))
    sizes = {name: mean.sets for name, mean in found.items()}
    assert sizes == {
        "classification": 10, "vqa": 10, "retrieval": 12, "grounding": 4, "ind": 20, "ood": 16,
        "mean_of_4": 36, "mean_of_36": 36,
    }  # fmt: skip
    part = mmeb.means({"MSCOCO": 0.5})
    assert part["grounding"].value == 0.5 and not part["grounding"].complete
    assert np.isnan(part["vqa"].value) and part["mean_of_4"].value == 0.5


def test_sets_are_chosen_by_name_task_and_distribution():
    names = [each.name for each in mmeb.choose("MSCOCO, vqa,imagenet_1k")]
    assert names[0] == "ImageNet-1K" and names[-1] == "MSCOCO" and len(names) == 12
    assert len(mmeb.choose("")) == 36 and len(mmeb.choose("ood")) == 16
    with pytest.raises(UserError, match="no set 'COCO'.*ImageNet-1K"):
        mmeb.choose("COCO")


@pytest.mark.parametrize("seed", range(4))
def test_recall_is_the_plain_reading_in_both_directions(seed):
    rng, vectors, same = world(seed)
    usable = rng.random(ITEMS) > 0.1
    images, captions = rng.integers(0, 20, 12), rng.integers(20, ITEMS, 40)
    owner = rng.integers(0, len(images), len(captions))
    for way, (queries, candidates, rights) in caption_retrieval.both_ways(
        images, captions, owner
    ).items():
        found = caption_retrieval.score(
            queries, candidates, rights, lambda i: vectors[i], same, usable, metrics.first_places
        )
        places, left_out = [], 0
        for query, right in zip(queries, rights, strict=True):
            there = [c for c in candidates if usable[c]]
            if not usable[query] or not right & set(there):
                left_out += 1
                continue
            cosine = {c: float(vectors[query] @ vectors[c]) for c in there}
            best = max(cosine[c] for c in there if c in right)
            places.append(sum(cosine[c] >= best for c in there if c not in right))
        assert [answer.rank for answer in found.answers] == places, way
        assert found.left_out == left_out
        for k in caption_retrieval.KS:
            assert found.recall(k) == np.mean(np.array(places) < k)
        for answer in found.answers:
            assert answer.top_right[0] == (answer.rank == 0)


def test_recall_equals_scikit_learns_on_the_same_scores():
    ranking = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((200, 16)).astype(np.float32)
    images = np.arange(100)
    queries, candidates, rights = caption_retrieval.both_ways(images, images + 100, images)[
        "image_to_text"
    ]
    found = caption_retrieval.score(
        queries, candidates, rights, lambda i: vectors[i], np.arange(200), np.ones(200, bool),
        metrics.first_places,
    )  # fmt: skip
    similarity = vectors[:100] @ vectors[100:].T
    for k in caption_retrieval.KS:
        expected = ranking.top_k_accuracy_score(images, similarity, k=k, labels=images)
        assert found.recall(k) == pytest.approx(expected)


def test_sugarcrepe_counts_ties_as_lost():
    vectors = np.array([[1, 0], [1, 0], [0, 1], [0.6, 0.8], [0.6, 0.8]], np.float32)
    same = np.array([0, 0, 2, 3, 3])
    images, captions, negatives = (
        np.array([0, 0, 0, 2]),
        np.array([1, 3, 2, 2]),
        np.array([2, 4, 1, 0]),
    )
    usable = np.ones(5, bool)
    found = sugarcrepe.score(images, captions, negatives, lambda i: vectors[i], same, usable)
    assert found.hits.tolist() == [True, False, False, True] and found.ties == 1
    usable[2] = False
    found = sugarcrepe.score(images, captions, negatives, lambda i: vectors[i], same, usable)
    assert found.left_out == 3 and found.accuracy == 0.0 and found.ties == 1
    means = sugarcrepe.means(dict.fromkeys(sugarcrepe.FILES[:4], 0.5) | {"swap_att": 1.0})
    assert means == {"replace": 0.5, "swap": 0.75}
