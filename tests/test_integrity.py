"""What is on the disk for good, in which order: a power cut leaves a whole checkpoint."""

import errno
import os
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import processes
import pytest

from unime_jax import checkpoint, steps
from unime_jax.checkpoint import integrity
from unime_jax.types import UserError


@pytest.fixture
def events(monkeypatch):
    """Lists what was synced and renamed, as (what, path, content or source)."""
    found, sync, rename, replace = [], os.fsync, os.rename, os.replace

    def synced(file):
        path = pathlib.Path(os.readlink(f"/proc/self/fd/{file}"))
        sync(file)
        found.append(("sync", path, path.read_bytes() if path.is_file() else None))

    def renaming(do):
        def run(source, target, **options):
            do(source, target, **options)
            found.append(("name", pathlib.Path(target), pathlib.Path(source)))

        return run

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renaming(rename))
    monkeypatch.setattr(os, "replace", renaming(replace))
    return found


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(events, tmp_path):
    saves = checkpoint.Checkpoints(tmp_path, config={}, keep=1)
    values = {"a": jnp.asarray(np.random.default_rng(0).standard_normal(5000, np.float32))}
    for step in (1, 2):
        saves.save(steps.TrainState(jnp.int32(step), values, {}), force=True)
    saves.close()
    place = tmp_path / "checkpoints"
    named = {path: at for at, (what, path, _) in enumerate(events) if what == "name"}
    for step in (1, 2):
        at = named[place / str(step)]
        part = events[at][2]
        content = {path: what for kind, path, what in events[:at] if kind == "sync"}
        folder = place / ("1.removed" if step == 1 else "2")
        if step == 2:
            files = integrity.read_manifest(folder)["files"]
            assert len(files) > 6
            for name in files:
                assert content[part / name] == (folder / name).read_bytes(), name
                assert (part / name).parent in content, "its name"
        # The manifest, then the directory that holds its name.
        manifest = [
            at for at, (_, path, _) in enumerate(events) if path == part / "manifest.json.part"
        ]
        renamed = named[part / "manifest.json"]
        folders = [at for at, event in enumerate(events) if event[:2] == ("sync", part)]
        assert manifest[0] < renamed < folders[-1] < at
    # The new one's name, before the older one goes.
    kept = [at for at, event in enumerate(events) if event[:2] == ("sync", place)]
    assert any(named[place / "2"] < at < named[place / "1.removed"] for at in kept)


def test_a_file_is_on_the_disk_before_it_has_its_name(events, tmp_path):
    integrity.write_json(tmp_path / "x.json", {"a": 1})
    assert [(what, path.name) for what, path, _ in events] == [
        ("sync", "x.json.part"),
        ("name", "x.json"),
        ("sync", tmp_path.name),
    ]
    assert events[0][2] == (tmp_path / "x.json").read_bytes()


@pytest.mark.parametrize("number, raises", [(errno.EINVAL, False), (errno.EIO, True)])
def test_directories_that_cannot_be_synced_are_not_missed(number, raises, tmp_path, monkeypatch):
    def fail(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if raises:
        with pytest.raises(OSError):
            integrity.to_disk(tmp_path)
    else:
        integrity.to_disk(tmp_path)


def test_a_step_that_is_removed_while_it_is_read_gives_way_to_a_newer_one(tmp_path):
    """In all processes, whichever of them was too late."""

    def save(step):
        path = tmp_path / str(step)
        path.mkdir()
        (path / "content").write_text(str(step))
        integrity.write_manifest(path)

    def read(path):
        if path.name == "3":
            shutil.rmtree(path)
            save(5)
        return (path / "content").read_text()

    save(2)
    save(3)
    assert integrity.newest_whole(tmp_path, read)[:2] == (5, "5")
    said = iter([["", "gone"], ["", ""]])  # by another process, at first
    found = integrity.newest_whole(tmp_path, read, exchange=lambda own: next(said))
    assert found[:2] == (5, "5") and next(said, None) is None
    with pytest.raises(UserError, match="5 is whole but cannot be read .a disk"):
        integrity.newest_whole(tmp_path, read, exchange=lambda own: [own, "fails: a disk"])


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_is_removed_while_it_is_checked_is_not_damaged(late, tmp_path, monkeypatch):
    """Nor is an older one taken for the newest."""

    def save(step):
        path = tmp_path / str(step)
        path.mkdir()
        (path / "content").write_text(str(step))
        integrity.write_manifest(path)

    find_problem = integrity.find_problem

    def slow(path, below):
        if path.name == "9":
            shutil.rmtree(path)
            save(11)
            if late:  # as the file system says over the network
                raise UserError("content: cannot be read now (Stale file handle)")
        return find_problem(path, below)

    monkeypatch.setattr(integrity, "find_problem", slow)
    save(8), save(9)
    assert integrity.newest_whole(tmp_path, str) == (11, str(tmp_path / "11"), {})


def test_steps_that_go_again_and_again_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(integrity.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(integrity, "_examine", lambda path, below: "gone")
    (tmp_path / "1").mkdir()
    with pytest.raises(UserError, match="each checkpoint was removed before it was read; raise"):
        integrity.newest_whole(tmp_path, str)


def test_what_one_process_alone_sees_is_said(tmp_path, monkeypatch):
    """And its checksums are made once."""
    monkeypatch.setattr(integrity.time, "sleep", lambda seconds: None)
    path, made = tmp_path / "1", []
    path.mkdir()
    (path / "content").write_text("1")
    integrity.write_manifest(path)
    digest = integrity._digest
    monkeypatch.setattr(integrity, "_digest", lambda path: made.append(path) or digest(path))
    with pytest.raises(UserError, match="1 is not seen by all processes; all need one directory"):
        integrity.newest_whole(tmp_path, str, exchange=lambda own: [own, "gone"])
    assert made == [path / "content"]


@pytest.mark.slow
def test_several_processes_look_again_or_fail_together(tmp_path):
    """Whichever of them comes too late: Orbax would have the others wait for it for ever."""
    saves = checkpoint.Checkpoints(tmp_path, config={}, keep=9)
    for step in (1, 2, 3, 4):
        value = jnp.full(4, float(step))
        saves.save(steps.TrainState(jnp.int32(step), {"a": value}, {}), force=True)
    saves.close()
    said = processes.finish(processes.start_program("reading_together.py", tmp_path), seconds=120)
    for text in said:
        assert "[3.0, 3.0, 3.0, 3.0] [2. 2.] " in text, text
        assert "2 is whole but cannot be read (a disk) ['0', '1']" in text, text
