"""Hashes of files: what is remembered from one process to the next, and what is read again."""

import errno
import os
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
    monkeypatch.setattr(file_hashes, "_TICK_NS", -(10**18))
    (tmp_path / "file_hashes.txt").mkdir()
    assert FileHashes(tmp_path)(path) == of_bytes(b"one")


def full(source, target):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_memory_that_is_mostly_of_files_that_changed_is_written_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(file_hashes, "_TICK_NS", -(10**18))
    memory = tmp_path / "file_hashes.txt"
    paths = [tmp_path / name for name in ("it's one.jpg", 'a "b" c.jpg', "\udcff.jpg")]
    for number, lines in enumerate((3, 6, 9, 6), 1):
        for path in paths:
            path.write_bytes(b"%d" % number)
            assert FileHashes(tmp_path)(path) == of_bytes(b"%d" % number)
        found = memory.read_bytes().splitlines()
        assert len(found) <= lines
    before = memory.read_bytes()
    with monkeypatch.context() as patch:  # a disk that is full
        memory.write_bytes(3 * before)
        patch.setattr(file_hashes.os, "replace", full)
        assert FileHashes(tmp_path)(paths[0]) == of_bytes(b"4")
    assert memory.read_bytes() == 3 * before and not list(tmp_path.glob("*.part"))
    memory.write_bytes(before)
    monkeypatch.setattr(file_hashes, "_READ", "not at all")  # nothing is read any more
    assert [FileHashes(tmp_path)(path) for path in paths] == [of_bytes(b"4")] * 3
    assert memory.read_bytes() == before and not list(tmp_path.glob("*.part"))


def test_models_and_images_are_remembered_apart(tmp_path, path, monkeypatch):
    """A program that asks for a model does not read what is known of a million images."""
    monkeypatch.setattr(file_hashes, "_TICK_NS", -(10**18))
    FileHashes(tmp_path)(path)
    assert file_hashes.of_files([path, path], tmp_path) == [of_bytes(b"one")] * 2
    assert (tmp_path / "model_hashes.txt").read_bytes().startswith(of_bytes(b"one").hex().encode())
    monkeypatch.setattr(file_hashes, "_READ", "not at all")
    assert file_hashes.of_files([path], tmp_path) == [FileHashes(tmp_path)(path)]
