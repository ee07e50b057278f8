"""NV-Embed-v2, the teacher: a Mistral that sees both ways, latent attention, a mean over tokens.

Source: Lee et al. 2024 (arXiv 2405.17428) and the model code published with nvidia/NV-Embed-v2.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from unime_jax.models import decoder
from unime_jax.models.attention import attention
from unime_jax.models.config_json import check_numbers
from unime_jax.models.decoder import Decoder, DecoderConfig
from unime_jax.models.hf import KeyMap, Rule
from unime_jax.models.layers import LayerNorm, Linear, unit
from unime_jax.types import Array, Inputs, UserError

_NORM_EPS = 1e-5
_FEED_FORWARD = 4  # width between the two linear layers, in widths of the model
# Values of config.json that change the mathematics, and the only ones built.
_LATENT_SIZES = ("num_latents_value", "num_cross_heads", "cross_dim_head")
_KNOWN = {"padding_side": "right", "mask_type": "b", "add_eos": True}


@dataclasses.dataclass(frozen=True)
class NVEmbedConfig:
    """Is config.json, parsed; names are its own.

    Attributes:
      text: of the decoder.
      num_latents_value: vectors that every position attends to.
      num_cross_heads, cross_dim_head: heads of that attention, and their width.
      is_mask_instruction: whether `Inputs.skip` counts.
    """

    text: DecoderConfig
    num_latents_value: int
    num_cross_heads: int
    cross_dim_head: int
    is_mask_instruction: bool

    @classmethod
    def from_hf(cls, config: dict[str, Any], **options) -> "NVEmbedConfig":
        """Reads config.json's content; `options` are fields of `DecoderConfig`.

        Raises:
          UserError: a part is missing, or a value changes the mathematics in a way not built here.
        """
        parts = [config.get(part) for part in ("text_config", "latent_attention_config")]
        if not all(isinstance(part, dict) for part in parts):
            raise UserError(
                "config.json of an nvembed model lacks text_config or latent_attention_config"
            )
        text, latent = parts
        for name, value in _KNOWN.items():
            if config.get(name, value) != value:
                raise UserError(
                    f"config.json: {name} = {config[name]!r} is not supported, only {value!r}"
                )
        # The published code never applies the window, and saves no head.
        parsed = DecoderConfig.from_hf(
            {**text, "model_type": "mistral", "sliding_window": None}, **options
        )
        for name in ("latent_dim", "hidden_dim"):
            if latent.get(name, parsed.hidden_size) != parsed.hidden_size:
                raise UserError(
                    f"config.json: latent_attention_config.{name} = {latent[name]} must be "
                    f"text_config.hidden_size = {parsed.hidden_size}"
                )
        check_numbers(latent, whole=_LATENT_SIZES, where="latent_attention_config.")
        return cls(
            text=dataclasses.replace(parsed, causal=False, head=False),
            **{name: latent[name] for name in _LATENT_SIZES},
            is_mask_instruction=config.get("is_mask_instruction", True),
        )


class LatentAttention(nnx.Module):
    """Adds to every position what it reads from learned latents, then a gated feed-forward."""

    def __init__(self, config: NVEmbedConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        def linear(inputs, outputs, bias=False):
            return Linear(
                inputs, outputs, bias=bias, rngs=rngs, dtype=dtype, matmul=config.text.matmul
            )

        width = config.text.hidden_size
        heads = config.num_cross_heads * config.cross_dim_head
        inner = _FEED_FORWARD * width
        self.config = config
        init = jax.random.normal(rngs.params(), (config.num_latents_value, width))
        self.latents = nnx.Param(init.astype(dtype))
        self.norm = LayerNorm(width, eps=_NORM_EPS, dtype=dtype)
        self.norm_context = LayerNorm(width, eps=_NORM_EPS, dtype=dtype)
        self.to_q = linear(width, heads)
        self.to_kv = linear(width, 2 * heads)
        self.to_out = linear(heads, width)
        self.ff_norm = LayerNorm(width, eps=_NORM_EPS, dtype=dtype)
        self.ff_in = linear(width, 2 * inner, bias=True)
        self.ff_out = linear(inner, width, bias=True)

    def __call__(self, x: Float[Array, "G T D"]) -> Float[Array, "G T D"]:
        config = self.config
        context = self.norm_context(self.latents[...].astype(x.dtype))
        k, v = jnp.split(self.to_kv(context), 2, axis=-1)
        q, k, v = (
            # One row: all positions share the latents, which are not copied for each.
            y.reshape(1, -1, config.num_cross_heads, config.cross_dim_head)
            for y in (self.to_q(self.norm(x)), k, v)
        )
        # No fused kernel has heads this wide.
        read = attention(q, k, v, causal=False, implementation="xla")
        x = x + self.to_out(read.reshape(*x.shape[:2], -1))
        inner, gate = jnp.split(self.ff_in(self.ff_norm(x)), 2, axis=-1)
        return x + self.ff_out(inner * jax.nn.gelu(gate, approximate=False))


class NVEmbed(nnx.Module):
    """Embeds text."""

    image_spec = None
    pooling = "mean of latent attention"

    def __init__(self, config: NVEmbedConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        self.embedding_model = Decoder(config.text, rngs=rngs, dtype=dtype)
        self.latent_attention_model = LatentAttention(config, rngs=rngs, dtype=dtype)

    @staticmethod
    def parse(config: dict[str, Any], **options) -> NVEmbedConfig:
        return NVEmbedConfig.from_hf(config, **options)

    @property
    def embedding_width(self) -> int:
        return self.config.text.hidden_size

    def hidden(self, inputs: Inputs, *, key: Array | None = None) -> Float[Array, "G T D"]:
        """Returns the decoder's last hidden states."""
        inputs = jax.tree.map(jnp.asarray, inputs)
        embeds = self.embedding_model.embed_tokens(inputs.tokens)
        return self.embedding_model(embeds, inputs.lengths, key=key)

    def embed(self, inputs: Inputs, *, key: Array | None = None) -> Float[Array, "G E"]:
        """Returns unit rows, f32: the mean over real tokens behind `Inputs.skip`."""
        inputs = jax.tree.map(jnp.asarray, inputs)
        x = self.latent_attention_model(self.hidden(inputs, key=key)).astype(jnp.float32)
        position = jnp.arange(x.shape[1])
        pooled = position < inputs.lengths[:, None]
        if inputs.skip is not None and self.config.is_mask_instruction:
            pooled &= position >= inputs.skip[:, None]
        # The sum points where the mean does.
        return unit(jnp.sum(jnp.where(pooled[..., None], x, 0), axis=1))

    @staticmethod
    def key_map(config: NVEmbedConfig) -> KeyMap:
        text = decoder.key_map(config.text, ours="embedding_model/")
        rules = [
            dataclasses.replace(rule, hf="embedding_model." + rule.hf.removeprefix("model."))
            for rule in text.rules
        ]
        hf, ours = "latent_attention_model.", "latent_attention_model/"
        read, forward = (f"{hf}cross_attend_blocks.{number}." for number in (0, 1))
        rules.append(Rule(f"{hf}latents", f"{ours}latents"))
        for name in ("to_q", "to_kv", "to_out"):
            rules.append(Rule(f"{read}fn.{name}.weight", f"{ours}{name}/kernel", "linear"))
        for theirs, name in (("fn.net.0", "ff_in"), ("fn.net.2", "ff_out")):
            rules.append(Rule(f"{forward}{theirs}.weight", f"{ours}{name}/kernel", "linear"))
            rules.append(Rule(f"{forward}{theirs}.bias", f"{ours}{name}/bias"))
        norms = {
            f"{read}norm": "norm",
            f"{read}norm_context": "norm_context",
            f"{forward}norm": "ff_norm",
        }
        for theirs, name in norms.items():
            rules.append(Rule(f"{theirs}.weight", f"{ours}{name}/scale"))
            rules.append(Rule(f"{theirs}.bias", f"{ours}{name}/bias"))
        return KeyMap(
            tuple(rules),
            ignored=(r"embedding_model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
        )
