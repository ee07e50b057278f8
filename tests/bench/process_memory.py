"""The memory of a process and of all that it starts, such as a compiler (Linux)."""

import contextlib
import pathlib
import threading
import time

PROC = pathlib.Path("/proc")
EVERY = 0.1  # seconds between two looks
SHARE = 0.1  # of a core's time that looking may take


class TreePeak:
    """Looks at a process and its descendants while a `with` block runs, in a thread of its own.

    Attributes:
      gib: the most that they held together; None where /proc does not say it.
    """

    def __init__(self, pid: int):
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.gib: float | None = None

    def __enter__(self) -> "TreePeak":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        wait, over = 0.0, False
        while not over:
            over = self._over.wait(wait)  # the last look is at the end
            start = time.perf_counter()
            held = tree(self._pid)
            if held is not None:
                self.gib = max(self.gib or 0.0, held / 2**30)
            wait = max(EVERY, (time.perf_counter() - start) / SHARE)


def tree(pid: int) -> int | None:
    """Returns the bytes that a process and its descendants hold; None: /proc does not say it.

    What they share is counted once, whoever else has it too: the sum of what is private, and the
    largest share. (Pss would be less where others run the same libraries.)
    """
    if not (PROC / f"self/task/{threading.get_native_id()}/children").exists():
        return None
    private, shared, waiting = 0, 0, [pid]
    while waiting:
        one = PROC / str(waiting.pop())
        with contextlib.suppress(OSError):  # it has ended
            for children in one.glob("task/*/children"):
                waiting += map(int, children.read_text().split())
            own, common = _rollup((one / "smaps_rollup").read_text())
            private, shared = private + own, max(shared, common)
    return private + shared or None


def _rollup(text: str) -> tuple[int, int]:
    """Returns the private and the shared bytes of a process."""
    sizes = {"Private": 0, "Shared": 0}
    for line in text.splitlines():
        name, *words = line.split()
        kind, _, part = name.partition("_")
        if kind in sizes and part in ("Clean:", "Dirty:"):
            sizes[kind] += int(words[0]) * 1024
    return sizes["Private"], sizes["Shared"]
