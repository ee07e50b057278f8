"""Embeds every training sentence with the teacher, once, to disk.

    python -m unime_jax.teach --config configs/smol_stage1.py
    python -m unime_jax.teach --config configs/teacher_nv_embed.py --config.teacher.path=DIR \\
        --config.data.path=nli_for_simcse.csv --config.output=nli_teacher/

Reads the sentences of config.data.path and config.teacher.path, an HF directory (NV-Embed-v2, a
BERT of sentence-transformers, a decoder). A config whose stage is "teach" writes config.output;
with that of a training run the vectors go to its config.teacher.vectors. Finished shards are kept:
started again, it goes on with the next one.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np

from unime_jax import embedder, report, runtime, sharding, weights
from unime_jax.config import check, check_choice, check_path, parse
from unime_jax.data import bad_rows, prompts, sources, teacher_vectors
from unime_jax.types import UserError

SHARD_ROWS = 8192


def main(argv: list[str]) -> None:
    config = parse(argv, __doc__)
    check_choice(config, "model.dtype", ("float32", "bfloat16"))
    check_path(config, "teacher.path")
    check_path(config, "data.path")
    key = "output" if config.stage == "teach" else "teacher.vectors"
    check(bool(_target(config)), f"config.{key} is empty; name a directory with --config.{key}=DIR")
    runtime.check_output(_target(config), f"config.{key}")
    runtime.start()
    run(config)


def _target(config) -> str:
    return config.output if config.stage == "teach" else config.teacher.vectors


def _sentences(config):
    """Reads the sentences; malformed rows are left out, as training leaves them out."""
    faults: list[str] = []
    sentences = sources.sentences(config.data.path, faults)
    bad = bad_rows.BadRows(len(sentences) + len(faults), config.data.max_bad_share)
    bad.add_all({(number,): (fault, "malformed") for number, fault in enumerate(faults)})
    if faults:
        print(f"rows left out: {len(faults)} ({bad.kinds()}), the first: {faults[0]}")
    return sentences


def run(config) -> pathlib.Path:
    """Writes the vectors as `vectors-NNNNN.npy` (f32[rows, E], unit rows) and a manifest."""
    directory = pathlib.Path(_target(config)).expanduser()
    sentences = _sentences(config)
    found = weights.find(config.teacher.path)
    manifest = {
        "teacher": pathlib.Path(config.teacher.path).expanduser().resolve().name,
        "teacher_hash": runtime.by_main(lambda: found.fingerprint, wait=runtime.HASHING_MS),
        "dtype": config.model.dtype,
        "instruction": config.teacher.instruction,
        "count": len(sentences),
        "sentences_sha256": teacher_vectors.sentences_hash(sentences),
        "shard_rows": SHARD_ROWS,
    }
    begun = _begun(directory, manifest, keep=config.stage == "teach")
    shards = range(0, len(sentences), SHARD_ROWS)
    missing = [start for start in shards if not (begun and _is_there(directory, manifest, start))]
    if begun and not missing:
        print(f"{directory}: all {len(sentences)} vectors are there")
        return directory

    mesh = sharding.make_mesh(**config.mesh.to_dict())
    model = embedder.build(found, dtype=config.model.dtype, mesh=mesh)
    teacher = embedder.Embedder(model, directory=found.directory, mesh=mesh)
    del found  # with the files that it holds mapped
    manifest["prompt"] = prompts.TEMPLATES[teacher.preprocessor.prompt].text
    manifest["pooling"] = model.pooling
    manifest["width"] = model.embedding_width
    runtime.barrier()  # all have looked at what was there
    if runtime.is_main():
        if not begun:
            for stale in directory.glob("vectors-*.npy"):
                stale.unlink()
        _write_manifest(directory, manifest)
    done = len(sentences) - sum(len(sentences[s : s + SHARD_ROWS]) for s in missing)
    with report.Progress(len(sentences), "teaching", start=done, unit="sentence") as progress:
        for start in missing:
            texts = sentences[start : start + SHARD_ROWS]
            vectors = teacher.embed(
                texts=texts,
                instruction=config.teacher.instruction or None,
                progress=progress.advance,
            )
            if not runtime.is_main():
                continue
            part = _shard(directory, start).with_suffix(".part")
            with open(part, "wb") as file:
                np.save(file, vectors)
                file.flush()
                os.fsync(file.fileno())  # before it has its name
            os.replace(part, _shard(directory, start))
    runtime.barrier()
    print(f"done: {directory}, {len(sentences)} vectors of width {manifest['width']}")
    return directory


def _begun(directory: pathlib.Path, manifest: dict[str, Any], *, keep: bool) -> bool:
    """Says whether vectors with these settings were begun there; others are to make room.

    Args:
      directory: of the vectors.
      manifest: what is known before the teacher is loaded.
      keep: whether other vectors are refused; in the cache of a run they are not.
    """
    try:
        found = json.loads((directory / teacher_vectors.MANIFEST).read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        found = {}
    found = found if isinstance(found, dict) else {}
    # Of before teachers were told apart by all of their bytes: the name has to do.
    old = "teacher_sha256" in found and "teacher_hash" not in found
    wanted = manifest.keys() - ({"teacher_hash"} if old else set())
    differing = sorted(key for key in wanted if found.get(key) != manifest[key])
    if not differing:
        return True
    if keep and any(directory.glob("vectors-*.npy")):
        named = f"of another {', '.join(differing)}" if found else "and no whole manifest.json"
        raise UserError(
            f"{directory} holds vectors {named}; choose another config.output or remove that "
            "directory"
        )
    return False


def _is_there(directory: pathlib.Path, manifest: dict[str, Any], start: int) -> bool:
    """Says whether a shard is whole, as far as its header and its size tell."""
    rows = min(SHARD_ROWS, manifest["count"] - start)
    try:
        teacher_vectors.open_shard(_shard(directory, start), rows)
    except UserError:
        return False
    return True


def _write_manifest(directory: pathlib.Path, manifest: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / teacher_vectors.MANIFEST
    part = path.with_suffix(".part")
    part.write_text(json.dumps(manifest, indent=2))
    os.replace(part, path)


def _shard(directory: pathlib.Path, start: int) -> pathlib.Path:
    return directory / f"vectors-{start // SHARD_ROWS:05d}.npy"


if __name__ == "__main__":
    runtime.run_entry(main)
