"""What the backbones that read images share: the projector, the merge, the embedding."""

import abc

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, UInt8

from unime_jax.models.layers import Linear, fold, unit
from unime_jax.types import Array, Inputs

FEATURES = "vision_features"  # what `features_of` returns, to `jax.checkpoint`'s policies
_VISION = 2**31 - 1  # far from the numbers that the decoder folds into the same key


class Projector(nnx.Module):
    """Turns visual features into the decoder's input vectors: linear, GELU (erf), linear."""

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        bias: bool = True,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        matmul: str = "transposed",
    ):
        options = {"bias": bias, "rngs": rngs, "dtype": dtype, "matmul": matmul}
        self.linear_1 = Linear(inputs, width, **options)
        self.linear_2 = Linear(width, width, **options)

    def __call__(self, x: Float[Array, "*G Dv"], key: Array | None = None) -> Float[Array, "*G D"]:
        x = jax.nn.gelu(self.linear_1(x, fold(key, 0)), approximate=False)
        return self.linear_2(x, fold(key, 1))


class Multimodal(nnx.Module):
    """Embeds text and images with the last real token's hidden state, scaled to length 1.

    Subclasses set `language_model` (a `Decoder`) and define `visual`, and `featurise` if they use
    `features_of`.
    """

    pooling = "last token"

    @abc.abstractmethod
    def visual(self, inputs: Inputs, *, key: Array | None = None) -> Float[Array, "G V D"]:
        """Returns the visual sequence of every row, laid out as `ImageSpec.kind` says."""

    def features_of(
        self, tiles: UInt8[Array, "G C S S 3"] | Float[Array, "G C S S 3"], key: Array | None
    ) -> Float[Array, "GC P Dv"]:
        """Runs the vision tower over the tiles of every row, each with the key of its row.

        The result has a name: the step keeps it where the tower is frozen (`FEATURES`).
        """
        if key is not None and key.ndim:
            numbers = jnp.arange(tiles.shape[1])
            key = jax.vmap(lambda key: jax.vmap(lambda n: fold(key, n))(numbers))(key).reshape(-1)
        features = self.featurise(tiles.reshape(-1, *tiles.shape[2:]), key=key)
        return checkpoint_name(features, FEATURES)

    def image_features(
        self, tiles: UInt8[Array, "G C S S 3"], grid: Array | None, *, key: Array | None = None
    ) -> Float[Array, "GC P Dv"]:
        """Returns what `Inputs.features` may hold in place of a group's tiles and grid."""
        return self.features_of(tiles, fold(key, 0))

    def inputs_embeds(self, inputs: Inputs, *, key: Array | None = None) -> Float[Array, "G T D"]:
        """Returns the decoder's input: token vectors, and visual ones where images stand."""
        inputs = jax.tree.map(jnp.asarray, inputs)
        x = self.language_model.embed_tokens(inputs.tokens)
        if inputs.tiles.shape[1] == 0:
            return x
        index = inputs.image_index[..., None]
        with jax.named_scope("vision"):  # for profiles and `plan`
            visual = self.visual(inputs, key=fold(key, _VISION)).astype(x.dtype)
        return jnp.where(index >= 0, jnp.take_along_axis(visual, jnp.maximum(index, 0), 1), x)

    def hidden(self, inputs: Inputs, *, key: Array | None = None) -> Float[Array, "G T D"]:
        """Returns the decoder's last hidden states."""
        embeds = self.inputs_embeds(inputs, key=key)
        return self.language_model(embeds, jnp.asarray(inputs.lengths), key=key)

    def last_hidden(self, inputs: Inputs, *, key: Array | None = None) -> Float[Array, "G D"]:
        """Returns the last hidden state of every row's last real position."""
        embeds = self.inputs_embeds(inputs, key=key)
        return self.language_model.last_hidden(embeds, jnp.asarray(inputs.lengths), key=key)

    def embed(self, inputs: Inputs, *, key: Array | None = None) -> Float[Array, "G E"]:
        """Returns unit rows, f32; the key is for the adapters' dropout."""
        return unit(self.last_hidden(inputs, key=key))
