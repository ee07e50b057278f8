"""2,000 steps, readers that are killed: memory, files, threads and processes do not grow."""

import os
import pathlib
import signal
import time

import numpy as np
import processes
import pytest
import test_processes

from unime_jax import report

root = test_processes.root
STEPS, WARM = 2000, 500  # what is held after the warm-up is held for good
SLOPE = 3.0  # MB per 1000 steps; measured: 0.2 to 0.4


def watch(process: int, metrics: pathlib.Path) -> tuple[list, set]:
    """Samples a run until it ends: (step, MB, files, threads, children), kills a reader every 400.

    Returns the samples and the processes that were its children.
    """
    samples, children, next_kill = [], set(), 400
    place, page = pathlib.Path(f"/proc/{process}"), os.sysconf("SC_PAGE_SIZE")
    while (place / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.1)
        step = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        try:
            listed = [path.read_text().split() for path in place.glob("task/*/children")]
            own = [int(child) for children_of_thread in listed for child in children_of_thread]
            readers = [
                child
                for child in own
                if "spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_text()
            ]
            threads = len(os.listdir(place / "task"))
            opened = [os.readlink(file) for file in (place / "fd").iterdir()]
            files = sum("/dev/shm/" not in path for path in opened)  # batches on their way
            memory = int((place / "statm").read_text().split()[1]) * page / 2**20
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.update(own)
        if step:
            samples.append((step, memory, files, threads, len(readers)))
        if step >= next_kill and len(readers) == 2:
            os.kill(readers[0], signal.SIGKILL)
            next_kill += 400
    return samples, children


@pytest.mark.slow
def test_nothing_grows_with_the_steps(root, tmp_path):
    output = tmp_path / "run"
    changes = {"train.steps": STEPS, "checkpoint.every_steps": 50, "data.workers": 2}
    flags = test_processes.flags(root, output, **changes)
    (process,) = processes.start([*flags, "--config.data.threads=1"], root)
    samples, children = watch(process.pid, output / "metrics.jsonl")
    (said,) = processes.finish([process])
    assert said.count("new ones go on from there") == 4, said
    assert len(report.read_metrics(output)) == STEPS

    table = np.array([sample for sample in samples if WARM <= sample[0] < STEPS - 10], float)
    assert len(table) > 50
    slope = 1000 * np.polyfit(table[:, 0], table[:, 1], 1)[0]
    ranges = {
        name: (int(table[:, column].min()), int(table[:, column].max()))
        for column, name in ((2, "files"), (3, "threads"), (4, "readers"))
    }
    print(f"memory {table[0, 1]:.0f} MB, {slope:+.2f} MB per 1000 steps; {ranges}")
    third = len(table) // 3
    for column in (2, 3):  # what comes and goes with saves and readers does not add up
        first, last = np.median(table[:third, column]), np.median(table[-third:, column])
        assert last <= first + 4, ranges
    assert ranges["readers"][1] <= 4
    assert slope < SLOPE, slope
    time.sleep(2)
    assert not [child for child in children if pathlib.Path(f"/proc/{child}").exists()]
