"""LLaVA-1.6 (LLaVA-NeXT): CLIP, any-resolution tiles, projector, Mistral or Llama decoder.

Source: `LlavaNextForConditionalGeneration` of transformers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from unime_jax.models import clip, config_json, decoder
from unime_jax.models.clip import ClipConfig, ClipVision
from unime_jax.models.decoder import Decoder, DecoderConfig
from unime_jax.models.hf import KeyMap, Rule
from unime_jax.models.layers import fold
from unime_jax.models.multimodal import Multimodal, Projector
from unime_jax.types import Array, ImageSpec, Inputs, UserError

# What transformers fills in where a nested text_config is silent.
_TEXT_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
}
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_TEXT_DEFAULTS, "intermediate_size": 11008},
    "mistral": {
        **_TEXT_DEFAULTS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# Key of config.json -> the only value that is built, which is also the default.
_KNOWN = {
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "use_image_newline_parameter": True,
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True)
class Llava16Config:
    """Is config.json, parsed.

    Attributes:
      projector_bias: whether the projector's linear layers have biases.
      grids: (height, width) in pixels of every canvas.
    """

    text: DecoderConfig
    vision: ClipConfig
    projector_bias: bool
    grids: tuple[tuple[int, int], ...]

    @classmethod
    def from_hf(cls, config: dict[str, Any], **options) -> "Llava16Config":
        """Reads config.json's content; `options` are fields of both parts' configs.

        Raises:
          UserError: a value changes the mathematics in a way not built here.
        """
        for name, only in _KNOWN.items():
            value = config.get(name, only)
            if value != only:
                raise UserError(f"config.json: {name} = {value!r} is not supported, only {only!r}")
        text = config_json.part(config, "text_config")
        kind = text.get("model_type", "llama")
        if kind not in tuple(TEXT_DEFAULTS):
            known = ", ".join(TEXT_DEFAULTS)
            raise UserError(
                f"config.json: text_config.model_type = {kind!r} is not supported; known: {known}"
            )
        tied = config.get("tie_word_embeddings", False)
        text = {**TEXT_DEFAULTS[kind], **text, "model_type": kind, "tie_word_embeddings": tied}
        silent = config.get("vision_config") is None
        tower = clip.LARGE_336 if silent else config_json.part(config, "vision_config")
        vision = ClipConfig.from_hf(tower, **options)
        return cls(
            text=DecoderConfig.from_hf(text, **options),
            vision=vision,
            projector_bias=config.get("multimodal_projector_bias", True),
            grids=_grids(config, vision.image_size),
        )


def _grids(config: dict[str, Any], size: int) -> tuple[tuple[int, int], ...]:
    """Returns the canvases, (height, width) in pixels.

    Raises:
      UserError: one of them is not made of whole tiles.
    """
    grids = config.get("image_grid_pinpoints") or GRIDS
    if not isinstance(grids, list | tuple):
        raise UserError(f"config.json: image_grid_pinpoints = {grids!r} must be a list")
    for grid in grids:
        whole = isinstance(grid, list | tuple) and all(type(side) is int for side in grid)
        if not whole or len(grid) != 2 or any(side < 1 or side % size for side in grid):
            raise UserError(
                f"config.json: image_grid_pinpoints: {grid} is no (height, width) in multiples "
                f"of {size}"
            )
    return tuple(map(tuple, grids))


class Llava16(Multimodal):
    """Embeds text and images with the last real token's hidden state, scaled to length 1.

    Attributes:
      image_newline: [D], closes every line of features; already in the decoder's width.
    """

    def __init__(self, config: Llava16Config, *, rngs: nnx.Rngs, dtype=jnp.float32):
        text, width = config.text, config.text.hidden_size
        self.config = config
        self.vision_tower = ClipVision(config.vision, rngs=rngs, dtype=dtype)
        self.multi_modal_projector = Projector(
            config.vision.hidden_size,
            width,
            bias=config.projector_bias,
            rngs=rngs,
            dtype=dtype,
            matmul=text.matmul,
        )
        init = jax.nn.initializers.normal(width**-0.5)
        self.image_newline = nnx.Param(init(rngs.params(), (width,), dtype))
        self.language_model = Decoder(text, rngs=rngs, dtype=dtype)

    @staticmethod
    def parse(config: dict[str, Any], **options) -> Llava16Config:
        return Llava16Config.from_hf(config, **options)

    @property
    def image_spec(self) -> ImageSpec:
        vision = self.config.vision
        return ImageSpec("llava_anyres", vision.image_size, vision.side**2, grids=self.config.grids)

    @property
    def embedding_width(self) -> int:
        return self.config.text.hidden_size

    def featurise(
        self, tiles: UInt8[Array | np.ndarray, "N S S 3"], *, key: Array | None = None
    ) -> Float[Array, "N P Dv"]:
        """Runs the vision tower alone; what `Inputs.features` may hold instead of tiles."""
        return self.vision_tower(tiles, key=key)

    def visual(self, inputs: Inputs, *, key: Array | None = None) -> Float[Array, "G V D"]:
        features = inputs.features
        if features is None:
            features = self.image_features(inputs.tiles, None, key=key)
        features = features.reshape(inputs.rows, -1, features.shape[-1])
        x = self.multi_modal_projector(features.astype(self.language_model.dtype), fold(key, 1))
        newline = self.image_newline[...].astype(x.dtype)
        newline = jnp.broadcast_to(newline, (inputs.rows, 1, x.shape[-1]))
        return jnp.concatenate([newline, x], axis=1)

    @staticmethod
    def key_map(config: Llava16Config) -> KeyMap:
        rules = [Rule("image_newline", "image_newline")]
        for name in ("linear_1", "linear_2"):
            hf, ours = f"multi_modal_projector.{name}", f"multi_modal_projector/{name}"
            rules.append(Rule(f"{hf}.weight", f"{ours}/kernel", "linear"))
            if config.projector_bias:
                rules.append(Rule(f"{hf}.bias", f"{ours}/bias"))
        # transformers 5 renamed the modules; the hub's files keep the names of version 4.
        renamed = (
            (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"),
            (r"^model\.language_model\.", "language_model.model."),
            # Adapters that were trained on the language model alone, as E5-V's.
            (r"^model\.(embed_tokens|layers|norm)\b", r"language_model.model.\1"),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
        )
        modules = (
            (r"^language_model\.lm_head\b", "lm_head"),
            (r"^language_model\.model\b", "model.language_model"),
            (r"^vision_tower\.vision_model\b", "model.vision_tower"),
            (r"^multi_modal_projector\b", "model.multi_modal_projector"),
        )
        return (
            decoder.key_map(config.text, hf="language_model.")
            + clip.key_map(config.vision, hf="vision_tower.vision_model.", ours="vision_tower/")
            + KeyMap(tuple(rules), renamed=renamed, modules=modules)
        )
