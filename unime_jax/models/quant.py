"""Weights in 4 or 8 bits (QLoRA, Dettmers et al. 2023): codes, and a scale for every 64 inputs.

A weight [I, O] becomes codes [I, O] (uint4 for "nf4", two packed in a byte by XLA; int8 for "int8")
and bf16 scales [I / 64, O]. It is made a float matrix again inside the layer that uses it, forward
and backward, so that only one layer's weights exist as floats at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from unime_jax.types import Array, UserError

BLOCK = 64
KINDS = ("nf4", "int8")
# Quantiles of a normal distribution scaled to [-1, 1], 0 among them; from bitsandbytes.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_DTYPES = {"nf4": jnp.uint4, "int8": jnp.int8}
_LARGEST = {"nf4": 1.0, "int8": 127.0}  # code value that a block's largest weight gets


def shapes(
    shape: tuple[int, ...], kind: str, name: str = "weight"
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of codes and scales.

    Args:
      shape: [*L, I, O] of the weight.
      kind: one of KINDS.
      name: of the weight, for messages.

    Raises:
      UserError: I is no multiple of 64, or an unknown kind.
    """
    if kind not in KINDS:
        raise UserError(f"quantize {kind!r} is unknown; use one of {', '.join(KINDS)}")
    *layers, inputs, outputs = shape
    if inputs % BLOCK:
        raise UserError(
            f"{name} {shape} cannot be quantized: {inputs} inputs are no multiple of {BLOCK}"
        )
    codes = jax.ShapeDtypeStruct(shape, _DTYPES[kind])
    return codes, jax.ShapeDtypeStruct((*layers, inputs // BLOCK, outputs), jnp.bfloat16)


def quantize(
    weight: Float[Array, "*L I O"], kind: str
) -> tuple[Num[Array, "*L I O"], Float[Array, "*L Ib O"]]:
    """Returns codes and scales; layers one after the other, so that f32 copies stay small."""
    if weight.ndim > 2:
        return jax.lax.map(lambda layer: quantize(layer, kind), weight)
    codes, scales = shapes(weight.shape, kind)
    blocks = weight.reshape(-1, BLOCK, weight.shape[-1]).astype(jnp.float32)
    scale = jnp.max(jnp.abs(blocks), axis=1) / _LARGEST[kind]
    scale = scale.astype(scales.dtype)
    # By the scale as it is stored: its rounding costs no accuracy of the weights.
    divisor = scale.astype(jnp.float32)[:, None]
    value = blocks / jnp.where(divisor == 0, 1.0, divisor)
    if kind == "int8":
        found = jnp.clip(jnp.round(value), -127, 127)
    else:
        found = jnp.zeros(value.shape, jnp.uint8)
        for low, high in zip(NF4, NF4[1:], strict=False):
            found += value > (low + high) / 2
    return found.reshape(weight.shape).astype(codes.dtype), scale


def dequantize(
    codes: Num[Array, "*L I O"], scales: Float[Array, "*L Ib O"], dtype
) -> Float[Array, "*L I O"]:
    """Returns the weight in a dtype; rounded once."""
    if codes.dtype == jnp.uint4:
        value = jnp.take(jnp.array(NF4, jnp.float32), codes.astype(jnp.int32), axis=0)
    else:
        value = codes.astype(jnp.float32)
    *layers, inputs, outputs = codes.shape
    value = value.reshape(*layers, inputs // BLOCK, BLOCK, outputs)
    value = value * scales.astype(jnp.float32)[..., None, :]
    return value.reshape(codes.shape).astype(dtype)


@jax.custom_vjp
def matmul(
    x: Float[Array, "... I"], codes: Num[Array, "I O"], scales: Float[Array, "Ib O"]
) -> Float[Array, "... O"]:
    """Multiplies in the dtype of x; gradients exist for x alone.

    For the way back codes and scales are kept, not the floats made of them.
    """
    return jnp.einsum("...i,io->...o", x, dequantize(codes, scales, x.dtype))


def _forward(x, codes, scales):
    # A call, so that no one takes the floats out of a loop over chunks of rows: all layers' would
    # be held at once.
    return matmul(x, codes, scales), (codes, scales)


def _backward(kept, g):
    return jnp.einsum("...o,io->...i", g, dequantize(*kept, g.dtype)), None, None


matmul.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames=("kind", "shardings"))
def quantize_placed(weight: Float[Array, "*L I O"], *, kind: str, shardings=None):
    """Is `quantize` with results on a pair of shardings."""
    found = quantize(weight, kind)
    if shardings is None:
        return found
    return tuple(map(jax.lax.with_sharding_constraint, found, shardings))
