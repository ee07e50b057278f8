"""Opens the model of an evaluation as its benchmark wants it prompted."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from unime_jax import embedder, file_hashes, runtime, sharding, weights
from unime_jax.data import prompts
from unime_jax.data.sources import Item
from unime_jax.data.stream import Stream
from unime_jax.evaluation import content
from unime_jax.evaluation.encode import Encoder, Wording
from unime_jax.evaluation.store import VectorStore
from unime_jax.types import UserError

MMEB_PROMPT = "mmeb"
# Prompts of the published evaluation of captions, where they are not the demo's.
CAPTION_PROMPTS = {"phi3_v": "phi35v_eval"}
# Images of the published evaluation, for models that do not say how they were trained: Phi-3.5-V
# gets them as they are in up to 4 crops, LLaVA-1.6 as squares of 336 pixels.
PUBLISHED_IMAGES = {
    "phi3_v": {"image_size": 0, "image_crops": 4},
    "llava_next": {"image_size": 336, "image_crops": 0},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the vectors of an evaluation, weights aside.

    Attributes:
      model_type: of the backbone.
      dtype: of the computation.
      preparation: keys of `weights.PREPARATION`.
    """

    model_type: str
    dtype: str
    preparation: dict[str, Any]

    @property
    def wording(self) -> Wording:
        name = self.preparation["prompt"]
        return Wording(prompts.TEMPLATES[name].raw, self.preparation["fusion"] == "sum")


def settings_of(found: weights.Weights, config, *, benchmark: str) -> Settings:
    """Returns what the config says, and for what it leaves open what the model was trained with.

    A model that was trained on texts alone (fusion "sum") has no form for an image with a text and
    keeps its own prompt on MMEB, as E5-V's evaluation has it.

    Args:
      found: the model.
      config: of the evaluation.
      benchmark: "mmeb" or "retrieval".
    """
    kind = found.config["model_type"]
    trained = found.preparation
    fusion = config.data.fusion or trained.get("fusion") or embedder.FUSIONS[0]
    own = trained.get("prompt") or prompts.name_for(kind)
    if prompts.TEMPLATES[own].raw:  # MMEB's own wording: no prompt for a caption
        own = prompts.name_for(kind)
    if own == prompts.name_for(kind):
        own = CAPTION_PROMPTS.get(kind, own)
    prompt = MMEB_PROMPT if benchmark == "mmeb" and fusion == "together" else own
    preparation = {"prompt": config.data.prompt or prompt, "fusion": fusion}
    if preparation["prompt"] not in prompts.TEMPLATES:
        raise UserError(
            f"config.data.prompt={config.data.prompt}: choose one of {', '.join(prompts.TEMPLATES)}"
        )
    for key in ("image_size", "image_crops"):
        default = trained.get(key, PUBLISHED_IMAGES.get(kind, {}).get(key, 0))
        preparation[key] = default if config.data[key] is None else config.data[key]
    return Settings(kind, config.model.dtype, preparation)


def open_encoder(
    config, found: weights.Weights, items: Sequence[Item], settings: Settings
) -> Encoder:
    """Returns the encoder of a benchmark's items; the model is loaded when a row needs it."""
    root = pathlib.Path(config.cache or runtime.cache_directory() / "vectors").expanduser()
    hashes = file_hashes.FileHashes(runtime.cache_directory())
    about = dataclasses.asdict(settings)
    del about["preparation"]["fusion"]  # decides what rows there are, not what their vectors are
    words = prompts.TEMPLATES[settings.preparation["prompt"]]
    wording = (words.text, words.image, words.both, words.raw)  # one name, another day's words
    key = content.of_model(found, {**about, "wording": wording})
    store = VectorStore(root / key, {"model": found.name, "base": found.base_name, **about})
    return Encoder(
        items, settings.wording, store, hashes, lambda: _open(config, found, items, settings)
    )


def _open(config, found: weights.Weights, items: Sequence[Item], settings: Settings):
    mesh = sharding.make_mesh(**config.mesh.to_dict(), devices=jax.local_devices())
    prepared = dataclasses.replace(found, preparation=settings.preparation)
    model = embedder.load_weights(prepared, dtype=settings.dtype, mesh=mesh)
    if model.image_spec is None and any(item.image is not None for item in items):
        raise UserError(f"config.model.path={found.name}: a {settings.model_type} takes no images")

    def run(rows, bad) -> Iterator:
        return model.run(Stream(model.preprocessor, rows, instruction=None, bad=bad))

    return run
