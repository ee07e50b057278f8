"""Layers against PyTorch, and the properties that the rest relies on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
import torch
from flax import nnx

from unime_jax.models import layers
from unime_jax.models.attention import attention
from unime_jax.types import UserError


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def products(function, *arguments):
    """Output shapes of all matrix products in a program, inner programs included."""
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(equation.outvars[0].aval.shape)
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


def test_frozen_weight_has_no_gradient_in_the_program():
    layer = layers.Linear(6, 4, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    x = normal(5, 6)

    def loss(x, state):
        return nnx.merge(graphdef, state)(x).sum()

    assert (6, 4) not in products(jax.grad(loss, argnums=0), x, state)
    assert (6, 4) in products(jax.grad(loss, argnums=1), x, state)


def test_frozen_stack_has_no_weight_gradient_in_the_program():
    stacked = layers.stack(lambda rngs: layers.Linear(6, 6, rngs=rngs), 3, nnx.Rngs(0))
    graphdef, state = nnx.split(stacked)

    def loss(x, state, remat):
        module = nnx.merge(graphdef, state)
        return layers.scan_layers(module, x, lambda f, x, key: f(x), remat=remat).sum()

    for remat in layers.REMATS:
        assert (6, 6) not in products(jax.grad(lambda x: loss(x, state, remat)), normal(5, 6))  # noqa: B023


def test_of_no_layers_the_input_comes_out():
    stacked = layers.stack(lambda rngs: layers.Linear(6, 6, rngs=rngs), 3, nnx.Rngs(0))
    x = normal(5, 6)
    out = layers.scan_layers(stacked, x, lambda f, x, key: f(x), key=jax.random.key(0), count=0)
    np.testing.assert_array_equal(out, x)


def test_linear_matches_torch():
    layer = layers.Linear(6, 4, bias=True, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.asarray(normal(4))
    x = normal(2, 3, 6)
    expected = torch.nn.functional.linear(
        torch.tensor(np.array(x)),
        torch.tensor(np.array(layer.kernel[...]).T),
        torch.tensor(np.array(layer.bias[...])),
    )
    tolerances.assert_near(layer(x), expected, tolerances.MODULE)


def test_linear_computes_in_the_dtype_of_its_input():
    layer = layers.Linear(6, 4, bias=True, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((2, 6), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_match_torch_with_gradients(kind):
    eps, x, direction = 1e-3, normal(4, 16) * 0.05, normal(4, 16, seed=1)
    scale, bias = normal(16, seed=2), normal(16, seed=3)
    tx, ts, tb = (torch.tensor(np.array(v), requires_grad=True) for v in (x, scale, bias))
    if kind == "rms":
        module = layers.RMSNorm(16, eps=eps)
        expected = torch.nn.functional.rms_norm(tx, (16,), ts, eps)
    else:
        module = layers.LayerNorm(16, eps=eps)
        module.bias[...] = jnp.asarray(bias)
        expected = torch.nn.functional.layer_norm(tx, (16,), ts, tb, eps)
    module.scale[...] = jnp.asarray(scale)
    (expected * torch.tensor(np.array(direction))).sum().backward()
    tolerances.assert_near(module(x), expected.detach(), tolerances.MODULE)
    graphdef, state = nnx.split(module)

    def loss(x, state):
        return jnp.sum(nnx.merge(graphdef, state)(x) * direction)

    dx, dstate = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, state)
    assert tolerances.relative(dx, tx.grad) < tolerances.GRADIENT
    assert tolerances.relative(dstate["scale"][...], ts.grad) < tolerances.GRADIENT


@pytest.mark.parametrize(
    "causal, tokens, kv_heads",
    [
        *[(causal, 6, heads) for causal in (True, False) for heads in (1, 2, 4)],
        (True, 171, 2),  # two blocks of queries, of unequal length
        (True, 323, 2),  # four
    ],
)
def test_attention_matches_torch_with_gradients(causal, tokens, kv_heads):
    lengths = jnp.array([tokens, tokens // 2], jnp.int32)
    q, k, v = (
        normal(2, tokens, 4, 8),
        normal(2, tokens, kv_heads, 8, seed=1),
        normal(2, tokens, kv_heads, 8, seed=2),
    )
    real = np.arange(tokens) < np.asarray(lengths)[:, None]
    direction = normal(2, tokens, 4, 8, seed=3) * real[..., None, None]

    def loss(q, k, v):
        out = attention(q, k, v, causal=causal, lengths=lengths)
        return jnp.sum(out * direction), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = run(q, k, v)
    visible = np.broadcast_to(real[:, None, None], (2, 1, tokens, tokens))
    if causal:
        visible = visible & np.tril(np.ones((tokens, tokens), bool))
    tensors = [torch.tensor(np.array(x), requires_grad=True) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in tensors), attn_mask=torch.tensor(visible), enable_gqa=True
    ).transpose(1, 2)
    (expected * torch.tensor(np.array(direction))).sum().backward()
    tolerances.assert_near(
        np.asarray(out)[real], expected.detach().numpy()[real], tolerances.MODULE
    )
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert tolerances.relative(gradient, tensor.grad) < tolerances.GRADIENT


def test_rope_turns_pairs_by_relative_positions():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def score(i, j):
        first = layers.rope(q, layers.rope_tables(jnp.array([i]), 8, 100.0))
        second = layers.rope(k, layers.rope_tables(jnp.array([j]), 8, 100.0))
        return float(jnp.sum(first * second))

    assert score(7, 3) == pytest.approx(score(14, 10), abs=1e-5)
    assert abs(score(7, 3) - score(3, 7)) > 1e-2
    assert score(0, 0) == pytest.approx(float(jnp.sum(q * k)), abs=1e-6)


def test_unit_of_a_zero_vector_is_zero_and_has_a_finite_gradient():
    x = jnp.zeros((1, 4))
    assert not np.asarray(layers.unit(x)).any()
    assert np.isfinite(jax.grad(lambda x: layers.unit(x).sum())(x)).all()
    tolerances.assert_near(jnp.linalg.norm(layers.unit(normal(5, 4)), axis=-1), 1, 1e-6)


def test_last_token_is_the_last_real_one():
    x = normal(3, 5, 2)
    lengths = jnp.array([5, 1, 3], jnp.int32)
    expected = np.stack([x[0, 4], x[1, 0], x[2, 2]])
    np.testing.assert_array_equal(layers.last_token(x, lengths), expected)


@pytest.mark.parametrize("remat", layers.REMATS)
def test_scan_equals_loop_with_gradients(remat):
    stacked = layers.stack(lambda rngs: layers.Linear(6, 6, rngs=rngs), 4, nnx.Rngs(0))
    graphdef, state = nnx.split(stacked)
    x = normal(2, 6)

    def apply(layer, x, key):
        return jnp.tanh(layer(x)) + x

    def scanned(state):
        module = nnx.merge(graphdef, state)
        return layers.scan_layers(module, x, apply, remat=remat).sum()

    def looped(state):
        y = x
        for number in range(4):
            one = jax.tree.map(lambda leaf: leaf[number], state)  # noqa: B023
            y = apply(nnx.merge(graphdef, one), y, None)
        return y.sum()

    (a, da), (b, db) = (jax.jit(jax.value_and_grad(f))(state) for f in (scanned, looped))
    tolerances.assert_near(a, b, tolerances.MODULE)
    tolerances.assert_near(da["kernel"][...], db["kernel"][...], tolerances.MODULE)


def test_layers_of_a_stack_start_differently_and_get_different_keys():
    stacked = layers.stack(lambda rngs: layers.Linear(6, 6, rngs=rngs), 3, nnx.Rngs(0))
    kernel = np.asarray(stacked.kernel[...])
    assert kernel.shape == (3, 6, 6) and (kernel[0] != kernel[1]).all()
    drawn = layers.scan_layers(
        stacked,
        jnp.zeros((3, 5)),
        lambda layer, x, key: jnp.roll(x, 1, 0).at[0].set(jax.random.normal(key, (5,))),
        key=jax.random.key(0),
    )
    assert len({float(v) for v in drawn[:, 0]}) == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda: attention(*[jnp.ones((1, 2, 1, 4))] * 3, causal=True, implementation="warp"),
        lambda: layers.Linear(2, 2, rngs=nnx.Rngs(0), matmul="warp"),
        lambda: layers.scan_layers(
            layers.stack(lambda r: layers.Linear(2, 2, rngs=r), 2, nnx.Rngs(0)),
            jnp.ones((1, 2)),
            lambda f, x, key: f(x),
            remat="warp",
        ),
    ],
)
def test_unknown_choices_are_refused_with_the_known_ones(call):
    with pytest.raises(UserError, match="'warp' is unknown; use one of "):
        call()
