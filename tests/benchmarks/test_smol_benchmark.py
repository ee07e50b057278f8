"""The small benchmarks on vectors whose answers are known."""

import itertools

import numpy as np
import pytest

from unime_jax import metrics
from unime_jax.benchmarks import smol


def test_sentences_are_embedded_in_one_call_and_split_again():
    calls = []

    def embed(texts):
        calls.append(list(texts))
        return np.array([[float(t)] for t in texts], np.float32)

    vectors = smol.embed_sentences(smol.Sentences(["0", "1", "2"], ["3", "4"], ["5", "6"]), embed)
    assert calls == [["0", "1", "2", "3", "4", "5", "6"]]
    assert vectors.heldout.ravel().tolist() == [0, 1, 2]
    assert vectors.glosses.ravel().tolist() == [3, 4]
    assert vectors.examples.ravel().tolist() == [5, 6]


def test_gloss_to_example_pairs_row_with_row():
    eye = np.eye(3, dtype=np.float32)
    task = smol.SentenceVectors(eye, eye, eye[[1, 2, 0]]).gloss_to_example()
    assert metrics.recall_at_k(task.similarity, task.relevant, [1])[1] == 0
    glosses = np.array([[1, 0], [0.8, 0.6]], np.float32)  # both look for the first example
    task = smol.SentenceVectors(eye, glosses, np.array([[1, 0], [0, 0.1]])).gloss_to_example()
    assert metrics.ranks(task.similarity, task.relevant).tolist() == [0, 1]


def test_retrievals_go_both_ways_and_equal_captions_are_all_right():
    images = np.eye(3, dtype=np.float32)
    captions = np.array([[0.6, 0.8, 0], [0.8, 0.6, 0], [0, 0, 1]], np.float32)
    vectors = smol.PairVectors(images, captions)
    apart = vectors.retrievals(["a", "b", "c"])
    assert list(apart) == ["image to text", "text to image"]
    for task in apart.values():
        assert metrics.recall_at_k(task.similarity, task.relevant, [1])[1] == pytest.approx(1 / 3)
    same = vectors.retrievals(["a", "a", "c"])
    assert metrics.recall_at_k(*astuple(same["image to text"]), [1])[1] == 1


def test_text_to_image_is_asked_by_the_captions():
    images = np.eye(2, dtype=np.float32)
    captions = np.array([[1, 0], [0.9, 0.1]], np.float32)  # both look for the first image
    tasks = smol.PairVectors(images, captions).retrievals(["a", "b"])
    assert metrics.ranks(*astuple(tasks["text to image"])).tolist() == [0, 1]
    assert metrics.ranks(*astuple(tasks["image to text"])).tolist() == [0, 0]


def astuple(task):
    return task.similarity, task.relevant


def test_subset_keeps_all_candidates():
    task = smol.Retrieval(np.arange(6.0).reshape(2, 3), np.ones((2, 3), bool))
    part = task.subset(np.array([False, True]))
    assert part.similarity.tolist() == [[3, 4, 5]] and part.relevant.shape == (1, 3)


def test_pairs_call_each_side_once():
    data = smol.Pairs([b"x", b"y"], ["a", "b"], ["a", "b"], [True, False])
    vectors = smol.embed_pairs(
        data, lambda texts: np.full((len(texts), 2), 1.0), lambda images: np.zeros((len(images), 2))
    )
    assert vectors.images.sum() == 0 and vectors.captions.sum() == 4 and len(data) == 2


def test_idf_mean_weighs_rare_tokens_and_ignores_omnipresent_ones():
    table = np.eye(4, dtype=np.float32)
    corpus = [[0, 1], [0, 1], [0, 2, 2]]
    got = smol.idf_mean(table, [[0, 1, 2, 2], [0], []], corpus)
    weight = np.log([4 / 3, 4 / 2])  # tokens 1 and 2
    want = np.array([0, weight[0], 2 * weight[1], 0])
    np.testing.assert_allclose(got[0], want / np.linalg.norm(want), rtol=1e-6)
    assert not got[1].any() and not got[2].any()


@pytest.mark.parametrize("right,k", [(1, 1), (1, 3), (2, 2), (3, 4), (2, 9)])
def test_chance_is_the_mean_over_all_orders(right, k):
    relevant = np.zeros((1, 5), bool)
    relevant[0, :right] = True
    orders = list(itertools.permutations(range(5)))
    want = np.mean([any(j < right for j in order[:k]) for order in orders])
    assert smol.chance_recall(relevant, [k])[k] == pytest.approx(want)


def make_linear(rows, rng, weights, noise):
    features = rng.normal(size=(rows, len(weights))) * 3 + 5
    targets = features @ weights + rng.normal(size=(rows, weights.shape[1])) * noise + 1
    return features.astype(np.float32), smol.unit(targets).astype(np.float32)


def test_ridge_equals_the_normal_equations():
    rng = np.random.default_rng(0)
    features, targets = make_linear(50, rng, rng.normal(size=(6, 4)), 0.1)
    ridge = smol.fit_ridge(features, targets, lambda r: 0.0, strengths=[0.5])
    x = (features - features.mean(axis=0)) / features.std(axis=0)
    want = np.linalg.solve(
        x.T @ x / 50 + 0.5 * np.eye(6), x.T @ (targets - targets.mean(axis=0)) / 50
    )
    np.testing.assert_allclose(ridge.weights, want, rtol=1e-3, atol=1e-5)
    predicted = ridge.predict(features)
    np.testing.assert_allclose(np.linalg.norm(predicted, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        predicted, smol.unit(x @ want + targets.mean(axis=0)), rtol=1e-3, atol=1e-4
    )


def test_ridge_strength_is_chosen_by_the_quality_given():
    rng = np.random.default_rng(1)
    features, targets = make_linear(30, rng, rng.normal(size=(20, 4)), 4.0)
    held_features, held_targets = make_linear(200, rng, rng.normal(size=(20, 4)), 4.0)

    def quality(ridge):
        return float((ridge.predict(held_features) * held_targets).sum())

    strengths = [1e-3, 0.1, 10.0]
    single = {s: quality(smol.fit_ridge(features, targets, lambda r: 0, [s])) for s in strengths}
    assert smol.fit_ridge(features, targets, quality, strengths).strength == max(
        single, key=single.get
    )
    assert len(set(single.values())) == 3


def test_more_features_than_rows_are_no_trouble():
    rng = np.random.default_rng(2)
    features, targets = make_linear(10, rng, rng.normal(size=(40, 4)), 0.1)
    features[:, 3] = 1.0  # constant
    ridge = smol.fit_ridge(features, targets, lambda r: 0.0, strengths=[1e-3])
    assert np.isfinite(ridge.predict(features)).all()


def test_spread_is_even_and_within_bounds():
    assert smol.spread(200, 3).tolist() == [0, 100, 199]
    assert smol.spread(2, 12).tolist() == [0, 1]
