"""The losses against the published code's values, a slow oracle, and their own contract."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unime_jax import losses

GOLDEN = pathlib.Path(__file__).parent / "golden" / "losses.safetensors"


def golden_cases():
    from safetensors.numpy import load_file

    cases = {}
    for name, value in load_file(GOLDEN).items():
        case, key = name.split(".")
        cases.setdefault(case, {})[key] = value[0] if value.shape == (1,) else value
    return cases


CASES = golden_cases()
MINE = jax.jit(losses.mine_hard_negatives, static_argnames="k")
HARD_LOSS = jax.jit(losses.hard_negative_info_nce, static_argnames=("k", "shortage", "negatives"))
INFO_NCE = jax.jit(losses.info_nce)
DISTILL = jax.jit(losses.distill_kl, static_argnames=("direction", "diagonal"))


# ---------------------------------------------------------------- slow oracle


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


def unit_rows(seed, rows, width, spread=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)) * spread + rng.normal(size=width)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


# ---------------------------------------------------------------- golden values and gradients


def hard_arguments(case, shortage):
    return dict(
        temperature=float(case["temperature"]),
        k=int(case["top_k"]),
        margin=float(case["margin"]),
        shortage=shortage,
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shortage,suffix", [("duplicate", "duplicate"), ("mask", "masked")])
def test_hard_negative_loss_equals_published_code(name, shortage, suffix):
    case = CASES[name]

    def loss(query, target):
        return HARD_LOSS(query, target, **hard_arguments(case, shortage))

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        jnp.asarray(case["query"]), jnp.asarray(case["target"])
    )
    np.testing.assert_allclose(value, case[f"loss_{suffix}"], rtol=2e-6)
    for got, side in zip(grads, ["query", "target"], strict=True):
        want = case[f"grad_{side}_{suffix}"]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=4e-6 * np.abs(want).max())
    survivors, k = case["num_survivors"], int(case["top_k"])
    assert metrics["short_rows"] == (survivors < k).sum()
    assert metrics["empty_rows"] == (survivors == 0).sum()
    assert metrics["filtered_share"] == pytest.approx((case["num_filtered"] > 0).mean())
    assert case["min_valid_negatives"] == survivors.min()


@pytest.mark.parametrize("name", CASES)
def test_released_loss_agrees_where_no_row_is_short(name):
    case = CASES[name]
    value, metrics = HARD_LOSS(case["query"], case["target"], **hard_arguments(case, "duplicate"))
    agrees = abs(float(value) - case["reference_loss"]) < 1e-5
    assert agrees == (metrics["short_rows"] == 0)


@pytest.mark.parametrize("name", CASES)
def test_mined_rows_have_the_published_number_of_survivors(name):
    case = CASES[name]
    similarity = losses._similarity(case["query"], case["target"])
    _, valid = losses.mine_hard_negatives(
        similarity, k=len(similarity), margin=float(case["margin"])
    )
    np.testing.assert_array_equal(valid.sum(axis=1), case["num_survivors"])


def kl_gradient_f64(case):
    """The gradient by hand: softmax differences through both factors of the cosines."""
    student, teacher = (case[f"kl_{name}"].astype(np.float64) for name in ("student", "teacher"))
    weights = [np.exp((x @ x.T) / float(case["temperature"])) for x in (teacher, student)]
    p, q = (w / w.sum(axis=1, keepdims=True) for w in weights)
    outer = (q - p) / (len(student) * float(case["temperature"]))
    return (outer + outer.T) @ student


@pytest.mark.parametrize("name", CASES)
def test_kl_equals_published_value_and_gradient(name):
    case = CASES[name]

    def loss(student):
        return DISTILL(student, case["kl_teacher"], temperature=float(case["temperature"]))[0]

    value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(case["kl_student"]))
    np.testing.assert_allclose(value, case["kl_loss"], rtol=5e-6)
    # The golden gradient is itself an f32 result, up to 6e-5 of its largest entry off; f64 is not.
    golden, exact = case["kl_grad_student"], kl_gradient_f64(case)
    np.testing.assert_allclose(grad, golden, atol=1e-4 * np.abs(exact).max())
    np.testing.assert_allclose(grad, exact, atol=2e-5 * np.abs(exact).max())


@pytest.mark.parametrize("name", CASES)
def test_info_nce_equals_published_value(name):
    case = CASES[name]
    value, _ = INFO_NCE(case["query"], case["target"], temperature=float(case["temperature"]))
    np.testing.assert_allclose(value, case["infonce_loss"], rtol=2e-6)


# ---------------------------------------------------------------- mining, against the oracle


@st.composite
def mining_problems(draw):
    rows = draw(st.sampled_from([1, 2, 5, 9]))  # few shapes: each one compiles
    # Few distinct values, -0. among them, so that ties and exact hits on the margin are common.
    values = st.sampled_from([-1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 0.75, 1.0])
    similarity = draw(hnp.arrays(np.float32, (rows, rows), elements=values))
    blocked = draw(hnp.arrays(bool, (rows, rows)) | st.just(np.zeros((rows, rows), bool)))
    margin = draw(st.sampled_from([-0.5, -0.25, 0.0, 0.25, 2.0]))
    return similarity, draw(st.sampled_from([1, 4, 12])), margin, blocked


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
    rows=st.sampled_from([1, 4, 11]),
    k=st.sampled_from([2, 12]),
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
    indices, valid = losses.mine_hard_negatives(similarity, k=4, margin=0.1)
    np.testing.assert_array_equal(indices[:3], [[2, 3, 2, 3], [2, 0, 3, 2], [0, 0, 0, 0]])
    np.testing.assert_array_equal(valid.sum(axis=1), [2, 3, 0, 2])


# ---------------------------------------------------------------- the contract beyond the goldens


HARD = dict(temperature=0.1, k=3, margin=0.1)


def test_gradients_touch_picked_targets_only():
    query, target = unit_rows(1, 10, 16), unit_rows(2, 10, 16)
    grad = jax.jit(jax.grad(lambda q: HARD_LOSS(q, target, **HARD)[0]))(query)
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

    for side, args in enumerate([(query, target), (query, target)]):
        grad = jax.grad(loss, argnums=side)(*map(jnp.asarray, args))
        moved = [list(args), list(args)]
        moved[0][side], moved[1][side] = (args[side] + h * direction for h in (1e-3, -1e-3))
        slope = (float(loss(*moved[0])) - float(loss(*moved[1]))) / 2e-3
        assert float((grad * direction).sum()) == pytest.approx(slope, rel=5e-3)


@pytest.mark.parametrize("shortage", losses.SHORTAGES)
def test_rows_without_candidates_cost_nothing_but_count_in_the_mean(shortage):
    # Two equal pairs: with target ids, rows 0 and 1 block one another; row 2 has both.
    query = unit_rows(6, 3, 4)
    target = np.stack([query[0], query[0], query[2]])
    ids = np.array([7, 7, 7], np.int32)
    value, metrics = HARD_LOSS(query, target, shortage=shortage, target_ids=ids, **HARD)
    grad = jax.grad(lambda q: HARD_LOSS(q, target, shortage=shortage, target_ids=ids, **HARD)[0])(
        jnp.asarray(query)
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


def test_equal_targets_are_no_negatives_in_info_nce():
    query, target = unit_rows(7, 4, 6), unit_rows(8, 4, 6)
    target[2] = target[1]
    ids = np.array([0, 1, 1, 2], np.int32)
    value, metrics = INFO_NCE(query, target, temperature=0.1, target_ids=ids)
    similarity = query.astype(np.float64) @ target.T
    rows = []
    for i in range(4):
        kept = [j for j in range(4) if j == i or ids[j] != ids[i]]
        rows.append(np.log(np.exp((similarity[i, kept] - similarity[i, i]) / 0.1).sum()))
    np.testing.assert_allclose(value, np.mean(rows), rtol=1e-5)
    plain, _ = INFO_NCE(query, target, temperature=0.1)
    assert plain > value
    assert metrics["accuracy"] == np.mean(
        [
            all(similarity[i, i] > similarity[i, j] for j in range(4) if ids[j] != ids[i])
            for i in range(4)
        ]
    )


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
    for seed in range(60):
        score = jax.random.uniform(jax.random.key(seed), similarity.shape)
        indices, valid = losses._pick(score, out, 3)
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


def test_kl_of_equal_geometry_is_zero_and_directions_differ():
    student, teacher = unit_rows(15, 8, 5), unit_rows(16, 8, 7)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0].astype(np.float32)
    same, metrics = DISTILL(student, student @ rotation, temperature=0.1)
    assert abs(same) < 1e-6 and metrics["neighbour_agreement"] == 1
    forward, metrics = DISTILL(student, teacher, temperature=0.1)
    backward, _ = DISTILL(student, teacher, temperature=0.1, direction="student_to_teacher")
    p, q = (
        np.exp(x @ x.T / 0.1) / np.exp(x @ x.T / 0.1).sum(axis=1, keepdims=True)
        for x in (teacher.astype(np.float64), student.astype(np.float64))
    )
    np.testing.assert_allclose(forward, (p * np.log(p / q)).sum(axis=1).mean(), rtol=1e-4)
    np.testing.assert_allclose(backward, (q * np.log(q / p)).sum(axis=1).mean(), rtol=1e-4)
    off = ~np.eye(8, dtype=bool)
    np.testing.assert_allclose(
        metrics["student_cosine"], (student @ student.T)[off].mean(), rtol=1e-4
    )
    np.testing.assert_allclose(
        metrics["teacher_cosine"], (teacher @ teacher.T)[off].mean(), rtol=1e-4
    )


def test_no_gradient_reaches_the_teacher():
    student, teacher = unit_rows(15, 6, 5), unit_rows(16, 6, 7)
    grad = jax.grad(lambda t: DISTILL(student, t, temperature=0.1)[0])(jnp.asarray(teacher))
    np.testing.assert_array_equal(grad, 0)


def test_low_temperature_stays_finite():
    x, y = unit_rows(17, 32, 16), unit_rows(18, 32, 16)

    def total(x, y):
        return (
            DISTILL(x, y, temperature=1e-3)[0]
            + INFO_NCE(x, y, temperature=1e-3)[0]
            + HARD_LOSS(x, y, temperature=1e-3, k=40, margin=-0.2)[0]
        )

    value, grads = jax.value_and_grad(total, argnums=(0, 1))(jnp.asarray(x), jnp.asarray(y))
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


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


def test_bfloat16_vectors_are_computed_in_f32():
    x = jnp.asarray(unit_rows(19, 8, 16), jnp.bfloat16)
    y = jnp.asarray(unit_rows(20, 8, 16), jnp.bfloat16)
    for loss, arguments in [
        (losses.info_nce, {}),
        (losses.distill_kl, {}),
        (losses.hard_negative_info_nce, dict(k=3, margin=0.1)),
    ]:
        value, metrics = loss(x, y, temperature=0.02, **arguments)
        want, _ = loss(x.astype(jnp.float32), y.astype(jnp.float32), temperature=0.02, **arguments)
        assert value.dtype == jnp.float32 and value == want
        assert all(m.shape == () and m.dtype == jnp.float32 for m in metrics.values())


def test_collapsed_vectors_are_never_accurate():
    x = np.broadcast_to(unit_rows(21, 1, 8), (6, 8)).copy()
    _, metrics = HARD_LOSS(x, x, **HARD)
    assert metrics["accuracy"] == 0
    value, metrics = INFO_NCE(x, x, temperature=0.1)
    assert metrics["accuracy"] == 0
    np.testing.assert_allclose(value, np.log(6), rtol=1e-5)


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


def test_kl_without_the_diagonal_is_that_of_the_other_rows():
    student, teacher = unit_rows(17, 6, 5), unit_rows(18, 6, 7)
    value, _ = DISTILL(student, teacher, temperature=0.1, diagonal=False)
    others = ~np.eye(6, dtype=bool)
    p, q = (
        (e := np.exp((x @ x.T)[others].reshape(6, 5) / 0.1)) / e.sum(axis=1, keepdims=True)
        for x in (teacher.astype(np.float64), student.astype(np.float64))
    )
    np.testing.assert_allclose(value, (p * np.log(p / q)).sum(axis=1).mean(), rtol=1e-4)
    grad = jax.grad(lambda s: DISTILL(s, teacher, temperature=0.1, diagonal=False)[0])(student)
    assert np.isfinite(grad).all()


# ---- explicit negatives


def unit_of(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_given_negatives_are_candidates_of_every_query():
    """SimCSE's loss with hard negatives: a cross-entropy over 2 B columns."""
    rng = np.random.default_rng(0)
    query, target, negative = (unit_of(rng.normal(size=(6, 5))) for _ in range(3))
    loss, metrics = losses.info_nce(query, target, temperature=0.05, negatives=negative)
    logits = np.concatenate([query @ target.T, query @ negative.T], axis=1) / 0.05
    wanted = np.mean(np.log(np.exp(logits).sum(1)) - logits[range(6), range(6)])
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["hard_negative_cosine"], (query @ negative.T).mean(), 1e-4)
    best = np.where(np.eye(6, 12), -9, logits).max(1)
    np.testing.assert_allclose(metrics["accuracy"], (logits[range(6), range(6)] > best).mean())


