"""CLIP's vision transformer, up to the layer before the last one.

Source: `CLIPVisionModel` of transformers; LLaVA and Phi-3-vision read `hidden_states[-2]`, without
the class token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from unime_jax.models.attention import attention
from unime_jax.models.config_json import check_numbers
from unime_jax.models.hf import KeyMap, Rule
from unime_jax.models.layers import (
    Embedding,
    LayerNorm,
    Linear,
    fold,
    scan_layers,
    stack,
)
from unime_jax.types import Array, UserError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# What transformers fills in where a nested vision_config is silent.
DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes and switches; names are those of config.json.

    Attributes:
      num_hidden_layers: layers in the file; all but the last one are run.
      attention, remat, matmul: as in `DecoderConfig`.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    attention: str = "xla"
    remat: str = "none"
    matmul: str = "transposed"

    @classmethod
    def from_hf(cls, config: dict[str, Any], **options) -> "ClipConfig":
        """Reads a nested `vision_config`; what it does not say is as transformers' defaults.

        Raises:
          UserError: a value that changes the mathematics in a way not built here.
        """
        config = {**DEFAULTS, **config}
        known = {
            "model_type": (config.get("model_type", "clip_vision_model"), "clip_vision_model"),
            "hidden_act": (config["hidden_act"], "quick_gelu"),
            "num_channels": (config["num_channels"], 3),
        }
        for name, (value, only) in known.items():
            if value != only:
                raise UserError(
                    f"config.json: vision_config.{name} = {value!r} is not supported, only {only!r}"
                )
        check_numbers(config, whole=_SIZES, real=("layer_norm_eps",), where="vision_config.")
        sizes = {name: config[name] for name in (*_SIZES, "layer_norm_eps")}
        parsed = cls(**sizes, **options)
        heads = parsed.num_attention_heads
        if (
            parsed.image_size % parsed.patch_size
            or parsed.hidden_size % heads
            or parsed.num_hidden_layers < 2
        ):
            raise UserError(
                f"config.json: vision_config: image_size {parsed.image_size} must be a multiple of "
                f"patch_size {parsed.patch_size}, hidden_size {parsed.hidden_size} one of "
                f"num_attention_heads {heads}, and num_hidden_layers at least 2"
            )
        return parsed

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


def normalise(tiles: Array | np.ndarray, dtype=jnp.float32) -> Float[Array, "..."]:
    """Turns RGB values of 0 to 255, channels last, into what the tower takes; in f32."""
    mean, std = (255 * np.asarray(x, np.float32) for x in (MEAN, STD))
    return ((jnp.asarray(tiles, jnp.float32) - mean) / std).astype(dtype)


class PatchEmbedding(nnx.Module):
    """Is a convolution whose windows do not overlap, without bias: one product per patch.

    Attributes:
      kernel: [p, p, 3, D].
    """

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        size = config.patch_size
        init = jax.nn.initializers.lecun_normal(in_axis=(0, 1, 2))
        self.kernel = nnx.Param(init(rngs.params(), (size, size, 3, config.hidden_size), dtype))

    def __call__(self, pixels: Float[Array, "N S S 3"]) -> Float[Array, "N patches D"]:
        kernel = self.kernel[...].astype(pixels.dtype)
        size, count = kernel.shape[0], pixels.shape[0]
        side = pixels.shape[1] // size
        patches = pixels.reshape(count, side, size, side, size, 3)
        x = jnp.einsum("nyhxwc,hwcd->nyxd", patches, kernel)
        return x.reshape(count, side * side, -1)


class Embeddings(nnx.Module):
    """Is the class token in front of the patches, plus a vector for every position."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        width = config.hidden_size
        init = jax.nn.initializers.normal(0.02)
        self.class_embedding = nnx.Param(init(rngs.params(), (width,), dtype))
        self.patch_embedding = PatchEmbedding(config, rngs=rngs, dtype=dtype)
        self.position_embedding = Embedding(config.side**2 + 1, width, rngs=rngs, dtype=dtype)

    def __call__(self, pixels: Float[Array, "N S S 3"]) -> Float[Array, "N T D"]:
        patches = self.patch_embedding(pixels)
        first = self.class_embedding[...].astype(patches.dtype)
        first = jnp.broadcast_to(first, (patches.shape[0], 1, patches.shape[-1]))
        x = jnp.concatenate([first, patches], axis=1)
        return x + self.position_embedding.embedding[...].astype(x.dtype)


