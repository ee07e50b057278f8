"""The state of a long embedding job on the disk: what is done survives any end of the process.

Beside the output, in OUTPUT.job/:

    job.json         what the vectors depend on; a job of other settings is refused
    items.jsonl      [digest, id, start of the text, name of the image] of each row read, in order
    vectors.bin      vector i at its place, in the output's dtype; holes where none is yet
    done-P.bin       int64 numbers of the rows that process P has finished
    errors-P.jsonl   rows that process P could not embed, and why; they are tried again when the job
                     goes on, for pictures may have come

Vectors reach the disk's cache before the number of their row does, so a killed process loses the
rows in flight and nothing else. With several processes all see one file system.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from unime_jax.data import image_files, vector_files
from unime_jax.data.items import Entry
from unime_jax.types import UserError

TEXT_LETTERS = 200  # of a row's text that the output repeats
# May be spelled in another way, or decide which rows are bad: those are tried again.
_FREE = ("input", "folder", "keys", "model", "image_root", "unime_jax")


class Job:
    """What of a job is done; use `open_job`.

    Attributes:
      finished: rows that are done, failed ones among them.
      failed: rows that could not be embedded.
    """

    def __init__(
        self,
        output: pathlib.Path,
        settings: dict[str, Any],
        *,
        width: int,
        dtype: np.dtype,
        process: int,
    ):
        self._output, self._settings = output, settings
        self.width, self.dtype = width, dtype
        self._process = process
        self._directory = directory_of(output)
        self._done = bytearray()  # 1: has a vector, 2: has none and will not get one
        self.finished = 0
        for path in _of_processes(self._directory, "done-*.bin").values():
            content = path.read_bytes()
            for row in np.frombuffer(content[: len(content) // 8 * 8], np.int64):
                self._mark(int(row), 1)
        self._vectors = os.open(self._directory / "vectors.bin", os.O_RDWR | os.O_CREAT, 0o644)
        needed = (self._done.rfind(1) + 1) * width * dtype.itemsize
        if os.fstat(self._vectors).st_size < needed:
            raise UserError(
                f"{self._directory}/vectors.bin lacks vectors that are counted as done: remove "
                f"{self._directory} and start again"
            )
        path = self._directory / f"done-{process}.bin"
        if path.exists():  # a killed process may have left half a number
            os.truncate(path, path.stat().st_size // 8 * 8)
        self._numbers = open(path, "ab", buffering=0)
        self._faults = open(self._directory / f"errors-{process}.jsonl", "w", encoding="utf-8")
        self.log = ItemLog(self._directory / "items.jsonl", writes=process == 0)

    def _mark(self, row: int, value: int) -> None:
        if row >= len(self._done):
            self._done.extend(bytes(max(row + 1 - len(self._done), len(self._done))))
        self.finished += self._done[row] == 0
        self._done[row] = value

    @property
    def failed(self) -> int:
        return self._done.count(2)

    def is_done(self, row: int) -> bool:
        return row < len(self._done) and self._done[row] > 0

    def add(self, rows: Sequence[int], vectors: np.ndarray) -> None:
        """Keeps the unit vectors of some rows."""
        vectors = vector_files.stored(vectors, self.dtype)
        size = self.width * self.dtype.itemsize
        with _naming(self._directory):
            self.log.flush()
            for row, vector in zip(rows, vectors, strict=True):
                os.pwrite(self._vectors, vector.tobytes(), row * size)
                self._mark(row, 1)
            self._numbers.write(np.array(rows, np.int64).tobytes())

    def fail(self, row: int, id: str, reason: str) -> None:
        """Notes that a row cannot be embedded."""
        line = {"row": row, "id": id, "error": reason}
        with _naming(self._directory):
            self._faults.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._faults.flush()
        self._mark(row, 2)

    def close(self) -> None:
        """Closes every file, also where one of them has something left that the disk refuses."""
        with _naming(self._directory), contextlib.ExitStack() as stack:
            for file in (self._numbers, self._faults, self.log):
                stack.callback(file.close)
            stack.callback(os.close, self._vectors)

    def write(self, *, complete: bool) -> dict[str, Any]:
        """Writes output and errors of all processes; returns what the output says of itself."""
        self.log.flush()
        for path in _of_processes(self._directory, "done-*.bin").values():
            content = path.read_bytes()
            for row in np.frombuffer(content[: len(content) // 8 * 8], np.int64):
                self._mark(int(row), 1)
        errors = [
            line
            for path in _of_processes(self._directory, "errors-*.jsonl").values()
            for line in _whole_lines(path)
            if self._done[line["row"] : line["row"] + 1] != b"\1"  # as it may be since
        ]
        errors = list({line["row"]: line for line in errors}.values())
        errors.sort(key=lambda line: line["row"])
        for line in errors:
            self._mark(line["row"], 2)
        rows = _Finished(self._directory, np.frombuffer(self._done, np.uint8), self)
        about = {
            **self._settings,
            "rows": self.log.count,
            "vectors": len(rows.rows),
            "bad_rows": len(errors),
            "complete": complete,
            "items": self.log.digest,
        }
        with _naming(self._output):
            vector_files.write(self._output, rows, about)
        path = errors_of(self._output)
        if errors:
            part = path.with_name(f".{path.name}.part")
            with _naming(path):
                lines = (json.dumps(x, ensure_ascii=False) + "\n" for x in errors)
                part.write_text("".join(lines), encoding="utf-8")
            os.replace(part, path)
        else:
            path.unlink(missing_ok=True)
        return about

    def remove(self) -> None:
        """Removes what is needed no more once the output is complete."""
        sweep(self._output)
        # Renamed as a whole first: what a kill leaves of it is never taken for a job.
        os.rename(self._directory, _removed(self._output))
        sweep(self._output)


class ItemLog:
    """What the rows are; checks that a job that goes on reads the same ones.

    Attributes:
      count: rows read in this process.
      digest: of all of them.
    """

    def __init__(self, path: pathlib.Path, *, writes: bool):
        self._known = _whole_lines(path) if path.exists() else iter(())
        self._path, self._writes = path, writes
        self._file = None
        self._size = 0  # of the lines that were checked
        self.count = 0
        self._digest = hashlib.blake2b(digest_size=16)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def add(self, entry: Entry) -> None:
        """Reads on.

        Raises:
          UserError: the row is another one than when the job began.
        """
        self.count += 1
        digest = entry.digest
        self._digest.update(digest.encode())
        if not self._writes:
            return
        if self._file is None:
            known = next(self._known, None)
            if known is not None:
                if known[0] != digest:
                    raise UserError(
                        f"row {entry.row} is not what it was when this job began: start anew after "
                        f"removing {self._path.parent}, or choose another --output"
                    )
                self._size += len(_line(known).encode())
                return
            self._file = open(self._path, "a+", encoding="utf-8")
            self._file.truncate(self._size)
        text = (entry.text or "")[:TEXT_LETTERS]
        self._file.write(_line([digest, entry.id, text, entry.label]))

    def end(self) -> None:
        """Is told that there are no more rows.

        Raises:
          UserError: there were more when the job began.
        """
        if self._writes and self._file is None and next(self._known, None) is not None:
            raise UserError(
                f"the input has fewer rows ({self.count}) than when this job began: start anew "
                f"after removing {self._path.parent}, or choose another --output"
            )

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Finished:
    """Is what goes into the output, as `vector_files.Rows` has it."""

    def __init__(self, directory: pathlib.Path, done: np.ndarray, job: Job):
        self.rows = np.flatnonzero(done == 1).astype(np.int64)
        self.width, self.dtype = job.width, job.dtype
        self._directory = directory

    def _blocks(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self.rows), vector_files.BLOCK):
            yield self.rows[start : start + vector_files.BLOCK]

    def vectors(self) -> Iterator[np.ndarray]:
        if not len(self.rows):
            return
        shape = (int(self.rows[-1]) + 1, self.width)
        path = self._directory / "vectors.bin"
        for block in self._blocks():
            # Mapped anew each time: pages that were read would count as memory of this process.
            yield np.array(np.memmap(path, self.dtype, "r", shape=shape)[block])

    def strings(self, name: str) -> Iterator[list[str]]:
        column = 1 + vector_files.NAMES.index(name)
        lines = enumerate(_whole_lines(self._directory / "items.jsonl"))
        for block in self._blocks():
            wanted, found = iter(block.tolist()), []
            row = next(wanted)
            for number, line in lines:
                if number != row:
                    continue
                found.append(line[column])
                row = next(wanted, None)
                if row is None:
                    break
            yield found


@contextlib.contextmanager
def open_job(
    output: pathlib.Path,
    settings: dict[str, Any],
    *,
    width: int,
    dtype: np.dtype,
    process: int,
    processes: int = 1,
) -> Iterator[Job]:
    """Begins a job, or goes on with the one that is there.

    Raises:
      UserError: it is a job of other settings, or another process works on it.
    """
    directory = directory_of(output)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / f"lock-{process}", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output} is being written by another process") from None
        path = directory / "job.json"
        is_new = not path.exists()
        if not is_new:
            check_settings(directory, json.loads(path.read_text()), settings)
        elif process == 0:
            part = directory / "job.json.part"
            part.write_text(json.dumps(settings, indent=2))
            os.replace(part, path)
        if process == 0:  # the rows of processes that are no more are tried again by others
            for number, old in _of_processes(directory, "errors-*.jsonl").items():
                if number >= processes:
                    old.unlink()
        job = Job(output, settings, width=width, dtype=dtype, process=process)
        try:
            yield job
        except BaseException:
            with contextlib.suppress(OSError):  # what could not be written is tried once more
                job.close()
            if is_new and not job.log.count and len(list(directory.glob("lock-*"))) == 1:
                shutil.rmtree(directory, ignore_errors=True)  # no row was read
            raise
        job.close()


def _of_processes(directory: pathlib.Path, pattern: str) -> dict[int, pathlib.Path]:
    """Returns the files of processes by their numbers; files of other names are left alone."""
    start, end = pattern.split("*")
    paths = directory.glob(pattern)
    numbers = {path.name.removeprefix(start).removesuffix(end): path for path in paths}
    return {int(number): numbers[number] for number in sorted(numbers) if number.isdecimal()}


def check_settings(place, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises unless vectors were made as they would be now."""
    differing = [
        f"{key} {there.get(key)!r} there, {now[key]!r} now"
        for key in now
        if key not in _FREE and there.get(key) != now[key]
    ]
    if differing:
        raise UserError(
            f"{place} is of other settings ({'; '.join(differing)}): give the same, choose another "
            "--output, or remove it"
        )


