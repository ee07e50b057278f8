"""The losses against the published code's values, f64 by hand, and their own contract."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_losses import (
    DISTILL,
    DISTILL_AND_GRADIENT,
    HARD,
    HARD_LOSS,
    HARD_LOSS_AND_GRADIENTS,
    INFO_NCE,
    MINE,
    unit_rows,
)

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
    (value, metrics), grads = HARD_LOSS_AND_GRADIENTS(
        case["query"], case["target"], **hard_arguments(case, shortage)
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
    _, valid = MINE(similarity, k=len(similarity), margin=float(case["margin"]))
    np.testing.assert_array_equal(valid.sum(axis=1), case["num_survivors"])


def kl_gradient_f64(case, cosines):
    """The gradient by hand: softmax differences through both factors of the cosines."""
    student, teacher = (case[f"kl_{name}"].astype(np.float64) for name in ("student", "teacher"))
    weights = [np.exp(cosines(x) / float(case["temperature"])) for x in (teacher, student)]
    p, q = (w / w.sum(axis=1, keepdims=True) for w in weights)
    outer = (q - p) / (len(student) * float(case["temperature"]))
    return (outer + outer.T) @ student


def across(vectors, rows):
    """What of the vectors is at right angles to unit rows, which is all that can turn these."""
    return vectors - (vectors * rows).sum(axis=1, keepdims=True) * rows


@pytest.mark.parametrize("name", CASES)
def test_kl_equals_published_value_and_gradient(name):
    case = CASES[name]
    (value, _), grad = DISTILL_AND_GRADIENT(
        case["kl_student"], case["kl_teacher"], temperature=float(case["temperature"])
    )
    np.testing.assert_allclose(value, case["kl_loss"], rtol=5e-6)
    # Where two rows are nearly one, the order in which an f32 product adds (the golden file's, or
    # another XLA's) moves the gradient along the rows by up to 6e-5 of its largest entry. Compared
    # closely: what is at right angles to the rows, and all of it, given the cosines as computed.
    golden, exact = case["kl_grad_student"], kl_gradient_f64(case, lambda x: x @ x.T)
    largest = np.abs(exact).max()
    np.testing.assert_allclose(grad, golden, atol=1e-4 * largest)
    student = case["kl_student"].astype(np.float64)
    np.testing.assert_allclose(across(grad, student), across(exact, student), atol=1e-5 * largest)

    def computed(rows):
        cosines = np.asarray(losses._similarity(rows, rows))
        np.testing.assert_allclose(cosines, rows @ rows.T, atol=5e-7)
        return cosines.astype(np.float64)

    np.testing.assert_allclose(grad, kl_gradient_f64(case, computed), atol=1e-5 * largest)


@pytest.mark.parametrize("name", CASES)
def test_info_nce_equals_published_value(name):
    case = CASES[name]
    value, _ = INFO_NCE(case["query"], case["target"], temperature=float(case["temperature"]))
    np.testing.assert_allclose(value, case["infonce_loss"], rtol=2e-6)


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
    grad = jax.jit(jax.grad(lambda t: DISTILL(student, t, temperature=0.1)[0]))(teacher)
    np.testing.assert_array_equal(grad, 0)


def test_low_temperature_stays_finite():
    x, y = unit_rows(17, 32, 16), unit_rows(18, 32, 16)

    def total(x, y):
        return (
            DISTILL(x, y, temperature=1e-3)[0]
            + INFO_NCE(x, y, temperature=1e-3)[0]
            + HARD_LOSS(x, y, temperature=1e-3, k=40, margin=-0.2)[0]
        )

    value, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(x, y)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_bfloat16_vectors_are_computed_in_f32():
    x = jnp.asarray(unit_rows(19, 8, 16), jnp.bfloat16)
    y = jnp.asarray(unit_rows(20, 8, 16), jnp.bfloat16)
    # Operation by operation: compiled as wholes, two programs may round differently.
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


def test_kl_without_the_diagonal_is_that_of_the_other_rows():
    student, teacher = unit_rows(17, 6, 5), unit_rows(18, 6, 7)
    value, _ = DISTILL(student, teacher, temperature=0.1, diagonal=False)
    others = ~np.eye(6, dtype=bool)
    p, q = (
        (e := np.exp((x @ x.T)[others].reshape(6, 5) / 0.1)) / e.sum(axis=1, keepdims=True)
        for x in (teacher.astype(np.float64), student.astype(np.float64))
    )
    np.testing.assert_allclose(value, (p * np.log(p / q)).sum(axis=1).mean(), rtol=1e-4)
    _, grad = DISTILL_AND_GRADIENT(student, teacher, temperature=0.1, diagonal=False)
    assert np.isfinite(grad).all()


# ---- explicit negatives


def unit_of(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_given_negatives_are_candidates_of_every_query():
    """SimCSE's loss with hard negatives: a cross-entropy over 2 B columns."""
    rng = np.random.default_rng(0)
    query, target, negative = (unit_of(rng.normal(size=(6, 5))) for _ in range(3))
    loss, metrics = INFO_NCE(query, target, temperature=0.05, negatives=negative)
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
    loss, _ = INFO_NCE(
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
        return INFO_NCE(query, target, temperature=0.5, negatives=negative)[0]

    grad = jax.jit(jax.grad(loss))(negative)
    step = 1e-2
    numeric = (loss(negative + step * np.eye(4, 5)) - loss(negative - step * np.eye(4, 5))) / 2
    np.testing.assert_allclose((grad * np.eye(4, 5)).sum(), numeric / step, rtol=2e-3)


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
    judged = jax.jit(
        jax.value_and_grad(losses.judged_kl, argnums=(0, 1, 2), has_aux=True),
        static_argnames="temperature",
    )
    (loss, metrics), grads = judged(query, target, own, scores, temperature=0.5)
    np.testing.assert_allclose(loss, np.mean(total), rtol=1e-5)
    np.testing.assert_allclose(metrics["agreement"], np.mean(agree))
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in grads)
    assert np.abs(grads[2][2, 2]).max() == np.abs(grads[2][4, 1:]).max() == 0  # empty places
    best = np.concatenate([np.ones((5, 1)), np.zeros((5, 3))], 1).astype(np.float32)
    (perfect, _), _ = judged(query, query, np.stack([-query] * 3, 1), 2 * best - 1, temperature=0.5)
    np.testing.assert_allclose(perfect, 0, atol=1e-6)
