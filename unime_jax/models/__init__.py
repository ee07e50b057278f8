"""Backbones: the one place where a model type becomes a class.

Every class offers `embed(inputs, *, key=None) -> f32[G, E]` (unit rows), `image_spec` (None for
text models), `embedding_width` and `pooling` (what of the hidden states the row is, for
reports); `parse(config, **options)` and `key_map(parsed)` are its door to
checkpoints.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unime_jax.models import bert, hf, hf_read, hf_write, qlora
from unime_jax.models.bert import Bert
from unime_jax.models.decoder import DecoderConfig, TextEmbedder
from unime_jax.models.llava16 import Llava16
from unime_jax.models.nv_embed import NVEmbed
from unime_jax.models.phi35v import Phi35V
from unime_jax.models.smol import Smol
from unime_jax.types import Params, UserError, flatten, unflatten

CLASSES: dict[str, type[nnx.Module]] = {
    "bert": Bert,
    "llama": TextEmbedder,
    "llava_next": Llava16,
    "mistral": TextEmbedder,
    "nvembed": NVEmbed,
    "phi3": TextEmbedder,
    "phi3_v": Phi35V,
    "unime_smol": Smol,
}


def _class(config: dict[str, Any]) -> type[nnx.Module]:
    name = config.get("model_type")
    if name not in tuple(CLASSES):
        known = ", ".join(sorted(CLASSES))
        raise UserError(f"config.json: model_type {name!r} is unknown; known: {known}")
    return CLASSES[name]


def read_config(directory) -> dict[str, Any]:
    """Reads a model directory's config.json, and `pooling` where sentence-transformers keeps it."""
    config = hf.read_config(directory)
    if CLASSES.get(config.get("model_type")) is TextEmbedder:
        bert.read_pooling(directory, {"lasttoken": TextEmbedder.pooling})  # or another is refused
        return config
    pooling = bert.read_pooling(directory)
    return config if pooling is None else {**config, "pooling": pooling}


def build(
    config: dict[str, Any],
    *,
    rngs: nnx.Rngs,
    dtype="float32",
    attention: str = "xla",
    remat: str = "none",
    matmul: str = "transposed",
) -> nnx.Module:
    """Builds a model with random weights.

    Args:
      config: content of config.json.
      rngs: seeds.
      dtype: of parameters and computation.
      attention, remat, matmul: see `layers`.

    Raises:
      UserError: an unknown model type, or a value that is not supported.
    """
    cls = _class(config)
    parsed = cls.parse(config, attention=attention, remat=remat, matmul=matmul)
    return cls(parsed, rngs=rngs, dtype=jnp.dtype(dtype))


def language_config(config: dict[str, Any], **options) -> DecoderConfig:
    """Returns the settings of a model's decoder, without its head.

    Raises:
      UserError: the model has no causal decoder.
    """
    parsed = _class(config).parse(config, **options)
    text = getattr(parsed, "text", parsed)
    if not isinstance(text, DecoderConfig) or not text.causal:
        raise UserError(f"a {config['model_type']} model has no language model that can be trained")
    return dataclasses.replace(text, head=False)


def rules(config: dict[str, Any]) -> hf.KeyMap:
    """Returns the checkpoint keys of a model."""
    cls = _class(config)
    return cls.key_map(cls.parse(config))


def abstract(
    config: dict[str, Any], *, part: str = "all", quantize: str | None = None, **options
) -> tuple[nnx.GraphDef, Params]:
    """Returns a model without weights: its definition, and shapes and dtypes of its parameters.

    Args:
      config: content of config.json.
      part, quantize: as `load` has them.
      options: `dtype`, `attention`, `remat`, `matmul` of `build`.
    """
    model = _abstract(config, part, **options)
    if quantize is not None:
        qlora.prepare(model, quantize)
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def _abstract(config: dict[str, Any], part: str, *, dtype="float32", **options) -> nnx.Module:
    if part == "all":
        return nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0), dtype=dtype, **options))
    if part != "language":
        raise ValueError(f"part {part!r} is neither all nor language")
    text = language_config(config, **options)
    return nnx.eval_shape(
        lambda: TextEmbedder(text, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)),
    )


def load(
    directory,
    *,
    dtype="float32",
    attention: str = "xla",
    remat: str = "none",
    matmul: str = "transposed",
    part: str = "all",
    quantize: str | None = None,
    sharding_of: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
    fill: Callable[..., Params] | None = None,
) -> nnx.Module:
    """Loads a model directory, parameter by parameter.

    Args:
      directory: config.json and safetensors files.
      dtype, attention, remat, matmul: as in `build`.
      part: "all", or "language" for the decoder alone: nothing else is read or allocated.
      quantize: one of `quant.KINDS` for the decoder's linear layers, done as each is read; None
        keeps them in `dtype`.
      sharding_of: (path, shape) -> where a parameter lives; None means the default device.
      fill: (abstract parameters, keys, `finish` of `hf.fill`) -> parameters; None reads the
        directory's safetensors files.

    Raises:
      UserError: files that are missing, damaged or do not fit each other.
    """
    config = read_config(directory)
    key_map = rules(config)
    model = _abstract(config, part, dtype=dtype, attention=attention, remat=remat, matmul=matmul)
    params = flatten(nnx.to_pure_dict(nnx.state(model)))
    if part == "language":
        key_map = key_map.only(params)
    finish = None
    if quantize is not None:
        finish = qlora.finisher(qlora.prepare(model, quantize), quantize, sharding_of)
    if sharding_of is not None:
        params = {
            path: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding_of(path, leaf.shape)
            )
            for path, leaf in params.items()
        }
    params = unflatten(params)
    if fill is None:
        filled = hf.fill(hf_read.Reader(directory, key_map), key_map, params, finish=finish)
    else:
        filled = fill(params, key_map, finish)
    return nnx.merge(nnx.graphdef(model), filled)


def save(directory, params: Params, config: dict[str, Any], dtype="float32") -> None:
    """Writes a model in HF layout; adapters must have been merged."""
    hf_write.save(directory, params, rules(config), config, jnp.dtype(dtype))
