"""Vectors of the teacher on disk, and the manifest that says whose they are."""

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from unime_jax.types import UserError


def sentences_hash(texts: Sequence[str]) -> str:
    """Fingerprints a list of texts, order included."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


MANIFEST = "manifest.json"
AGAIN = "run `python -m unime_jax.teach` again"


class Vectors:
    """Unit rows on disk in shards of equal length, read as they are needed."""

    def __init__(self, shards: Sequence[np.ndarray]):
        self._shards = list(shards)
        self._rows = len(self._shards[0])
        self.shape = (sum(map(len, self._shards)), self._shards[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows) -> Float32[np.ndarray, "*rows E"]:
        rows = np.asarray(rows)
        out = np.empty((*rows.shape, self.shape[1]), np.float32)
        for number in np.unique(rows // self._rows):
            here = rows // self._rows == number
            out[here] = self._shards[number][rows[here] % self._rows]
        return out


def files(directory: str | os.PathLike) -> list[pathlib.Path]:
    """Lists the shards."""
    return sorted(pathlib.Path(directory).expanduser().glob("vectors-*.npy"))


def read(directory: str | os.PathLike, texts: Sequence[str] | None = None) -> tuple[Vectors, dict]:
    """Opens the vectors that `teach` wrote, and their manifest.

    Args:
      directory: of the shards.
      texts: the sentences they should belong to, in order; checked if given.

    Raises:
      UserError: missing, incomplete or damaged shards, or vectors of other sentences.
    """
    directory = pathlib.Path(directory).expanduser()
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        count, shard_rows = manifest["count"], manifest["shard_rows"]
        if not all(isinstance(x, int) and x > 0 for x in (count, shard_rows)):
            raise ValueError(f"count {count!r}, shard_rows {shard_rows!r}")
    except FileNotFoundError:
        raise UserError(f"{directory} holds no teacher vectors: {AGAIN}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{directory / MANIFEST} is damaged ({error}): {AGAIN}") from None
    if texts is not None and manifest.get("sentences_sha256") != sentences_hash(texts):
        raise UserError(f"{directory}: vectors of other sentences than the data now has: {AGAIN}")
    shards = []
    for start in range(0, count, shard_rows):
        path = directory / f"vectors-{start // shard_rows:05d}.npy"
        shards.append(open_shard(path, min(shard_rows, count - start)))
    widths = {shard.shape[1] for shard in shards}
    if len(widths) > 1:
        raise UserError(f"{directory}: vectors of {len(widths)} widths: remove it and {AGAIN}")
    return Vectors(shards), manifest


def open_shard(path: pathlib.Path, rows: int) -> Float32[np.ndarray, "rows E"]:
    """Opens the vectors of a file, memory-mapped.

    Raises:
      UserError: it is not there, of another number of rows, or damaged as far as its header and its
        size tell.
    """
    try:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
        if shard.ndim != 2 or shard.dtype != np.float32:
            raise ValueError(f"{shard.dtype} of shape {shard.shape}")
        if shard.offset + shard.nbytes != path.stat().st_size:
            raise ValueError(f"{path.stat().st_size} bytes")
    except Exception as error:  # numpy parses headers with Python's own tokenizer
        raise UserError(f"{path}: cannot be read ({error}): {AGAIN}") from None
    if len(shard) != rows:
        raise UserError(f"{path}: {len(shard)} rows, {rows} expected: {AGAIN}")
    return shard
