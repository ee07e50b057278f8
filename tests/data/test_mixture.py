"""What batches are made of."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unime_jax.data import mixture
from unime_jax.types import UserError


def test_largest_remainder():
    assert mixture.shares([50, 30, 20], 10) == [5, 3, 2]
    assert mixture.shares([1, 1, 1], 10) == [4, 3, 3]
    assert mixture.shares([0, 5], 4) == [0, 4]
    assert mixture.shares([100, 1], 8, temperature=1e9) == [4, 4]
    assert mixture.shares([100, 1], 8, weights=[1, 3]) == [2, 6]


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=9), st.integers(1, 500))
def test_shares_fill_the_batch_and_are_within_one(sizes, batch):
    if not any(sizes):
        return
    counts = mixture.shares(sizes, batch)
    assert sum(counts) == batch
    exact = np.array(sizes) / sum(sizes) * batch
    assert (np.abs(np.array(counts) - exact) < 1).all()


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [([0, 0], None), ([1, 2], [0, 0]), ([1], [-1]), ([1, 2], [1]), ([1], [np.nan])],
)
def test_impossible_shares(sizes, weights):
    with pytest.raises(UserError):
        mixture.shares(sizes, 4, weights=weights)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(0, 1000))
def test_a_step_depends_on_seed_and_number_alone(seed, step):
    one = mixture.Mixture([7, 40], 8, seed=seed)
    other = mixture.Mixture([7, 40], 8, seed=seed)
    for earlier in range(3):
        other.rows(earlier)
    assert one.rows(step) == other.rows(step)


def test_every_row_once_an_epoch():
    mix = mixture.Mixture([10, 30], 8, seed=3)
    assert mix.counts == [2, 6]
    for stratum, size in ((0, 10), (1, 30)):
        rows = [row for step in range(15) for s, row in mix.rows(step) if s == stratum]
        for epoch in range(len(rows) // size):
            part = rows[epoch * size : (epoch + 1) * size]
            assert sorted(part) == list(range(size))
        assert rows[:size] != rows[size : 2 * size]


def test_other_seeds_and_strata_have_other_orders():
    orders = {
        tuple(mixture.Mixture([50, 50], 100, seed=seed).rows(0)[half : half + 50])
        for seed in (0, 1)
        for half in (0, 50)
    }
    assert len({tuple(row for _, row in order) for order in orders}) == 4


def test_each_step_has_the_same_composition():
    mix = mixture.Mixture([3, 50, 11], 16, weights=[1, 1, 2], seed=0)
    for step in range(5):
        counts = collections.Counter(stratum for stratum, _ in mix.rows(step))
        assert [counts[i] for i in range(3)] == mix.counts == [4, 4, 8]


def test_blocks_come_from_one_set():
    counts = mixture.shares([1000, 500, 90, 3], 64, block=8)
    assert sum(counts) == 64 and all(count % 8 == 0 and count for count in counts)
    assert counts == [32, 16, 8, 8]  # a block for the smallest, the others in proportion
    assert mixture.shares([1000, 500, 0], 64, block=8) == [40, 24, 0]
    assert mixture.shares([10, 10], 16, weights=[3, 1], block=4) == [12, 4]
    for batch, block in ((64, 7), (64, 32)):
        with pytest.raises(UserError, match=f"config.data.block={block}"):
            mixture.shares([1000, 500, 90], batch, block=block)
