"""Layers that every backbone shares: linear with an optional adapter, norms, RoPE, stacks.

A layer computes in the dtype of its input; parameters are cast to it. Attributes are spelled as in
the Hugging Face checkpoints, except that `weight` is `kernel` ([inputs, outputs]), `embedding` or
`scale`.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int, Shaped

from unime_jax.models import products, quant
from unime_jax.models.dropout import dropout
from unime_jax.types import Array, UserError, flatten, unflatten

_OUTPUT = "linear_output"  # what the remat policy "dots" keeps of a Linear


class Linear(nnx.Module):
    """Is `x @ kernel + bias`, plus a low-rank adapter where one is attached.

    Attributes:
      kernel: [I, O]; stacked layers have L in front of every array. None where it is quantised.
      kernel_codes, kernel_scales: what stands for the kernel then (see `quant`), else None.
      bias: [O] or None.
      lora_A, lora_B: f32[I, R] and f32[R, O], or None (see `lora.attach`).
      lora_scale: factor on the adapter's output, alpha / R.
      lora_dropout: rate on the adapter's input, in training only.
      matmul: one of `products.MATMULS`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        matmul: str = "transposed",
    ):
        if matmul not in products.MATMULS:
            names = ", ".join(products.MATMULS)
            raise UserError(f"matmul {matmul!r} is unknown; use one of {names}")
        init = jax.nn.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), dtype))
        self.kernel_codes = nnx.data(None)
        self.kernel_scales = nnx.data(None)
        self.bias = nnx.data(nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None)
        self.lora_A = nnx.data(None)
        self.lora_B = nnx.data(None)
        self.lora_scale = 0.0
        self.lora_dropout = 0.0
        self.matmul = matmul

    @property
    def shape(self) -> tuple[int, ...]:
        """Is [I, O], or [L, I, O] where layers are stacked."""
        return (self.kernel_codes if self.kernel is None else self.kernel).shape

    def __call__(self, x: Float[Array, "... I"], key: Array | None = None) -> Float[Array, "... O"]:
        """Applies the layer; with a key, dropout acts on the adapter's input."""
        drops = key is not None and self.lora_dropout > 0
        y = self._merged(x) if self.lora_A is not None and not drops else None
        if y is not None:
            return _named(self._shifted(y))
        if self.kernel is None:
            y = quant.matmul(x, self.kernel_codes[...], self.kernel_scales[...])
        else:
            y = self._product(x, self.kernel)
        y = self._shifted(y)
        if self.lora_A is not None:
            if drops:
                x = dropout(x, key, self.lora_dropout)
            low = _named(self._product(x, self.lora_A))
            y = y + self._product(low * self.lora_scale, self.lora_B)
        return _named(y)

    def _product(self, x: Array, weight: nnx.Param) -> Array:
        # How gradients are written costs as much to trace as the product itself.
        return products.matmul(x, weight[...], "plain" if _read_only() else self.matmul)

    def _merged(self, x: Array) -> Array | None:
        """Applies the sum of weight and adapter, where that is faster."""
        if self.kernel is None or not products.merges(x, self.kernel[...], self.matmul):
            return None
        parts = self.kernel[...], self.lora_A[...], self.lora_B[...]
        return products.merged(x, *parts, self.lora_scale)

    def _shifted(self, y: Array) -> Array:
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def _named(x: Array) -> Array:
    """Names what a Linear gives, for a sum, not its terms, is what the way back needs.

    Policies of `jax.checkpoint` do not see into the products' own derivatives either.
    """
    return x if _read_only() else checkpoint_name(x, _OUTPUT)