def test_a_given_negative_that_is_the_target_is_left_out():
    rng = np.random.default_rng(1)
    target = unit_of(rng.normal(size=(4, 5)))
    query = unit_of(target + 0.3 * rng.normal(size=(4, 5)))  # near: the positive weighs
    ids = np.arange(4)
    negative = np.concatenate([target[1:2], unit_of(rng.normal(size=(1, 5)))])
    loss, _ = losses.info_nce(
        query, target, temperature=0.1, target_ids=ids, negatives=negative,
        negative_ids=np.array([1, 9]),
    )  # fmt: skip
    logits = np.concatenate([query @ target.T, query @ negative.T], axis=1) / 0.1
    logits[1, 4] = -np.inf
    wanted = np.mean(np.log(np.exp(logits).sum(1)) - logits[range(4), range(4)])
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_gradients_reach_the_given_negatives():
    rng = np.random.default_rng(2)
    query, target, negative = (unit_of(rng.normal(size=(4, 5))) for _ in range(3))

    def loss(negative):
        return losses.info_nce(query, target, temperature=0.5, negatives=negative)[0]

    grad = jax.grad(loss)(jnp.asarray(negative))
    step = 1e-2
    numeric = (loss(negative + step * np.eye(4, 5)) - loss(negative - step * np.eye(4, 5))) / 2
    np.testing.assert_allclose((grad * np.eye(4, 5)).sum(), numeric / step, rtol=2e-3)


