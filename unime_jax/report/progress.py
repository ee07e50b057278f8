"""Progress of a long loop on the terminal, with rate and time left."""

import collections
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from unime_jax import runtime

# The rate is that of the last half minute, at least of the last few updates: it follows a change
# of speed and forgets the first step's compilation.
WINDOW_SECONDS = 30.0
WINDOW_UPDATES = 5
TTY_SECONDS = 0.1  # between redraws of the line
LOG_SECONDS = 10.0  # between lines where the output is no terminal
BAR_WIDTH = 20


class Progress:
    """One line that tells how far a loop is.

    On a terminal the line is redrawn in place; elsewhere (a file, a CI log) a new line is printed
    about every ten seconds, and always at the first update and at the end. Usable as a context
    manager; `close` may be called twice.
    """

    def __init__(
        self,
        total: int | None,
        title: str,
        *,
        start: int = 0,
        unit: str = "step",
        stream: io.TextIOBase | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts the clock.

        Args:
          total: of `unit`s; more may be reported. None: not known.
          title: what is going on, in a few words.
          start: units done before this process began; they do not count in the rate.
          unit: name of what is counted, singular.
          stream: stderr by default; of several processes, the first's alone.
          clock: seconds.
        """
        self.total = total
        self.title = title
        self.done = start
        self._unit = unit
        shown = sys.stderr if runtime.is_main() else io.StringIO()
        self._stream = shown if stream is None else stream
        self._clock = clock
        self._terminal = bool(getattr(self._stream, "isatty", lambda: False)())
        self._first_time = clock()
        self._start = start
        self._history = collections.deque([(self._first_time, start)])
        self._shown_at: float | None = None
        self._text = ""
        self._closed = False
        try:
            "━─".encode(getattr(self._stream, "encoding", None) or "ascii")
            self._bar = "━─"
        except UnicodeEncodeError:
            self._bar = "#-"

    def update(self, done: int, text: str | Mapping[str, Any] = "") -> None:
        """Reports `done` units in all; `text` (or metrics by name) stands at the line's end."""
        now = self._clock()
        self.done = done
        self._text = text if isinstance(text, str) else format_metrics(text)
        self._history.append((now, done))
        while len(self._history) > WINDOW_UPDATES and now - self._history[1][0] > WINDOW_SECONDS:
            self._history.popleft()
        # The step that compiled is no measure of those to come.
        if len(self._history) == 3 and self._history[0] == (self._first_time, self._start):
            self._history.popleft()
        wait = TTY_SECONDS if self._terminal else LOG_SECONDS
        if self._shown_at is None or now - self._shown_at >= wait:
            self._show(now)

    def advance(self, count: int = 1, text: str | Mapping[str, Any] = "") -> None:
        """Reports `count` more units."""
        self.update(self.done + count, text)

    def track(self, items: Iterable) -> Iterator:
        """Yields the items and counts each when it is finished; closes at the end."""
        with self:
            for item in items:
                yield item
                self.advance()

    def close(self) -> None:
        """Shows the last state and ends the line."""
        if self._closed:
            return
        self._closed = True
        self._show(self._clock(), last=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _seconds_per_unit(self) -> float | None:
        (t0, n0), (t1, n1) = self._history[0], self._history[-1]
        return (t1 - t0) / (n1 - n0) if n1 > n0 else None

    def _show(self, now: float, last: bool = False) -> None:
        self._shown_at = now
        try:
            self._print(now, last)
        except BrokenPipeError:  # nobody reads any more; the loop goes on
            self._stream = open(os.devnull, "w")

    def _print(self, now: float, last: bool) -> None:
        parts = [f"{self.done}" if self.total is None else f"{self.done}/{self.total}"]
        pace = self._seconds_per_unit()
        if last:
            seconds, count = now - self._first_time, self.done - self._start
            pace = seconds / count if count > 0 else None  # of the time beside it
            parts.append(f"in {format_seconds(seconds)}")
        if pace is not None:
            parts.append(format_rate(pace, self._unit))
            if not last and self.total is not None and self.done < self.total:
                parts.append(f"{format_seconds(pace * (self.total - self.done))} left")
        if self._text:
            parts.append(self._text)
        if not self._terminal:
            print(f"{self.title}: {', '.join(parts)}", file=self._stream, flush=True)
            return
        if self.total is None:
            self._redraw(f"{self.title}  {'  '.join(parts)}", last)
            return
        share = min(1.0, self.done / self.total) if self.total > 0 else 1.0
        full = round(share * BAR_WIDTH)
        bar = self._bar[0] * full + self._bar[1] * (BAR_WIDTH - full)
        self._redraw(f"{self.title}  {bar} {share:4.0%}  {'  '.join(parts)}", last)

    def _redraw(self, line: str, last: bool) -> None:
        width = shutil.get_terminal_size().columns - 1
        # Erasing to the end of the line removes what is left of a longer one.
        self._stream.write(f"\r{line[:width]}\x1b[K" + ("\n" if last else ""))
        self._stream.flush()


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Returns "name value" pairs, four significant digits each."""
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())


def format_seconds(seconds: float | int) -> str:
    """Returns 0.4 s, 12 s, 3 min 05 s or 2 h 07 min."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_rate(seconds_per_unit: float | int, unit: str) -> str:
    """Returns "3.1 s/step", or "42 steps/s" where that reads better."""
    if seconds_per_unit >= 1:
        return f"{seconds_per_unit:.3g} s/{unit}"
    rate = 1 / max(seconds_per_unit, 1e-9)
    return f"{rate:.0f} {unit}s/s" if rate >= 100 else f"{rate:.3g} {unit}s/s"
