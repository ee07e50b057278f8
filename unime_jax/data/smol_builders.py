"""The small data as tensorflow-datasets builders (array_record, no TensorFlow needed)."""

import collections.abc
import contextlib
import io
import os
import pathlib

os.environ.setdefault("TFDS_LOG_LEVEL", "error")
import numpy as np
import tensorflow_datasets as tfds

from unime_jax.data.smol_split import Pair, Sentence
from unime_jax.types import UserError


class SmolPairs(tfds.core.GeneratorBasedBuilder):
    """Pictures with captions: Tux Paint, art4apps, Noto emoji, Open Clip Art."""

    VERSION = tfds.core.Version("1.0.0")
    # Where tfds would look for checksums of downloads: there are none, and looking takes
    # importlib_resources, which tfds does not declare.
    code_path = None

    def __init__(self, *, rows: dict[str, list[Pair]] | None = None, **kwargs):
        self._rows = rows or {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "caption": text(),
            "key": text(),
            "source": text(),
            "category": text(),
            "name": text(),
            "keywords": tfds.features.Sequence(text()),
            "gloss": text(),
            "seen": np.bool_,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            description=self.__doc__,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict:
        del dl_manager
        return {split: self._generate_examples(rows) for split, rows in self._rows.items()}

    def _generate_examples(self, rows: list[Pair]) -> collections.abc.Iterator:
        for number, pair in enumerate(rows):
            yield (
                number,
                {
                    "image": io.BytesIO(pair.image),
                    "caption": pair.raw.caption,
                    "key": pair.key,
                    "source": pair.raw.source,
                    "category": pair.raw.category,
                    "name": pair.raw.name,
                    "keywords": list(pair.keywords),
                    "gloss": pair.gloss,
                    "seen": pair.seen,
                },
            )


class SmolSentences(tfds.core.GeneratorBasedBuilder):
    """Sentences of WordNet 3.0 (definitions and examples) and captions."""

    VERSION = tfds.core.Version("1.0.0")
    # Where tfds would look for checksums of downloads: there are none, and looking takes
    # importlib_resources, which tfds does not declare.
    code_path = None

    def __init__(self, *, rows: dict[str, list[Sentence]] | None = None, **kwargs):
        self._rows = rows or {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = {"text": text(), "kind": text(), "synset": text(), "second": text()}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            description=self.__doc__,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict:
        del dl_manager
        return {split: self._generate_examples(rows) for split, rows in self._rows.items()}

    def _generate_examples(self, rows: list[Sentence]) -> collections.abc.Iterator:
        for number, row in enumerate(rows):
            yield (
                number,
                {"text": row.text, "kind": row.kind, "synset": row.synset, "second": row.second},
            )


def write(directory: pathlib.Path, pairs: dict[str, list[Pair]], sentences: dict) -> None:
    """Writes both data sets below `directory`.

    Raises:
      UserError: the disk is full, or cannot be written.
    """
    tfds.disable_progress_bar()
    for builder_class, rows in ((SmolPairs, pairs), (SmolSentences, sentences)):
        builder = builder_class(rows=rows, data_dir=str(directory), file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # it announces a download: there is none
            try:
                builder.download_and_prepare()
            except RuntimeError as error:  # array_record hides the OSError inside
                reason = str(error).split(";")[0]
                raise UserError(f"{directory} cannot be written: {reason}") from None
