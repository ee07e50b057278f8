"""What the language-model head would say where the embedding is read (UniME, Fig. 6)."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unime_jax import runtime
from unime_jax.data.stream import Item, Stream
from unime_jax.embedder import Embedder
from unime_jax.types import Array, Inputs, Params, UserError


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A token that may come next.

    Attributes:
      token: its id.
      text: what it stands for, the blank in front of a word included.
      probability: among all tokens, 0 to 1.
    """

    token: int
    text: str
    probability: float


def vocabulary_of(model: Embedder) -> int:
    """Returns how many tokens a model's head chooses from.

    Raises:
      UserError: it has no head.
    """
    decoder = getattr(nnx.merge(model.graphdef, model.params), "language_model", None)
    if decoder is None or not decoder.config.head:
        kind = model.model_config["model_type"]
        raise UserError(f"a {kind} model has no language-model head: it predicts no tokens")
    return decoder.config.vocab_size


def predict(
    model: Embedder,
    items: Iterable[Item],
    *,
    k: int,
    instruction: str | None = None,
    bad: Callable[[Hashable, str], None],
) -> Iterator[tuple[Hashable, list[Prediction]]]:
    """Yields each item's key and the k most probable tokens after its prompt, items in any order.

    Args:
      model: with a head.
      items: rows; one of image and text is read in one prompt.
      k: not above the vocabulary.
      instruction: put before every text.
      bad: called with the key of an item that cannot be read, and the reason.
    """
    platform = (jax.devices()[0] if model.mesh is None else model.mesh.devices.flat[0]).platform
    apply = jax.jit(
        functools.partial(_most_probable, model.graphdef, k=k),
        compiler_options=runtime.compiler_options(platform),
    )
    stream = Stream(model.preprocessor, items, instruction=instruction, bad=bad)
    for keys, (probabilities, tokens) in model.run(stream, apply):
        for key, chances, ids in zip(keys, probabilities, tokens, strict=True):
            if np.isfinite(chances).all():
                yield key, _read(model, ids, chances)
            else:
                bad(key, "the model gave no finite probabilities")


def _read(model: Embedder, ids: np.ndarray, chances: np.ndarray) -> list[Prediction]:
    return [
        Prediction(int(id), model.preprocessor.text_of(int(id)), float(chance))
        for id, chance in zip(ids, chances, strict=True)
    ]


def _most_probable(
    graphdef, params: Params, inputs: Sequence[Inputs], *, k: int
) -> tuple[Array, Array]:
    """Returns f32[G, k] probabilities, the highest first, and int32[G, k] tokens."""
    (inputs,) = inputs
    model = nnx.merge(graphdef, params)
    logits = model.language_model.logits(model.last_hidden(inputs))
    probabilities, tokens = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), k)
    return probabilities, tokens
