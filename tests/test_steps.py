"""The step: chunking changes nothing, gradients are the full batch's, devices agree, it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import nnx

from unime_jax import losses, models, optim, sharding, steps
from unime_jax.models import lora
from unime_jax.types import flatten, unflatten


def parts(chunk=0, *, mesh=None, dropout=False, stage="contrast", seed=0):
    graphdef, state = nnx.split(toy.ToyModel(rngs=nnx.Rngs(0)))
    trainable, frozen = optim.split_trainable(flatten(nnx.to_pure_dict(state)), ["kernel"])
    schedule = optax.constant_schedule(1e-2)
    optimizer = optim.make_optimizer(schedule)
    objective = steps.make_objective(stage, temperature=0.1, k=4)
    step = steps.make_train_step(
        graphdef, objective, optimizer, schedule=schedule, seed=seed, chunk=chunk,
        dropout=dropout, mesh=mesh,
    )  # fmt: skip
    state = steps.create_state(trainable, optimizer, mesh=mesh)
    return graphdef, state, frozen, step


def test_loss_and_gradient_are_those_of_the_plain_formula():
    graphdef, state, frozen, step = parts(chunk=4)
    batch = toy.batch()
    before = state.trainable["kernel"] + 0

    def plain(kernel):
        model = nnx.merge(graphdef, unflatten({**frozen, "kernel": kernel}))
        query = jnp.concatenate([model.embed(g) for g in batch.query])[batch.query_order]
        target = jnp.concatenate([model.embed(g) for g in batch.target])[batch.target_order]
        return losses.hard_negative_info_nce(
            query, target, temperature=0.1, k=4, margin=0.1, target_ids=batch.target_ids
        )[0]

    loss, grad = jax.jit(jax.value_and_grad(plain))(before)
    _, metrics = step(state, frozen, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], jnp.linalg.norm(grad), rtol=1e-5)


@functools.cache
def three_steps(chunk):
    _, state, frozen, step = parts(chunk=chunk)
    for seed in range(3):
        state, metrics = step(state, frozen, toy.batch(seed=seed))
    return metrics["loss"], state.trainable["kernel"]


@pytest.mark.parametrize("chunk", [3, 16])  # groups hold 7 and 9 rows
def test_chunking_changes_nothing(chunk):
    (loss, kernel), (expected, expected_kernel) = three_steps(chunk), three_steps(0)
    np.testing.assert_allclose(expected, loss, rtol=1e-5)
    np.testing.assert_allclose(expected_kernel, kernel, atol=1e-5)


def test_own_rows_are_placed_as_whole_batches_are():
    """Of one process all rows are its own; groups hold 7 + 9, 9 and 7, on eight devices."""
    mesh, batch = sharding.make_mesh(data=2, fsdp=4), toy.batch(16)
    batch = dataclasses.replace(batch, target=(toy.inputs(9, 4, seed=5), batch.target[1]))
    shapes = {"query": [(7, 4, 0), (9, 7, 0)], "target": [(9, 4, 0), (7, 3, 0)], "negative": []}
    whole, own = steps.place_batch(batch, mesh), steps.place_batch(batch, mesh, shapes)
    assert [group.rows for group in whole.query] == [16, 16, 8] and whole.target == ()
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, whole, own))
    jax.tree.map(np.testing.assert_array_equal, whole, own)


def test_eight_devices_equal_one():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    results = []
    for chosen in (None, mesh):
        _, state, frozen, step = parts(chunk=8, mesh=chosen)
        for seed in range(2):
            batch = toy.batch(32, seed=seed)
            batch = batch if chosen is None else steps.place_batch(batch, chosen)
            state, metrics = step(state, frozen, batch)
        results.append((metrics["loss"], state.trainable["kernel"]))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-5)


@pytest.mark.slow
def test_a_decoder_split_over_three_axes_equals_one_device():
    """Two key/value heads of four, adapters, rows that do not divide; heads over tensor."""
    config = {
        "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": True,
    }  # fmt: skip
    model = models.build(config, rngs=nnx.Rngs(0))
    lora.attach(
        model, rank=4, alpha=8, dropout=0.0, targets=".*(q|v|up|down)_proj$", rngs=nnx.Rngs(1)
    )
    graphdef, state = nnx.split(model)
    params = {path: np.asarray(x) for path, x in flatten(nnx.to_pure_dict(state)).items()}
    for number, path in enumerate(path for path in params if path.endswith("lora_B")):
        shape = params[path].shape  # zeros would leave A without a gradient
        params[path] = np.random.default_rng(number).normal(0, 0.1, shape).astype(np.float32)
    results = []
    for mesh in (None, sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        trainable, frozen = optim.split_trainable(params, ["lora_[AB]$"])
        schedule = optax.constant_schedule(1e-2)
        optimizer = optax.sgd(schedule)  # whose updates are the gradients
        step = steps.make_train_step(
            graphdef,
            steps.make_objective("contrast", temperature=0.1, k=4),
            optimizer,
            schedule=schedule,
            seed=0,
            mesh=mesh,
        )
        batch = toy.batch()
        if mesh is not None:
            place = sharding.sharding_of(mesh)
            frozen = {k: jax.device_put(x, place(k, x.shape)) for k, x in frozen.items()}
            batch = steps.place_batch(batch, mesh)
            split = [x.sharding.spec for k, x in frozen.items() if k.endswith("k_proj/kernel")]
            assert split and all("tensor" in spec for spec in split)
        state = steps.create_state(jax.tree.map(jnp.asarray, trainable), optimizer, mesh=mesh)
        state, metrics = step(state, frozen, batch)
        results.append((metrics["loss"], metrics["gradient_norm"], state.trainable))
    (loss, norm, expected), (found_loss, found_norm, found) = jax.device_get(results)
    assert norm > 0.01 and any(np.abs(expected[k] - params[k]).max() > 1e-5 for k in expected)
    np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(found_norm, norm, rtol=1e-5)
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=0, atol=1e-6, err_msg=path)


def test_a_step_compiles_once():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    _, state, frozen, step = parts(mesh=mesh)
    for seed in range(3):
        state, _ = step(state, frozen, steps.place_batch(toy.batch(16, seed=seed), mesh))
    assert step._cache_size() == 1


def test_dropout_is_a_function_of_seed_and_step():
    def losses_of(seed):
        _, state, frozen, step = parts(dropout=True, seed=seed)
        out = []
        for _ in range(2):
            state, metrics = step(state, frozen, toy.batch())
            out.append(float(metrics["loss"]))
        return out

    assert losses_of(0) == losses_of(0)
    assert losses_of(0) != losses_of(1)


@pytest.mark.parametrize("stage", ["contrast", "align", "distill"])
def test_every_stage_learns(stage):
    _, state, frozen, step = parts(stage=stage)
    batch = toy.batch()
    if stage != "contrast":
        vectors = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        batch = dataclasses.replace(batch, target=(), target_order=None, vectors=vectors)
    history = []
    for _ in range(60):
        state, metrics = step(state, frozen, batch)
        history.append(float(metrics["loss"]))
    assert history[-1] < 0.8 * history[0]
    assert int(state.step) == 60


def test_k_zero_is_plain_info_nce():
    rng = np.random.default_rng(0)
    query, target = (jnp.asarray(x) for x in rng.normal(size=(2, 8, 4)).astype(np.float32))
    objective = steps.make_objective("contrast", temperature=0.1, k=0)
    batch = dataclasses.replace(toy.batch(8), target_ids=None)
    loss, _ = objective([query, target], batch, jax.random.key(0))
    expected, _ = losses.info_nce(query, target, temperature=0.1)
    np.testing.assert_allclose(loss, expected)


@pytest.mark.parametrize(
    ("changes", "drawn"),
    [
        ({}, ""),
        ({"negatives": "random"}, "random negatives"),
        ({"negatives": "random", "k": 0}, ""),
        ({"negatives": "random", "feature_dropout": 0.1}, "dropout masks and random negatives"),
    ],
)
def test_what_is_drawn_by_groups(changes, drawn):
    loss = {"k": 8, "negatives": "hard"}
    train = {"feature_dropout": 0.0, "adapters": {"rank": 8, "dropout": 0.0}}
    for section in (loss, train):
        section |= {key: changes[key] for key in section.keys() & changes.keys()}
    assert steps.drawn_by_groups({"stage": "contrast", "loss": loss, "train": train}) == drawn
