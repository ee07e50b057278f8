"""A backbone small enough to think about: one adapted projection of mean token vectors."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unime_jax import sharding
from unime_jax.models.dropout import dropout
from unime_jax.types import Batch, Inputs

# As for any new backbone: a rule for a parameter that no other matches.
sharding.RULES += ((r"^kernel$", jax.sharding.PartitionSpec()),)


class ToyModel(nnx.Module):
    """Mean of token embeddings, one linear map, unit norm; dropout when a key is given."""

    image_spec = None

    def __init__(self, *, vocabulary: int = 50, width: int = 8, rngs: nnx.Rngs):
        init = jax.random.normal
        self.embedding = nnx.Param(init(rngs.params(), (vocabulary, width)))
        self.kernel = nnx.Param(init(rngs.params(), (width, width)))

    def embed(self, inputs: Inputs, *, key=None):
        real = jnp.arange(inputs.tokens.shape[1]) < inputs.lengths[:, None]
        vectors = self.embedding[...][inputs.tokens] * real[..., None]
        mean = vectors.sum(1) / inputs.lengths[:, None]
        if key is not None:
            mean = dropout(mean, key, 0.5)
        out = mean @ self.kernel[...]
        return out * jax.lax.rsqrt(jnp.sum(out**2, -1, keepdims=True) + 1e-12)


def inputs(rows: int, tokens: int = 6, *, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, tokens + 1, rows).astype(np.int32)
    ids = rng.integers(1, 50, (rows, tokens)).astype(np.int32)
    ids *= np.arange(tokens) < lengths[:, None]
    index = np.full((rows, tokens), -1, np.int32)
    return Inputs(ids, lengths, index, np.zeros((rows, 0, 0, 0, 3), np.uint8))


def batch(rows: int = 16, *, seed: int = 0) -> Batch:
    """Pairs whose two sides each come in two groups of unequal size, in permuted order."""
    rng = np.random.default_rng(seed)
    half = rows // 2 - 1
    return Batch(
        query=(inputs(half, 4, seed=seed), inputs(rows - half, 7, seed=seed + 1)),
        target=(inputs(rows - half, 5, seed=seed + 2), inputs(half, 3, seed=seed + 3)),
        query_order=np.arange(rows, dtype=np.int32),
        target_order=rng.permutation(rows).astype(np.int32),
        target_ids=np.arange(rows, dtype=np.int32),
    )
