"""The embedding model as users hold it: load, preprocess, a pure function, embed."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from unime_jax import models, sharding, weights
from unime_jax.data import buckets, preprocess, prompts
from unime_jax.data.rows import IMAGE_SLOT, without_padding
from unime_jax.models import lora
from unime_jax.runner import Runner
from unime_jax.runtime import resolve_attention, resolve_matmul
from unime_jax.types import Array, Inputs, Params, UserError, flatten

MAX_TOKENS = 4096
DTYPES = ("bfloat16", "float32")
# The layers of CLIP that run; the last one does not.
VISION_TARGETS = r"vision_tower/encoder/layers/.*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"
LLAVA_IMAGE_TOKEN = 32000  # where config.json leaves it out, as transformers does
PREPARATION = weights.PREPARATION
FUSIONS = ("together", "sum")


class Embedder:
    """A model, its host-side preprocessing, and where its parameters live.

    Attributes:
      graphdef, params: the model; `nnx.merge(graphdef, params)` is its module. Other parameters
        may be set: every call takes those that are there.
      model_config: config.json of the backbone.
      mesh: devices, or None for the default one.

    Args:
      model: with its parameters.
      directory: of the tokenizer, config.json and preprocessor_config.json.
      mesh: see above.
      prompt: key of `prompts.TEMPLATES`; "": the backbone's.
      image_size, image_crops: as `preprocess.Preprocessor` has them.
      fusion: what `embed` does with a row of image and text unless it is told; "": "together".
    """

    def __init__(
        self,
        model: nnx.Module,
        *,
        directory: pathlib.Path,
        mesh=None,
        prompt: str = "",
        image_size: int = 0,
        image_crops: int = 0,
        fusion: str = "",
    ):
        self.graphdef, state = nnx.split(model)
        self.params: Params = nnx.to_pure_dict(state)
        self.directory = directory
        self.model_config: dict[str, Any] = models.read_config(directory)
        self.image_spec = model.image_spec
        self.embedding_width: int = model.embedding_width
        self.pooling: str = model.pooling
        decoder = getattr(model, "language_model", None)
        self._window = None if decoder is None else decoder.config.sliding_window
        self.mesh = mesh
        self._preparation = {"image_size": image_size, "image_crops": image_crops}
        self._prompt = prompt
        self.fusion = fusion or FUSIONS[0]
        size = sum(leaf.size for leaf in flatten(self.params).values())
        self._runner = Runner(self.graphdef, size=size, mesh=mesh)

    @functools.cached_property
    def preprocessor(self) -> preprocess.Preprocessor:
        """Tokenizer and image transform; the tokenizer's files are read at the first text."""
        return preprocess.Preprocessor(
            self.directory,
            self.image_spec,
            prompt=self._prompt or prompts.name_for(self.model_config["model_type"]),
            max_tokens=self._number("max_position_embeddings", MAX_TOKENS),
            image_token_id=self._image_token_id(),
            vocabulary=self._number("vocab_size", None),
            window=self._window,
            limits=self._runner.limits,
            **self._preparation,
        )

    def _image_token_id(self) -> int:
        if self.image_spec is None or self.image_spec.kind != "llava_anyres":
            return IMAGE_SLOT
        named = self._number("image_token_id", LLAVA_IMAGE_TOKEN)
        return self._number("image_token_index", named)

    def _number(self, key: str, default: int | None) -> int | None:
        """Reads a key of config.json, or of its text_config."""
        inner = self.model_config.get("text_config") or {}
        return self.model_config.get(key, inner.get(key, default))

    @property
    def image_token_id(self) -> int:
        """Marks an image's place in rows given to `embed_tokens`."""
        return self.preprocessor.image_token_id

    def function(self) -> tuple[Callable[[Params, Sequence[Inputs]], Array], Params]:
        """Returns `(apply, params)`: `apply(params, inputs) -> f32[B, E]`, pure, unit rows.

        `params` is a nested dict of arrays, `inputs` comes from `preprocess`.
        """
        return self._runner.apply, self.params

    def preprocess(
        self,
        texts: Iterable[str | prompts.Slotted | None] | None = None,
        images: Iterable[Any] | None = None,
        instruction: str | None = None,
    ) -> list[Inputs]:
        """Turns rows into groups of one shape each; `Inputs.index` remembers their order.

        The groups depend on these rows alone; those of `embed` also on what it has compiled.

        Args:
          texts: a text or None per row.
          images: per row None or a PIL image, encoded bytes, or a path; not shorter than texts.
          instruction: put before every text.
        """
        fresh = buckets.Programs(self._runner.limits.program)
        groups = self._bucket(texts, images, instruction, programs=fresh)
        return [dataclasses.replace(inputs, index=rows.astype(np.int32)) for inputs, rows in groups]

    def embed(
        self,
        texts: Iterable[str | prompts.Slotted | None] | None = None,
        images: Iterable[Any] | None = None,
        instruction: str | None = None,
        *,
        fusion: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Embeds rows of any mixture of text, image and both.

        Args:
          texts: a text or None per row; with the prompt "mmeb", `prompts.Slotted` says where the
            image stands, a plain text stands behind it.
          images: None, a PIL image, encoded bytes or a path per row.
          instruction: put before every text.
          fusion: a row of image and text is read in one prompt ("together"), or is the sum of the
            vectors of its text and of its image, scaled to length 1 ("sum"). None: as the model was
            trained, "sum" after stage 1, else "together".
          progress: called with the number of rows just finished.

        Returns:
          f32[N, E], unit norm, in the order given.

        Raises:
          UserError: lists of different length, a row with neither, an image that cannot be read.
        """
        fusion = self.fusion if fusion is None else fusion
        if fusion not in FUSIONS:
            raise UserError(f"embed: fusion {fusion!r}; choose one of {', '.join(FUSIONS)}")
        if fusion == "together" or texts is None or images is None:
            return self._run(self._bucket(texts, images, instruction), progress)
        _check_lists(texts, images)
        texts, images = list(texts), list(images)
        self._check(texts, images)
        count = len(texts)
        pairs = [i for i in range(count) if texts[i] is not None and images[i] is not None]
        # The images of these rows become rows of their own behind all others.
        both = set(pairs)
        apart = [None if i in both else image for i, image in enumerate(images)]
        groups = self._bucket(
            [*texts, *[None] * len(pairs)], [*apart, *(images[i] for i in pairs)], instruction
        )
        vectors = self._run(groups, progress, rows=count)
        found = vectors[:count]
        found[pairs] += vectors[count:]
        found[pairs] /= np.linalg.norm(found[pairs], axis=1, keepdims=True)
        return found

    def embed_tokens(
        self,
        token_rows: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
        images: Sequence[Any] | None = None,
        *,
        attention_mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Embeds tokenised rows; one `image_token_id` marks the place of each row's image.

        Args:
          token_rows: token ids of each row, start and end tokens included.
          images: None, a PIL image, encoded bytes or a path per row.
          attention_mask: 1 for real tokens, 0 for padding on the left or on the right; for rows
            that are padded.

        Returns:
          f32[N, E], unit norm, in the order given.

        Raises:
          UserError: ids, places and images that do not fit each other; names the row.
        """
        if attention_mask is not None:
            token_rows = without_padding(token_rows, attention_mask)
        return self._run(self.preprocessor.embed_rows(token_rows, images), None)

    def featurise(
        self, tiles: np.ndarray, *, rows: int = 32, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Runs the vision tower alone: uint8[N, S, S, 3] -> f32[N, P, D]."""
        return self._runner.featurise(self.params, tiles, rows=rows, progress=progress)

    def _bucket(self, texts, images, instruction, **options):
        if texts is None and images is None:
            raise UserError("embed: give texts, images or both")
        _check_lists(texts, images)
        texts, images = (None if rows is None else list(rows) for rows in (texts, images))
        texts = [None] * len(images) if texts is None else texts
        images = [None] * len(texts) if images is None else images
        self._check(texts, images)
        for row, (text, image) in enumerate(zip(texts, images, strict=True)):
            if text is None and image is None:
                raise UserError(f"embed: row {row} has neither text nor image")
            if not isinstance(text, str | prompts.Slotted | None):
                raise UserError(f"embed: row {row}: a text is a string, not {type(text).__name__}")
        return self.preprocessor.bucket(texts, images, instruction, **options)

    def _check(self, texts, images) -> None:
        if len(texts) != len(images):
            raise UserError(f"embed: {len(texts)} texts but {len(images)} images; None marks a gap")

    def run(
        self,
        groups: Iterable[tuple[Inputs, Any]],
        apply: Callable[[Params, Sequence[Inputs]], Any] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """Embeds groups one after the other; see `Runner.run`."""
        return self._runner.run(self.params, groups, apply)

    def _run(self, groups: buckets.Groups, progress, *, rows: int | None = None) -> np.ndarray:
        """Embeds groups; `progress` counts the first `rows` rows alone, where that is given."""
        out = np.zeros((groups.rows, self.embedding_width), np.float32)
        for places, vectors in self.run(groups):
            out[places] = vectors
            if progress:
                progress(len(places) if rows is None else int((places < rows).sum()))
        return out


def load(path, *, adapter=None, dtype: str = "bfloat16", mesh=None) -> Embedder:
    """Loads an embedding model.

    Args:
      path: an HF directory (config.json, safetensors, tokenizer.json) or hub id, a model directory
        of ours, the output directory of a training run or a PEFT adapter; the last two are merged
        into the model they started from.
      adapter: a run directory or a PEFT adapter to merge into `path`.
      dtype: of parameters and computation, "bfloat16" or "float32"; embeddings are f32.
      mesh: devices to shard the parameters over (`unime_jax.sharding`), or None.

    Raises:
      UserError: a missing or inconsistent file, an unknown model type.
    """
    dtype = str(getattr(dtype, "__name__", dtype))  # jnp.bfloat16 as well
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype} is not built; give one of {', '.join(DTYPES)}")
    mesh = None if mesh is None else sharding.checked(mesh)
    return load_weights(weights.find(path, adapter), dtype=dtype, mesh=mesh)


def load_weights(found: weights.Weights, *, dtype: str, mesh=None) -> Embedder:
    """Loads what `weights.find` found; see `load`."""
    model = build(found, dtype=dtype, mesh=mesh)
    return Embedder(model, directory=found.directory, mesh=mesh, **found.preparation)


def load_model(path, *, dtype: str, mesh=None, **options) -> tuple[nnx.Module, pathlib.Path]:
    """Returns the model, adapters merged, and the directory of its config.json and tokenizer.

    Args:
      path, dtype, mesh: see `load`.
      options: see `build`.
    """
    found = weights.find(path)
    return build(found, dtype=dtype, mesh=mesh, **options), found.directory


def build(
    found: weights.Weights,
    *,
    dtype: str,
    attention: str = "auto",
    remat: str = "none",
    mesh=None,
    part: str = "all",
    quantize: str | None = None,
) -> nnx.Module:
    """Returns the model that `weights.find` found, adapters merged.

    Args:
      dtype, mesh: see `load`.
      attention, remat, part, quantize: see `models.load`.
    """
    return models.load(
        found.directory,
        dtype=dtype,
        attention=resolve_attention(attention, dtype, mesh),
        matmul=resolve_matmul(mesh),
        sharding_of=None if mesh is None else sharding.sharding_of(mesh),
        fill=found.fill,
        remat=remat,
        part=part,
        quantize=quantize,
    )


def attach_adapters(model: nnx.Module, adapters: dict[str, Any], *, seed: int) -> None:
    """Adds the adapters that `config.train.adapters` describes; rank 0 adds none."""
    if adapters["rank"]:
        targets = adapters["targets"]
        if adapters.get("vision", False):  # runs of old lack the key
            targets = f"{targets}|{VISION_TARGETS}"
        lora.attach(
            model,
            rank=adapters["rank"],
            alpha=adapters["alpha"],
            dropout=adapters["dropout"],
            targets=targets,
            rngs=nnx.Rngs(seed),
        )


def _check_lists(texts, images) -> None:
    """Refuses a single text or image, which would be read as a list of its letters or bytes."""
    for name, rows in (("texts", texts), ("images", images)):
        if isinstance(rows, str | bytes | os.PathLike) or hasattr(rows, "getexif"):
            raise UserError(f"embed: {name} is one {type(rows).__name__}; give a list")
