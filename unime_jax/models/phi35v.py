"""Phi-3.5-vision: CLIP, HD transform with learned separators, projector, Phi-3 decoder.

Source: the remote code of microsoft/Phi-3.5-vision-instruct (`model_type` phi3_v). It gives a whole
batch the RoPE factors of its longest row; here every row has its own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, UInt8

from unime_jax.models import clip, config_json, decoder
from unime_jax.models.clip import ClipConfig, ClipVision
from unime_jax.models.decoder import Decoder, DecoderConfig
from unime_jax.models.hf import KeyMap, Rule
from unime_jax.models.layers import fold
from unime_jax.models.multimodal import Multimodal, Projector
from unime_jax.models.su_rope import SuRope
from unime_jax.types import Array, ImageSpec, Inputs, UserError

CROPS = 16  # of the published processor, where a checkpoint does not say
TOWERS = {"openai/clip-vit-large-patch14-336": clip.LARGE_336}

# Key of config.json -> the only value that is built; the remote code's defaults are others.
_EMBEDDING = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}
_PROCESSOR = {"name": "clip_vision_model", "layer_idx": -2, "type_feature": "patch"}
_PROCESSOR_DEFAULTS = {"layer_idx": -2, "type_feature": "patch"}


def _part(config: dict[str, Any], name: str, known: dict[str, Any], defaults=None) -> dict:
    """Returns a nested dict of config.json whose values are those known."""
    part = config.get(name)
    if not isinstance(part, dict):
        raise UserError(f"config.json of a phi3_v model lacks {name}")
    part = {**(defaults or {}), **part}
    for key, only in known.items():
        if part.get(key) != only:
            raise UserError(
                f"config.json: {name}.{key} = {part.get(key)!r} is not supported, only {only!r}"
            )
    return part


@dataclasses.dataclass(frozen=True)
class Phi35VConfig:
    """Is config.json, parsed."""

    text: DecoderConfig
    vision: ClipConfig

    @classmethod
    def from_hf(cls, config: dict[str, Any], **options) -> "Phi35VConfig":
        """Reads config.json's content; `options` are fields of both parts' configs.

        Raises:
          UserError: a key is missing, or a value changes the mathematics in a way not built here.
        """
        _part(config, "embd_layer", _EMBEDDING)
        processor = _part(config, "img_processor", _PROCESSOR, _PROCESSOR_DEFAULTS)
        tower = config_json.part(config, "vision_config") or TOWERS.get(processor.get("model_name"))
        if tower is None:
            raise UserError(
                f"config.json: img_processor.model_name = {processor.get('model_name')!r} is "
                f"unknown; known: {', '.join(TOWERS)}; or describe the tower in vision_config"
            )
        if config.get("rope_parameters"):
            raise UserError("config.json: rope_parameters: a phi3_v model has rope_scaling instead")
        # RoPE is read below.
        text = {**config, "model_type": "phi3", "rope_scaling": None}
        text = DecoderConfig.from_hf(text, **options)
        rope = SuRope.from_hf(config, text.head_dim)
        vision = ClipConfig.from_hf(tower, **options)
        if vision.side % 2 or processor.get("image_dim_out") != vision.hidden_size:
            raise UserError(
                f"config.json: img_processor.image_dim_out = {processor.get('image_dim_out')!r} "
                f"does not fit the vision tower, {vision.side} patches a side, "
                f"{vision.hidden_size} wide"
            )
        return cls(dataclasses.replace(text, su_rope=rope), vision)

    @property
    def merged(self) -> int:
        """Width of four neighbouring patches together."""
        return 4 * self.vision.hidden_size


class Phi35V(Multimodal):
    """Embeds text and images with the last real token's hidden state, scaled to length 1.

    Attributes:
      sub_GN: [1, 1, 1, 4 Dv], closes every line of features.
      glb_GN: [1, 1, 4 Dv], stands between the crops and the thumbnail.
    """

    def __init__(self, config: Phi35VConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        text, width = config.text, config.merged
        init = jax.nn.initializers.normal(0.02)
        self.config = config
        self.vision_tower = ClipVision(config.vision, rngs=rngs, dtype=dtype)
        self.sub_GN = nnx.Param(init(rngs.params(), (1, 1, 1, width), dtype))
        self.glb_GN = nnx.Param(init(rngs.params(), (1, 1, width), dtype))
        self.multi_modal_projector = Projector(
            width, text.hidden_size, rngs=rngs, dtype=dtype, matmul=text.matmul
        )
        self.language_model = Decoder(text, rngs=rngs, dtype=dtype)

    @staticmethod
    def parse(config: dict[str, Any], **options) -> Phi35VConfig:
        return Phi35VConfig.from_hf(config, **options)

    @property
    def image_spec(self) -> ImageSpec:
        vision = self.config.vision
        return ImageSpec("phi_hd", vision.image_size, (vision.side // 2) ** 2, crops=CROPS)

    @property
    def embedding_width(self) -> int:
        return self.config.text.hidden_size

    def featurise(
        self,
        tiles: UInt8[Array | np.ndarray, "N S S 3"] | Float[Array, "N S S 3"],
        *,
        key: Array | None = None,
    ) -> Float[Array, "N P Dv"]:
        """Runs the tower and joins 2 x 2 patches: what `Inputs.features` may hold per slot."""
        x = self.vision_tower(tiles, key=key)
        half = self.config.vision.side // 2
        x = x.reshape(x.shape[0], half, 2, half, 2, -1).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(x.shape[0], half * half, -1)

    def image_features(
        self,
        tiles: UInt8[Array | np.ndarray, "G C S S 3"],
        grid: Int[Array | np.ndarray, "G 2"] | None,
        *,
        key: Array | None = None,
    ) -> Float[Array, "slots P Dv"]:
        """Returns the features of every row's slots: its thumbnail, unless C = 1, and its tiles."""
        slots = tiles
        if tiles.shape[1] > 1:
            small = thumbnail(tiles, grid)[:, None]
            slots = jnp.concatenate([small, slots.astype(small.dtype)], axis=1)
        return self.features_of(slots, fold(key, 0))

    def visual(self, inputs: Inputs, *, key: Array | None = None) -> Float[Array, "G V D"]:
        rows, features = inputs.rows, inputs.features
        if features is None:
            features = self.image_features(inputs.tiles, inputs.grid, key=key)
        dtype = self.language_model.dtype
        features = features.reshape(rows, -1, features.shape[-1]).astype(dtype)
        separators = jnp.concatenate([self.sub_GN[...][0, 0], self.glb_GN[...][0]])
        separators = jnp.broadcast_to(separators.astype(dtype), (rows, *separators.shape))
        return self.multi_modal_projector(jnp.concatenate([separators, features], 1), fold(key, 1))

    @staticmethod
    def key_map(config: Phi35VConfig) -> KeyMap:
        image = "model.vision_embed_tokens."
        rules = [Rule(f"{image}{name}", name) for name in ("sub_GN", "glb_GN")]
        for theirs, own in (("0", "linear_1"), ("2", "linear_2")):
            theirs, own = f"{image}img_projection.{theirs}", f"multi_modal_projector/{own}"
            rules.append(Rule(f"{theirs}.weight", f"{own}/kernel", "linear"))
            rules.append(Rule(f"{theirs}.bias", f"{own}/bias"))
        tower = f"{image}img_processor.vision_model."
        return (
            decoder.key_map(config.text)
            + clip.key_map(config.vision, hf=tower, ours="vision_tower/")
            + KeyMap(tuple(rules), copies=((f"{image}wte.weight", "model.embed_tokens.weight"),))
        )


