"""The small multimodal model: how images enter, and that rows keep to themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tolerances
import torch
from flax import nnx

from unime_jax import models
from unime_jax.types import ImageSpec, UserError


@pytest.fixture(scope="module")
def model():
    return parity.build(parity.SMOL)


def featurise(model, tiles):
    graphdef, params = parity.split(model)
    return np.asarray(jax.jit(lambda p, x: nnx.merge(graphdef, p).featurise(x))(params, tiles))


def with_features(model, inputs, dtype=np.float32):
    features = featurise(model, inputs.tiles[:, 0])[:, None].astype(dtype)
    tiles = np.zeros((*inputs.tiles.shape[:2], 0, 0, 3), np.uint8)
    return dataclasses.replace(inputs, tiles=tiles, features=features)


def test_what_hosts_must_know(model):
    assert model.image_spec == ImageSpec("grid", 64, 4)
    assert model.embedding_width == 32
    vision = {**parity.VISION, "grid": 1}
    pooled = nnx.eval_shape(
        lambda: models.build({**parity.SMOL, "vision_config": vision}, rngs=nnx.Rngs(0))
    )
    assert pooled.image_spec == ImageSpec("grid", 64, 1)


def test_embeddings_are_unit_f32_rows(model):
    vectors = parity.embed(model, parity.image_inputs())
    assert vectors.shape == (2, 32) and vectors.dtype == np.float32
    tolerances.assert_near(np.linalg.norm(vectors, axis=-1), 1, 1e-6)


def test_features_given_equal_features_computed(model):
    inputs = parity.image_inputs()
    expected = parity.embed(model, inputs)
    tolerances.assert_near(
        parity.embed(model, with_features(model, inputs)), expected, tolerances.EMBEDDING
    )
    half = parity.embed(model, with_features(model, inputs, np.float16))
    assert 0 < np.abs(half - expected).max() < 2e-3


def test_features_stand_where_the_index_says(model):
    inputs = with_features(model, parity.image_inputs(start=(1, 3)))
    inputs.image_index[1, 3:7] = [3, 2, -1, 0]  # any order, any subset
    embeds = parity.inputs_embeds(model, inputs)
    visual = np.asarray(model.multi_modal_projector(jnp.asarray(inputs.features[:, 0])))
    words = np.asarray(model.language_model.embed_tokens(jnp.asarray(inputs.tokens)))
    for row in range(2):
        for position in range(12):
            index = inputs.image_index[row, position]
            expected = words[row, position] if index < 0 else visual[row, index]
            tolerances.assert_near(embeds[row, position], expected, tolerances.MODULE)


def test_dropout_is_for_training_and_follows_the_row(model):
    projector = model.multi_modal_projector
    x, keys = jnp.ones((4, 2, 24)), jax.random.split(jax.random.key(0), 4)
    x = x.at[..., ::2].set(-1)
    whole = projector(x, keys)
    projector.dropout = 0.5
    try:
        tolerances.assert_near(projector(x), whole, tolerances.MODULE)
        dropped = projector(x, keys)
        assert (np.abs(dropped - whole).max(axis=(1, 2)) > 1e-2).all()
        tolerances.assert_near(projector(x[1:3], keys[1:3]), dropped[1:3], tolerances.MODULE)
    finally:
        projector.dropout = 0.0


def test_several_tiles_of_a_row_are_counted_through(model):
    first = with_features(model, parity.image_inputs())
    both = np.concatenate([first.features[::-1], first.features], axis=1)
    index = np.where(first.image_index >= 0, first.image_index + 4, -1)
    second = dataclasses.replace(first, features=both, image_index=index)
    tolerances.assert_near(
        parity.embed(model, second), parity.embed(model, first), tolerances.EMBEDDING
    )


def test_several_tiles_go_through_the_tower_in_order(model):
    inputs = parity.image_inputs()
    two = np.stack([inputs.tiles[:, 0], inputs.tiles[::-1, 0]], axis=1)
    index = np.where(inputs.image_index >= 0, inputs.image_index + 4, -1)
    swapped = dataclasses.replace(inputs, tiles=inputs.tiles[::-1])
    tolerances.assert_near(
        parity.inputs_embeds(model, dataclasses.replace(inputs, tiles=two, image_index=index)),
        parity.inputs_embeds(model, swapped),
        tolerances.MODULE,
    )


def test_image_rows_keep_to_themselves(model):
    inputs = with_features(model, parity.image_inputs())
    together = parity.embed(model, inputs)
    cut = jax.tree.map(lambda x: x[1:], inputs)
    alone = dataclasses.replace(cut, tokens=cut.tokens[:, :9], image_index=cut.image_index[:, :9])
    tolerances.assert_near(parity.embed(model, alone)[0], together[1], tolerances.EMBEDDING)
    features = np.concatenate([-inputs.features[:1], inputs.features[1:]])
    changed = parity.embed(model, dataclasses.replace(inputs, features=features))
    assert np.abs(changed[0] - together[0]).max() > 1e-3
    tolerances.assert_near(changed[1], together[1], tolerances.EMBEDDING)


def test_text_rows_never_touch_tower_or_projector(model):
    graphdef, params = parity.split(model)
    inputs = parity.text_inputs()
    nan = lambda x: jnp.full_like(x, jnp.nan)  # noqa: E731
    broken = {
        **params,
        "vision_tower": jax.tree.map(nan, params["vision_tower"]),
        "multi_modal_projector": jax.tree.map(nan, params["multi_modal_projector"]),
    }
    expected = parity.embed(model, inputs)
    np.testing.assert_array_equal(parity.embed(nnx.merge(graphdef, broken), inputs), expected)
    program = str(jax.make_jaxpr(lambda p: nnx.merge(graphdef, p).embed(inputs))(params))
    assert "erf" not in program


def test_text_rows_equal_the_decoder_alone(model):
    graphdef, _ = parity.split(parity.build(parity.TEXT, seed=1))
    alone = nnx.merge(graphdef, {"language_model": parity.split(model)[1]["language_model"]})
    inputs = parity.text_inputs()
    tolerances.assert_near(
        parity.embed(alone, inputs), parity.embed(model, inputs), tolerances.EMBEDDING
    )


@pytest.mark.parametrize("norm", [True, False])
def test_projector_matches_torch_with_gradients(norm):
    config = {**parity.SMOL, "projector": {"hidden": 20, "norm": norm}}
    projector = parity.build(config).multi_modal_projector
    graphdef, params = parity.split(projector)
    parts = [torch.nn.LayerNorm(24)] * norm
    parts += [torch.nn.Linear(24, 20), torch.nn.GELU(), torch.nn.Linear(20, 32)]
    reference = torch.nn.Sequential(*parts)
    parity.randomise(reference)
    for name, part in zip(["norm"] * norm + ["linear_1", "", "linear_2"], parts, strict=True):
        if name:
            weight = "scale" if name == "norm" else "kernel"
            params[name][weight] = jnp.asarray(part.weight.detach().numpy().T)
            params[name]["bias"] = jnp.asarray(part.bias.detach().numpy())
    x = np.random.default_rng(0).standard_normal((3, 24)).astype(np.float32) * 2
    expected = reference(torch.tensor(x))
    expected.square().sum().backward()

    def loss(params):
        out = nnx.merge(graphdef, params)(jnp.asarray(x))
        return jnp.sum(out**2), out

    (_, ours), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    tolerances.assert_near(ours, expected.detach(), tolerances.MODULE)
    for name, part in (("linear_1", parts[-3]), ("linear_2", parts[-1])):
        error = tolerances.relative(gradients[name]["kernel"], part.weight.grad.T)
        assert error < tolerances.GRADIENT, name


def test_projector_gradients_reach_through_image_positions_only(model):
    graphdef, params = parity.split(model)
    inputs = with_features(model, parity.image_inputs())

    def loss(projector, inputs):
        merged = nnx.merge(graphdef, {**params, "multi_modal_projector": projector})
        return merged.embed(inputs)[:, 0].sum()

    gradient = jax.jit(jax.grad(loss))
    seen = gradient(params["multi_modal_projector"], inputs)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(seen))
    nowhere = dataclasses.replace(inputs, image_index=np.full_like(inputs.image_index, -1))
    unseen = gradient(params["multi_modal_projector"], nowhere)
    assert not any(np.any(x) for x in jax.tree.leaves(unseen))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": None}, "lacks text_config"),
        ({"projector": {"hidden": 8, "width": 1}}, "must have an integer `hidden`"),
        ({"projector": {}}, "must have an integer `hidden`"),
    ],
)
def test_bad_configs_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        models.build({**parity.SMOL, **changes}, rngs=nnx.Rngs(0))


@pytest.mark.assets
def test_the_fetched_student_loads_and_embeds(assets):
    student = models.load(assets / "student")
    assert student.image_spec.kind == "grid" and student.image_spec.features > 1
    vectors = parity.embed(student, parity.text_inputs((8, 3), vocabulary=49152))
    assert vectors.shape == (2, 576) and np.isfinite(vectors).all()
