"""Faults of the machine: kills, signals, full and read-only disks, two runs in one directory.

Whatever happens, the run goes on from its newest whole checkpoint and ends bit for bit as one that
nothing happened to.
"""

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import time

import numpy as np
import pytest
import toy_run

from unime_jax import report
from unime_jax.checkpoint import integrity

STEPS = 12
KILLS = 24  # at random moments, besides one at each of `toy_run.EVENTS`


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = toy_run.Server(tmp_path_factory.mktemp("compiled"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """An undisturbed run."""
    directory = tmp_path_factory.mktemp("whole")
    assert server.run(directory / "run", STEPS, directory / "log") == 0
    return directory / "run"


def assert_same(run, whole):
    """Compares parameters, optimiser, step and every logged loss, bit for bit."""
    found, expected = toy_run.final(run), toy_run.final(whole)
    assert found.keys() == expected.keys() and len(found) > 4
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    losses = [[row["loss"] for row in report.read_metrics(path)] for path in (run, whole)]
    assert len(losses[0]) >= STEPS and losses[0] == losses[1]


def test_runs_of_one_seed_are_bit_identical(server, whole, tmp_path):
    for seed in (0, 1):
        directory = tmp_path / str(seed)
        assert server.run(directory, STEPS, tmp_path / "log", seed=seed) == 0
    assert_same(tmp_path / "0", whole)
    one, other = (toy_run.final(tmp_path / seed) for seed in "01")
    assert not np.array_equal(one["trainable['kernel']"], other["trainable['kernel']"])


@contextlib.contextmanager
def small_disk(directory: pathlib.Path, kilobytes: int):
    """Mounts a file system of its own."""
    directory.mkdir()
    size = f"size={kilobytes}k"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", directory], check=False)
    if done.returncode:
        pytest.skip("mounts a small disk, which takes root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.slow
def test_killed_at_random_moments_and_at_those_of_a_save(server, tmp_path):
    run, log, rng = tmp_path / "run", tmp_path / "log", random.Random(0)
    steps, events = 60, list(toy_run.EVENTS)
    assert server.run(tmp_path / "whole", steps, log) == 0
    kills = inside = 0
    while kills < KILLS + len(toy_run.EVENTS):
        done = len(report.read_metrics(run))
        if events and kills % 4 == 3:
            assert server.run(run, steps, log, die=events.pop()) == -signal.SIGKILL
        else:
            process = server.start(run, steps, log)
            if rng.random() < 0.8:  # else while it starts
                toy_run.wait_for_line(run, process, min(done, steps - 8) + 1)
            time.sleep(rng.random() * 0.15)
            os.kill(process, signal.SIGKILL)
            assert server.finish() == -signal.SIGKILL, log.read_text()[-2000:]
        kills += 1
        checkpoints = run / "checkpoints"
        inside += any("tmp" in path.name for path in checkpoints.glob("*"))
        for step in integrity.steps(checkpoints):
            assert integrity.find_problem(checkpoints / str(step)) == ""
    assert server.run(run, steps, log) == 0
    print(f"{kills} kills, {inside} of them inside a save")
    assert inside >= 5
    assert_same(run, tmp_path / "whole")
    assert not (run / "damaged").exists()
    assert sorted(int(path.name) for path in checkpoints.iterdir()) == [steps - 1, steps]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_save_and_stop(number, code, server, whole, tmp_path):
    process = server.start(tmp_path / "run", STEPS, tmp_path / "log")
    toy_run.wait_for_line(tmp_path / "run", process, 3)
    os.kill(process, number)
    assert server.finish() == code
    assert f"{number.name}: stopping after this step" in (tmp_path / "log").read_text()
    done = len(report.read_metrics(tmp_path / "run"))
    assert max(integrity.steps(tmp_path / "run" / "checkpoints")) == done < STEPS
    assert server.run(tmp_path / "run", STEPS, tmp_path / "log") == 0
    assert f"going on after step {done}" in (tmp_path / "log").read_text()
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(server, whole, tmp_path):
    process = server.start(tmp_path / "run", STEPS, tmp_path / "log")
    toy_run.wait_for_line(tmp_path / "run", process, 4)
    os.kill(process, signal.SIGKILL)
    server.finish()
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = max(integrity.steps(checkpoints))
    files = [path for path in (checkpoints / str(newest) / "rest").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    assert server.run(tmp_path / "run", STEPS, tmp_path / "log") == 0
    said = (tmp_path / "log").read_text()
    assert f"{newest} is damaged ({largest.relative_to(checkpoints / str(newest))} has" in said
    assert f"going on after step {newest - 1}" in said
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_loses_nothing(server, whole, tmp_path):
    log = tmp_path / "log"
    with small_disk(tmp_path / "disk", 1024) as disk:
        process = server.start(disk / "run", STEPS, log)
        assert toy_run.wait_for_line(disk / "run", process, 4)
        file = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while True:
                os.write(file, b"x" * 4096)
        os.close(file)
        assert server.finish() == 2
        said = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and "o space left on" in said[0], said
        assert "Traceback" not in log.read_text()
        for step in integrity.steps(disk / "run" / "checkpoints"):
            assert integrity.find_problem(disk / "run" / "checkpoints" / str(step)) == ""
        (disk / "filler").unlink()
        assert server.run(disk / "run", STEPS, log) == 0, log.read_text()[-2000:]
        assert_same(disk / "run", whole)


def test_a_disk_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    assert server.run(tmp_path / "file" / "run", 4, tmp_path / "log") == 2
    said = (tmp_path / "log").read_text()
    assert said.count("\n") == 1 and "file/run: cannot be written (Not a directory)" in said
    with small_disk(tmp_path / "disk", 1024) as disk:
        assert server.run(disk / "run", 2, tmp_path / "log") == 0
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for run in ("run", "other"):
            (tmp_path / "log").unlink()
            assert server.run(disk / run, 4, tmp_path / "log") == 2
            said = (tmp_path / "log").read_text()
            assert said.count("\n") == 1 and "Read-only file system" in said and run in said


def test_one_run_a_directory_and_a_kill_frees_it(server, whole, tmp_path):
    process = server.start(tmp_path / "run", STEPS, tmp_path / "log")
    toy_run.wait_for_line(tmp_path / "run", process, 2)
    os.kill(process, signal.SIGSTOP)  # that it is not done before the other one comes
    other = toy_run.Server(tmp_path / "compiled")
    assert other.run(tmp_path / "run", STEPS, tmp_path / "second") == 2
    said = (tmp_path / "second").read_text()
    assert said.count("\n") == 1 and f"process {process} on " in said and "trains there" in said
    os.kill(process, signal.SIGKILL)
    assert server.finish() == -signal.SIGKILL
    assert other.run(tmp_path / "run", STEPS, tmp_path / "second") == 0
    other.close()
    assert_same(tmp_path / "run", whole)
