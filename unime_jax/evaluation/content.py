"""Tells models apart by their contents."""

import hashlib
import json
import pathlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import unime_jax
from unime_jax import checkpoint, weights
from unime_jax.file_hashes import FileHashes

# Raise it when the same weights begin to embed differently: stored vectors are then left alone.
FORMAT = 2


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
