"""Checkpoints that other runs are built on: RUN/kept/N names those that need checkpoint N."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterable, Iterator

from unime_jax import runtime
from unime_jax.checkpoint import integrity, run_directory
from unime_jax.types import UserError

KEPT = "kept"


def keep(checkpoint: str | os.PathLike, output: str | os.PathLike) -> bool:
    """Has a run keep a checkpoint for another one that is built on it; says whether it will.

    Args:
      checkpoint: RUN/checkpoints/STEP.
      output: the other run. What it was to be built on when it was started before and saved nothing
        is no longer kept for it; what another run under its name needs is.
    """
    run, step = run_directory.locate(checkpoint)
    output = pathlib.Path(output)
    place, line = run / KEPT, str(output.absolute())
    before = _begins_from(output)
    with contextlib.suppress(OSError):
        with _locked(place):
            with contextlib.suppress(OSError), open(output / run_directory.BEGINS, "ab") as begins:
                begins.write(os.fsencode(f"{checkpoint}\n"))  # should this start end here
            _mark(place / str(step), line, True)
            there = pathlib.Path(checkpoint).is_dir()  # not removed before it was marked
            for number in integrity.steps(place):
                if not there if number == step else (run, number) in before:
                    _mark(place / str(number), line, False)
        return there
    return False


def release(output: str | os.PathLike, wanted: Iterable[str]) -> None:
    """Takes back the marks of earlier starts of a run, but for those that it needs now.

    Args:
      output: the run.
      wanted: what it is built on.
    """
    runtime.by_main(lambda: _release(pathlib.Path(output), set(map(run_directory.locate, wanted))))


def _release(output: pathlib.Path, wanted: set[tuple[pathlib.Path, int | None]]) -> str:
    for run, step in _begins_from(output) - wanted:
        if (run / KEPT / str(step)).is_file():
            with contextlib.suppress(OSError), _locked(run / KEPT):
                _mark(run / KEPT / str(step), str(output.absolute()), False)
    return ""


@contextlib.contextmanager
def _locked(place: pathlib.Path) -> Iterator[None]:
    """Keeps others from marking theirs meanwhile."""
    place.mkdir(exist_ok=True)
    with open(place / "lock", "a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def _begins_from(output: pathlib.Path) -> set[tuple[pathlib.Path, int | None]]:
    """Returns the runs and steps that starts of a run have marked, and that it does not need.

    It needs what run.json names once it has begun: before, another start may change all.
    """
    config = {}
    with contextlib.suppress(UserError):
        config = run_directory.read_run(output)
    model = config.get("model")
    names = config.get("init_from"), model.get("path") if isinstance(model, dict) else None
    named = {run_directory.locate(name) for name in names if isinstance(name, str)}
    marked = set(map(run_directory.locate, _lines(output / run_directory.BEGINS)))
    return marked - named if run_directory.has_begun(output) else marked | named


def kept_for_none(path: str | os.PathLike) -> dict[int, list[str]]:
    """Returns the runs that checkpoints are kept for, by step, where none of them is there."""
    place = pathlib.Path(path) / KEPT
    runs = {step: _lines(place / str(step)) for step in integrity.steps(place)}
    return {step: lines for step, lines in runs.items() if not any(map(os.path.exists, lines))}


def _lines(path: pathlib.Path) -> list[str]:
    return os.fsdecode(path.read_bytes()).splitlines() if path.is_file() else []


def _mark(path: pathlib.Path, line: str, wanted: bool) -> None:
    """Puts a line into a file or takes it out; without any the file goes."""
    lines = _lines(path)
    kept = [other for other in lines if wanted or other != line]
    kept += [line] * (wanted and line not in lines)
    if not kept:
        path.unlink(missing_ok=True)
    elif kept != lines:
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(os.fsencode("".join(f"{other}\n" for other in kept)))
        os.replace(part, path)
