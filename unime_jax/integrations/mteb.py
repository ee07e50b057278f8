"""Runs our models on the tasks of MTEB and MIEB; needs the extra `mteb`.

import mteb
from unime_jax.integrations.mteb import MTEBEncoder

model = MTEBEncoder("runs/phi35v/stage2", instructions=True)
mteb.evaluate(model, mteb.get_tasks(tasks=["STSBenchmark", "Flickr30kT2IRetrieval"]))
"""

import io
import itertools
import logging
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from unime_jax import embedder, report, weights
from unime_jax.types import UserError

try:
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder, get_prompt
    from mteb.types import PromptType
except ImportError as error:
    raise ImportError(f"{error}; install the extra: pip install -e '.[mteb]'") from error

logger = logging.getLogger(__name__)
# Rows embedded in one call: enough to sort them by length, few enough to hold their pictures.
ROWS = 1024


class MTEBEncoder(AbsEncoder):
    """Is a model as mteb asks for one: texts, pictures and both together in, unit rows out.

    A row that cannot be embedded (an empty document, a damaged picture) becomes zeros, equally far
    from everything, and is counted in a warning.

    Args:
      model: what `unime_jax.load` takes, or a loaded `Embedder`.
      revision: stands in the results; None: the model's fingerprint.
      device: not used, mteb gives it.
      dtype: of parameters and computation; None: float32 on CPUs, else bfloat16.
      prompts: task name, task type or "query" or "document" -> the instruction put before every
        text of it; a name or type may end in "-query" or "-document". The first that fits counts,
        in mteb's order (name before type before side); "" means none.
      instructions: whether queries, and rows of tasks without queries, get the task's own
        instruction of mteb where `prompts` has none. Documents never do.
      fusion: of a row with a text and a picture; None: as the model was trained.
      name: "organisation/model" in the results; None: unime_jax/ and the directory's name.

    Raises:
      UserError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: Any,
        revision: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        prompts: Mapping[str, str] | None = None,
        instructions: bool = False,
        fusion: str | None = None,
        name: str | None = None,
        **_,
    ):
        del device
        title = "model"
        if not isinstance(model, embedder.Embedder):
            title = pathlib.Path(model).name or title
            found = weights.find(model)
            revision = revision or found.fingerprint
            if dtype is None:
                dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
            model = embedder.load_weights(found, dtype=dtype)
        self.model = model
        self.model_prompts = self.validate_task_to_prompt_name(dict(prompts or {}))
        self._instructions = instructions
        self._fusion = fusion
        self.mteb_model_meta = _meta(
            model, name or f"unime_jax/{title}", revision, bool(prompts) or instructions
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embeds batches of {"text": [...], "image": [...]}, either left out.

        Returns:
          f32[N, E], unit rows; zeros for rows that cannot be embedded.

        Raises:
          UserError: none of them can be embedded.
        """
        instruction = self.instruction_of(task_metadata, prompt_type)
        rows = _rows(inputs)
        total = len(inputs.dataset) if hasattr(inputs, "dataset") else None
        parts, faults, count = [], [], 0
        stream = None if kwargs.get("show_progress_bar", True) else io.StringIO()
        title = f"{task_metadata.name} {prompt_type.value if prompt_type else ''}".strip()
        with report.Progress(total, title, unit="row", stream=stream) as progress:
            while part := list(itertools.islice(rows, ROWS)):
                parts.append(self._embed(part, count, instruction, faults))
                count += len(part)
                progress.update(count)
        if faults and len(faults) == count:
            raise UserError(f"{task_metadata.name}: no row can be embedded; {faults[0]}")
        if faults:
            logger.warning(
                "%s: %d of %d rows cannot be embedded and become zeros; the first: %s",
                task_metadata.name, len(faults), count, faults[0],
            )  # fmt: skip
        return np.concatenate(parts) if parts else np.zeros((0, self.model.embedding_width), "f4")

    def instruction_of(self, task_metadata, prompt_type: PromptType | None) -> str | None:
        """Returns what stands before the texts of a task's side, None for nothing."""
        given = get_prompt(self.model_prompts, task_metadata, prompt_type)
        if given is not None:
            return given or None
        if self._instructions and prompt_type != PromptType.document:
            return self.get_instruction(task_metadata, prompt_type) or None
        return None

    def _embed(
        self, rows: list[tuple[str | None, Any]], first: int, instruction, faults: list[str]
    ) -> np.ndarray:
        """Embeds rows, numbered from `first` in what goes to `faults`."""
        vectors = np.zeros((len(rows), self.model.embedding_width), np.float32)

        def fill(places: list[int]) -> None:
            """Embeds some of the rows; where one cannot be, the two halves one by one."""
            texts, images = ([rows[place][side] for place in places] for side in (0, 1))
            try:
                vectors[places] = self.model.embed(texts, images, instruction, fusion=self._fusion)
            except UserError as error:
                if len(places) == 1:
                    reason = str(error).removeprefix("row 0: ")
                    faults.append(f"row {first + places[0]}: {reason}")
                    return
                half = len(places) // 2
                fill(places[:half])
                fill(places[half:])

        places = [place for place, row in enumerate(rows) if any(x is not None for x in row)]
        empty = sorted(set(range(len(rows))) - set(places))
        faults += [f"row {first + place} is empty" for place in empty]
        if places:
            fill(places)
        for place in np.flatnonzero(~np.isfinite(vectors).all(axis=1)):
            faults.append(f"row {first + place}: the model gave no finite vector")
            vectors[place] = 0
        return vectors


def _rows(batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str | None, Any]]:
    """Yields (text, image) of every row; a blank text is none."""
    for batch in batches:
        texts, images = batch.get("text"), batch.get("image")
        if texts is None and images is None:
            raise UserError(f"mteb asks for {', '.join(batch)}; these models read text and image")
        count = len(images if texts is None else texts)
        texts = [None] * count if texts is None else texts
        texts = [text if text is not None and text.strip() else None for text in texts]
        yield from zip(texts, images or [None] * count, strict=True)


def _meta(model: embedder.Embedder, name: str, revision: str | None, instructed: bool) -> ModelMeta:
    sizes = [leaf.size for leaf in jax.tree.leaves(model.params)]
    limit = model.preprocessor.max_tokens
    return ModelMeta(
        loader=None,
        name=name,
        revision=revision or "none",
        release_date=None,
        languages=None,
        n_parameters=sum(sizes),
        memory_usage_mb=sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / 2**20,
        max_tokens=float(limit) if limit else math.inf,
        embed_dim=model.embedding_width,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=[],
        similarity_fn_name="cosine",
        use_instructions=instructed,
        training_datasets=None,
        modalities=["text"] if model.image_spec is None else ["text", "image"],
    )
