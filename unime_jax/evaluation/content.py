"""Hashes of contents: of models and of image files; remembered by size and time of change."""

import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import unime_jax
from unime_jax import checkpoint, weights

# Raise it when the same weights begin to embed differently: stored vectors are then left alone.
FORMAT = 1
_BYTES = 16
_MEMORY = "file_hashes.txt"
_READ = 1 << 22


class FileHashes:
    """Hashes files by content; a file whose size and time are as before is not read again.

    Args:
      directory: keeps what is known from one process to the next.
    """

    def __init__(self, directory: pathlib.Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / _MEMORY
        self._known: dict[str, bytes] = {}
        self._file = None
        self._lock = threading.Lock()
        if self._path.is_file():
            for line in self._path.read_text(errors="replace").splitlines():
                digest, _, key = line.partition(" ")
                if len(digest) == 2 * _BYTES and key:  # a line cut short by a kill is not
                    try:
                        self._known[key] = bytes.fromhex(digest)
                    except ValueError:
                        continue

    def __call__(self, path: pathlib.Path) -> bytes:
        """Returns 16 bytes.

        Raises:
          OSError: the file cannot be read.
        """
        stat = os.stat(path)
        key = f"{stat.st_size} {stat.st_mtime_ns} {str(path.absolute())!r}"
        if key not in self._known:
            digest = hashlib.blake2b(digest_size=_BYTES)
            with open(path, "rb") as file:
                while block := file.read(_READ):
                    digest.update(block)
            self._known[key] = digest.digest()
            self._remember(key)
        return self._known[key]

    def _remember(self, key: str) -> None:
        with self._lock:
            if self._file is None:
                self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
            # One short line in one write: those of several processes do not mix.
            self._file.write(f"{self._known[key].hex()} {key}\n".encode())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def of_bytes(content: bytes) -> bytes:
    """Returns 16 bytes, those of a file with this content."""
    return hashlib.blake2b(content, digest_size=_BYTES).digest()


def of_model(found: weights.Weights, hashes: FileHashes, settings: dict[str, Any]) -> str:
    """Returns 20 hex digits that are equal for models that embed equally.

    Every byte of the weights counts: a fine-tuned model differs from its base in any of them.

    Args:
      found: the model.
      hashes: of its files.
      settings: what else decides its vectors: dtype, prompt, sizes of images.
    """
    digest = hashlib.blake2b(digest_size=10)
    version = [FORMAT, unime_jax.__version__]
    digest.update(json.dumps([version, settings], sort_keys=True).encode())
    root = found.directory
    inside = root.rglob("*") if checkpoint.is_model(root) else root.glob("*")
    paths = sorted(p for p in inside if p.is_file() and _matters(p.relative_to(root)))
    with ThreadPoolExecutor(4) as pool:
        for path, content in zip(paths, pool.map(hashes, paths), strict=True):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + content)
    for change in found.changes:
        for key, low_rank in sorted(change.low_rank.items()):
            digest.update(f"{key}:{low_rank.scale}:".encode())
            _update(digest, (low_rank.a, low_rank.b, low_rank.magnitude))
        for key, value in sorted(change.replaced.items()):
            digest.update(key.encode())
            _update(digest, (value,))
    return digest.hexdigest()


def _matters(path: pathlib.Path) -> bool:
    """Leaves out what stands beside a model and is no part of it."""
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix not in (".md", ".bin", ".pt", ".pth", ".gguf", ".log")


def _update(digest, arrays: Iterable[Any]) -> None:
    for array in arrays:
        if array is not None:
            array = np.ascontiguousarray(array)
            digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
