"""Run directories as training leaves them, with random numbers for what was trained."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
from flax import nnx

from unime_jax import checkpoint, models, steps
from unime_jax.models import lora
from unime_jax.types import flatten

ALL = r"language_model/.*(q|k|v|o|qkv|gate|up|gate_up|down)_proj$"


def write_run(
    directory: pathlib.Path,
    base: pathlib.Path,
    config: dict,
    *,
    rank: int = 3,
    targets: str = ALL,
    trainable: str | None = None,
    seed: int = 0,
    scale: float = 0.2,
) -> pathlib.Path:
    """Writes a run that started from `base`, a directory of a model with this config.

    Args:
      trainable: regex on paths of parameters that were trained as a whole.
    """
    adapters = {"rank": rank, "alpha": 2.0 * rank, "dropout": 0.25, "targets": targets}

    def build():
        model = models.build(config, rngs=nnx.Rngs(0))
        return lora.attach(model, **adapters, rngs=nnx.Rngs(0)) if rank else model

    shapes = flatten(nnx.to_pure_dict(nnx.state(nnx.eval_shape(build))))
    rng = np.random.default_rng(seed)
    trained = {
        path: jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32)
        for path, leaf in shapes.items()
        if "/lora_" in path or (trainable and re.search(trainable, path))
    }
    settings = {
        "data": {"image_size": 224},
        "model": {"path": str(base)},
        "train": {"adapters": adapters},
    }
    checkpoint.open_run(directory, settings)
    saves = checkpoint.Checkpoints(directory, config=settings, every_steps=1)
    saves.save(steps.TrainState(jnp.int32(1), trained, {"count": jnp.int32(1)}), force=True)
    saves.close()
    return directory
