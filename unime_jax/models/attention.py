"""Attention, through one door: XLA's own everywhere, or a kernel of the platform."""

import contextlib
import contextvars
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from unime_jax.models import splash
from unime_jax.models.layers import placed_kernel
from unime_jax.types import Array, UserError

ATTENTIONS = ("xla", "cudnn", "splash", "splash_interpret")
_CUDNN_HEAD = 128  # widest head, on Ampere
_BLOCK = 80  # positions that are worth a block of their own, on two cores of a CPU
_BLOCKS = 4  # at most: each is traced and compiled


def attention(
    q: Float[Array, "G T N H"],
    k: Float[Array, "G S K H"],
    v: Float[Array, "G S K H"],
    *,
    causal: bool,
    lengths: Int[Array, " G"] | None = None,
    implementation: str = "xla",
) -> Float[Array, "G T N H"]:
    """Attends, scaled by 1 / sqrt(H); query head n reads key/value head n // (N / K).

    Rows are right-padded: causal rows need no mask, for no real position sees the padding behind
    it. Otherwise keys at positions >= lengths are hidden. Padded positions give finite values that
    mean nothing.

    Args:
      q, k, v: of any length; kernels that want whole blocks pad inside.
      causal: T == S, and a position sees those up to itself.
      lengths: real keys of each row; None: all.
      implementation: "xla" is the reference; "cudnn" (GPU) takes bf16 and heads of up to 128 and is
        left for xla where they are wider; "splash" (TPU); "splash_interpret" is the same kernel,
        run step by step on any platform.
    """
    if implementation not in ATTENTIONS:
        names = ", ".join(ATTENTIONS)
        raise UserError(f"attention {implementation!r} is unknown; use one of {names}")
    if implementation == "cudnn" and (q.shape[-1] > _CUDNN_HEAD or q.shape[-1] % 8):
        implementation = "xla"
    if _WHOLE.get() or (implementation == "xla" and not causal):
        return _whole(q, k, v, lengths, causal=causal)
    if implementation == "xla":
        return _in_blocks(q, k, v)
    if implementation == "cudnn":
        run = functools.partial(_whole, causal=causal, implementation="cudnn")
    else:
        run = functools.partial(
            splash.attention, causal=causal, interpret=implementation == "splash_interpret"
        )
    args = (q, k, v) if causal or lengths is None else (q, k, v, lengths)
    return placed_kernel(run)(*args)


def _whole(q, k, v, lengths=None, *, causal, implementation="xla"):
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=causal,
        key_value_seq_lengths=None if causal else lengths,
        implementation=implementation,
    )


def _in_blocks(q, k, v):
    """Attends block by block of queries: none computes scores of the keys behind its last."""
    tokens = q.shape[1]
    count = min(_BLOCKS, tokens // _BLOCK)
    if count < 2:
        return _whole(q, k, v, causal=True)
    ends = [tokens * (number + 1) // count for number in range(count)]
    blocks = []
    for start, end in zip([0, *ends], ends, strict=False):
        seen = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        blocks.append(
            jax.nn.dot_product_attention(
                q[:, start:end], k[:, :end], v[:, :end], mask=seen[None, None]
            )
        )
    return jnp.concatenate(blocks, axis=1)


_WHOLE = contextvars.ContextVar("whole", default=False)


@contextlib.contextmanager
def without_kernels():
    """Takes the plain products of all queries with all keys in what is traced inside.

    They are what kernels are counted as, for nobody sees into these.
    """
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)
