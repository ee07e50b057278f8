"""Decoders of the Llama family: Llama, Mistral and Phi-3 are one module with other settings.

Source: the `llama`, `mistral` and `phi3` models of transformers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from unime_jax.models.attention import attention
from unime_jax.models.config_json import check_numbers, refuse_unknown_mathematics, rope_settings
from unime_jax.models.hf import KeyMap, Rule
from unime_jax.models.layers import (
    Embedding,
    Linear,
    RMSNorm,
    copied_share,
    fold,
    last_token,
    layer_of,
    placed_rows,
    placed_weights,
    rope,
    rope_tables,
    scan_layers,
    stack,
    unit,
)
from unime_jax.models.su_rope import SuRope, asks_for_su_rope
from unime_jax.types import Array, Inputs, UserError

MODEL_TYPES = ("llama", "mistral", "phi3")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window")
# The last layer is computed for the last token alone: it saves nearly a layer and costs a copy of
# what is trained in the others. Models deeper than this do so where that is a small share.
NARROW_LAYERS, _SMALL = 12, 0.1


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches; names are those of config.json where it has one.

    Attributes:
      fused: one product for q, k, v and one for gate and up, as Phi-3 stores them.
      head: False leaves the next-token head out: a model that only embeds.
      causal: False lets every position see every real position of its row.
      sliding_window: longer rows than this are refused: windows are not implemented.
      su_rope: two sets of RoPE factors instead of `rope_theta` alone.
      attention: kernel, one of `attention.ATTENTIONS`.
      remat: what the backward pass recomputes, one of `layers.REMATS`.
      matmul: how gradients of weights are written, one of `products.MATMULS`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    fused: bool = False
    head: bool = True
    causal: bool = True
    su_rope: SuRope | None = None
    attention: str = "xla"
    remat: str = "none"
    matmul: str = "transposed"

    @classmethod
    def from_hf(cls, config: dict[str, Any], **options) -> "DecoderConfig":
        """Reads config.json's content; `options` set the fields that it does not have.

        Raises:
          UserError: a key is missing, or a value changes the mathematics in a way not built here.
        """
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise UserError(f"config.json: model_type {model_type!r} is no decoder known here")
        scaled = model_type == "phi3" and asks_for_su_rope(config)
        refuse_unknown_mathematics({**config, "rope_scaling": None} if scaled else config)
        check_numbers(config, whole=_SIZES, real=("rms_norm_eps",))
        check_numbers(config, whole=_OPTIONAL_SIZES, optional=True)
        heads, width = config["num_attention_heads"], config["hidden_size"]
        shared = config.get("num_key_value_heads") or heads
        if heads % shared or not (config.get("head_dim") or width % heads == 0):
            raise UserError(
                f"config.json: num_attention_heads = {heads} must be a multiple of "
                f"num_key_value_heads = {shared}, and hidden_size = {width} one of it"
            )
        head_dim = config.get("head_dim") or width // heads
        return cls(
            **{name: config[name] for name in _SIZES},
            num_key_value_heads=shared,
            head_dim=head_dim,
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=rope_settings(config).get("rope_theta") or 10000.0,
            attention_bias=model_type == "llama" and config.get("attention_bias", False),
            mlp_bias=model_type == "llama" and config.get("mlp_bias", False),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            sliding_window=None if model_type == "llama" else config.get("sliding_window"),
            fused=model_type == "phi3",
            su_rope=SuRope.from_hf(config, head_dim) if scaled else None,
            **options,
        )


def _linear(config: DecoderConfig, bias: bool, rngs: nnx.Rngs, dtype) -> Callable[..., Linear]:
    return functools.partial(Linear, bias=bias, rngs=rngs, dtype=dtype, matmul=config.matmul)


class Attention(nnx.Module):
    """Is grouped-query self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        linear = _linear(config, config.attention_bias, rngs, dtype)
        width, head = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        self.config = config
        if config.fused:
            self.qkv_proj = linear(width, queries + 2 * keys)
        else:
            self.q_proj = linear(width, queries)
            self.k_proj = linear(width, keys)
            self.v_proj = linear(width, keys)
        self.o_proj = linear(queries, width)

    def __call__(
        self,
        x: Float[Array, "G T D"],
        tables: tuple[Array, Array],
        lengths: Int[Array, " G"],
        key: Array | None = None,
        *,
        last: bool = False,
    ) -> Float[Array, "G T2 D"]:
        config = self.config
        head = config.head_dim
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        if config.fused:
            qkv = self.qkv_proj(x, fold(key, 0))
            q, k, v = jnp.split(qkv, [queries, queries + keys], axis=-1)
            q = last_token(q, lengths)[:, None] if last else q
        else:
            q = self.q_proj(last_token(x, lengths)[:, None] if last else x, fold(key, 0))
            k = self.k_proj(x, fold(key, 1))
            v = self.v_proj(x, fold(key, 2))
        q, k, v = (y.reshape(*y.shape[:2], -1, head) for y in (q, k, v))
        q_tables = _last_tables(tables, lengths) if last else tables
        out = attention(
            rope(q, q_tables),
            rope(k, tables),
            v,
            causal=config.causal and not last,  # the last token sees all real positions
            lengths=lengths,
            implementation="xla" if last else config.attention,
        )
        return self.o_proj(out.reshape(*q.shape[:2], queries), fold(key, 3))


