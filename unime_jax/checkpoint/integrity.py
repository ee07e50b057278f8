"""Checkpoints that are whole: manifests of checksums, and the newest one that agrees with its own.

A directory holds checkpoints under their steps as names.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from unime_jax.types import UserError

MANIFEST = "manifest.json"


def write_manifest(directory: pathlib.Path, **notes: Any) -> None:
    """Writes the bytes and SHA-256 of every file below a directory, and notes.

    Files at the top whose names begin with "_" are Orbax's own and change later.
    """
    files = {
        str(path.relative_to(directory)): [path.stat().st_size, _digest(path)]
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not str(path.relative_to(directory)).startswith("_")
    }
    write_json(directory / MANIFEST, {**notes, "files": files})


def has_manifest(directory: pathlib.Path) -> bool:
    return (directory / MANIFEST).is_file()


def read_manifest(directory: pathlib.Path) -> dict[str, Any]:
    """Returns the content of a manifest; {} if there is none that can be read."""
    try:
        found = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else {}


def find_problem(directory: pathlib.Path, below: str = "") -> str:
    """Names the first file that is not as it was written; "" if all are.

    Args:
      directory: with a manifest.
      below: files whose path begins so are looked at.
    """
    files = read_manifest(directory).get("files")
    if files is None:
        return f"{MANIFEST} is missing or cut short"
    for name, (size, digest) in files.items():
        if not name.startswith(below):
            continue
        path = directory / name
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found} of {size} bytes"
            if _digest(path) != digest:
                return f"{name} has another checksum than when it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""


def newest_whole(
    directory: pathlib.Path,
    read: Callable[[pathlib.Path], Any],
    *,
    below: str = "",
    among: Callable[[int], bool] = lambda step: True,
    agree: Callable[[str], str] = str,
) -> tuple[int, Any, dict[int, str]] | None:
    """Reads the newest checkpoint that is as it was written.

    Args:
      directory: of the checkpoints.
      read: what is to be done with one.
      below: part of it that matters.
      among: says of a step whether it will do.
      agree: lets all processes have what process 0 found.

    Returns:
      its step, what was read, and by step what is wrong with newer ones; None without any.
    """
    problems: dict[int, str] = {}
    there = [step for step in steps(directory) if among(step)]
    for step in sorted(json.loads(agree(json.dumps(there))), reverse=True):
        path = directory / str(step)
        # Those of versions that wrote no manifest: Orbax's own mark must do.
        old = (path / "_CHECKPOINT_METADATA").is_file() and not has_manifest(path)
        problem = agree("" if old else find_problem(path, below))
        if not problem:
            try:
                return step, read(path), problems
            except Exception as error:  # of Orbax, of TensorStore: each its own kind
                problem = " ".join(str(error).split())[:300]
                if not old:
                    raise UserError(f"{path} is whole but cannot be read ({problem})") from error
        problems[step] = problem
    if problems:
        told = "; ".join(f"{directory / str(step)}: {text}" for step, text in problems.items())
        raise UserError(
            f"no checkpoint is whole ({told}); nothing was changed: restore the files from a copy, "
            "or train anew in another config.output"
        )
    return None


def steps(directory: pathlib.Path) -> list[int]:
    """Lists the steps of which there is a checkpoint."""
    if not directory.is_dir():
        return []
    return [int(path.name) for path in directory.iterdir() if path.name.isdigit()]


def scores(directory: pathlib.Path) -> dict[int, float]:
    """Returns the scores of those checkpoints that have one, by step."""
    found = {step: read_manifest(directory / str(step)).get("score") for step in steps(directory)}
    return {step: score for step, score in found.items() if score is not None}


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a file that is there as a whole or not at all, after a power cut as well."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def orbax():
    """Imports Orbax, which takes a second, where it is used."""
    import orbax.checkpoint as ocp

    return ocp
