"""Dropout's masks: as many as asked for, and independent of one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unime_jax.models import dropout as module
from unime_jax.models.dropout import dropout

ROWS, TOKENS, WIDTH = 32, 64, 256


def lost(keys, rate, shape=(ROWS, TOKENS, WIDTH)):
    """Says which values of rows of ones are lost."""
    return np.asarray(dropout(jnp.ones(shape), keys, rate) == 0)


def correlation(first, second, rate):
    """Returns the covariance of two masks in standard errors of independent ones."""
    product = (first - rate) * (second - rate)
    return product.sum() / (rate * (1 - rate) * np.sqrt(product.size))


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_masks_look_random(rate):
    """Counts of every row, position and column, and neighbours at many distances."""
    masks = lost(jax.random.split(jax.random.key(1), ROWS), rate).astype(np.float64)
    for axes in ((), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        count = np.prod([masks.shape[axis] for axis in axes])
        far = (masks.mean(axes) - rate) ** 2 / (rate * (1 - rate) / count)
        # Sums of squares of standard normal values, each of variance 2, or more where counts are
        # small: 1 / (rate (1 - rate)) - 6 beyond that of a normal value.
        spread = np.sqrt((2 + max(0.0, 1 / (rate * (1 - rate)) - 6) / count) * far.size)
        assert abs(np.sum(far) - far.size) < 5 * spread
    for lag in (1, 2, 3, 8, 64, 128):
        assert abs(correlation(masks[..., lag:], masks[..., :-lag], rate)) < 4.5
        lag = min(lag, TOKENS // 2)
        assert abs(correlation(masks[:, lag:], masks[:, :-lag], rate)) < 4.5
    for other in range(1, 8):
        assert abs(correlation(masks[other:], masks[:-other], rate)) < 4.5


def test_neighbours_correlate_no_more_than_is_said():
    """Of Phi's width, where a mean over keys shows what is left."""
    masks = lost(jax.random.split(jax.random.key(0), ROWS), 0.05, (ROWS, TOKENS, 3072))
    pairs = np.mean(masks[:, 1:] & masks[:, :-1])  # standard error .0008 of the correlation
    assert abs(pairs - 0.05**2) / (0.05 * 0.95) < 0.006


@pytest.mark.parametrize("word", [0, 1, (0, 1)])
def test_keys_that_are_alike_have_masks_that_are_not(word):
    """Seeds, or keys that count: the words of a key are drawn from, not taken as they are."""
    words = np.zeros((ROWS, 2), np.uint32)
    words[:, word] = np.arange(ROWS).reshape(ROWS, *[1] * isinstance(word, tuple))
    masks = lost(jax.random.wrap_key_data(jnp.asarray(words)), 0.1).reshape(ROWS, -1) - 0.1
    far = masks @ masks.T / (0.09 * np.sqrt(masks.shape[1]))
    apart = far[np.tril_indices(ROWS, -1)]
    assert abs(apart).max() < 5 and 0.85 < apart.std() < 1.15


def test_a_row_has_its_mask_in_any_batch_and_one_key_serves_all_rows():
    keys = jax.random.split(jax.random.key(2), ROWS)
    masks = lost(keys, 0.3)
    np.testing.assert_array_equal(lost(keys[5:7], 0.3, (2, TOKENS, WIDTH)), masks[5:7])
    together = lost(keys[0], 0.3)
    np.testing.assert_array_equal(together[0], masks[0])  # places are counted from the first row
    assert not np.array_equal(together[1], together[0])


def test_what_is_left_is_scaled_up_in_its_dtype():
    x = jnp.full((4, 512), 3, jnp.bfloat16)
    found = dropout(x, jax.random.key(0), 0.25)
    assert found.dtype == jnp.bfloat16 and set(np.unique(found.astype(np.float32))) == {0.0, 4.0}
    np.testing.assert_array_equal(dropout(x, jax.random.key(0), 0.0), x)


def test_masks_of_two_keys_are_not_one_another_moved():
    """With the first word alone, a mask would be another's at places whose bits are flipped."""
    places, first = jnp.arange(2**14, dtype=jnp.uint32), jnp.uint32(0x9E3779B9)
    seconds = jax.random.bits(jax.random.key(0), (2,))
    flipped = 0b10110
    masks = [
        np.asarray(module._hash(places ^ there, first ^ there, second) < jnp.uint32(2**31))
        for there, second in ((0, seconds[0]), (flipped, seconds[1]))
    ]
    assert abs(correlation(*masks, 0.5)) < 4.5