def _last_tables(tables: tuple[Array, Array], lengths: Array) -> tuple[Array, Array]:
    """Returns the tables of every row's last position: [T, 1, H/2] or per row -> [G, 1, 1, H/2]."""
    rows = (jnp.broadcast_to(t, (len(lengths), *t.shape[-3:])) for t in tables)
    return tuple(jnp.take_along_axis(t, (lengths - 1)[:, None, None, None], axis=1) for t in rows)


class MLP(nnx.Module):
    """Is SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        linear = _linear(config, config.mlp_bias, rngs, dtype)
        width, inner = config.hidden_size, config.intermediate_size
        self.fused = config.fused
        if config.fused:
            self.gate_up_proj = linear(width, 2 * inner)
        else:
            self.gate_proj = linear(width, inner)
            self.up_proj = linear(width, inner)
        self.down_proj = linear(inner, width)

    def __call__(self, x: Float[Array, "G T D"], key: Array | None = None) -> Float[Array, "G T D"]:
        if self.fused:
            gate, up = jnp.split(self.gate_up_proj(x, fold(key, 0)), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x, fold(key, 0)), self.up_proj(x, fold(key, 1))
        return self.down_proj(jax.nn.silu(gate) * up, fold(key, 2))


class DecoderLayer(nnx.Module):
    """Is attention and MLP, each behind a norm and added to its input."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        eps, width = config.rms_norm_eps, config.hidden_size
        self.input_layernorm = RMSNorm(width, eps=eps, dtype=dtype)
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(width, eps=eps, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "G T D"],
        tables: tuple[Array, Array],
        lengths: Int[Array, " G"],
        key: Array | None = None,
        *,
        last: bool = False,
    ) -> Float[Array, "G T2 D"]:
        """Applies the layer; with `last`, for every row's last real position alone (T2 = 1)."""
        y = self.self_attn(self.input_layernorm(x), tables, lengths, fold(key, 0), last=last)
        x = y + (last_token(x, lengths)[:, None] if last else x)
        return x + self.mlp(self.post_attention_layernorm(x), fold(key, 1))


class Stack(nnx.Module):
    """Is the decoder without its head; the name `model` of checkpoints."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        width = config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, width, rngs=rngs, dtype=dtype)
        self.layers = stack(
            lambda rngs: DecoderLayer(config, rngs=rngs, dtype=dtype),
            config.num_hidden_layers,
            rngs,
        )
        self.norm = RMSNorm(width, eps=config.rms_norm_eps, dtype=dtype)


class Decoder(nnx.Module):
    """Turns input vectors into hidden states, and hidden states into next-token scores.

    Attributes:
      dtype: of computation; parameters may have another one, for instance while they are trained.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.model = Stack(config, rngs=rngs, dtype=dtype)
        self.lm_head = nnx.data(None)
        if config.head and not config.tie_word_embeddings:
            linear = _linear(config, False, rngs, dtype)
            self.lm_head = nnx.data(linear(config.hidden_size, config.vocab_size))

    def embed_tokens(self, tokens: Int[Array, "G T"]) -> Float[Array, "G T D"]:
        return self.model.embed_tokens(tokens).astype(self.dtype)

    @jax.named_scope("decoder")  # for profiles and `plan`
    def __call__(
        self,
        embeds: Float[Array, "G T D"],
        lengths: Int[Array, " G"],
        *,
        key: Array | None = None,
    ) -> Float[Array, "G T D"]:
        """Returns hidden states after the final norm; those behind a row's length mean nothing.

        Args:
          embeds: right-padded input vectors.
          lengths: real positions of each row.
          key: for the adapters' dropout, or None.

        Raises:
          UserError: T exceeds the checkpoint's sliding window.
        """
        x = self._layers(embeds, lengths, key)
        return self.model.norm(x)

    @jax.named_scope("decoder")
    def last_hidden(
        self,
        embeds: Float[Array, "G T D"],
        lengths: Int[Array, " G"],
        *,
        key: Array | None = None,
    ) -> Float[Array, "G D"]:
        """Returns the hidden state of every row's last real position; same as `__call__` there."""
        if not self._narrows():
            return last_token(self(embeds, lengths, key=key), lengths)
        final = placed_weights(layer_of(self.model.layers, -1))
        x = self._layers(embeds, lengths, fold(key, 0), self.config.num_hidden_layers - 1)
        x = final(x, self._tables(embeds, lengths), lengths, fold(key, 1), last=True)
        return self.model.norm(placed_rows(x))[:, 0]

    def _narrows(self) -> bool:
        depth = self.config.num_hidden_layers
        return depth > 1 and (depth <= NARROW_LAYERS or copied_share(self.model.layers) <= _SMALL)

    def _tables(self, embeds: Array, lengths: Array) -> tuple[Array, Array]:
        if self.config.su_rope is not None:
            return self.config.su_rope.tables(embeds.shape[1], lengths)
        positions = jnp.arange(embeds.shape[1])
        return rope_tables(positions, self.config.head_dim, self.config.rope_theta)

    def _layers(self, embeds: Array, lengths: Array, key, count: int | None = None) -> Array:
        window, tokens = self.config.sliding_window, embeds.shape[1]
        if window is not None and tokens > window:
            raise UserError(
                f"rows of {tokens} tokens exceed the model's sliding_window of {window}, which is "
                "not supported; use shorter rows"
            )
        tables = self._tables(embeds, lengths)
        return scan_layers(
            self.model.layers,
            embeds.astype(self.dtype),
            lambda layer, x, key: layer(x, tables, lengths, key),
            key=key,
            remat=self.config.remat,
            count=count,
        )

    def logits(self, hidden: Float[Array, "*G D"]) -> Float[Array, "*G V"]:
        if not self.config.head:
            raise UserError("this model was built without its next-token head")
        if self.lm_head is None:
            return self.model.embed_tokens.attend(hidden)
        return self.lm_head(hidden)