class Embedding(nnx.Module):
    """Is a table of V vectors."""

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs, dtype=jnp.float32):
        init = jax.nn.initializers.normal(0.02)
        self.embedding = nnx.Param(init(rngs.params(), (count, width), dtype))

    def __call__(self, index: Int[Array, "..."]) -> Float[Array, "... D"]:
        return jnp.take(self.embedding[...], index, axis=0)

    def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores every vector of the table: the head of models with tied embeddings."""
        return jnp.einsum("...d,vd->...v", x, self.embedding[...].astype(x.dtype))


class RMSNorm(nnx.Module):
    """Divides by the root mean square, in f32."""

    def __init__(self, width: int, *, eps: float, dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        # One rounding at the end: in bf16 a second one costs up to half of the accuracy left.
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalises mean and variance, in f32; `eps` has no default, for checkpoints differ."""

    def __init__(self, width: int, *, eps: float, dtype=jnp.float32):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        scale, bias = self.scale[...], self.bias[...]
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def rope_tables(
    positions: Int[Array, "*batch T"], head_width: int, theta: float
) -> tuple[Float[Array, "*batch T 1 half"], Float[Array, "*batch T 1 half"]]:
    """Returns cosine and sine of every position's angles, f32, to be used by all layers."""
    frequency = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rope(x: Float[Array, "G T N H"], tables: tuple[Array, Array]) -> Float[Array, "G T N H"]:
    """Rotates the pairs (x[i], x[i + H/2]) of every head by their position's angles, in f32."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def last_token(x: Float[Array, "G T D"], lengths: Int[Array, " G"]) -> Float[Array, "G D"]:
    """Returns every row's last real position."""
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]


def unit(x: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Scales to length 1, in f32; a zero vector stays zero."""
    x = x.astype(jnp.float32)
    # The tiny number keeps the gradient of a zero vector finite.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-24))


def fold(key: Array | None, number: int | Int[Array, ""]) -> Array | None:
    """Derives the key of the number-th consumer, of every row if there is one each; or None."""
    if key is None or not key.ndim:
        return None if key is None else jax.random.fold_in(key, number)
    return jax.vmap(jax.random.fold_in, (0, None))(key, number)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """Builds `count` equal layers as one module whose arrays have a leading L axis."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), count)
    state = jax.vmap(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(keys)
    return nnx.merge(graphdef, state)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a step wants what the compiler would place as it likes; models name no mesh.

    Left alone, XLA moves activations rather than a small weight, and splits them along their width.

    Attributes:
      rows: places an array of rows.
      weights: (path, array) -> the array as a layer uses it; None leaves all as they are.
      kernel: wraps (q, k, v, ...) -> rows that the compiler cannot divide over devices.
      read_only: weights have no gradients: nothing is traced that only gradients need.
      trainable: paths, within a layer, of what has gradients; None: any may have. Of the others
        some layers of a stack are run without a copy of them.
    """

    rows: Callable[[Array], Array] = lambda x: x
    weights: Callable[[str, Array], Array] | None = None
    kernel: Callable[[Callable[..., Array]], Callable[..., Array]] = lambda run: run
    read_only: bool = False
    trainable: frozenset[str] | None = None


_PLACEMENT: contextvars.ContextVar[Placement | None] = contextvars.ContextVar(
    "placement", default=None
)


@contextlib.contextmanager
def placed(placement: Placement | None):
    """Holds for every model that is traced inside."""
    token = _PLACEMENT.set(placement)
    try:
        yield
    finally:
        _PLACEMENT.reset(token)


def _read_only() -> bool:
    """Says whether there will be no gradients of weights."""
    placement = _PLACEMENT.get()
    return placement is not None and placement.read_only


def _is_frozen(path: str) -> bool:
    """Says whether a layer's parameter is known to have no gradient."""
    placement = _PLACEMENT.get()
    if placement is None:
        return False
    return placement.read_only or (
        placement.trainable is not None and path not in placement.trainable
    )


def copied_share(layers: nnx.Module) -> float:
    """Returns the share of a stack's weights that running some of its layers alone copies."""
    sizes = {path: leaf.size for path, leaf in flatten(nnx.to_pure_dict(nnx.state(layers))).items()}
    return sum(n for path, n in sizes.items() if not _is_frozen(path)) / sum(sizes.values())


def placed_kernel(run: Callable[..., Array]) -> Callable[..., Array]:
    """Wraps a kernel that the compiler cannot divide over devices."""
    placement = _PLACEMENT.get()
    return run if placement is None else placement.kernel(run)


def placed_rows(x: Array) -> Array:
    """Places an array of rows where the step wants it."""
    placement = _PLACEMENT.get()
    return x if placement is None else placement.rows(x)


def placed_weights(layer: nnx.Module) -> nnx.Module:
    """Places the weights of a layer where the step wants them while it runs."""
    placement = _PLACEMENT.get()
    if placement is None or placement.weights is None:
        return layer
    flat = flatten(nnx.to_pure_dict(nnx.state(layer)))
    flat = {path: placement.weights(path, leaf) for path, leaf in flat.items()}
    nnx.update(layer, unflatten(flat))
    return layer


def layer_of(layers: nnx.Module, number: int) -> nnx.Module:
    """Returns one of stacked layers."""
    graphdef, state = nnx.split(layers)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: _of_layer(leaf, number), state))


