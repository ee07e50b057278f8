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
from unime_jax.config import STAGES, check, check_choice, check_path, parse, validate_keys
from unime_jax.data import bad_rows, prompts, sources, teacher_vectors
from unime_jax.types import UserError

SHARD_ROWS = 8192


def main(argv: list[str]) -> None:
    config = parse(argv, __doc__)
    validate_keys(config)
    check_choice(config, "stage", (*STAGES, "teach"))
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
    mesh = sharding.make_mesh(**config.mesh.to_dict())
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
    if len(set(runtime.exchange(manifest["sentences_sha256"]))) > 1:
        raise UserError(
            f"config.data.path={config.data.path}: processes read different sentences; give all of "
            "them the same files"
        )
    keep = config.stage == "teach"
    missing = runtime.by_main(lambda: json.dumps(_missing(directory, manifest, keep=keep)))
    missing = json.loads(missing)
    if not missing:
        print(f"{directory}: all {len(sentences)} vectors are there")
        return directory

    model = embedder.build(found, dtype=config.model.dtype, mesh=mesh)
    teacher = embedder.Embedder(model, directory=found.directory, mesh=mesh)
    del found  # with the files that it holds mapped
    manifest["prompt"] = prompts.TEMPLATES[teacher.preprocessor.prompt].text
    manifest["pooling"] = model.pooling
    manifest["width"] = model.embedding_width
    if runtime.is_main():
        if len(missing) == len(_starts(manifest)):
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


def _starts(manifest: dict[str, Any]) -> range:
    """Returns the first row of every shard."""
    return range(0, manifest["count"], SHARD_ROWS)


def _missing(directory: pathlib.Path, manifest: dict[str, Any], *, keep: bool) -> list[int]:
    """Returns the first rows of the shards that are to be made: all where settings differ.

    Args:
      directory: of the vectors.
      manifest: what is known before the teacher is loaded.
      keep: whether other vectors are refused; in the cache of a run they make room.
    """
    found = _read_manifest(directory)
    # Of before teachers were told apart by all of their bytes: the name has to do, for vectors that
    # are all there; this teacher may be another one than theirs.
    old = "teacher_sha256" in found and "teacher_hash" not in found
    missing = [start for start in _starts(manifest) if not _is_there(directory, manifest, start)]
    wanted = manifest.keys() - ({"teacher_hash"} if old and not missing else set())
    differing = sorted(key for key in wanted if found.get(key) != manifest[key])
    if not differing:
        return missing
    if keep and any(directory.glob("vectors-*.npy")):
        named = f"of another {', '.join(differing)}" if found else "and no whole manifest.json"
        if differing == ["teacher_hash"] and old:
            named = f"of a teacher that only its name tells, and not all {manifest['count']}"
        raise UserError(
            f"{directory} holds vectors {named}; choose another config.output or remove that "
            "directory"
        )
    return [*_starts(manifest)]


def _read_manifest(directory: pathlib.Path) -> dict[str, Any]:
    """Returns what a manifest says, {} where there is no whole one."""
    path = directory / teacher_vectors.MANIFEST
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); put that right or choose another directory"
        ) from None
    return found if isinstance(found, dict) else {}


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
