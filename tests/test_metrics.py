"""Retrieval and correlation scores, against slow oracles and scipy."""

import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unime_jax import metrics

COARSE = st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0])  # few values: many ties


@st.composite
def retrievals(draw):
    queries, candidates = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    similarity = draw(hnp.arrays(np.float32, (queries, candidates), elements=COARSE))
    relevant = draw(hnp.arrays(bool, (queries, candidates)))
    return similarity, relevant


def oracle_hit(scores, relevant, k):
    """Is a relevant candidate in the top k, with every tie broken against it?"""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], relevant[j]))
    return any(relevant[j] for j in order[:k])


@settings(max_examples=200, deadline=None)
@given(retrievals(), st.integers(1, 8))
def test_recall_equals_oracle(retrieval, k):
    similarity, relevant = retrieval
    want = np.mean([oracle_hit(s, r, k) for s, r in zip(similarity, relevant, strict=True)])
    assert metrics.recall_at_k(similarity, relevant, [k]) == {k: pytest.approx(want)}


@settings(max_examples=100, deadline=None)
@given(retrievals())
def test_precision_is_recall_at_1_and_ties_are_what_luck_could_add(retrieval):
    similarity, relevant = retrieval
    precision = metrics.precision_at_1(similarity, relevant)
    assert precision.value == metrics.recall_at_k(similarity, relevant, [1])[1]
    lucky = [r[s == s.max()].any() for s, r in zip(similarity, relevant, strict=True)]
    assert precision.ties == sum(lucky) - round(precision.value * len(similarity))


def test_relevant_by_index_and_by_mask_agree():
    similarity = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    index = np.array([0, 3, 8, 8, 2])
    mask = np.zeros((5, 9), bool)
    mask[np.arange(5), index] = True
    np.testing.assert_array_equal(metrics.ranks(similarity, index), metrics.ranks(similarity, mask))
    order = np.argsort(-similarity, axis=1)
    want = [list(row).index(i) for row, i in zip(order, index, strict=True)]
    np.testing.assert_array_equal(metrics.ranks(similarity, index), want)


def test_collapsed_embedding_scores_nothing():
    similarity = np.ones((4, 4), np.float32)
    assert metrics.recall_at_k(similarity, np.arange(4), [1, 3, 4]) == {1: 0.0, 3: 0.0, 4: 1.0}
    assert metrics.precision_at_1(similarity, np.arange(4)) == (0.0, 4)
    assert metrics.pair_accuracy(similarity[0], similarity[1]) == 0.0


def test_nan_counts_against_the_row():
    similarity = np.array([[np.nan, 0.1], [0.9, np.nan], [0.9, 0.1]], np.float32)
    assert metrics.recall_at_k(similarity, np.zeros(3, int), [1])[1] == pytest.approx(1 / 3)
    assert metrics.precision_at_1(similarity, np.zeros(3, int)) == (pytest.approx(1 / 3), 0)
    assert metrics.pair_accuracy(np.array([np.nan, 0.2]), np.array([0.1, 0.1])) == 0.5


def test_pair_accuracy_by_hand():
    assert metrics.pair_accuracy(np.array([0.3, 0.2, 0.1]), np.array([0.2, 0.2, 0.5])) == (
        pytest.approx(1 / 3)
    )


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 30).flatmap(lambda n: hnp.arrays(np.float64, (2, n), elements=COARSE)))
def test_spearman_equals_scipy(values):
    a, b = values
    ours = metrics.spearman(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert np.isnan(ours)
    else:
        assert ours == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_spearman_of_nan_is_nan():
    assert np.isnan(metrics.spearman(np.array([0.1, np.nan, 0.3]), np.arange(3.0)))


def test_similarity_spearman_counts_every_pair_once():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(7, 4)), rng.normal(size=(7, 9))
    pairs = [(i, j) for i in range(7) for j in range(i + 1, 7)]
    want = scipy.stats.spearmanr(
        [a[i] @ a[j] for i, j in pairs], [b[i] @ b[j] for i, j in pairs]
    ).statistic
    assert metrics.similarity_spearman(a, b) == pytest.approx(want, abs=1e-12)
    assert len(metrics.upper_triangle(a @ a.T)) == len(pairs)
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    assert metrics.similarity_spearman(a, a @ rotation) == pytest.approx(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(metrics.similarity_spearman(a[:1], b[:1]))


def test_no_queries_score_nan():
    assert np.isnan(metrics.recall_at_k(np.zeros((0, 3)), np.zeros(0, int), [1])[1])
