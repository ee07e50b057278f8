"""The step of stage 2 on a tiny LLaVA: chunks, devices, dropout, an explicit gradient cache."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llava
import tolerances
from flax import nnx

from unime_jax import losses, sharding, steps
from unime_jax.types import unflatten

ATOL = 1e-5


def one_step(batch, *, mesh=None, objective=None, **options):
    """Returns loss and changed adapters after a step."""
    state, frozen, step = tiny_llava.parts(objective, mesh=mesh, **options)
    placed = batch if mesh is None else steps.place_batch(batch, mesh)
    state, metrics = step(state, frozen, placed)
    return {k: float(v) for k, v in metrics.items()}, jax.device_get(state.trainable)


@pytest.fixture(scope="module")
def whole():
    """A step without chunks, with dropout."""
    return one_step(tiny_llava.batch(), dropout=True)


def assert_same(found, expected):
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], abs=ATOL)
    norm = expected[0]["gradient_norm"]
    assert found[0]["gradient_norm"] == pytest.approx(norm, rel=tolerances.GRADIENT)
    assert any(np.abs(value).max() > 0 for value in expected[1].values())
    for path, value in expected[1].items():
        np.testing.assert_allclose(found[1][path], value, atol=ATOL, err_msg=path)


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_change_nothing(whole, chunk):
    """Neither loss nor adapters; a row loses the same inputs to dropout in any chunk."""
    assert_same(one_step(tiny_llava.batch(), dropout=True, chunk=chunk), whole)


def test_eight_devices_equal_one(whole):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    assert_same(one_step(tiny_llava.batch(), dropout=True, chunk=8, mesh=mesh), whole)


def test_gradients_are_those_of_an_explicit_gradient_cache():
    """Pass one: embeddings. Pass two: their gradients, pulled back row by row."""
    graphdef, trainable, frozen = tiny_llava._model(False)
    batch = dataclasses.replace(tiny_llava.batch(), sets=None)
    trainable = jax.tree.map(jnp.asarray, trainable)

    def embed(trainable, group):
        return nnx.merge(graphdef, unflatten({**frozen, **trainable})).embed(group)

    def objective(query, target):
        return losses.hard_negative_info_nce(
            query, target, temperature=0.1, k=4, margin=0.1, target_ids=batch.target_ids
        )[0]

    run = jax.jit(embed)
    sides = [
        jnp.concatenate([run(trainable, group) for group in groups])[order]
        for groups, order in (
            (batch.query, batch.query_order),
            (batch.target, batch.target_order),
        )
    ]
    cached = jax.grad(objective, (0, 1))(*sides)

    @jax.jit
    def pull(trainable, group, grads):
        return jax.vjp(lambda t: embed(t, group), trainable)[1](grads)[0]

    total = jax.tree.map(jnp.zeros_like, trainable)
    for groups, order, grads in (
        (batch.query, batch.query_order, cached[0]),
        (batch.target, batch.target_order, cached[1]),
    ):
        own = jnp.zeros_like(grads).at[order].set(grads)
        start = 0
        for group in groups:
            part = own[start : start + group.rows]
            start += group.rows
            total = jax.tree.map(jnp.add, total, pull(trainable, group, part))
    step = steps.loss_and_gradients(graphdef, _as_objective(objective), chunk=4)
    _, grads = jax.jit(step)(trainable, frozen, batch, jax.random.key(0))
    tolerances.assert_gradients_near(grads, total)


def _as_objective(objective):
    return lambda sides, batch, key: (objective(*sides), {})


def collectives(text: str) -> list[tuple[str, str]]:
    """Lists (kind, result type) of every collective in a compiled program."""
    pattern = r"= (\S+) (all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    return [(kind, shape) for shape, kind in re.findall(pattern, text)]


def test_embeddings_are_gathered_once_a_side_and_activations_stay():
    mesh = sharding.make_mesh(fsdp=8)
    batch = tiny_llava.small_batch()
    state, frozen, step = tiny_llava.parts(mesh=mesh, chunk=8)
    text = step.lower(state, frozen, steps.place_batch(batch, mesh)).compile().as_text()
    found = collectives(text)
    embeddings = [
        shape for _, shape in found if re.match(rf"f32\[8,\d+,{tiny_llava.WIDTH}\]", shape)
    ]
    assert len(embeddings) == 2, found
    kinds = {kind for kind, _ in found}
    assert kinds == {"all-gather"}, found  # no reshuffling, no weights' gradients but sums
    weights = {tuple(x.shape[-2:]) for path, x in frozen.items() if x.ndim > 1}
    for _, shape in found:
        sizes = tuple(map(int, re.match(r"\w+\[([\d,]*)\]", shape).group(1).split(",")))
        assert shape in embeddings or sizes[-2:] in weights, f"{shape} is no weight"
