"""Models whose answers are known, and encoders of made-up benchmarks that use them."""

import hashlib
import pathlib

import numpy as np

from unime_jax.data import pictures
from unime_jax.evaluation.encode import Encoder, Wording
from unime_jax.evaluation.store import VectorStore
from unime_jax.file_hashes import FileHashes
from unime_jax.types import UserError

WIDTH = 48
RAW = Wording(raw=True)


def content_of(text, image) -> bytes:
    """Returns all that a row says."""
    data = b"" if image is None else (image if isinstance(image, bytes) else image.read_bytes())
    return repr(text).encode() + b"\0" + data


class FakeModel:
    """Gives a row a direction of its own, or that of another row; counts what it was asked.

    Args:
      targets: what a row says -> what the row says whose direction it gets.
      constant: whether all rows get one direction.
      stop_after: groups until the process is "killed".
    """

    def __init__(self, targets=None, *, constant=False, stop_after=None):
        self.targets, self.constant, self.stop_after = targets or {}, constant, stop_after
        self.seen: list[bytes] = []
        self.groups = 0

    def __call__(self, rows, bad):
        keys, vectors = [], []
        for row in rows:
            try:
                if row.image is not None:
                    pictures.load_rgb(row.image)
            except UserError as error:
                bad(row.key, str(error))
                continue
            said = content_of(row.text, row.image)
            self.seen.append(said)
            keys.append(row.key)
            vectors.append(self.direction(said))
            if len(keys) == 16:
                yield keys, np.stack(vectors)
                keys, vectors = [], []
                self.groups += 1
                if self.groups == self.stop_after:
                    raise KeyboardInterrupt
        if keys:
            yield keys, np.stack(vectors)

    def direction(self, said: bytes) -> np.ndarray:
        said = b"" if self.constant else self.targets.get(said, said)
        seed = int.from_bytes(hashlib.sha256(said).digest()[:8], "little")
        found = np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32)
        return found / np.linalg.norm(found)


def encoder_of(items, model, cache: pathlib.Path, wording=RAW) -> Encoder:
    """Returns an encoder whose vectors lie in `cache`."""
    store, hashes = VectorStore(cache / "model"), FileHashes(cache)
    return Encoder(list(items), wording, store, hashes, lambda: model)


def oracle(items, pairs, wording=RAW) -> dict[bytes, bytes]:
    """Returns targets for `FakeModel` with which every query finds what it should.

    Args:
      items: of the benchmark.
      pairs: (query, right candidate) by number of the item.
    """

    def said(number: int) -> bytes:
        ((text, image),) = wording.rows(items[number])
        return content_of(text, None if image is None else image.load())

    return {said(query): said(right) for query, right in pairs}
