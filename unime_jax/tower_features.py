"""Vision features of a frozen tower, computed once for a run and kept on disk."""

import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from unime_jax import report, runtime
from unime_jax.data import sources
from unime_jax.embedder import Embedder
from unime_jax.types import UserError, flatten

_IMAGES_AT_ONCE = 32


def cache_features(
    pairs: sources.Pairs, embedder: Embedder, directory: pathlib.Path, *, variants: int
) -> np.ndarray:
    """Runs the frozen vision tower over every view of every image, once.

    View 0 is the image itself, the others are random flips and crops, the same on every call.
    Begun files are gone on with; another tower or other images get a file of their own. An image
    that cannot be read gets zeros, which `pipeline.Batches` takes for a bad row, and a warning.

    Returns:
      f16[images, variants, P, D], memory-mapped.
    """
    directory = directory.expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    spec = embedder.image_spec
    name = f"features-{_fingerprint(pairs, embedder)}-{variants}"
    path, done_path = directory / f"{name}.npy", directory / f"{name}.done.json"
    total = len(pairs.rows)
    done = json.loads(done_path.read_text())["images"] if done_path.is_file() else 0
    if path.is_file() and done == total:
        return np.load(path, mmap_mode="r")
    if not path.is_file():
        width = embedder.featurise(np.zeros((1, spec.size, spec.size, 3), np.uint8)).shape[-1]
        shape, done = (total, variants, spec.features, width), 0
        runtime.barrier()  # all have seen that there is none
        if runtime.is_main():
            np.lib.format.open_memmap(path, "w+", np.float16, shape)
        runtime.barrier()
    features = np.load(path, mmap_mode="r+")
    bad = 0
    with report.Progress(total, "vision features", start=done, unit="image") as progress:
        for start in range(done, total, _IMAGES_AT_ONCE):
            numbers = range(start, min(start + _IMAGES_AT_ONCE, total))
            tiles = []
            for number in numbers:
                views = _views(pairs, number, embedder, variants)
                bad += views is None
                blank = np.zeros((variants, spec.size, spec.size, 3), np.uint8)
                tiles.append(blank if views is None else views)
            found = embedder.featurise(np.concatenate(tiles))
            if not runtime.is_main():
                continue
            features[start : numbers.stop] = found.reshape(len(numbers), *features.shape[1:])
            features.flush()
            _write_json(done_path, {"images": numbers.stop})
            progress.update(numbers.stop)
    if bad:
        print(f"{bad} of {total} images cannot be read; their rows are skipped")
    runtime.barrier()
    return np.load(path, mmap_mode="r")


def _views(pairs, number: int, embedder: Embedder, variants: int) -> np.ndarray | None:
    try:
        content = pairs.image(number)
        views = [embedder.preprocessor.image(content).tiles]
        for variant in range(1, variants):
            rng = np.random.default_rng((number, variant))
            views.append(embedder.preprocessor.image(content, augment=rng).tiles)
    except UserError:
        return None
    return np.concatenate(views)


def _fingerprint(pairs: sources.Pairs, embedder: Embedder) -> str:
    """Hashes the tower's weights, the tile size and the rows."""
    digest = hashlib.sha256(repr(embedder.image_spec).encode())
    if embedder.preprocessor.image_size:
        digest.update(f"image_size {embedder.preprocessor.image_size}".encode())
    for path, leaf in sorted(flatten(embedder.params).items()):
        if path.startswith("vision_tower/"):
            digest.update(path.encode() + np.asarray(leaf).tobytes()[:4096])
    for row in pairs.rows:
        digest.update(f"{row.source}\t{row.caption}\n".encode())
    return digest.hexdigest()[:12]


def _write_json(path: pathlib.Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    os.replace(part, path)
