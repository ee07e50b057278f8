"""The losses of both stages.

Every loss takes unit rows as they are (nothing is normalised again), computes in f32 whatever the
inputs' type, divides by the temperature, averages over all B rows, and returns
`(loss, metrics)` with metrics a flat dict of f32 scalars.

The arrays are global: under a mesh, row i of query and target are the i-th of the whole batch, and
XLA inserts the gathers. There is no other notion of a distributed loss here.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SHORTAGES = ("duplicate", "mask")
NEGATIVES = ("hard", "random", "easy")
DIRECTIONS = ("teacher_to_student", "student_to_teacher")

AnyArray = Array | np.ndarray
Scalar = Float[Array, ""]
Number = float | int | Scalar
LossAndMetrics = tuple[Scalar, dict[str, Scalar]]


def distill_kl(
    student: Float[AnyArray, "B E"],
    teacher: Float[AnyArray, "B Et"],
    *,
    temperature: Number,
    direction: str = "teacher_to_student",
    diagonal: bool = True,
) -> LossAndMetrics:
    """Matches the student's in-batch similarities to the teacher's.

    Rows of both similarity matrices become distributions by a softmax; the widths of student and
    teacher may differ. No gradient reaches the teacher.

    Args:
      student: unit rows.
      teacher: unit rows of the same sentences.
      temperature: of both softmaxes.
      direction: "teacher_to_student" is KL(teacher || student), "student_to_teacher" the reverse.
      diagonal: whether a row's similarity to itself, 1 in both matrices, is part of the softmax, as
        the paper writes it. At a low temperature it takes nearly all of the probability, and what
        is left to learn from is small: a 6-layer student reached a rank correlation of .12 with it
        and .48 without it after 40 steps at temperature 0.05.

    Returns:
      The mean over rows, and metrics: loss; student_cosine and teacher_cosine, the mean cosine of
      two different rows (near 1: collapsed); neighbour_agreement, the share of rows whose nearest
      other row is the teacher's choice too.

    Source: UniME, Eq. 2, which sums over rows; the mean keeps learning rate and clipping
    independent of the batch size.
    """
    _one_of("direction", direction, DIRECTIONS)
    similarity = _similarity(student, student)
    wanted = jax.lax.stop_gradient(_similarity(teacher, teacher))
    self_pair = _diagonal_mask(similarity)
    # Far below any cosine, so that its probability is 0 and its logarithm still finite.
    hidden = 0.0 if diagonal else jnp.where(self_pair, -1e9, 0.0)
    log_p = jax.nn.log_softmax(wanted / temperature + hidden, axis=-1)
    log_q = jax.nn.log_softmax(similarity / temperature + hidden, axis=-1)
    if direction == "student_to_teacher":
        log_p, log_q = log_q, log_p
    loss = jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    nearest = [jnp.argmax(jnp.where(self_pair, -jnp.inf, s), axis=-1) for s in (similarity, wanted)]
    return loss, _metrics(
        loss=loss,
        student_cosine=_masked_mean(similarity, ~self_pair),
        teacher_cosine=_masked_mean(wanted, ~self_pair),
        neighbour_agreement=jnp.mean(nearest[0] == nearest[1]),
    )


def info_nce(
    query: Float[AnyArray, "B E"],
    target: Float[AnyArray, "B E"],
    *,
    temperature: Number,
    target_ids: Int[AnyArray, "B"] | None = None,
    negatives: Float[AnyArray, "N E"] | None = None,
    negative_ids: Int[AnyArray, "N"] | None = None,
) -> LossAndMetrics:
    """Contrasts each query's own target with all others of the batch, query to target only.

    Args:
      query: unit rows.
      target: unit rows; row i is the positive of query i.
      temperature: divides the cosines.
      target_ids: rows with equal ids have the same target, which is then no negative.
      negatives: unit rows; each is one more negative of every query, as SimCSE and E5-V use the
        contradictions of NLI.
      negative_ids: ids of the negatives; one that equals the id of a query's target is no negative
        of that query.

    Returns:
      The mean over rows, and metrics: loss; positive_cosine; negative_cosine, the mean over all
      negatives; accuracy, the share of queries more similar to their positive than to every
      negative (ties lose); with `negatives`, hard_negative_cosine, the mean over those alone.
    """
    similarity = _similarity(query, target)
    negative = _others(similarity, None if target_ids is None else _same_target(target_ids))
    positive = _diagonal(similarity)
    kept = negative | _diagonal_mask(similarity)
    further = {}
    if negatives is not None:
        given = _similarity(query, negatives)
        wrong = jnp.ones(given.shape, bool)
        if target_ids is not None and negative_ids is not None:
            wrong = jnp.asarray(target_ids)[:, None] != jnp.asarray(negative_ids)[None, :]
        similarity = jnp.concatenate([similarity, given], axis=1)
        negative = jnp.concatenate([negative, wrong], axis=1)
        kept = jnp.concatenate([kept, wrong], axis=1)
        further["hard_negative_cosine"] = _masked_mean(given, wrong)
    logits = jnp.where(kept, similarity / temperature, -jnp.inf)
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) - positive / temperature)
    return loss, _metrics(
        loss=loss,
        positive_cosine=jnp.mean(positive),
        negative_cosine=_masked_mean(similarity, negative),
        accuracy=_accuracy(positive, similarity, negative),
        **further,
    )


def hard_negative_info_nce(
    query: Float[AnyArray, "B E"],
    target: Float[AnyArray, "B E"],
    *,
    temperature: Number,
    k: int,
    margin: Number,
    shortage: str = "duplicate",
    target_ids: Int[AnyArray, "B"] | None = None,
    negatives: str = "hard",
    key: Array | None = None,
    sets: Int[AnyArray, "B"] | None = None,
    set_names: tuple[str, ...] = (),
) -> LossAndMetrics:
    """Contrasts each query's positive with k negatives mined from the batch.

    What may be a negative, and in which order, is told in `mine_hard_negatives`. Mining is not
    differentiated: gradients flow through the picked similarities, to query and target. A row
    without any negative has loss 0 and still counts in the mean.

    Args:
      query: unit rows.
      target: unit rows; row i is the positive of query i.
      temperature: divides the cosines, after mining.
      k: negatives a query; may exceed B - 1.
      margin: of the false-negative filter, in cosine units.
      shortage: a query with m < k candidates repeats them in rank order ("duplicate", the paper's
        rule: earlier ranks may weigh once more than later ones) or uses only m ("mask").
      target_ids: rows with equal ids have the same target, which is then no negative.
      negatives: of the candidates take the k most similar ("hard"), the k least similar ("easy"),
        or any k, drawn anew at each call ("random"); the last two are the paper's Fig. 5.
      key: PRNG key, needed by "random" alone.
      sets: the data set of each row, a place in `set_names`; metrics are then given by set as well.
      set_names: the data sets.

    Returns:
      The mean over rows, and metrics: loss; positive_cosine; hard_negative_cosine, the mean over
      the picked negatives, each once (0 without any); filtered_share, the share of queries with at
      least one filtered false negative; short_rows and empty_rows, the number of rows with fewer
      than k candidates and with none; accuracy, the share of queries more similar to their positive
      than to every other target of the batch (ties lose). By set: filtered_share, short_share (of
      rows with fewer than k candidates), positive_cosine and hard_negative_cosine, as
      "filtered_share/NAME" and so on; a set without rows in the batch has 0.

    Source: UniME, Eqs. 3 and 4. Unlike the released loss, filtered candidates and the positive
    never come back as negatives, and equal targets can be kept out.
    """
    _one_of("shortage", shortage, SHORTAGES)
    _one_of("negatives", negatives, NEGATIVES)
    if negatives == "random" and key is None:
        raise ValueError("negatives='random' needs a PRNG key: pass key=")
    similarity = _similarity(query, target)
    blocked = None if target_ids is None else _same_target(target_ids)
    fixed = jax.lax.stop_gradient(similarity)
    out = _excluded(fixed, margin, blocked)
    score = {
        "hard": lambda: fixed,
        "easy": lambda: -fixed,
        "random": lambda: jax.random.uniform(key, fixed.shape),
    }[negatives]()
    indices, valid = _pick(score, out, k)

    positive = _diagonal(similarity)
    picked = jnp.take_along_axis(similarity, indices, axis=1)
    # Slot 0 is valid exactly where the row has a candidate; a row without is left with its
    # positive alone, whose loss and gradient are exactly 0.
    used = valid if shortage == "mask" else jnp.broadcast_to(valid[:, :1], valid.shape)
    wrong = jnp.where(used, picked / temperature, -jnp.inf)
    right = positive / temperature
    loss = jnp.mean(jax.nn.logsumexp(jnp.column_stack([right, wrong]), axis=1) - right)

    others = _others(similarity, blocked)
    filtered = jnp.any(others & out, axis=1)
    by_set = {}
    if sets is not None:
        own = jnp.arange(len(set_names))[:, None] == jnp.asarray(sets)[None, :]
        for name, values, weights in (
            ("filtered_share", filtered, jnp.ones_like(positive)),
            ("short_share", ~valid[:, -1], jnp.ones_like(positive)),
            ("positive_cosine", positive, jnp.ones_like(positive)),
            ("hard_negative_cosine", jnp.sum(picked * valid, axis=1), jnp.sum(valid, axis=1)),
        ):
            total = own @ jnp.asarray(values, jnp.float32)
            mean = total / jnp.maximum(own @ jnp.asarray(weights, jnp.float32), 1)
            by_set |= {f"{name}/{set_name}": mean[i] for i, set_name in enumerate(set_names)}
    return loss, _metrics(
        loss=loss,
        positive_cosine=jnp.mean(positive),
        hard_negative_cosine=_masked_mean(picked, valid),
        filtered_share=jnp.mean(filtered),
        short_rows=jnp.sum(~valid[:, -1]),
        empty_rows=jnp.sum(~valid[:, 0]),
        accuracy=_accuracy(positive, similarity, others),
        **by_set,
    )


def judged_kl(
    query: Float[AnyArray, "B E"],
    target: Float[AnyArray, "B E"],
    negatives: Float[AnyArray, "B k E"],
    scores: Float[AnyArray, "B k1"],
    *,
    temperature: Number,
) -> LossAndMetrics:
    """Matches each query's similarities to a judge's scores of its target and its own negatives.

    Args:
      query: unit rows.
      target: unit rows; row i is the positive of query i.
      negatives: unit rows, k of each query.
      scores: of the target and of each negative; -inf for a place left empty.
      temperature: of both softmaxes.

    Returns:
      Half of KL(judge || model) + KL(model || judge) over the 1 + k candidates, mean over rows, and
      metrics: loss; positive_cosine; hard_negative_cosine, the mean over all negatives; accuracy,
      the share of queries more similar to their target than to every negative (ties lose);
      agreement, the share whose most similar candidate has the judge's highest score.

    Source: UniME-V2 (arXiv 2510.13515), soft labels; no gradient reaches the scores.
    """
    query, target, negatives = (jnp.asarray(x, jnp.float32) for x in (query, target, negatives))
    candidates = jnp.concatenate([target[:, None], negatives], axis=1)
    similarity = jnp.einsum("ie,ike->ik", query, candidates, precision=jax.lax.Precision.HIGHEST)
    scores = jax.lax.stop_gradient(jnp.asarray(scores, jnp.float32))
    used = jnp.isfinite(scores)
    # Far below any score, so that an empty place has probability 0 and a finite logarithm.
    logits = [jnp.where(used, x / temperature, -1e9) for x in (similarity, scores)]
    log_q, log_p = (jax.nn.log_softmax(x, axis=1) for x in logits)
    difference = jnp.where(used, (jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q), 0.0)
    loss = jnp.mean(jnp.sum(difference, axis=1)) / 2
    best = jnp.argmax(logits[0], axis=1)
    return loss, _metrics(
        loss=loss,
        positive_cosine=jnp.mean(similarity[:, 0]),
        hard_negative_cosine=_masked_mean(similarity[:, 1:], used[:, 1:]),
        accuracy=_accuracy(similarity[:, 0], similarity[:, 1:], used[:, 1:]),
        agreement=jnp.mean(best == jnp.argmax(logits[1], axis=1)),
    )


def mine_hard_negatives(
    similarity: Float[AnyArray, "B B"],
    *,
    k: int,
    margin: Number,
    blocked: Bool[AnyArray, "B B"] | None = None,
) -> tuple[Int[Array, "B k"], Bool[Array, "B k"]]:
    """Picks for each query the k most similar targets that are no false negatives.

    Target j is out for query i when j == i, when `similarity[i, j] > similarity[i, i] + margin`
    (too similar to be wrong), or when `blocked[i, j]`. What is out never comes back, however few
    remain.

    Args:
      similarity: cosines, before the temperature; the diagonal holds the positives.
      k: slots a query, at least 1; may exceed B - 1.
      margin: in cosine units; negative values filter candidates below the positive too.
      blocked: True = out.

    Returns:
      indices: most similar first, ties to the lower index. With m < k survivors slot j holds
        survivor j mod m; 0 where m = 0.
      valid: `j < min(m, k)`: True where the slot holds a survivor for the first time.
      Neither is differentiable.
    """
    similarity = jax.lax.stop_gradient(jnp.asarray(similarity, jnp.float32))
    return _pick(similarity, _excluded(similarity, margin, blocked), k)


def _excluded(similarity, margin, blocked):
    """Marks the targets that can be no negative of a query, bool[B, B]."""
    out = similarity > _diagonal(similarity)[:, None] + margin
    out |= _diagonal_mask(similarity)
    return out if blocked is None else out | blocked


def _pick(score, out, k):
    """Ranks what is not out by score; see `mine_hard_negatives` for the result."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    # top_k may order -0. and 0. although they are equal.
    score = jnp.where(score == 0, 0.0, score)
    ranked = jax.lax.top_k(jnp.where(out, -jnp.inf, score), min(k, score.shape[1]))[1]
    survivors = jnp.sum(~out, axis=1, dtype=jnp.int32)[:, None]
    slots = jnp.arange(k, dtype=jnp.int32)[None, :]
    # Without survivors all of a row ties at -inf, so that its slots hold index 0.
    indices = jnp.take_along_axis(ranked, slots % jnp.maximum(survivors, 1), axis=1)
    return indices, slots < survivors


def _similarity(a, b):
    """All cosines of unit rows, at full precision where the matrix unit's default is less."""
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    return jnp.einsum("ie,je->ij", a, b, precision=jax.lax.Precision.HIGHEST)


def _same_target(target_ids):
    ids = jnp.asarray(target_ids)
    return ids[:, None] == ids[None, :]


def _diagonal_mask(matrix):
    return jnp.eye(matrix.shape[0], dtype=bool)


def _diagonal(matrix):
    """The diagonal by a masked sum: local to each row, so no gather under a mesh; exact."""
    return jnp.sum(jnp.where(_diagonal_mask(matrix), matrix, 0.0), axis=1)


def _others(matrix, blocked):
    """Marks the targets of other rows that are not blocked, bool[B, B]."""
    others = ~_diagonal_mask(matrix)
    return others if blocked is None else others & ~blocked


def _accuracy(positive, similarity, negative):
    best = jnp.max(jnp.where(negative, similarity, -jnp.inf), axis=1)
    return jnp.mean(positive > best)


def _masked_mean(values, mask):
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def _metrics(**values):
    return {
        name: jax.lax.stop_gradient(jnp.asarray(value, jnp.float32))
        for name, value in values.items()
    }


def _one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
