"""Vision features of a frozen tower, computed once for a run and kept on disk."""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from unime_jax import report, runtime
from unime_jax.data import sources
from unime_jax.embedder import Embedder
from unime_jax.file_hashes import FileHashes, of_bytes
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

    Raises:
      UserError: there is no room for them.
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
        runtime.by_main(lambda: _make(path, shape))
    features = np.load(path, mmap_mode="r")
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
            _write(path, features.offset + start * features[0].nbytes, found)
            _write_json(done_path, {"images": numbers.stop})
            progress.update(numbers.stop)
    if bad:
        print(f"{bad} of {total} images cannot be read; their rows are skipped")
    runtime.barrier()
    return np.load(path, mmap_mode="r")


def _make(path: pathlib.Path, shape: tuple[int, ...]) -> str:
    """Makes a file of zeros, sparse where the file system can."""
    size, free = 2 * math.prod(shape), shutil.disk_usage(path.parent).free
    if size > free:
        raise UserError(
            f"config.data.features={path.parent}: features of {shape[0]} images take "
            f"{size / 1e9:.2g} GB, and {free / 1e9:.2g} GB are free there; choose another place"
        )
    part = path.with_suffix(".part")
    np.lib.format.open_memmap(part, "w+", np.float16, shape)
    os.replace(part, path)
    return ""


def _write(path: pathlib.Path, offset: int, features: np.ndarray) -> None:
    """Writes features into the file; through a memory map a full disk would kill the process."""
    content = memoryview(np.ascontiguousarray(features, np.float16).tobytes())
    try:
        with open(path, "r+b") as file:
            while content:
                written = os.pwrite(file.fileno(), content, offset)
                content, offset = content[written:], offset + written
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


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
    """Hashes the tower's weights, the tile size and the images."""
    digest = hashlib.sha256(repr(embedder.image_spec).encode())
    if embedder.preprocessor.image_size:
        digest.update(f"image_size {embedder.preprocessor.image_size}".encode())
    for path, leaf in sorted(flatten(embedder.params).items()):
        if path.startswith("vision_tower/"):
            digest.update(path.encode() + np.asarray(leaf).tobytes()[:4096])
    images = runtime.by_main(lambda: _images(pairs), wait=runtime.HASHING_MS)
    digest.update(images.encode())
    return digest.hexdigest()[:12]


def _images(pairs: sources.Pairs) -> str:
    """Hashes all images, each in its place; files that look as before are not read again."""
    digest = hashlib.sha256()
    with contextlib.closing(FileHashes(runtime.cache_directory())) as hashes:
        for mark in _marks(pairs, hashes):
            digest.update(mark)
    return digest.hexdigest()


def _marks(pairs: sources.Pairs, hashes: FileHashes) -> Iterator[bytes]:
    def of_file(path: pathlib.Path | None) -> bytes:
        with contextlib.suppress(OSError):  # unreadable: a mark that it loses when it is repaired
            return hashes(path) if path else b"-"
        return b"-"

    def of_image(number: int) -> bytes:
        with contextlib.suppress(UserError):
            return of_bytes(pairs.image(number))
        return b"-"

    files = pairs.files()
    with ThreadPoolExecutor(4) as pool:
        yield from pool.map(of_file, files) if files else map(of_image, range(len(pairs.rows)))


def _write_json(path: pathlib.Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    os.replace(part, path)
