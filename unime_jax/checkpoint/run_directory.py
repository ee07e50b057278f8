"""The directory of a run: who writes it, which configuration and data it belongs to.

run.json          the resolved configuration
data.json         rows of every data set and a digest of them
files.json        hashes of the other files that the run reads: its base, its teacher's vectors
run.lock          held by the process that trains there
checkpoints/N/    see `runs`
damaged/          checkpoints that were found damaged, moved here
kept/N            which other runs need checkpoint N: it is never removed (see `kept`)
begins_from       checkpoints of others that a start has marked so, until run.json names them
metrics.jsonl     one line a logged step
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from unime_jax import runtime
from unime_jax.checkpoint import integrity
from unime_jax.types import UserError

RUN_FILE, DATA_FILE, FILES_FILE, LOCK_FILE = "run.json", "data.json", "files.json", "run.lock"
CHECKPOINTS, DAMAGED, BEGINS = "checkpoints", "damaged", "begins_from"
# Keys that may change between a run and its continuation without changing what is computed.
FREE_KEYS = (
    "checkpoint.",
    "log.",
    "eval.",
    "mesh.",
    "output",
    "init_from",  # was read before the first checkpoint
    "teacher.path",  # measures held-out sentences; what is trained on are its vectors
    "data.threads",
    "data.workers",
    "data.max_bad_share",
    "data.image_root",
    "model.remat",
    "train.chunk",
    "train.replay",
)
# Keys that runs of old lack, and what they did.
NEW_KEYS = {"data.joint_bins": False, "optim.spike_factor": 0.0, "optim.spike_window": 32}
# Keys of paths: what lies there is known by its contents from files.json; by its rows from
# data.json, which tells data that were moved but not one copy from another one's pictures.
_BY_FILES = ("model.path", "teacher.vectors")
_BY_ROWS = ("data.path", "data.images", "data.features")
# Files that runs of old read as well and kept no hashes of.
NEW_FILES = ("processor_config.json",)


def locate(path: str | os.PathLike) -> tuple[pathlib.Path, int | None]:
    """Returns a run's directory, and the step where RUN/checkpoints/STEP names one."""
    path = pathlib.Path(path)
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, None


def is_run(path: str | os.PathLike) -> bool:
    """Says whether a path is the directory of a run or of one of its checkpoints."""
    return (locate(path)[0] / RUN_FILE).is_file()


