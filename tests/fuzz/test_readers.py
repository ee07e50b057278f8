"""Damaged files of every kind end in success or in one line, soon and in little memory.

Readers run in processes of their own, that a crash, a hang or a forged size ends alone.
"""

import json
import os
import pathlib
import subprocess
import sys

import processes
import pytest

ROOT = pathlib.Path(__file__).parents[2]
FAST = 6  # inputs for each reader
LONG = 150


def run(count: int, first: int, names=(), timeout: int = 500) -> list[dict]:
    """Reads so many damaged files with each reader; returns what came of them."""
    folders = [ROOT, ROOT / "tests", ROOT / "tests/models", ROOT / "tests/fuzz"]
    environment = {
        **processes.environment(1),
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/fuzz/worker.py"), str(count), str(first), *names],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 0, f"did not survive: {lines[-12:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(found: list[dict]) -> None:
    others = {counts["reader"]: counts["other"] for counts in found if counts["other"]}
    assert not others, json.dumps(others, indent=1)
    assert all(counts["refused"] + counts["accepted"] == counts["inputs"] for counts in found)
    # Of what a forged size would take nothing is allocated.
    assert max(counts["memory_mib"] for counts in found) < 2048


def test_a_few_damaged_files_of_every_kind():
    found = run(FAST, 0)
    check(found)
    assert len(found) >= 35 and sum(counts["refused"] for counts in found) > 100


@pytest.mark.slow
def test_many_damaged_files_of_every_kind(capsys):
    found = run(LONG, 1_000)
    with capsys.disabled():
        print()
        for counts in found:
            print("  {reader}: {inputs} read, {refused} refused".format(**counts))
        print(f"  {sum(counts['inputs'] for counts in found)} damaged files")
    check(found)


def test_what_goes_wrong_is_seen(tmp_path):
    """The harness itself: a reader that raises something else, and one that ends the process."""
    script = tmp_path / "bad.py"
    script.write_text(
        "import os, sys\n"
        "import readers, worker\n"
        "from unime_jax.types import UserError\n"
        "def write(directory): (directory / 'x').write_bytes(b'good' * 9)\n"
        "def read(directory):\n"
        "    content = (directory / 'x').read_bytes()\n"
        "    if content != b'good' * 9: {what}\n"
        "readers.READERS = {{'bad': readers.Reader(write, ('x',), read)}}\n"
        "worker.main(3, 0, [])\n"
    )
    text = script.read_text()
    for what, told in (("1 / 0", "ZeroDivisionError"), ("os._exit(3)", "bad 0")):
        script.write_text(text.format(what=what))
        folders = [ROOT, ROOT / "tests", ROOT / "tests/models", ROOT / "tests/fuzz"]
        done = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
            capture_output=True,
            text=True,
        )
        assert told in done.stdout + done.stderr
        assert (done.returncode == 0) == (what == "1 / 0")


@pytest.mark.parametrize(
    "name, count", [("JSON lines", 8), ("task pairs", 24), ("Parquet, captions", 6)]
)
def test_pictures_of_good_rows_are_read(tmp_path, monkeypatch, name, count):
    """Else what is refused would say nothing."""
    monkeypatch.syspath_prepend(ROOT / "tests/fuzz")
    monkeypatch.syspath_prepend(ROOT / "tests/models")
    import row_readers

    monkeypatch.chdir(tmp_path)
    directory = pathlib.Path("rows")
    directory.mkdir()
    reader = row_readers.READERS[name]
    reader.write(directory)
    assert row_readers.pictures_loaded(directory, reader) == count
