"""Progress of long work: lines in a log, a line that is redrawn, rates and times."""

import io

import pytest

from unime_jax import report
from unime_jax.report.progress import format_rate, format_seconds


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_progress_in_a_log_prints_a_line_about_every_ten_seconds():
    out, clock = io.StringIO(), Clock()
    with report.Progress(100, "training", stream=out, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 1.0
            progress.update(step, {"loss": 0.25})
    lines = out.getvalue().splitlines()
    assert len(lines) == 11  # the first update, one each ten seconds, the end
    assert lines[1] == "training: 11/100, 1 s/step, 1 min 29 s left, loss 0.25"
    assert lines[-1] == "training: 100/100, in 1 min 40 s, 1 s/step, loss 0.25"
    assert "\r" not in out.getvalue()


def test_the_last_line_has_the_rate_of_the_time_beside_it():
    out, clock = io.StringIO(), Clock()
    with report.Progress(22, "x", start=2, unit="row", stream=out, clock=clock) as progress:
        for seconds in [100.0] + 19 * [1.0]:  # the first compiles
            clock.now += seconds
            progress.advance()
        clock.now += 1.0
    assert out.getvalue().splitlines()[-1] == "x: 22/22, in 2 min 00 s, 6 s/row"


def test_progress_on_a_terminal_redraws_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    out, clock = Terminal(), Clock()
    with report.Progress(4, "embedding", unit="row", stream=out, clock=clock) as progress:
        for _ in range(4):
            clock.now += 0.5
            progress.advance(text="a text much too long for so narrow a terminal")
    text = out.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n")
    drawn = [line.split("\x1b")[0] for line in text.split("\r")[1:]]
    assert len(drawn) == 5 and all(len(line) < 70 for line in drawn)
    assert drawn[1].startswith("embedding  ━━━━━━━━━━──────────  50%  2/4  2 rows/s  1.0 s left")


def test_progress_falls_back_to_ascii():
    out, clock = Terminal(), Clock()
    out.encoding = "ascii"
    with report.Progress(2, "x", stream=out, clock=clock) as progress:
        progress.update(1)
    assert out.getvalue().isascii() and "####" in out.getvalue()


def test_rate_forgets_the_compiling_step_and_steps_of_an_earlier_run():
    out, clock = io.StringIO(), Clock()
    progress = report.Progress(1000, "x", start=500, stream=out, clock=clock)
    clock.now += 100.0
    progress.update(501)
    for step in range(502, 520):
        clock.now += 2.0
        progress.update(step)
    assert out.getvalue().splitlines()[-1].startswith("x: 516/1000, 2 s/step, 16 min 08 s left")


def test_rate_follows_a_change_of_speed():
    out, clock = io.StringIO(), Clock()
    progress = report.Progress(10_000, "x", stream=out, clock=clock)
    for step in range(1, 1001):
        clock.now += 0.1 if step < 900 else 4.0
        progress.update(step)
    assert ", 4 s/step," in out.getvalue().splitlines()[-1]


def test_track_counts_finished_items_and_close_is_idempotent():
    out = io.StringIO()
    progress = report.Progress(3, "x", stream=out)
    items = progress.track("abc")
    assert next(items) == "a" and progress.done == 0
    assert list(items) == ["b", "c"]
    progress.close()
    assert out.getvalue().count("3/3") == 1


def test_progress_without_anything_to_do():
    out = io.StringIO()
    report.Progress(0, "x", stream=out).close()
    assert out.getvalue() == "x: 0/0, in 0.0 s\n"


@pytest.mark.parametrize(
    "seconds,text",
    [(0.04, "0.0 s"), (9.9, "9.9 s"), (9.97, "10 s"), (59.7, "1 min 00 s"), (3599.8, "1 h 00 min"),
     (7620, "2 h 07 min")],
)  # fmt: skip
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_rates():
    assert format_rate(3.14159, "step") == "3.14 s/step"
    assert format_rate(0.25, "row") == "4 rows/s"
    assert format_rate(1 / 2.34, "row") == "2.34 rows/s"
    assert format_rate(0.0002, "row") == "5000 rows/s"