# ---- statistics by set, judged negatives


def test_statistics_by_set_are_those_of_its_rows():
    query, target = (unit_rows(seed, 12, 6) for seed in (5, 6))
    sets = np.array([0, 1, 1, 0, 2, 0, 1, 2, 2, 2, 0, 0])
    options = {"temperature": 0.1, "k": 5, "margin": 0.2}
    _, metrics = losses.hard_negative_info_nce(
        query, target, sets=sets, set_names=("a", "b", "c", "none"), **options
    )
    similarity = query @ target.T
    positive = np.diag(similarity)
    indices, valid = losses.mine_hard_negatives(similarity, k=5, margin=0.2)
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


def test_judged_kl_is_the_symmetric_divergence():
    rng = np.random.default_rng(6)
    query, target = (unit_rows(seed, 5, 4) for seed in (7, 8))
    own = unit_rows(9, 15, 4).reshape(5, 3, 4)
    scores = rng.uniform(size=(5, 4)).astype(np.float32)
    scores[2, 3] = scores[4, 2:] = -np.inf
    candidates = np.concatenate([target[:, None], own], 1).astype(np.float64)
    total, agree = [], []
    for i in range(5):
        kept = np.isfinite(scores[i])
        similarity = candidates[i, kept] @ query[i]
        p, q = (np.exp(x / 0.5) / np.exp(x / 0.5).sum() for x in (scores[i, kept], similarity))
        total.append(0.5 * (p * np.log(p / q)).sum() + 0.5 * (q * np.log(q / p)).sum())
        agree.append(p.argmax() == q.argmax())
    loss, metrics = losses.judged_kl(query, target, own, scores, temperature=0.5)
    np.testing.assert_allclose(loss, np.mean(total), rtol=1e-5)
    np.testing.assert_allclose(metrics["agreement"], np.mean(agree))
    grads = jax.grad(
        lambda *x: losses.judged_kl(*x, scores, temperature=0.5)[0], argnums=(0, 1, 2)
    )(query, target, own)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in grads)
    assert np.abs(grads[2][2, 2]).max() == np.abs(grads[2][4, 1:]).max() == 0  # empty places
    best = np.concatenate([np.ones((5, 1)), np.zeros((5, 3))], 1).astype(np.float32)
    perfect, _ = losses.judged_kl(
        query, query, np.stack([-query] * 3, 1), 2 * best - 1, temperature=0.5
    )
    np.testing.assert_allclose(perfect, 0, atol=1e-6)
