"""BERT sentence encoders: the small teachers.

Source: the `bert` model of transformers, with the pooling of sentence-transformers; vectors are
always scaled to length 1.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from unime_jax.models import hf
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
    unit,
)
from unime_jax.types import Array, Inputs, UserError

POOLINGS = ("mean", "cls")
_NAMES = {"mean_tokens": "mean", "cls_token": "cls"}  # of sentence-transformers
MODULES = ("Transformer", "Pooling", "Normalize")  # of a sentence-transformers directory


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes and switches; names are those of config.json where it has one.

    Attributes:
      pooling: "mean" over real tokens, or "cls", the first one.
      attention, remat, matmul: as in `decoder.DecoderConfig`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    pooling: str = "mean"
    attention: str = "xla"
    remat: str = "none"
    matmul: str = "transposed"

    @classmethod
    def from_hf(cls, config: dict[str, Any], **options) -> "BertConfig":
        """Reads config.json's content, plus `pooling` (see `read_pooling`).

        Raises:
          UserError: a key is missing, or a value changes the mathematics in a way not built here.
        """
        known = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
        for name, value in known.items():
            if config.get(name, value) != value:
                raise UserError(
                    f"config.json: {name} = {config[name]!r} is not supported, only {value!r}"
                )
        pooling = config.get("pooling", "mean")
        if pooling not in POOLINGS:
            raise UserError(f"pooling {pooling!r} is unknown; use one of {', '.join(POOLINGS)}")
        fields = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        required = tuple(fields)
        if missing := [name for name in required if name not in config]:
            raise UserError(f"config.json of a bert model lacks {', '.join(missing)}")
        check_numbers(config, whole=required[:-1], real=required[-1:])
        if config["hidden_size"] % config["num_attention_heads"]:
            raise UserError(
                f"config.json: hidden_size = {config['hidden_size']} is no multiple of "
                f"num_attention_heads = {config['num_attention_heads']}"
            )
        return cls(**{name: config[name] for name in required}, pooling=pooling, **options)


def read_pooling(directory, known: Mapping[str, str] = _NAMES) -> str | None:
    """Returns the pooling that a sentence-transformers directory names; None without such a file.

    Args:
      directory: of the model.
      known: those that are built, by sentence-transformers' names.

    Raises:
      UserError: the file is unreadable or asks for a pooling not built here, or the directory has
        modules behind the pooling other than Normalize.
    """
    _refuse_unknown_modules(pathlib.Path(directory) / "modules.json")
    path = pathlib.Path(directory) / "1_Pooling" / "config.json"
    if not path.exists():
        return None
    content = hf.read_json(path)
    prefix = "pooling_mode_"
    modes = {key.removeprefix(prefix) for key, on in content.items() if on is True}
    modes = {key for key in modes if f"{prefix}{key}" in content}
    if len(modes) != 1 or not modes <= set(known):
        names = " or ".join(known)
        raise UserError(f"{path}: only {names} alone are supported, not {modes}")
    return known[modes.pop()]


def _refuse_unknown_modules(path: pathlib.Path) -> None:
    if not path.exists():
        return
    try:
        kinds = [str(module["type"]) for module in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    # Names come with their package: "sentence_transformers.models.Pooling".
    unknown = [kind for kind in kinds if kind.rsplit(".", 1)[-1] not in MODULES]
    if unknown:
        raise UserError(f"{path}: {', '.join(unknown)} is not supported, only {', '.join(MODULES)}")


class BertLayer(nnx.Module):
    """Is attention and MLP, each normalised after it was added to its input."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        def linear(inputs, outputs):
            return Linear(inputs, outputs, bias=True, rngs=rngs, dtype=dtype, matmul=config.matmul)

        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.config = config
        self.query = linear(width, width)
        self.key = linear(width, width)
        self.value = linear(width, width)
        self.attention_output = linear(width, width)
        self.attention_norm = LayerNorm(width, eps=eps, dtype=dtype)
        self.intermediate = linear(width, inner)
        self.output = linear(inner, width)
        self.output_norm = LayerNorm(width, eps=eps, dtype=dtype)

    def __call__(
        self, x: Float[Array, "G T D"], lengths: Int[Array, " G"], key: Array | None = None
    ) -> Float[Array, "G T D"]:
        heads = (*x.shape[:2], self.config.num_attention_heads, -1)
        out = attention(
            self.query(x, fold(key, 0)).reshape(heads),
            self.key(x, fold(key, 1)).reshape(heads),
            self.value(x, fold(key, 2)).reshape(heads),
            causal=False,
            lengths=lengths,
            implementation=self.config.attention,
        )
        out = self.attention_output(out.reshape(x.shape), fold(key, 3))
        x = self.attention_norm(x + out)
        inner = jax.nn.gelu(self.intermediate(x, fold(key, 4)), approximate=False)
        return self.output_norm(x + self.output(inner, fold(key, 5)))


