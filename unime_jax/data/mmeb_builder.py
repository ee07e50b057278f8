"""One set of MMEB's training data as tensorflow-datasets builders (array_record)."""

import collections.abc
import contextlib
import dataclasses
import io
import os
import pathlib

os.environ.setdefault("TFDS_LOG_LEVEL", "error")
import numpy as np
import tensorflow_datasets as tfds

from unime_jax.data.mmeb_sets import Pair
from unime_jax.types import UserError

IMAGES, PAIRS, SPLIT = "images", "pairs", "train"


class _Builder(tfds.core.GeneratorBasedBuilder):
    """Writes examples as they come."""

    VERSION = tfds.core.Version("1.0.0")
    # Where tfds would look for checksums of downloads: there are none, and looking takes
    # importlib_resources, which tfds does not declare.
    code_path = None
    features: dict

    def __init__(self, *, examples: collections.abc.Iterable[dict] = (), **kwargs):
        self._examples = examples
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(self.features),
            description=self.__doc__,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict:
        del dl_manager
        return {SPLIT: self._generate_examples(self._examples)}

    def _generate_examples(self, examples) -> collections.abc.Iterator:
        yield from enumerate(examples)


class MmebImages(_Builder):
    """Every image of a set once, as its encoded file."""

    name = IMAGES
    features = {"image": tfds.features.Image(shape=(None, None, 3))}


class MmebPairs(_Builder):
    """Queries and targets of a set; images by their number."""

    name = PAIRS
    features = {
        "query_text": tfds.features.Text(),
        "query_image": np.int32,
        "target_text": tfds.features.Text(),
        "target_image": np.int32,
        "target_key": tfds.features.Text(),
        "row": np.int64,
    }


def write(
    directory: pathlib.Path,
    images: collections.abc.Iterable[bytes],
    pairs: collections.abc.Iterable[Pair],
) -> None:
    """Writes a set below `directory`: all images, then all pairs.

    Raises:
      UserError: the disk is full, or cannot be written.
    """
    tfds.disable_progress_bar()
    found = (
        (MmebImages, ({"image": io.BytesIO(content)} for content in images)),
        (MmebPairs, (dataclasses.asdict(pair) for pair in pairs)),
    )
    for builder_class, examples in found:
        builder = builder_class(
            examples=examples, data_dir=str(directory), file_format="array_record"
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it announces a download: there is none
            try:
                builder.download_and_prepare()
            except RuntimeError as error:  # array_record hides the OSError inside
                reason = str(error).split(";")[0]
                raise UserError(f"{directory} cannot be written: {reason}") from None


def read(directory: pathlib.Path, name: str):
    """Opens IMAGES or PAIRS of a set for random access; images stay encoded."""
    (path,) = (directory / name).glob("*/dataset_info.json")
    builder = tfds.builder_from_directory(str(path.parent))
    decoders = {"image": tfds.decode.SkipDecoding()} if name == IMAGES else None
    return builder.as_data_source(SPLIT, decoders=decoders)