class Attention(nnx.Module):
    """Is self-attention in which every position sees all."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        options = {"bias": True, "rngs": rngs, "dtype": dtype, "matmul": config.matmul}
        width = config.hidden_size
        self.q_proj = Linear(width, width, **options)
        self.k_proj = Linear(width, width, **options)
        self.v_proj = Linear(width, width, **options)
        self.out_proj = Linear(width, width, **options)
        self.heads = config.num_attention_heads
        self.implementation = config.attention

    def __call__(self, x: Float[Array, "N T D"], key: Array | None = None) -> Float[Array, "N T D"]:
        q, k, v = (
            linear(x, fold(key, number)).reshape(*x.shape[:2], self.heads, -1)
            for number, linear in enumerate((self.q_proj, self.k_proj, self.v_proj))
        )
        out = attention(q, k, v, causal=False, implementation=self.implementation)
        return self.out_proj(out.reshape(x.shape), fold(key, 3))


class MLP(nnx.Module):
    """Is fc2(quick_gelu(fc1(x))), quick_gelu(x) = x sigmoid(1.702 x)."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        options = {"bias": True, "rngs": rngs, "dtype": dtype, "matmul": config.matmul}
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, **options)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, **options)

    def __call__(self, x: Float[Array, "N T D"], key: Array | None = None) -> Float[Array, "N T D"]:
        x = self.fc1(x, fold(key, 0))
        return self.fc2(x * jax.nn.sigmoid(1.702 * x), fold(key, 1))


class EncoderLayer(nnx.Module):
    """Is attention and MLP, each behind a norm and added to its input."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = LayerNorm(width, eps=eps, dtype=dtype)
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype)
        self.layer_norm2 = LayerNorm(width, eps=eps, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "N T D"], key: Array | None = None) -> Float[Array, "N T D"]:
        x = x + self.self_attn(self.layer_norm1(x), fold(key, 0))
        return x + self.mlp(self.layer_norm2(x), fold(key, 1))


class Encoder(nnx.Module):
    """Holds the layers: those that are run, stacked, and the last one, which is not.

    The last layer, like the tower's `post_layernorm`, is kept only so that a checkpoint comes out
    as it went in; it is 0.3 % of Phi-3.5-vision's weights. Cutting it off a common stack inside
    the program would copy the other layers' weights (0.6 GB) at every call.
    """

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        def make(rngs):
            return EncoderLayer(config, rngs=rngs, dtype=dtype)

        self.layers = stack(make, config.num_hidden_layers - 1, rngs)
        self.last_layer = make(rngs)


class ClipVision(nnx.Module):
    """Turns tiles into one vector per patch.

    Attributes:
      dtype: of computation; parameters may have another one.
    """

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.embeddings = Embeddings(config, rngs=rngs, dtype=dtype)
        self.pre_layrnorm = LayerNorm(width, eps=eps, dtype=dtype)  # spelled as in the checkpoint
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.post_layernorm = LayerNorm(width, eps=eps, dtype=dtype)

    def __call__(
        self, tiles: UInt8[Array, "N S S 3"] | Float[Array, "N S S 3"], *, key: Array | None = None
    ) -> Float[Array, "N P D"]:
        """Returns the patches' hidden states before the last layer, row by row, in `self.dtype`.

        Args:
          tiles: RGB, 0 to 255.
          key: for the adapters' dropout, or None.
        """
        x = self.pre_layrnorm(self.embeddings(normalise(tiles, self.dtype)))
        x = scan_layers(
            self.encoder.layers,
            x,
            lambda layer, x, key: layer(x, key),
            key=key,
            remat=self.config.remat,
        )
        return x[:, 1:]


def key_map(config: ClipConfig, *, hf: str, ours: str) -> KeyMap:
    """Returns the keys of a tower whose `embeddings`, `encoder`, ... stand under a prefix."""
    rules = [
        Rule(f"{hf}embeddings.class_embedding", f"{ours}embeddings/class_embedding"),
        Rule(
            f"{hf}embeddings.patch_embedding.weight",
            f"{ours}embeddings/patch_embedding/kernel",
            "conv",
        ),
        Rule(
            f"{hf}embeddings.position_embedding.weight",
            f"{ours}embeddings/position_embedding/embedding",
        ),
    ]

    def norm(theirs, own):
        rules.append(Rule(f"{theirs}.weight", f"{own}/scale"))
        rules.append(Rule(f"{theirs}.bias", f"{own}/bias"))

    norm(f"{hf}pre_layrnorm", f"{ours}pre_layrnorm")
    norm(f"{hf}post_layernorm", f"{ours}post_layernorm")
    last = config.num_hidden_layers - 1
    for number, name in (("{L}", "layers"), (last, "last_layer")):
        theirs, own = f"{hf}encoder.layers.{number}.", f"{ours}encoder/{name}/"
        for part in ("layer_norm1", "layer_norm2"):
            norm(theirs + part, own + part)
        for part in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            "mlp.fc1",
            "mlp.fc2",
        ):
            path = own + part.replace(".", "/")
            rules.append(Rule(f"{theirs}{part}.weight", f"{path}/kernel", "linear"))
            rules.append(Rule(f"{theirs}{part}.bias", f"{path}/bias"))
    # A buffer that older versions of transformers saved.
    return KeyMap(tuple(rules), ignored=(f"{hf}embeddings.position_ids".replace(".", r"\."),))