def check_root(output: pathlib.Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises where rows of a finished output were outside an image root that is another now."""
    if _root(there) == _root(now) or not errors_of(output).exists():
        return
    lines = _whole_lines(errors_of(output))
    if count := sum(image_files.OUTSIDE in line["error"] for line in lines):
        raise UserError(
            f"{output} lacks {count} rows whose images were outside the image root then "
            f"(--image-root {_root(there)!r} there, {_root(now)!r} now): remove it, or choose "
            "another --output"
        )


def _root(about: dict[str, Any]) -> str:
    return about.get("image_root", "")  # of before there was the key


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Says in what an operating system raises while a file is written, which one it is."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def directory_of(output: pathlib.Path) -> pathlib.Path:
    return output.with_name(f"{output.name}.job")


def sweep(output: pathlib.Path) -> None:
    """Removes what is left of a job that was being removed."""
    shutil.rmtree(_removed(output), ignore_errors=True)


def _removed(output: pathlib.Path) -> pathlib.Path:
    return output.with_name(f".{output.name}.job.removed")


def errors_of(output: pathlib.Path) -> pathlib.Path:
    return output.with_name(f"{output.name}.errors.jsonl")


def _line(content: list) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def _whole_lines(path: pathlib.Path) -> Iterator[Any]:
    """Parses the lines of a file up to one that was not written to its end."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)