def read_run(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the resolved configuration of a run."""
    return _read(locate(path)[0] / RUN_FILE)


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def check_continues(path: str | os.PathLike, config: dict[str, Any]) -> None:
    """Checks that a configuration continues the run that a directory holds.

    Raises:
      UserError: it is another one; every differing key is named. All processes raise it.
    """
    runtime.by_main(lambda: _check_continues(pathlib.Path(path), config))


def _check_continues(path: pathlib.Path, config: dict[str, Any]) -> str:
    old = {**NEW_KEYS, **_flat(read_run(path))}
    new = {**NEW_KEYS, **_flat(json.loads(json.dumps(config)))}
    differing = [
        f"{key}: {old.get(key)!r} there, {new[key]!r} now"
        for key in sorted(new)  # others of old were a user's own
        if _or_empty(old.get(key)) != _or_empty(new[key])
        and not key.startswith(FREE_KEYS)
        and not _is_same_place(path, key, old.get(key), new[key])
    ]
    if differing:
        raise UserError(
            f"{path} holds a run of another configuration ({'; '.join(differing)}); "
            "go on with what it has (--config.KEY=VALUE), choose another config.output or remove "
            "that directory"
        )
    return ""


def _or_empty(value: Any) -> Any:
    return "" if value is None else value  # they used to mean the same


def take_old_values(path: str | os.PathLike, config: dict[str, Any], drawn: str = "") -> None:
    """Sets the keys that a run lacks, for it was begun before they were there, to what it did then.

    Args:
      path: the run directory; one that has not begun takes all as it is.
      config: the configuration of a start, which is changed.
      drawn: what steps draw in another way since groups are merged, and "joint_bins" is there.
    """
    for key in json.loads(runtime.by_main(lambda: json.dumps(_lacking(path)))):
        section, name = key.split(".")
        old = NEW_KEYS[key]
        since = f"; from here on it draws other {drawn}" if drawn and name == "joint_bins" else ""
        if since or config.get(section, {}).get(name, old) != old:
            print(f"config.{key}={old}: {path} was begun before there was this key{since}")
            config[section][name] = old


def _lacking(path: str | os.PathLike) -> list[str]:
    """Returns the keys that were not there yet when a run was begun, if it was."""
    begun = is_run(path) and has_begun(path)
    return sorted(NEW_KEYS.keys() - _flat(read_run(path)).keys()) if begun else []


def _is_same_place(run: pathlib.Path, key: str, then: Any, now: Any) -> bool:
    """Says whether a path is the same one, or what lies there is yet to be compared with a record.

    `check_files` and `check_data` do, of every run that goes on.
    """
    if key not in _BY_FILES + _BY_ROWS or not (isinstance(then, str) and then and now):
        return False
    there, here = (pathlib.Path(place).expanduser().resolve() for place in (then, now))
    if there == here:
        return True
    if key in _BY_ROWS:
        return not os.path.exists(there) and (run / DATA_FILE).is_file()
    return (run / FILES_FILE).is_file() and bool(_read(run / FILES_FILE).get(f"config.{key}"))


def open_run(path: str | os.PathLike, config: dict[str, Any]) -> None:
    """Creates a run directory, or checks that the configuration continues the run that is there.

    A run that has begun keeps its settings until `record`: files and rows are yet to be checked.

    Raises:
      UserError: the directory holds a run of another configuration, or cannot be written.
    """
    path = pathlib.Path(path)
    with _by_main():
        if runtime.is_main():
            begun = is_run(path) and has_begun(path)
            (_check_continues if begun else _write_settings)(path, config)
    if not is_run(path):
        raise UserError(
            f"config.output={path}: what process 0 writes there is not seen here; all processes "
            "need one directory, on a file system that they share"
        )


def record(path: str | os.PathLike, config: dict[str, Any]) -> None:
    """Keeps the settings of a start whose files and rows are those of the run.

    Keys that the run lacks stay so, that `take_old_values` finds them the next time as well.

    Raises:
      UserError: the directory cannot be written.
    """
    config = json.loads(json.dumps(config))
    with _by_main():
        if runtime.is_main():
            for section, name in (key.split(".") for key in _lacking(path)):
                config.get(section, {}).pop(name, None)
            _write_settings(pathlib.Path(path), config)


def _write_settings(path: pathlib.Path, config: dict[str, Any]) -> None:
    with _writable(path):
        path.mkdir(parents=True, exist_ok=True)
        integrity.write_json(path / RUN_FILE, config)
        (path / BEGINS).unlink(missing_ok=True)


def has_begun(path: str | os.PathLike, *, before: float = math.inf) -> bool:
    """Says whether there is a checkpoint, of fewer steps than `before`.

    Until there is one, another start may change all.
    """
    return any(step < before for step in integrity.steps(pathlib.Path(path) / CHECKPOINTS))


Found = dict[str, dict[str, Any]]  # rows of data sets and a digest of them, by name


def check_data(
    path: str | os.PathLike,
    found: Found,
    *,
    keep: bool = True,
    earlier: Callable[[dict[str, Any]], list[Found]] | None = None,
) -> None:
    """Keeps what a run's data are, or checks that they are those that it began with.

    Args:
      path: the run directory.
      found: by data set, its number of rows and a digest of them, as this process read them.
      keep: False to check alone.
      earlier: what earlier versions found in the same rows, from the settings that the run has
        recorded; process 0 calls it.

    Raises:
      UserError: they differ, or processes read other ones; every data set that does is named.
    """
    first, *others = map(json.loads, runtime.exchange(json.dumps(found)))
    for number, other in enumerate(others, 1):
        if differing := _differing(first, other, ("in process 0", f"in process {number}")):
            raise UserError(
                f"config.data.path: processes read different rows ({differing}); give all of them "
                "the same files"
            )
    with _by_main():
        if runtime.is_main():
            _check_data(pathlib.Path(path), found, keep, earlier)


def _check_data(path: pathlib.Path, found: Found, keep: bool, earlier: Callable | None) -> None:
    file = path / DATA_FILE
    if not file.is_file() or (keep and not has_begun(path)):
        if keep:
            integrity.write_json(file, found)
        return
    there = _read(file)
    for name, entry in there.items():
        if not isinstance(entry, dict) or not {"rows", "digest"} <= entry.keys():
            raise UserError(f"{file}: {name!r} is {entry!r}; is the file damaged? remove it")
    differing = _differing(there, found, ("then", "now"))
    if differing and earlier and there in earlier(read_run(path)):
        if keep:  # whoever goes on from elsewhere cannot tell any more
            integrity.write_json(file, found)
    elif differing:
        raise UserError(
            f"config.data.path: not the rows that {path} was trained on so far ({differing}); put "
            "them back or choose another config.output"
        )


Hashes = dict[str, dict[str, str]]  # of files, by key of the configuration and name


def check_files(path: str | os.PathLike, find: Callable[[], Hashes], *, keep: bool = True) -> None:
    """Keeps which files a run reads, or checks that they are those that it began with.

    Runs that were begun by a version that kept none keep those of now.

    Args:
      path: the run directory.
      find: process 0 calls it, for up to an hour.
      keep: False to check alone.

    Raises:
      UserError: they differ; all that do are named.
    """
    runtime.by_main(lambda: _check_files(pathlib.Path(path), find, keep), wait=runtime.HASHING_MS)


def _check_files(path: pathlib.Path, find: Callable[[], Hashes], keep: bool) -> str:
    file = path / FILES_FILE
    there = _read(file) if file.is_file() and (has_begun(path) or not keep) else None
    if there is None and keep:
        with _writable(path):
            integrity.write_json(file, find())
    if there is None:
        return ""
    found = find()
    if not all(isinstance(names, dict) for names in there.values()):
        raise UserError(f"{file}: is the file damaged? remove it")
    differing = [
        f"{key}: {', '.join(names)}"
        for key in sorted(there.keys() & found.keys())
        if (names := _other_names(there[key], found[key]))
    ]
    if differing:
        raise UserError(
            f"not the files that {path} was trained with so far ({'; '.join(differing)}); put them "
            "back or choose another config.output"
        )
    return ""


def _other_names(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """Names what is gone, new or another one."""
    unknown = {name for name in NEW_FILES if name not in then}
    names = sorted((then | now).keys() - unknown)
    return [name for name in names if then.get(name) != now.get(name)]


def _differing(one: dict[str, Any], other: dict[str, Any], when: tuple[str, str]) -> str:
    """Names the data sets that differ, "" where none does."""
    return "; ".join(
        f"{name}: {_rows(one.get(name))} {when[0]}, {_rows(other.get(name))} {when[1]}"
        for name in sorted(one | other)
        if one.get(name) != other.get(name)
    )


def _rows(data_set: dict[str, Any] | None) -> str:
    return f"{data_set['rows']} rows ({data_set['digest']})" if data_set else "none"


@contextlib.contextmanager
def lock(path: str | os.PathLike) -> Iterator[None]:
    """Keeps other processes from training in a directory; the system frees it after a kill.

    Raises:
      UserError: a process trains there, or nothing can be written there.
    """
    path = pathlib.Path(path)
    with contextlib.ExitStack() as held:
        with _by_main(), _writable(path):
            if runtime.is_main():
                path.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(open(path / LOCK_FILE, "a+", encoding="utf-8"))
                _hold(file, path)
        yield


def _hold(file: TextIO, path: pathlib.Path) -> None:
    try:
        # Of the process, not of the open file: a worker that outlives us does not hold it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"config.output={path}: {holder} trains there; wait for it, stop it or choose "
                "another directory"
            ) from None
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        print(
            f"{path}: its file system has no locks ({error.strerror}); nothing keeps a second run "
            "from training there"
        )
    file.seek(0)
    file.truncate()
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} (since {started})\n")
    file.flush()


@contextlib.contextmanager
def _by_main() -> Iterator[None]:
    """Lets what process 0 alone does fail in all processes."""
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error)
    problem = runtime.from_main(problem)
    if problem:
        raise UserError(problem)


@contextlib.contextmanager
def _writable(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"config.output={path}: cannot be written ({error.strerror}); choose another directory"
        ) from None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
