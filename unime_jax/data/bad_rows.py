"""Keeps count of training rows that cannot be read."""

import threading

from unime_jax.types import UserError


class BadRows:
    """Counts unreadable rows, from any thread, and stops the run when they are too many.

    Args:
      total: rows of the data.
      limit: share of them that may be bad, 0 to 1.
    """

    def __init__(self, total: int, limit: int | float):
        self._lock = threading.Lock()
        self._seen: dict[tuple, str] = {}
        self._allowed = limit * total
        self._total = total

    def add(self, row: tuple, problem: str) -> None:
        """Notes a bad row; a row met again counts once.

        Raises:
          UserError: more than the limit.
        """
        with self._lock:
            self._seen.setdefault(row, problem)
            if len(self._seen) > self._allowed:
                raise UserError(
                    f"{len(self._seen)} of {self._total} rows are unreadable, more than "
                    f"config.data.max_bad_share allows; the last: {problem}"
                )

    def __len__(self) -> int:
        return len(self._seen)

    def __getstate__(self):
        """Leaves the lock behind: another process has its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    def items(self) -> list[tuple[tuple, str]]:
        """Lists the bad rows, each with its problem."""
        with self._lock:
            return list(self._seen.items())

    def problems(self) -> list[str]:
        """Lists one line for each bad row."""
        with self._lock:
            return list(self._seen.values())
