"""Keeps count of training rows that cannot be read."""

import collections
import contextlib
import json
import os
import pathlib
import threading
from collections.abc import Mapping
from typing import BinaryIO

from unime_jax.types import UserError

_SHOWN = 3  # rows that a message names


class BadRows:
    """Counts unreadable rows, from any thread, and stops the run when they are too many.

    Args:
      total: rows of the data.
      limit: share of them that may be bad, 0 to 1.
    """

    def __init__(self, total: int, limit: int | float):
        self._lock = threading.Lock()
        self._seen: dict[tuple, tuple[str, str]] = {}
        self._total, self._limit = total, limit
        self._before: dict[tuple, tuple[str, str]] = {}  # listed by earlier starts of the run
        self._unlisted: list[tuple] = []
        self._count = 0  # of `_seen` and `_before` together

    def add(self, row: tuple, problem: str, kind: str = "unreadable") -> None:
        """Notes a bad row; a row met again counts once.

        Args:
          row: tells it from others.
          problem: names the row and what is wrong with it.
          kind: a word or two, by which rows are counted.

        Raises:
          UserError: more than the limit.
        """
        self.add_all({row: (problem, kind)})

    def add_all(self, rows: Mapping[tuple, tuple[str, str]]) -> None:
        """Notes bad rows, each with its problem and kind; as `add`."""
        with self._lock:
            for row, (problem, kind) in rows.items():
                if row in self._seen:
                    continue
                self._seen[row] = kind, problem
                if row not in self._before:
                    self._count += 1
                    self._unlisted.append(row)
            too_many = len(self._seen) > self._limit * self._total
            seen = dict(self._seen) if too_many else {}  # other threads go on adding
        if too_many:
            first = "; ".join(problem for _, problem in list(seen.values())[:_SHOWN])
            some = "the first" if len(seen) > _SHOWN else "they are"
            raise UserError(
                f"{len(seen)} of {self._total} rows are unreadable ({_count(seen)}), "
                f"more than config.data.max_bad_share={self._limit} allows; {some}: {first}"
            )

    def __len__(self) -> int:
        return self._count

    def __getstate__(self):
        """Leaves the lock behind: another process has its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    def items(self) -> list[tuple[tuple, tuple[str, str]]]:
        """Lists the bad rows, each with its problem and kind, as `add` takes them."""
        with self._lock:
            return [(row, (problem, kind)) for row, (kind, problem) in self._seen.items()]

    def problems(self) -> list[str]:
        """Lists one line for each bad row."""
        with self._lock:
            return [problem for _, problem in self._seen.values()]

    def go_on(self, path: pathlib.Path) -> None:
        """Counts what an earlier start listed in a file, and does not list it again.

        Towards the limit these do not count: they may have been put right since.
        """
        try:
            # The last is cut short or empty; texts hold other ends of lines.
            *lines, _ = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return
        with self._lock:
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    found = json.loads(line)
                    self._before[tuple(found["row"])] = str(found["kind"]), str(found["problem"])
            self._count = len(self._seen.keys() | self._before.keys())
            self._unlisted = [row for row in self._unlisted if row not in self._before]

    def list_in(self, path: pathlib.Path) -> None:
        """Appends the rows that no call has written yet to a file of JSON lines."""
        with self._lock:
            rows = list(self._unlisted)
            found = [self._seen[row] for row in rows]
        if not rows:
            return
        with open(path, "ab+") as file:
            _cut_last_line(file)
            for row, (kind, problem) in zip(rows, found, strict=True):
                line = {"kind": kind, "problem": problem, "row": row}
                text = json.dumps(line, ensure_ascii=False)
                file.write(text.encode(errors="replace") + b"\n")
        with self._lock:
            del self._unlisted[: len(rows)]

    def kinds(self) -> str:
        """Returns how many there are of each kind: "3 missing, 2 unreadable"."""
        with self._lock:
            return _count({**self._before, **self._seen})


def _cut_last_line(file: BinaryIO) -> None:
    """Takes a line back that a kill cut short."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if file.read() not in (b"", b"\n"):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _count(rows: Mapping[tuple, tuple[str, str]]) -> str:
    counts = collections.Counter(kind for kind, _ in rows.values())
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def told(error: UserError) -> tuple[str, str]:
    """Returns the problem and kind of a row that an error speaks of."""
    return str(error), getattr(error, "kind", "unreadable")
