"""Products with weights: what the kinds compute, and what is in their programs."""

import jax
import jax.numpy as jnp
import numpy as np
import tolerances
from flax import nnx
from test_layers import normal
from test_layers import products as products_in

from unime_jax.models import layers, lora, products


def test_transposed_matmul_equals_plain_with_gradients():
    x, w, direction = normal(3, 5, 7), normal(7, 11, seed=1), normal(3, 5, 11, seed=2)

    def value(kind):
        def loss(x, w):
            return jnp.sum(products.matmul(x, w, kind) * direction)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, w)

    (a, (ax, aw)), (b, (bx, bw)) = value("transposed"), value("plain")
    tolerances.assert_near(a, b, 1e-4)
    tolerances.assert_near(ax, bx, tolerances.MODULE)
    tolerances.assert_near(aw, bw, tolerances.MODULE)


def test_weight_gradient_is_summed_in_the_weights_dtype():
    x = jnp.asarray(normal(2048, 4), jnp.bfloat16)
    w = jnp.asarray(normal(4, 3))
    gradient = jax.grad(lambda w: products.matmul(x, w, "transposed").astype(jnp.float32).sum())(w)
    assert gradient.dtype == jnp.float32
    exact = np.repeat(np.asarray(x, np.float32).sum(0)[:, None], 3, 1)
    tolerances.assert_near(gradient, exact, 1e-3)


def adapted(rows: int, matmul: str, *, inputs=12, outputs=20):
    layer = layers.Linear(inputs, outputs, bias=True, rngs=nnx.Rngs(0), matmul=matmul)
    lora.attach(layer, rank=3, alpha=6.0, dropout=0.5, targets="", rngs=nnx.Rngs(1))
    layer.bias[...] = normal(outputs, seed=3)
    layer.lora_B[...] = normal(3, outputs, seed=4)
    return layer, normal(2, rows // 2, inputs), normal(2, rows // 2, outputs, seed=5)


def test_merged_adapter_equals_one_beside_its_weight_with_gradients():
    def value(kind):
        layer, x, direction = adapted(32, kind)
        graphdef, state = nnx.split(layer)

        def loss(state, x):
            return jnp.mean(nnx.merge(graphdef, state)(x) * direction)

        value, (state, x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, x)
        return value, [*jax.tree.leaves(state), x]

    (a, merged), (b, beside) = value("merged"), value("transposed")
    assert abs(a - b) < 1e-6
    assert len(merged) == 5
    for one, other in zip(merged, beside, strict=True):
        assert np.abs(other).max() > 1e-3
        tolerances.assert_near(one, other, 1e-6)


def test_frozen_weight_has_no_gradient_where_its_adapter_is_merged():
    layer, x, _ = adapted(40, "merged")
    graphdef, state = nnx.split(layer)
    state = nnx.to_pure_dict(state)
    adapter = {name: state.pop(name) for name in ("lora_A", "lora_B")}

    def loss(adapter, x):
        return nnx.merge(graphdef, {**state, **adapter})(x).sum()

    found = products_in(jax.grad(loss), adapter, x)
    assert found.count((12, 20)) == 1  # the sum of weight and adapter, for the way there
    assert (2, 20, 12) not in found  # nobody wants the gradient of x
    both = products_in(jax.grad(loss, argnums=(0, 1)), adapter, x)
    assert both.count((12, 20)) == 2 and (2, 20, 12) in both


def test_adapters_stay_beside_their_weights_where_merging_is_not_worth_it():
    for rows, kind, key, count in (
        (40, "merged", None, 1),
        (6, "merged", None, 0),  # the sum would take longer than what it saves
        (40, "transposed", None, 0),
        (40, "merged", jax.random.key(0), 0),  # dropout acts on the adapter's input alone
    ):
        layer, x, _ = adapted(rows, kind)
        found = products_in(lambda x: layer(x, key), x)  # noqa: B023
        assert found.count((12, 20)) == count, (rows, kind, key)
    layer, x, _ = adapted(40, "merged")
    assert (12, 20) not in products_in(layer, x.astype(jnp.bfloat16))