class TextEmbedder(nnx.Module):
    """Embeds text with a decoder alone: the last real token's hidden state, scaled to length 1."""

    image_spec = None
    pooling = "last token"

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.language_model = Decoder(config, rngs=rngs, dtype=dtype)

    @staticmethod
    def parse(config: dict[str, Any], **options) -> DecoderConfig:
        return DecoderConfig.from_hf(config, **options)

    @property
    def embedding_width(self) -> int:
        return self.language_model.config.hidden_size

    def hidden(self, inputs: Inputs, *, key: Array | None = None) -> Float[Array, "G T D"]:
        """Returns the decoder's last hidden states."""
        inputs = jax.tree.map(jnp.asarray, inputs)
        embeds = self.language_model.embed_tokens(inputs.tokens)
        return self.language_model(embeds, inputs.lengths, key=key)

    def last_hidden(self, inputs: Inputs, *, key: Array | None = None) -> Float[Array, "G D"]:
        """Returns the last hidden state of every row's last real position."""
        inputs = jax.tree.map(jnp.asarray, inputs)
        embeds = self.language_model.embed_tokens(inputs.tokens)
        return self.language_model.last_hidden(embeds, inputs.lengths, key=key)

    def embed(self, inputs: Inputs, *, key: Array | None = None) -> Float[Array, "G E"]:
        """Returns unit rows, f32; the key is for the adapters' dropout."""
        return unit(self.last_hidden(inputs, key=key))

    @staticmethod
    def key_map(config: DecoderConfig) -> KeyMap:
        return key_map(config)


def key_map(config: DecoderConfig, *, hf: str = "", ours: str = "language_model/") -> KeyMap:
    """Returns the checkpoint keys of a decoder that stands under a prefix on either side."""
    attn = ("qkv_proj",) if config.fused else ("q_proj", "k_proj", "v_proj")
    mlp = ("gate_up_proj",) if config.fused else ("gate_proj", "up_proj")
    names = [(f"self_attn.{name}", config.attention_bias) for name in (*attn, "o_proj")]
    names += [(f"mlp.{name}", config.mlp_bias) for name in (*mlp, "down_proj")]

    def under(name, leaf_hf, leaf_ours, transform="same"):
        path = name.replace(".{L}", "").replace(".", "/")
        return Rule(f"{hf}{name}.{leaf_hf}", f"{ours}{path}/{leaf_ours}", transform)

    layer = "model.layers.{L}."
    rules = [
        under("model.embed_tokens", "weight", "embedding"),
        under("model.norm", "weight", "scale"),
        under(f"{layer}input_layernorm", "weight", "scale"),
        under(f"{layer}post_attention_layernorm", "weight", "scale"),
    ]
    rules += [under(layer + name, "weight", "kernel", "linear") for name, _ in names]
    rules += [under(layer + name, "bias", "bias") for name, bias in names if bias]
    ignored = [rf"{hf}model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
    if config.tie_word_embeddings or not config.head:
        ignored.append(rf"{hf}lm_head\.weight")  # a copy of embed_tokens, or not wanted
    else:
        rules.append(under("lm_head", "weight", "kernel", "linear"))
    return KeyMap(tuple(rules), ignored=tuple(ignored))
