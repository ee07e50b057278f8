"""Vectors on disk under the hash of what they are of: what was embedded once is never again.

A directory belongs to one model. It holds shards of two files each, written whole or not at all:
`NAME.vectors.npy`, f32[n, E], and then `NAME.keys.npy`, uint8[n, 24], the key and a hash of the
vector. A killed process loses the rows since its last shard; several processes may write at once.
"""

import errno
import hashlib
import json
import os
import pathlib
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt64

KEY_BYTES = 16
FLUSH_ROWS, FLUSH_SECONDS = 1024, 5.0
_ABOUT = "about.json"
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class VectorStore:
    """Is a set of vectors by key, growing; `flush` or `close` keeps what was added.

    Args:
      directory: made if needed.
      about: what the vectors are of; stored for people to read.
    """

    def __init__(self, directory: pathlib.Path, about: dict[str, Any] | None = None):
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        if about is not None:
            _replace(directory / _ABOUT, json.dumps(about, indent=2).encode())
        self._shards: list[str] = []  # by name: a map that stays open is a descriptor for good
        self._read: set[str] = set()
        self._places: dict[bytes, tuple[int, int]] = {}
        self._hashes: dict[bytes, int] = {}
        self._waiting: dict[bytes, np.ndarray] = {}
        self._flushed = time.monotonic()
        self.refresh()

    def refresh(self) -> None:
        """Reads shards that were written since, by any process.

        Raises:
          OSError: the system has no descriptors or memory left; of a damaged shard nothing.
        """
        for path in sorted(self.directory.glob("*.keys.npy")):
            name = path.name.removesuffix(".keys.npy")
            if name in self._read:
                continue
            self._read.add(name)
            try:
                keys, vectors = np.load(path), self._map(name)
                if keys.shape != (len(vectors), KEY_BYTES + 8) or vectors.dtype != np.float32:
                    raise ValueError
            except (OSError, ValueError, EOFError) as error:
                if getattr(error, "errno", None) in _EXHAUSTED:
                    raise
                continue  # damaged: its rows are embedded again
            self._shards.append(name)
            for row, line in enumerate(keys):
                key = line[:KEY_BYTES].tobytes()
                self._places[key] = len(self._shards) - 1, row
                self._hashes[key] = int.from_bytes(line[KEY_BYTES:].tobytes(), "little")

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, key: bytes) -> bool:
        return key in self._hashes

    def add(self, keys: Sequence[bytes], vectors: Float[np.ndarray, "N E"]) -> None:
        """Takes vectors in; they reach the disk by `flush`, which is called now and then."""
        for key, vector in zip(keys, vectors, strict=True):
            vector = np.ascontiguousarray(vector, np.float32)
            self._waiting[key] = vector
            digest = hashlib.blake2b(vector.tobytes(), digest_size=8).digest()
            self._hashes[key] = int.from_bytes(digest, "little")
        elapsed = time.monotonic() - self._flushed
        if len(self._waiting) >= FLUSH_ROWS or elapsed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is not on the disk yet as one shard."""
        self._flushed = time.monotonic()
        if not self._waiting:
            return
        keys, vectors = list(self._waiting), np.stack(list(self._waiting.values()))
        lines = b"".join(key + self._hashes[key].to_bytes(8, "little") for key in keys)
        lines = np.frombuffer(lines, np.uint8).reshape(len(keys), -1)
        name = uuid.uuid4().hex[:12]
        for kind, array in (("vectors", vectors), ("keys", lines)):
            path = self.directory / f"{name}.{kind}.npy"
            part = path.with_suffix(".part")
            with open(part, "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        self._read.add(name)
        self._shards.append(name)
        for row, key in enumerate(keys):
            self._places[key] = len(self._shards) - 1, row
        self._waiting.clear()

    def vectors(self, keys: Sequence[bytes]) -> Float[np.ndarray, "N E"]:
        """Reads vectors; every key must be there."""
        found: list[np.ndarray | None] = [self._waiting.get(key) for key in keys]
        stored: dict[int, list[tuple[int, int]]] = {}  # shard -> place in keys, row
        for place, key in enumerate(keys):
            if found[place] is None:
                shard, row = self._places[key]
                stored.setdefault(shard, []).append((place, row))
        for shard, wanted in stored.items():
            places, numbers = zip(*wanted, strict=True)
            for place, row in zip(
                places, self._map(self._shards[shard])[list(numbers)], strict=True
            ):
                found[place] = row
        return np.stack(found) if found else np.zeros((0, 0), np.float32)

    def _map(self, name: str) -> Float[np.ndarray, "N E"]:
        """Maps a shard's vectors into memory until the array is let go."""
        return np.load(self.directory / f"{name}.vectors.npy", mmap_mode="r")

    def hashes(self, keys: Iterable[bytes]) -> UInt64[np.ndarray, "N"]:
        """Returns a number for each vector; equal numbers are equal vectors."""
        return np.array([self._hashes[key] for key in keys], np.uint64)

    def close(self) -> None:
        self.flush()

    def __enter__(self) -> "VectorStore":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def _replace(path: pathlib.Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, path)
