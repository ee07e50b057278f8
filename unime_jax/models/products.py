"""Products of activations with weights, and how their gradients are written.

All compute in the dtype of the activations. What the kinds differ in is speed alone:

- "transposed" writes a weight's gradient as x^T g where autodiff writes (g^T x)^T, unless it is
  much narrower than wide: on XLA:CPU 6 times faster for the lora_B of a rank-8 adapter and 1.6
  times for a square weight, and summed in the weight's dtype. It has no forward-mode derivative.
- "merged" is "transposed", and adds an adapter to its weight rather than to the layer's output:
  x @ (w + s a b) costs one product over all rows where x @ w + s (x @ a) @ b costs three and passes
  over the outputs twice. For f32 alone: in bf16 the sum would round small updates away.
- "plain" leaves all to autodiff.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float

from unime_jax.types import Array

MATMULS = ("transposed", "merged", "plain")
_NARROW = 4


def _dot(a, b, axis, other, dtype=None):
    """Sums over an axis of a and one of b; not an einsum, which takes longer to trace."""
    numbers = (((axis % a.ndim,), (other,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=dtype)


def _product(x, w):
    return _dot(x, w.astype(x.dtype), -1, 0)


_matmul = jax.custom_vjp(_product)


def _matmul_forward(x, w):
    # An operand is kept only for a gradient that is wanted: with a frozen weight the inputs are
    # not, and the weight's gradient does not even appear in the program.
    kept_x = x.value if w.perturbed else None
    kept_w = w.value if x.perturbed else None
    return _product(x.value, w.value), (kept_x, kept_w, jnp.zeros((0,), w.value.dtype))


def _matmul_backward(kept, g):
    x, w, like_w = kept
    dx = None if w is None else _dot(g, w.astype(g.dtype), -1, 1)
    if x is None:
        return dx, None
    return dx, _weight_gradient(x, g, like_w.dtype)


def _weight_gradient(x, g, dtype):
    x, g = _rows(x), _rows(g)
    if x.shape[1] > _NARROW * g.shape[1]:  # of lora_A: the narrow side first, 7 times faster
        return _dot(g, x, 0, 0, dtype).T
    return _dot(x, g, 0, 0, dtype)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


_matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


def matmul(x: Float[Array, "... I"], w: Float[Array, "I O"], kind: str) -> Float[Array, "... O"]:
    """Multiplies in the dtype of x; `kind` is one of MATMULS."""
    return _product(x, w) if kind == "plain" else _matmul(x, w)


def merges(x: Float[Array, "... I"], w: Float[Array, "I O"], kind: str) -> bool:
    """Says whether adding the adapter to the weight is worth it: with rows enough, in f32.

    Which of the two a product is depends on the rows of a batch as it is traced. They differ by
    rounding alone, and only training asks for "merged".
    """
    inputs, outputs = w.shape
    rows = math.prod(x.shape[:-1])
    wide = x.dtype == jnp.float32 and w.dtype == jnp.float32
    return kind == "merged" and wide and rows * (inputs + outputs) > inputs * outputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def merged(
    x: Float[Array, "... I"],
    w: Float[Array, "I O"],
    a: Float[Array, "I R"],
    b: Float[Array, "R O"],
    scale: float,
) -> Float[Array, "... O"]:
    """Is x @ (w + scale * a @ b); only a trained w gets a gradient of its size."""
    return _product(x, _merge(w, a, b, scale))


def _merge(w, a, b, scale):
    return w + scale * (a @ b)


def _merged_forward(x, w, a, b, scale):
    # A call, for JAX takes what depends on weights alone, here the sum, out of a loop over chunks,
    # where all layers' would be held at once.
    y = merged(x.value, w.value, a.value, b.value, scale)
    # As above: what is not trained is not kept, or has no gradient in the program.
    kept_x = x.value if w.perturbed or a.perturbed or b.perturbed else None
    kept_w = w.value if x.perturbed else None
    like_w = jnp.zeros((0,), w.value.dtype) if w.perturbed else None
    return y, (kept_x, kept_w, a.value, b.value, like_w)


def _merged_backward(scale, kept, g):
    x, w, a, b, like_w = kept
    # The sum is made again: kept, it would be a second copy of all layers' weights.
    dx = None if w is None else _dot(g, _merge(w, a, b, scale), -1, 1)
    if x is None:
        return dx, None, None, None
    dw = None if like_w is None else _weight_gradient(x, g, like_w.dtype)
    narrow = _dot(g, b * scale, -1, 1)
    da = _weight_gradient(x, narrow, a.dtype)
    db = _weight_gradient(_product(x, a * scale), g, b.dtype)
    return dx, dw, da, db


merged.defvjp(_merged_forward, _merged_backward, symbolic_zeros=True)
