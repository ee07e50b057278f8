"""Attention by JAX's splash kernel, which is for TPUs; interpreted it runs anywhere, slowly."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from unime_jax.types import Array

LANE = 128  # the kernel's blocks are multiples of it
_BLOCKS = (640, 512, 384, 256, 128)


def block_of(tokens: int) -> tuple[int, int]:
    """Returns the kernel's block, and the multiple of it that rows are padded to.

    The least padding counts first, then the larger block: 577 patches of CLIP are padded to one
    block of 640, 2928 tokens to six of 512. Up to 640 a row is one block; in longer ones blocks of
    128 and 256 would be slow.
    """
    whole = -(-tokens // LANE) * LANE
    if whole <= _BLOCKS[0]:
        return whole, whole
    padded = [(-(-tokens // block) * block, block) for block in _BLOCKS[:3]]
    length, block = min(padded, key=lambda pair: (pair[0], -pair[1]))
    return block, length


def attention(
    q: Float[Array, "G T N H"],
    k: Float[Array, "G S K H"],
    v: Float[Array, "G S K H"],
    lengths: Int[Array, " G"] | None = None,
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "G T N H"]:
    """Attends as `attention.attention` does, on one device.

    Padding to whole blocks is done here: behind a causal row no position sees it, elsewhere segment
    numbers hide it, so that a tower's 577 patches never need all their scores in memory.
    """
    tokens, keys = q.shape[1], k.shape[1]
    block_q, padded_q = block_of(tokens)
    block_k, padded_k = block_of(keys)
    kernel = _kernel(padded_q, padded_k, q.shape[2], causal, block_q, block_k, interpret)
    segments = None
    if not causal and (lengths is not None or padded_k != keys):
        real = jnp.full((q.shape[0],), keys) if lengths is None else lengths
        segments = _module().SegmentIds(
            # Every query, padded or not, reads the real keys.
            q=jnp.ones((q.shape[0], padded_q), jnp.int32),
            kv=(jnp.arange(padded_k) < real[:, None]).astype(jnp.int32),
        )

    def heads_first(x, length):
        x = jnp.pad(x, [(0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)])
        return jnp.swapaxes(x, 1, 2)

    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)  # the kernel does not scale
    args = (heads_first(scaled, padded_q), heads_first(k, padded_k), heads_first(v, padded_k))
    out = jax.vmap(kernel)(*args, *([] if segments is None else [segments]))
    return jnp.swapaxes(out, 1, 2)[:, :tokens].astype(q.dtype)


def _kernel(tokens, keys, heads, causal, block_q, block_k, interpret):
    """Returns the kernel of a row. Its mask is a constant of the program that it is made in."""
    module, masks = _module(), _masks()
    mask = masks.CausalMask((tokens, keys)) if causal else masks.FullMask((tokens, keys))
    sizes = module.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_kv_compute=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_kv_dkv_compute=block_k,
        block_q_dq=block_q,
        block_kv_dq=block_k,
    )
    return module.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads), block_sizes=sizes, interpret=interpret
    )


@functools.cache
def _module():  # Pallas takes half a second to import
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel


@functools.cache
def _masks():
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    return splash_attention_mask
