"""Mining and the loss over hard negatives against a slow oracle, and their contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_losses import HARD, HARD_LOSS, HARD_LOSS_AND_GRADIENTS, MINE, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unime_jax import losses


def oracle_mine(similarity, k, margin, blocked=None):
    """The contract of `mine_hard_negatives`, one row and one candidate at a time."""
    rows = len(similarity)
    indices, valid = np.zeros((rows, k), np.int32), np.zeros((rows, k), bool)
    for i in range(rows):
        limit = np.float32(similarity[i, i] + np.float32(margin))
        survivors = [
            j
            for j in range(rows)
            if j != i
            and not similarity[i, j] > limit
            and not (blocked is not None and blocked[i, j])
        ]
        survivors.sort(key=lambda j: (-similarity[i, j], j))
        for slot in range(k if survivors else 0):
            indices[i, slot] = survivors[slot % len(survivors)]
            valid[i, slot] = slot < len(survivors)
    return indices, valid


def oracle_loss(query, target, temperature, k, margin, shortage, ids=None):
    """The value of `hard_negative_info_nce` in f64 from the f32 mining of the oracle."""
    similarity = np.asarray(losses._similarity(query, target))
    blocked = None if ids is None else ids[:, None] == ids[None, :]
    indices, valid = oracle_mine(similarity, k, margin, blocked)
    total = 0.0
    for i, row in enumerate(similarity.astype(np.float64)):
        slots = [j for j in range(k) if valid[i, j] or (shortage == "duplicate" and valid[i, 0])]
        logits = np.array([row[i], *(row[indices[i, j]] for j in slots)]) / temperature
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[0]
    return total / len(similarity)


@st.composite
def mining_problems(draw):
    rows = draw(st.sampled_from([1, 2, 7]))  # few shapes: each one compiles
    # Few distinct values, -0. among them, so that ties and exact hits on the margin are common.
    values = st.sampled_from([-1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 0.75, 1.0])
    similarity = draw(hnp.arrays(np.float32, (rows, rows), elements=values))
    blocked = draw(hnp.arrays(bool, (rows, rows)) | st.just(np.zeros((rows, rows), bool)))
    margin = draw(st.sampled_from([-0.5, -0.25, 0.0, 0.25, 2.0]))
    return similarity, draw(st.sampled_from([1, 4])), margin, blocked


@settings(max_examples=150, deadline=None)
@given(mining_problems())
def test_mining_equals_oracle(problem):
    similarity, k, margin, blocked = problem
    indices, valid = MINE(similarity, k=k, margin=margin, blocked=blocked)
    want_indices, want_valid = oracle_mine(similarity, k, margin, blocked)
    np.testing.assert_array_equal(indices, want_indices)
    np.testing.assert_array_equal(valid, want_valid)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([1, 9]),
    k=st.sampled_from([2, 10]),
    margin=st.sampled_from([-0.3, -0.1, 0.0, 0.1]),
    shortage=st.sampled_from(losses.SHORTAGES),
    distinct=st.integers(1, 20),
)
def test_hard_negative_loss_equals_oracle(seed, rows, k, margin, shortage, distinct):
    query, target = unit_rows(seed, rows, 6), unit_rows(seed + 1, rows, 6)
    ids = np.random.default_rng(seed).integers(0, distinct, rows).astype(np.int32)
    value, _ = HARD_LOSS(
        query, target, temperature=0.1, k=k, margin=margin, shortage=shortage, target_ids=ids
    )
    want = oracle_loss(query, target, 0.1, k, margin, shortage, ids)
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)


def test_mining_by_hand():
    similarity = np.array(
        [
            [0.5, 0.7, 0.2, 0.2],  # 1 is too similar; 2 and 3 tie
            [0.1, 0.9, 0.3, 0.0],
            [0.9, 0.9, 0.1, 0.9],  # everything is too similar
            [0.4, 0.1, 0.5, 0.3],  # 2 is exactly at the margin in f32? no: above it
        ],
        np.float32,
    )
    indices, valid = MINE(similarity, k=4, margin=0.1)
    np.testing.assert_array_equal(indices[:3], [[2, 3, 2, 3], [2, 0, 3, 2], [0, 0, 0, 0]])
    np.testing.assert_array_equal(valid.sum(axis=1), [2, 3, 0, 2])


def test_gradients_touch_picked_targets_only():
    query, target = unit_rows(1, 10, 16), unit_rows(2, 10, 16)
    _, (grad, _) = HARD_LOSS_AND_GRADIENTS(query, target, **HARD)
    # The targets are linearly independent, so the gradient of a query names those it was made of.
    weights = np.asarray(grad, np.float64) @ np.linalg.pinv(target.astype(np.float64))
    indices, _ = oracle_mine(np.asarray(losses._similarity(query, target)), 3, 0.1)
    for i in range(10):
        assert set(np.flatnonzero(np.abs(weights[i]) > 1e-5)) == {i, *indices[i]}


def test_gradient_equals_finite_differences():
    query, target = unit_rows(3, 8, 5), unit_rows(4, 8, 5)
    direction = unit_rows(5, 8, 5)

    def loss(query, target):
        return HARD_LOSS(query, target, **HARD)[0]

    _, grads = HARD_LOSS_AND_GRADIENTS(query, target, **HARD)
    for side, args in enumerate([(query, target), (query, target)]):
        moved = [list(args), list(args)]
        moved[0][side], moved[1][side] = (args[side] + h * direction for h in (1e-3, -1e-3))
        slope = (float(loss(*moved[0])) - float(loss(*moved[1]))) / 2e-3
        assert float((grads[side] * direction).sum()) == pytest.approx(slope, rel=5e-3)


@pytest.mark.parametrize("shortage", losses.SHORTAGES)
def test_rows_without_candidates_cost_nothing_but_count_in_the_mean(shortage):
    # Two equal pairs: with target ids, rows 0 and 1 block one another; row 2 has both.
    query = unit_rows(6, 3, 4)
    target = np.stack([query[0], query[0], query[2]])
    ids = np.array([7, 7, 7], np.int32)
    (value, metrics), (grad, _) = HARD_LOSS_AND_GRADIENTS(
        query, target, shortage=shortage, target_ids=ids, **HARD
    )
    assert value == 0 and metrics["empty_rows"] == 3 and metrics["short_rows"] == 3
    assert metrics["hard_negative_cosine"] == 0
    np.testing.assert_array_equal(grad, 0)

    ids = np.array([7, 7, 8], np.int32)
    value, metrics = HARD_LOSS(
        query, target, shortage=shortage, target_ids=ids, temperature=0.1, k=1, margin=2.0
    )
    want = oracle_loss(query, target, 0.1, 1, 2.0, shortage, ids)
    np.testing.assert_allclose(value, want, rtol=1e-5)


def test_easy_negatives_are_the_least_similar_survivors():
    query, target = unit_rows(9, 12, 6), unit_rows(10, 12, 6)
    easy, metrics = HARD_LOSS(query, target, negatives="easy", **HARD)
    hard, hard_metrics = HARD_LOSS(query, target, **HARD)
    similarity = np.asarray(losses._similarity(query, target))
    mask = ~np.eye(12, dtype=bool) & (similarity <= np.diag(similarity)[:, None] + 0.1)
    picked = [np.sort(row[keep])[:3] for row, keep in zip(similarity, mask, strict=True)]
    np.testing.assert_allclose(
        metrics["hard_negative_cosine"], np.concatenate(picked).mean(), rtol=1e-5
    )
    assert easy < hard and metrics["hard_negative_cosine"] < hard_metrics["hard_negative_cosine"]


def test_random_negatives_follow_the_key_and_never_bring_back_what_is_out():
    query, target = unit_rows(11, 16, 6), unit_rows(12, 16, 6)
    ids = (np.arange(16) // 2).astype(np.int32)
    arguments = dict(HARD, negatives="random", target_ids=ids)
    values = [
        float(HARD_LOSS(query, target, key=jax.random.key(s), **arguments)[0]) for s in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]

    similarity = losses._similarity(query, target)
    out = losses._excluded(similarity, 0.1, losses._same_target(ids))
    counts = np.zeros((16, 16), int)
    pick = jax.jit(lambda score: losses._pick(score, out, 3))
    for score in jax.random.uniform(jax.random.key(0), (60, *similarity.shape)):
        indices, valid = pick(score)
        np.add.at(counts, (np.arange(16)[:, None], np.asarray(indices)), np.asarray(valid))
    assert not counts[np.asarray(out)].any()
    assert counts[~np.asarray(out)].all()
    with pytest.raises(ValueError, match="key"):
        HARD_LOSS(query, target, **arguments)


def test_mask_and_duplicate_differ_only_on_short_rows():
    query, target = unit_rows(13, 5, 6), unit_rows(14, 5, 6)
    full = [
        HARD_LOSS(query, target, temperature=0.1, k=4, margin=2.0, shortage=s)[0]
        for s in losses.SHORTAGES
    ]
    short = [
        HARD_LOSS(query, target, temperature=0.1, k=9, margin=2.0, shortage=s)[0]
        for s in losses.SHORTAGES
    ]
    assert full[0] == full[1] == short[1] and short[0] > short[1]


def test_a_sharded_batch_gives_the_same_loss_and_gradients():
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("needs several devices")
    query, target = unit_rows(23, 32, 16), unit_rows(24, 32, 16)
    ids = (np.arange(32) // 2).astype(np.int32)
    step = jax.jit(
        jax.value_and_grad(
            lambda q, t, i: losses.hard_negative_info_nce(q, t, target_ids=i, **HARD)[0],
            argnums=(0, 1),
        )
    )
    rows = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(devices), ("data",)), jax.sharding.PartitionSpec("data")
    )
    want, want_grads = step(query, target, ids)
    got, grads = step(*(jax.device_put(x, rows) for x in (query, target, ids)))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for g, w in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-6)


def test_nothing_larger_than_the_similarity_matrix_is_made():
    rows, width = 64, 8
    arguments = dict(temperature=0.1, k=16, margin=0.1)
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
    program = jax.make_jaxpr(
        jax.grad(
            lambda q, t, i: HARD_LOSS(q, t, target_ids=i, **arguments)[0],
            argnums=(0, 1),
        )
    )(x, x, ids)
    sizes = [v.aval.size for eqn in program.jaxpr.eqns for v in eqn.outvars]
    assert max(sizes) <= rows * rows


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(shortage="repeat"), "shortage must be one of duplicate, mask"),
        (dict(negatives="soft"), "negatives must be one of hard, random, easy"),
        (dict(k=0), "k must be at least 1"),
    ],
)
def test_impossible_options_are_refused(arguments, message):
    x = unit_rows(22, 4, 4)
    with pytest.raises(ValueError, match=message):
        HARD_LOSS(x, x, **(HARD | arguments))


def test_statistics_by_set_are_those_of_its_rows():
    query, target = (unit_rows(seed, 12, 6) for seed in (5, 6))
    sets = np.array([0, 1, 1, 0, 2, 0, 1, 2, 2, 2, 0, 0])
    options = {"temperature": 0.1, "k": 5, "margin": 0.2}
    _, metrics = losses.hard_negative_info_nce(
        query, target, sets=sets, set_names=("a", "b", "c", "none"), **options
    )
    similarity = query @ target.T
    positive = np.diag(similarity)
    indices, valid = MINE(similarity, k=5, margin=0.2)
    picked = np.take_along_axis(similarity, np.asarray(indices), 1)
    filtered = (similarity > positive[:, None] + 0.2).any(1)
    for number, name in enumerate("abc"):
        own = sets == number
        ok = np.asarray(valid)[own]
        expected = {
            "filtered_share": filtered[own].mean(),
            "short_share": (ok.sum(1) < 5).mean(),
            "positive_cosine": positive[own].mean(),
            "hard_negative_cosine": picked[own][ok].mean(),
        }
        for key, value in expected.items():
            np.testing.assert_allclose(metrics[f"{key}/{name}"], value, atol=1e-6, err_msg=key)
    assert metrics["filtered_share/none"] == 0
    plain = losses.hard_negative_info_nce(query, target, **options)[1]
    assert {k: float(v) for k, v in metrics.items() if "/" not in k} == {
        k: float(v) for k, v in plain.items()
    }
