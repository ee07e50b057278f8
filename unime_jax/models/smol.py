"""A small multimodal model put together from parts: vision tower, projector, decoder.

Its directory holds config.json, model.safetensors and the tokenizer. config.json:

    {
      "model_type": "unime_smol",
      "text_config": {...},          a Llama's config.json
      "vision_config": {
        "model_type": "efficientnet-lite0",
        "image_size": 224,           S, a multiple of 32
        "grid": 7                    optional: features per side, S / 32 unless given; fewer are
                                     averages over areas
      },
      "projector": {
        "hidden": 1152,              width between its two linear layers
        "norm": true                 optional: LayerNorm in front, true unless given
      }
    }

Keys of model.safetensors: `language_model.model.*` (and `language_model.lm_head.weight` where the
head is not tied) as a LlamaForCausalLM's, `vision_tower.*` as EfficientNet-Lite0's .pth, and
`multi_modal_projector.{norm,linear_1,linear_2}.{weight,bias}`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, UInt8

from unime_jax.models import decoder, efficientnet
from unime_jax.models.decoder import Decoder, DecoderConfig
from unime_jax.models.dropout import dropout
from unime_jax.models.efficientnet import EfficientNet, EfficientNetConfig
from unime_jax.models.hf import KeyMap, Rule
from unime_jax.models.layers import LayerNorm, Linear
from unime_jax.models.multimodal import FEATURES, Multimodal
from unime_jax.types import Array, ImageSpec, Inputs, UserError

_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class SmolConfig:
    """Is config.json, parsed.

    Attributes:
      projector_hidden: width between the projector's linear layers.
      projector_norm: whether it normalises the tower's features first.
    """

    text: DecoderConfig
    vision: EfficientNetConfig
    projector_hidden: int
    projector_norm: bool = True

    @classmethod
    def from_hf(cls, config: dict[str, Any], **options) -> "SmolConfig":
        """Reads config.json's content; `options` are fields of `DecoderConfig`.

        Raises:
          UserError: a part is missing or unknown.
        """
        for part in ("text_config", "vision_config", "projector"):
            if not isinstance(config.get(part), dict):
                raise UserError(f"config.json of a unime_smol model lacks {part}")
        projector = config["projector"]
        unknown = sorted(set(projector) - {"hidden", "norm"})
        hidden = projector.get("hidden")
        if unknown or type(hidden) is not int or not 0 < hidden < 2**28:
            raise UserError(
                f"config.json: projector = {projector} must have an integer `hidden` above 0 and "
                "nothing else but `norm`"
            )
        return cls(
            text=DecoderConfig.from_hf(config["text_config"], **options),
            vision=EfficientNetConfig.from_hf(config["vision_config"]),
            projector_hidden=hidden,
            projector_norm=projector.get("norm", True),
        )


class Projector(nnx.Module):
    """Turns the tower's features into vectors of the decoder's input space.

    Attributes:
      dropout: rate on the normalised features, in training only.
    """

    def __init__(self, config: SmolConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        inputs, hidden = config.vision.head, config.projector_hidden
        options = {"bias": True, "rngs": rngs, "dtype": dtype, "matmul": config.text.matmul}
        self.norm = nnx.data(
            LayerNorm(inputs, eps=_NORM_EPS, dtype=dtype) if config.projector_norm else None
        )
        self.linear_1 = Linear(inputs, hidden, **options)
        self.linear_2 = Linear(hidden, config.text.hidden_size, **options)
        self.dropout = 0.0

    def __call__(self, x: Float[Array, "*G Dv"], key: Array | None = None) -> Float[Array, "*G D"]:
        if self.norm is not None:
            x = self.norm(x)
        if key is not None and self.dropout > 0:
            x = dropout(x, key, self.dropout)
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=False))


class Smol(Multimodal):
    """Is the tower, the projector and the decoder."""

    pooling = "last token"

    def __init__(self, config: SmolConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        self.vision_tower = EfficientNet(config.vision, rngs=rngs)
        self.multi_modal_projector = Projector(config, rngs=rngs, dtype=dtype)
        self.language_model = Decoder(config.text, rngs=rngs, dtype=dtype)

    @staticmethod
    def parse(config: dict[str, Any], **options) -> SmolConfig:
        return SmolConfig.from_hf(config, **options)

    @property
    def image_spec(self) -> ImageSpec:
        vision = self.config.vision
        return ImageSpec("grid", vision.image_size, vision.grid**2)

    @property
    def embedding_width(self) -> int:
        return self.config.text.hidden_size

    def featurise(self, tiles: UInt8[Array | np.ndarray, "N S S 3"]) -> Float[Array, "N P Dv"]:
        """Runs the vision tower alone; what `Inputs.features` may hold instead of tiles."""
        return self.vision_tower(tiles)

    def image_features(
        self,
        tiles: UInt8[Array | np.ndarray, "G C S S 3"],
        grid: Array | None,
        *,
        key: Array | None = None,
    ) -> Float[Array, "GC P Dv"]:
        """Returns what `Inputs.features` may hold in place of tiles."""
        features = self.featurise(tiles.reshape(-1, *tiles.shape[2:]))
        return checkpoint_name(features, FEATURES)

    def visual(self, inputs: Inputs, *, key: Array | None = None) -> Float[Array, "G V D"]:
        features = inputs.features
        if features is None:
            features = self.image_features(inputs.tiles, None)
        # [G, C, P, Dv] or [G * C, P, Dv] -> [G, C * P, Dv]; f16 features are converted here.
        features = features.reshape(inputs.rows, -1, features.shape[-1])
        return self.multi_modal_projector(features.astype(self.language_model.dtype), key)

    @staticmethod
    def key_map(config: SmolConfig) -> KeyMap:
        hf, ours = "multi_modal_projector.", "multi_modal_projector/"
        rules = []
        for name in ("linear_1", "linear_2"):
            rules.append(Rule(f"{hf}{name}.weight", f"{ours}{name}/kernel", "linear"))
            rules.append(Rule(f"{hf}{name}.bias", f"{ours}{name}/bias"))
        if config.projector_norm:
            rules.append(Rule(f"{hf}norm.weight", f"{ours}norm/scale"))
            rules.append(Rule(f"{hf}norm.bias", f"{ours}norm/bias"))
        return (
            decoder.key_map(config.text, hf="language_model.", ours="language_model/")
            + efficientnet.key_map(config.vision, hf="vision_tower.", ours="vision_tower/")
            + KeyMap(tuple(rules))
        )
