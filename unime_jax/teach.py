"""Embeds every training sentence with the teacher, once, to disk.

    python -m unime_jax.teach --config configs/smol_stage1.py

Reads config.teacher.path (an HF directory) and the sentences of config.data.path, writes
config.teacher.vectors. Finished shards are kept: started again, it goes on with the next one.
"""

import hashlib
import json
import os
import pathlib

import numpy as np

from unime_jax import embedder, report, runtime
from unime_jax.config import check, check_path, parse
from unime_jax.data import sources

SHARD_ROWS = 1024


def main(argv: list[str]) -> None:
    config = parse(argv, __doc__)
    check_path(config, "teacher.path")
    check_path(config, "data.path")
    check(
        bool(config.teacher.vectors),
        "config.teacher.vectors is empty; name a directory with --config.teacher.vectors=DIR",
    )
    runtime.start()
    run(config)


def run(config) -> pathlib.Path:
    """Writes the vectors as `vectors-NNNNN.npy` (f32[rows, E], unit rows) and a manifest."""
    directory = pathlib.Path(config.teacher.vectors).expanduser()
    sentences = sources.sentences(config.data.path)
    manifest = {
        "teacher": pathlib.Path(config.teacher.path).name,
        "teacher_sha256": _fingerprint(config.teacher.path),
        "count": len(sentences),
        "shard_rows": SHARD_ROWS,
        "sentences_sha256": sources.sentences_hash(sentences),
    }
    known = directory / "manifest.json"
    begun = json.loads(known.read_text()) if known.is_file() else {}
    if any(begun.get(key) != value for key, value in manifest.items()):
        for old in directory.glob("vectors-*.npy"):
            old.unlink()
        begun = {}
    directory.mkdir(parents=True, exist_ok=True)
    shards = range(0, len(sentences), SHARD_ROWS)
    missing = [start for start in shards if not _shard(directory, start).is_file()]
    if not missing and begun:
        print(f"{directory}: all {len(sentences)} vectors are there")
        return directory

    teacher = embedder.load(config.teacher.path, dtype=config.model.dtype)
    _write(known, json.dumps(manifest, indent=2).encode())
    done = len(sentences) - sum(len(sentences[s : s + SHARD_ROWS]) for s in missing)
    progress = report.Progress(len(sentences), "teaching", start=done, unit="sentence")
    for start in missing:
        vectors = teacher.embed(texts=sentences[start : start + SHARD_ROWS])
        part = _shard(directory, start).with_suffix(".part")
        with open(part, "wb") as file:
            np.save(file, vectors)
        os.replace(part, _shard(directory, start))
        done += len(vectors)
        progress.update(done)
    progress.close()
    width = int(np.load(_shard(directory, 0), mmap_mode="r").shape[1])
    _write(known, json.dumps({**manifest, "width": width}, indent=2).encode())
    print(f"done: {directory}, {len(sentences)} vectors of width {width}")
    return directory


def _shard(directory: pathlib.Path, start: int) -> pathlib.Path:
    return directory / f"vectors-{start // SHARD_ROWS:05d}.npy"


def _write(path: pathlib.Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)


def _fingerprint(directory) -> str:
    """Hashes config and the head of each weight file: another teacher is noticed at no cost."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(directory).expanduser().glob("*")):
        if path.suffix in (".json", ".safetensors"):
            digest.update(f"{path.name}:{path.stat().st_size}:".encode())
            with open(path, "rb") as file:
                digest.update(file.read(1 << 20))
    return digest.hexdigest()


if __name__ == "__main__":
    runtime.run_entry(main)
