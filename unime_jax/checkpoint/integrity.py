"""Checkpoints that are whole: manifests of checksums, and the newest one that agrees with its own.

A directory holds checkpoints under their steps as names.
"""

import errno
import hashlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

from unime_jax.types import UserError

MANIFEST = "manifest.json"
# Chunks are compressed, written and read one by one: each device of a mesh reads little besides its
# own part.
CHUNK_BYTES = 64 * 2**20
# What is said of a checkpoint: removed before it was read; of before there were manifests.
_GONE, _OLD = "gone", "old"
_ATTEMPTS = 60


def write_manifest(directory: pathlib.Path, **notes: Any) -> None:
    """Writes the bytes and SHA-256 of every file below a directory, and notes.

    All is on the disk then. Files at the top whose names begin with "_" are Orbax's own and change
    later.
    """
    files = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_file() and not name.startswith("_"):
            files[name] = [path.stat().st_size, _digest(path)]
        to_disk(path)
    write_json(directory / MANIFEST, {**notes, "files": files})


def to_disk(path: pathlib.Path) -> None:
    """Returns once a file's content, or a directory's names, would survive a power cut."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # not for directories there
            raise
    finally:
        os.close(file)


def read_manifest(directory: pathlib.Path) -> dict[str, Any]:
    """Returns the content of a manifest; {} if there is none, or none as it is written.

    Raises:
      UserError: the file system does not give it.
    """
    path = directory / MANIFEST
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    except OSError as error:
        raise _unreadable(path, error) from error
    files = found.get("files") if isinstance(found, dict) else None
    if not files or not isinstance(files, dict):
        return {}
    whole = all(
        isinstance(entry, list) and [type(part) for part in entry] == [int, str]
        for entry in files.values()
    )
    return found if whole else {}


def find_problem(directory: pathlib.Path, below: str = "") -> str:
    """Names the first file that is not as it was written; "" if all are.

    Args:
      directory: of a checkpoint.
      below: files whose path begins so are looked at.

    Raises:
      UserError: the file system does not give one, which may pass.
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
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return f"{name} is missing"
        except OSError as error:
            raise _unreadable(path, error) from error
    return ""


def _unreadable(path: pathlib.Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be read now ({error.strerror}); nothing was changed: start again once it "
        "can, or move that checkpoint away to go on from the one before"
    )


def is_old(directory: pathlib.Path) -> bool:
    """Says whether a checkpoint is of a version that wrote no manifests.

    Its own configuration says so: it lacks a key that came with them.
    """
    if os.path.exists(directory / MANIFEST):
        return False
    try:
        config = json.loads((directory / "config" / "metadata").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    whole = (directory / "_CHECKPOINT_METADATA").is_file()  # Orbax's own mark
    return whole and isinstance(config, dict) and "init_from" not in config


def newest_whole(
    directory: pathlib.Path,
    read: Callable[[pathlib.Path], Any],
    *,
    below: str = "",
    among: Callable[[int], bool] = lambda step: True,
    agree: Callable[[Callable[[], str]], str] = lambda find: find(),
    exchange: Callable[[str], list[str]] = lambda text: [text],
) -> tuple[int, Any, dict[int, str]] | None:
    """Reads the newest checkpoint that is as it was written.

    Args:
      directory: of the checkpoints.
      read: what is to be done with one; waits for no other process, which may have failed.
      below: part of it that matters.
      among: says of a step whether it will do.
      agree: lets all processes have what process 0 finds, or raise what it raises.
      exchange: lets all processes have what each of them says.

    Returns:
      its step, what was read, and by step what is wrong with newer ones; None without any.
    """
    gone, whole = None, set()
    for attempt in range(_ATTEMPTS):
        time.sleep(min(1, attempt / 10))  # what one process sees as gone, another may still see
        try:
            return _newest_whole(directory, read, below, among, agree, exchange, whole)
        except _Gone as error:  # removed by a run that trains, which has saved newer ones
            gone = error.path
    if agree(lambda: "there" if gone in whole and gone.exists() else ""):
        raise UserError(
            f"{gone} is not seen by all processes; all need one directory, on a file system that "
            "they share"
        )
    raise UserError(
        f"{directory}: each checkpoint was removed before it was read; raise "
        "config.checkpoint.keep of the run that trains there, or start again once it is done"
    )


class _Gone(Exception):
    """A checkpoint was removed before it had been read; all processes raise it."""

    def __init__(self, path: pathlib.Path | None = None):
        super().__init__(path)
        self.path = path


def _newest_whole(directory, read, below, among, agree, exchange, whole: set[pathlib.Path]):
    """See `newest_whole`; `whole` are those that process 0 has found so, to be looked at once."""

    def examine(path: pathlib.Path) -> str:
        if path in whole:
            return "" if path.exists() else _GONE
        problem = _examine(path, below)
        whole.update([] if problem else [path])
        return problem

    def listed() -> str:
        return agree(lambda: json.dumps(sorted(filter(among, steps(directory)))))

    problems: dict[int, str] = {}
    there = listed()
    for step in sorted(json.loads(there), reverse=True):
        path = directory / str(step)
        problem = agree(lambda path=path: examine(path))
        old = problem == _OLD
        if old or not problem:
            content, said, cause = None, "", None
            try:
                content = read(path)
            except Exception as error:  # of Orbax, of TensorStore: each its own kind
                said, cause = f"fails: {' '.join(str(error).split())[:300]}", error
                if not path.exists():
                    said = _GONE
            told = [text for text in exchange(said) if text]
            if not told:
                return step, content, problems
            problem = _GONE if _GONE in told else told[0].removeprefix("fails: ")
            if not old and problem != _GONE:
                raise UserError(f"{path} is whole but cannot be read ({problem})") from cause
        if problem == _GONE:
            raise _Gone(path)
        problems[step] = problem
    if not problems:
        return None
    if there != listed():  # a run that trains has saved newer ones
        raise _Gone
    told = "; ".join(f"{directory / str(step)}: {text}" for step, text in problems.items())
    others = agree(lambda: ", ".join(str(step) for step in steps(directory) if not among(step)))
    advice = f"others are there ({others})" if others else "train anew in another config.output"
    raise UserError(
        f"no checkpoint is whole{' of those that will do' if others else ''} ({told}); nothing was "
        f"changed: restore the files from a copy; or {advice}"
    )


def _examine(path: pathlib.Path, below: str) -> str:
    """Returns what is wrong with a checkpoint, "" if nothing is; _OLD or _GONE."""
    if is_old(path):
        return _OLD
    try:
        problem = find_problem(path, below)
    except UserError:  # as a file system over the network says of what was removed
        if path.exists():
            raise
        return _GONE
    return _GONE if problem and not path.exists() else problem


def steps(directory: pathlib.Path) -> list[int]:
    """Lists the steps of which there is a checkpoint."""
    if not directory.is_dir():
        return []
    return [int(path.name) for path in directory.iterdir() if path.name.isdigit()]


def scores(directory: pathlib.Path) -> dict[int, float]:
    """Returns the scores of those checkpoints that have one, by step."""
    found = {step: read_manifest(directory / str(step)).get("score") for step in steps(directory)}
    return {
        step: score
        for step, score in found.items()
        if isinstance(score, int | float) and math.isfinite(score)
    }


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a file that is there as a whole or not at all, after a power cut as well."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    to_disk(path.parent)


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def orbax():
    """Imports Orbax, which takes a second, where it is used."""
    import orbax.checkpoint as ocp

    return ocp