def _of_layer(leaf: Shaped[Array, "L *shape"], number: int | Array) -> Shaped[Array, "*shape"]:
    """Returns a parameter of one layer; quicker to trace than an index in brackets."""
    if isinstance(number, int):
        return jax.lax.index_in_dim(leaf, number, keepdims=False)
    return jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False, allow_negative_indices=False)


def _all_but_weights(primitive, *_, **params) -> bool:
    """Keeps everything but a layer's weights: of all layers, they would be the whole model."""
    return primitive.name not in ("sharding_constraint", "dynamic_slice", "squeeze")


_REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.save_only_these_names(_OUTPUT),
}
REMATS = ("none", *_REMAT_POLICIES)


def scan_layers(
    layers: nnx.Module,
    x: Array,
    apply: Callable[[nnx.Module, Array, Array | None], Array],
    *,
    key: Array | None = None,
    remat: str = "none",
    count: int | None = None,
) -> Array:
    """Runs stacked layers one after the other; compile time does not grow with their number.

    Args:
      layers: what `stack` built.
      x: what the first layer takes.
      apply: (layer, x, key) -> x.
      key: one, one a row, or None; every layer gets its own.
      remat: what the backward pass computes again: "none", "dots" (all but what a Linear gives),
        "full" (everything inside a layer).
      count: of the first layers, which alone are run; None: all.
    """
    graphdef, stacked = nnx.split(layers)
    stacked = flatten(nnx.to_pure_dict(stacked))
    numbers = jnp.arange(jax.tree.leaves(stacked)[0].shape[0] if count is None else count)
    keys = None if key is None else jax.vmap(lambda n: fold(key, n))(numbers)
    whole = {} if count is None else {p: leaf for p, leaf in stacked.items() if _is_frozen(p)}
    split = {p: leaf for p, leaf in stacked.items() if p not in whole}
    if count is not None:
        split = {path: leaf[:count] for path, leaf in split.items()}

    def body(x, layer):
        number, state, key = layer
        state = state | {path: _of_layer(leaf, number) for path, leaf in whole.items()}
        layer = placed_weights(nnx.merge(graphdef, unflatten(state)))
        return placed_rows(apply(layer, placed_rows(x), key)), None

    if remat not in REMATS:
        raise UserError(f"remat {remat!r} is unknown; use one of {', '.join(REMATS)}")
    if remat != "none":
        body = jax.checkpoint(body, policy=_REMAT_POLICIES[remat], prevent_cse=False)
    elif _PLACEMENT.get() is not None and not _read_only():
        body = jax.checkpoint(body, policy=_all_but_weights, prevent_cse=False)
    return jax.lax.scan(body, x, (numbers, split, keys))[0]