def thumbnail(tiles: UInt8[Array, "G C S S 3"], grid: Int[Array, "G 2"]) -> Float[Array, "G S S 3"]:
    """Shrinks every row's image of h x w tiles to one tile, RGB values of 0 to 255 and a bit more.

    Bicubic, a = -0.75, half-pixel centres, edges repeated, no antialiasing, as PyTorch's
    `interpolate`. All scales are whole numbers, so there are two filters: odd ones pick a pixel,
    even ones weigh four. Written as products with two matrices of weights per tile, exact in f32;
    padded tiles get weight zero. One program serves any mixture of grids.
    """
    count, size = tiles.shape[1:3]
    number = jnp.arange(count)
    rows = _weights(grid[:, 0], number // grid[:, 1:], size)
    columns = _weights(grid[:, 1], number % grid[:, 1:], size)
    x = jnp.einsum("gciy,gcyxr->gcixr", rows, tiles.astype(jnp.float32), precision="highest")
    return jnp.einsum("gcjx,gcixr->gijr", columns, x, precision="highest")


def _weights(
    scale: Int[Array, " G"], place: Int[Array, "G C"], size: int
) -> Float[Array, "G C S S"]:
    """Returns the weight of a tile's pixel (last axis) in a pixel of the thumbnail, for one side.

    Args:
      scale: tiles along this side.
      place: which of them a tile is.
      size: S.
    """
    scale = scale[:, None]
    first = jnp.arange(size) * scale + (scale - 1) // 2
    own = place[:, :, None] * size + jnp.arange(size)
    even = (scale % 2 == 0)[..., None, None]
    total = 0.0
    for tap, weight in zip((-1, 0, 1, 2), (-3 / 32, 19 / 32, 19 / 32, -3 / 32), strict=True):
        source = jnp.clip(first + tap, 0, scale * size - 1)
        hit = source[:, None, :, None] == own[:, :, None, :]
        total = total + hit * jnp.where(even, weight, float(tap == 0))
    return total
