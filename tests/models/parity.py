"""Tiny random models and inputs that the tests of the backbones share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unime_jax import models
from unime_jax.types import Inputs, flatten, unflatten

TEXT = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
VISION = {
    "model_type": "efficientnet-lite0",
    "image_size": 64,
    "stem": 8,
    "head": 24,
    "stages": [
        [3, 1, 1, 8, 1],
        [3, 2, 3, 12, 2],
        [5, 2, 2, 12, 1],
        [3, 2, 2, 16, 1],
        [5, 2, 2, 16, 2],
    ],
    "num_classes": 10,
}
SMOL = {
    "model_type": "unime_smol",
    "text_config": TEXT,
    "vision_config": VISION,
    "projector": {"hidden": 20},
}


def text_inputs(lengths=(9, 5, 1, 12), *, tokens: int | None = None, vocabulary=97, seed=0):
    """Rows of random tokens; padding holds random tokens too, for nothing may depend on it."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), tokens or max(lengths))
    return Inputs(
        rng.integers(1, vocabulary, shape).astype(np.int32),
        np.asarray(lengths, np.int32),
        np.full(shape, -1, np.int32),
        np.zeros((len(lengths), 0, 8, 8, 3), np.uint8),
    )


def image_inputs(lengths=(12, 9), *, size=64, features=4, start=(1, 3), seed=0):
    """Rows with one image each, whose features stand from `start` on."""
    rng = np.random.default_rng(seed)
    text = text_inputs(lengths, seed=seed)
    index = np.array(text.image_index)
    for row, first in enumerate(start):
        index[row, first : first + features] = np.arange(features)
    tokens = np.where(index >= 0, 0, text.tokens)
    tiles = rng.integers(0, 256, (len(lengths), 1, size, size, 3)).astype(np.uint8)
    return Inputs(tokens, text.lengths, index, tiles)


def mask(inputs: Inputs) -> np.ndarray:
    """int64[G, T], 1 at real positions: PyTorch's attention_mask."""
    positions = np.arange(inputs.tokens.shape[1])
    return (positions < inputs.lengths[:, None]).astype(np.int64)


def split(model: nnx.Module):
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def build(config: dict, *, seed: int = 0, **options) -> nnx.Module:
    """Builds a model with random weights drawn by numpy: drawing by jax compiles every shape."""
    abstract_model = nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0), **options))
    graphdef, abstract = split(abstract_model)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, noise = path.rsplit("/", 1)[-1], rng.standard_normal(leaf.shape)
        if name == "kernel":
            # Stacked kernels [L, I, O] and convolutions [k, k, I, O] alike.
            value = noise / np.sqrt(leaf.shape[-2] * (leaf.shape[0] ** 2 if noise.ndim == 4 else 1))
        elif name == "var":
            value = np.exp(0.3 * noise)
        else:
            value = 0.1 * noise + (name == "scale")
        return jnp.asarray(value, leaf.dtype)

    flat = {path: draw(path, leaf) for path, leaf in flatten(abstract).items()}
    return nnx.merge(graphdef, unflatten(flat))


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef, params, inputs):
    return nnx.merge(graphdef, params).embed(inputs)


def embed(model: nnx.Module, inputs: Inputs) -> np.ndarray:
    """Compiles once per model and shape: op by op, tiny models take ten times as long."""
    return np.asarray(_embed(*split(model), inputs))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graphdef, params, inputs):
    return nnx.merge(graphdef, params).hidden(inputs)


@functools.partial(jax.jit, static_argnums=0)
def _inputs_embeds(graphdef, params, inputs):
    return nnx.merge(graphdef, params).inputs_embeds(inputs)


def inputs_embeds(model: nnx.Module, inputs: Inputs) -> np.ndarray:
    return np.asarray(_inputs_embeds(*split(model), inputs))


def hidden(model: nnx.Module, inputs: Inputs) -> np.ndarray:
    return np.asarray(_hidden(*split(model), inputs))


def randomise(module, *, seed: int = 0, scale: float = 0.1) -> None:
    """Moves a torch module's norms and biases off their ones and zeros."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