class Bert(nnx.Module):
    """Embeds text."""

    image_spec = None

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        width = config.hidden_size
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.word_embeddings = Embedding(config.vocab_size, width, rngs=rngs, dtype=dtype)
        self.position_embeddings = Embedding(
            config.max_position_embeddings, width, rngs=rngs, dtype=dtype
        )
        self.token_type_embeddings = Embedding(
            config.type_vocab_size, width, rngs=rngs, dtype=dtype
        )
        self.norm = LayerNorm(width, eps=config.layer_norm_eps, dtype=dtype)
        self.layers = stack(
            lambda rngs: BertLayer(config, rngs=rngs, dtype=dtype),
            config.num_hidden_layers,
            rngs,
        )

    @staticmethod
    def parse(config: dict[str, Any], **options) -> BertConfig:
        return BertConfig.from_hf(config, **options)

    @property
    def pooling(self) -> str:
        return self.config.pooling

    @property
    def embedding_width(self) -> int:
        return self.config.hidden_size

    def hidden(self, inputs: Inputs, *, key: Array | None = None) -> Float[Array, "G T D"]:
        """Returns the last layer's hidden states.

        Raises:
          UserError: rows are longer than the checkpoint has position embeddings.
        """
        inputs = jax.tree.map(jnp.asarray, inputs)
        tokens = inputs.tokens.shape[1]
        if tokens > self.config.max_position_embeddings:
            raise UserError(
                f"rows of {tokens} tokens exceed the model's max_position_embeddings of "
                f"{self.config.max_position_embeddings}; use shorter rows"
            )
        x = self.word_embeddings(inputs.tokens)
        x = x + self.position_embeddings(jnp.arange(tokens))
        x = x + self.token_type_embeddings(jnp.zeros((1, 1), jnp.int32))
        return scan_layers(
            self.layers,
            self.norm(x.astype(self.dtype)),
            lambda layer, x, key: layer(x, inputs.lengths, key),
            key=key,
            remat=self.config.remat,
        )

    def embed(self, inputs: Inputs, *, key: Array | None = None) -> Float[Array, "G E"]:
        """Returns unit rows, f32."""
        x = self.hidden(inputs, key=key).astype(jnp.float32)
        if self.config.pooling == "cls":
            return unit(x[:, 0])
        real = jnp.arange(x.shape[1]) < inputs.lengths[:, None]
        # The sum points where the mean does.
        return unit(jnp.sum(jnp.where(real[..., None], x, 0), axis=1))

    @staticmethod
    def key_map(config: BertConfig) -> KeyMap:
        """Returns the keys of a BertModel, which other heads' checkpoints prefix with `bert.`."""
        layer = "encoder.layer.{L}."
        linears = {
            "attention.self.query": "query",
            "attention.self.key": "key",
            "attention.self.value": "value",
            "attention.output.dense": "attention_output",
            "intermediate.dense": "intermediate",
            "output.dense": "output",
        }
        norms = {
            f"{layer}attention.output.LayerNorm": "layers/attention_norm",
            f"{layer}output.LayerNorm": "layers/output_norm",
            "embeddings.LayerNorm": "norm",
        }
        rules = [
            Rule(f"embeddings.{name}.weight", f"{name}/embedding")
            for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
        ]
        for theirs, ours in linears.items():
            rules.append(Rule(f"{layer}{theirs}.weight", f"layers/{ours}/kernel", "linear"))
            rules.append(Rule(f"{layer}{theirs}.bias", f"layers/{ours}/bias"))
        for theirs, ours in norms.items():
            rules.append(Rule(f"{theirs}.weight", f"{ours}/scale"))
            rules.append(Rule(f"{theirs}.bias", f"{ours}/bias"))
        return KeyMap(
            tuple(rules),
            ignored=(r"embeddings\.position_ids", r"pooler\..*", r"cls\..*"),
            renamed=((r"^bert\.", ""),),
        )
