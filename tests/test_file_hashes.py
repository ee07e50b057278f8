"""Hashes of files: what is remembered from one process to the next, and what is read again."""

import os
import pathlib
import time

import pytest

from unime_jax import file_hashes
from unime_jax.file_hashes import FileHashes, of_bytes


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a file\nof two lines.jpg"
    path.write_bytes(b"one")
    return path


def test_a_file_is_read_again_only_when_it_changed(tmp_path, path, monkeypatch):
    monkeypatch.setattr(file_hashes, "_TICK_NS", -(10**18))  # as if it had been written long ago
    memory = tmp_path / "cache" / "file_hashes.txt"
    assert FileHashes(memory.parent)(path) == of_bytes(b"one")
    memory.write_text(memory.read_text().replace(of_bytes(b"one").hex(), of_bytes(b"old").hex()))
    assert FileHashes(memory.parent)(path) == of_bytes(b"old")  # not read
    stat = path.stat()
    time.sleep(0.02)
    path.write_bytes(b"two")  # of the same size, and the time set back
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert FileHashes(memory.parent)(path) == of_bytes(b"two")
    with open(memory, "a") as file:
        file.write("cut short by a ki")
    assert FileHashes(memory.parent)(path) == of_bytes(b"two")


def test_a_file_just_written_is_not_remembered(tmp_path, path):
    hashes = FileHashes(tmp_path / "cache")
    assert hashes(path) == of_bytes(b"one")
    path.write_bytes(b"two")
    assert hashes(path) == of_bytes(b"two") and not (tmp_path / "cache").exists()


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path, path, monkeypatch):
    monkeypatch.setattr(file_hashes, "_TICK_NS", -(10**18))
    (tmp_path / "cache").write_text("a file")
    assert FileHashes(tmp_path / "cache")(path) == of_bytes(b"one")


def test_a_memory_that_cannot_be_read_is_none(tmp_path, path, monkeypatch):
    (tmp_path / "file_hashes.txt").write_text("x")

    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "read_text", fail)
    assert FileHashes(tmp_path)(path) == of_bytes(b"one")
