"""What the tests of the losses share: compiled losses, their usual settings, unit rows."""

import jax
import numpy as np

from unime_jax import losses

HARD = dict(temperature=0.1, k=3, margin=0.1)
MINE = jax.jit(losses.mine_hard_negatives, static_argnames="k")
HARD_LOSS = jax.jit(losses.hard_negative_info_nce, static_argnames=("k", "shortage", "negatives"))
HARD_LOSS_AND_GRADIENTS = jax.jit(
    jax.value_and_grad(losses.hard_negative_info_nce, argnums=(0, 1), has_aux=True),
    static_argnames=("k", "shortage"),
)
INFO_NCE = jax.jit(losses.info_nce)
DISTILL = jax.jit(losses.distill_kl, static_argnames=("direction", "diagonal"))
DISTILL_AND_GRADIENT = jax.jit(
    jax.value_and_grad(losses.distill_kl, has_aux=True), static_argnames="diagonal"
)


def unit_rows(seed, rows, width, spread=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)) * spread + rng.normal(size=width)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
