"""Estimated memory of programs whose memory is known."""

import jax
import jax.numpy as jnp

from unime_jax.planning import flops, liveness

ROWS, WIDTH, DEPTH = 64, 32, 5
ROW_BYTES = 4 * ROWS * WIDTH


def peak(function, *shapes, flash=False):
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return liveness.peak(flops.trace(function, *structs)[0], flash=flash)


def test_products_are_held_and_what_is_fused_is_not():
    def chain(x, w):
        return jnp.sum(jnp.tanh((x @ w) * 2 + 1))

    assert peak(chain, (ROWS, WIDTH), (WIDTH, WIDTH)) == ROW_BYTES + 4  # one product, one sum

    def two(x, w):
        y = jnp.tanh(x @ w)
        return y @ w

    # The product lives until its tanh is whole, then the tanh until the second product is done.
    assert peak(two, (ROWS, WIDTH), (WIDTH, WIDTH)) == 2 * ROW_BYTES


def test_loops_keep_what_the_way_back_reads():
    def loss(x, weights, remat):
        def layer(x, w):
            hidden = jnp.tanh(x @ w)
            return jnp.tanh(hidden @ w.T), None

        layer = jax.checkpoint(layer) if remat else layer
        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    found = {
        remat: peak(
            jax.grad(lambda x, w, remat=remat: loss(x, w, remat)),
            (ROWS, WIDTH),
            (DEPTH, WIDTH, WIDTH),
        )
        for remat in (True, False)
    }
    kept = DEPTH * ROW_BYTES  # the inputs of the layers
    assert kept <= found[True] <= kept + 8 * ROW_BYTES
    assert found[False] >= 2 * kept  # and at least one value inside of each


def test_a_loop_holds_the_slice_it_works_on_and_no_constant_twice():
    def run(x, weights, kept):
        return jax.lax.scan(lambda x, w: ((x @ w) @ kept, None), x, weights)[0]

    shapes = (1, WIDTH), (DEPTH, WIDTH, WIDTH), (WIDTH, WIDTH)
    # The result; inside both products, and one layer's weights.
    assert peak(run, *shapes) == 4 * (WIDTH + 2 * WIDTH + WIDTH * WIDTH)


def test_scores_of_pairs_are_held_unless_the_kernel_is_flash():
    def attend(q, k):
        return jnp.einsum("gnts,gnsh->gnth", jnp.tanh(jnp.einsum("gnth,gnsh->gnts", q, k)), k)

    shapes = (2, 3, 128, 8), (2, 3, 128, 8)
    scores = 4 * 2 * 3 * 128 * 128
    assert peak(attend, *shapes) == 2 * scores
    assert peak(attend, *shapes, flash=True) == 4 * 2 * 3 * 128 * 8


def test_bodies_that_are_called_twice_have_values_of_their_own():
    half = jax.jit(lambda x, w: x @ w)

    def program(x, w):
        return half(half(x, w), w)

    assert peak(program, (ROWS, WIDTH), (WIDTH, WIDTH)) == 2 * ROW_BYTES
