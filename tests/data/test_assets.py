"""Fetching packages once, and reading them where they lie."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import stat
import sys

import packages
import pytest

from unime_jax.data import assets
from unime_jax.types import UserError


@pytest.fixture
def registry(tmp_path):
    """A folder that stands for a registry, with one wheel in it."""
    folder = tmp_path / "registry"
    folder.mkdir()
    packages.wheel(folder / "toy_pack-1.0-py3-none-any.whl", {"toy/data.txt": b"hello" * 100})
    return folder


@pytest.fixture
def package(registry):
    path = next(registry.iterdir())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return assets.Package("toy-pack", "pypi", "1.0", digest, path.stat().st_size, "MIT")


@pytest.fixture
def fetched(registry, monkeypatch):
    """Replaces pip by a copy from the registry; counts the calls."""
    calls = []

    def pip(self, package, scratch, progress):
        calls.append(package.name)
        for path in registry.iterdir():
            (scratch / path.name).write_bytes(path.read_bytes())
        if progress:
            progress(1)

    monkeypatch.setattr(assets.Cache, "_pip", pip)
    return calls


def test_nothing_is_fetched_twice(tmp_path, package, fetched):
    for _ in range(2):
        with assets.Cache(tmp_path / "cache") as cache:
            path = cache.fetch(package)
    assert fetched == ["toy-pack"]
    assert path.name == "toy_pack-1.0-py3-none-any.whl"
    assert not list((tmp_path / "cache").glob(".fetch-*"))


def test_a_package_put_there_by_hand_is_taken(tmp_path, registry, package, fetched):
    (tmp_path / "cache").mkdir()
    source = next(registry.iterdir())
    (tmp_path / "cache" / source.name).write_bytes(source.read_bytes())
    with assets.Cache(tmp_path / "cache") as cache:
        assert cache.path(package) == tmp_path / "cache" / source.name
    assert fetched == []


def test_another_content_than_expected_is_refused_and_removed(tmp_path, package, fetched):
    other = dataclasses.replace(package, sha256="0" * 64)
    with assets.Cache(tmp_path / "cache") as cache:
        with pytest.raises(UserError, match="sha256 .* expected 000000000000...: removed it"):
            cache.fetch(other)
        assert cache.path(other) is None
        assert cache.fetch(package).exists()


def test_a_damaged_package_is_noticed_before_it_is_used(tmp_path, package, fetched):
    with assets.Cache(tmp_path / "cache") as cache:
        path = cache.fetch(package)
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(UserError, match=f"{path.name} does not match its checksum"):
            cache.path(package)
        path.write_bytes(content[:-1] + b"!")
        with pytest.raises(UserError, match="delete it and run again"):
            cache.fetch(package)
        path.unlink()
        cache.fetch(package)
    assert len(fetched) == 2


def test_an_interrupted_fetch_leaves_nothing_in_place(tmp_path, package, fetched, monkeypatch):
    whole = assets.Cache._pip

    def interrupted(self, package, scratch, progress):
        (scratch / "toy_pack-1.0-py3-none-any.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets.Cache, "_pip", interrupted)
    with assets.Cache(tmp_path / "cache") as cache, pytest.raises(KeyboardInterrupt):
        cache.fetch(package)
    monkeypatch.setattr(assets.Cache, "_pip", whole)
    with assets.Cache(tmp_path / "cache") as cache:
        assert cache.path(package) is None
        assert cache.fetch(package).stat().st_size == package.size


def test_only_one_process_at_a_time(tmp_path):
    with assets.Cache(tmp_path), pytest.raises(UserError, match="another process is preparing"):
        assets.Cache(tmp_path)
    assets.Cache(tmp_path).close()


def test_a_known_debian_version_must_match_another_may_differ(tmp_path, monkeypatch):
    def apt(self, package, scratch, progress):
        (scratch / "words_1%3a2.0-1_all.deb").write_bytes(b"content")

    monkeypatch.setattr(assets.Cache, "_apt", apt)
    known = assets.Package("words", "debian", "1:2.0-1", "0" * 64, 7, "x")
    with assets.Cache(tmp_path) as cache:
        with pytest.raises(UserError, match="expected 000"):
            cache.fetch(known)
        assert cache.fetch(dataclasses.replace(known, version="1:1.9-1")).exists()


# ---- the clients


def test_pips_last_error_line_is_the_message(tmp_path):
    package = assets.Package("unime-jax-no-such-package", "pypi", "0.0.0", "", 0, "")
    with assets.Cache(tmp_path) as cache, pytest.raises(UserError) as caught:
        cache._pip(
            dataclasses.replace(package, name="--no-such-option"), _made(tmp_path / "s"), None
        )
    assert "failed" in str(caught.value) and "\n" not in str(caught.value)


def _made(path: pathlib.Path) -> pathlib.Path:
    path.mkdir()
    return path


def test_a_client_reports_how_much_is_here(tmp_path):
    seen = []
    code = "import time, os; open('part', 'w').write('x' * 10); time.sleep(.5)"
    assets._run([sys.executable, "-c", code], "test", tmp_path, seen.append)
    assert seen[-1] == 10


def fake_apt(folder: pathlib.Path, script: str, monkeypatch) -> pathlib.Path:
    """Puts an apt-get of our own first in the path; it logs its arguments."""
    folder.mkdir()
    log = folder / "log"
    for name in ("apt-get", "apt-cache", "dpkg-deb"):
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\n{script}\n')
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return log


def test_missing_package_lists_are_fetched_into_the_cache(tmp_path, monkeypatch):
    script = (
        'case "$*" in *Dir::State*update*) ;; *Dir::State*download*) echo deb > words_1_all.deb ;; '
        '*) echo "E: Unable to locate package words" >&2; exit 100 ;; esac'
    )
    log = fake_apt(tmp_path / "bin", script, monkeypatch)
    package = assets.Package("words", "debian", "9", "", 4, "x")
    with assets.Cache(tmp_path / "cache") as cache:
        assert cache.fetch(package).read_text() == "deb\n"
        cache.fetch(dataclasses.replace(package, name="word"))
    calls = log.read_text().splitlines()
    assert sum(" update" in call for call in calls) == 1
    assert f"Dir::State::lists={tmp_path}/cache/apt/lists" in calls[1]


def test_apt_that_fails_says_why_in_one_line(tmp_path, monkeypatch):
    fake_apt(tmp_path / "bin", 'echo "E: No network" >&2; echo "noise" >&2; exit 100', monkeypatch)
    package = assets.Package("words", "debian", "9", "", 4, "x")
    with assets.Cache(tmp_path / "cache") as cache:
        with pytest.raises(UserError, match="^apt-get update failed: E: No network$"):
            cache.fetch(package)


def test_without_apt_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    package = assets.Package("words", "debian", "9", "", 4, "x")
    with assets.Cache(tmp_path / "cache") as cache:
        with pytest.raises(UserError, match="words is a Debian package.*--pairs pairs.jsonl"):
            cache.fetch(package)


# ---- reading


def test_the_one_file_of_a_wheel(tmp_path):
    path = packages.wheel(tmp_path / "a.whl", {"x/a.bin": b"1", "x/b.bin": b"2", "x/c.txt": b"3"})
    assert assets.read_wheel(path, ".txt") == b"3"
    with pytest.raises(UserError, match="a.whl holds 2 files named"):
        assets.read_wheel(path, ".bin")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="a.whl is not a readable wheel.*delete it"):
        assets.read_wheel(path, ".txt")


def test_a_flipped_bit_in_a_wheel(tmp_path):
    path = packages.wheel(tmp_path / "a.whl", {"x/c.txt": b"3" * 1000})
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.whl is not a readable wheel"):
        assets.read_wheel(path, ".txt")


def test_files_of_a_debian_package(tmp_path):
    path = packages.deb(tmp_path / "a_1_all.deb", "a", {"usr/x": b"1", "usr/y/z": b"2" * 9999})
    found = dict(assets.read_deb(path, lambda name: not name.endswith("x")))
    assert found == {"usr/y/z": b"2" * 9999}


@pytest.mark.parametrize("keep", [0, 30, -2000])
def test_a_cut_debian_package_is_named(tmp_path, keep):
    path = packages.deb(tmp_path / "a_1_all.deb", "a", {"usr/z": b"2" * 9999})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="a_1_all.deb is not a readable Debian package"):
        list(assets.read_deb(path, lambda name: True))


def test_stopping_early_leaves_no_process(tmp_path):
    path = packages.deb(tmp_path / "a_1_all.deb", "a", {f"usr/{i}": b"2" * 99999 for i in range(9)})
    reader = assets.read_deb(path, lambda name: True)
    next(reader)
    reader.close()
    running = []
    for line in pathlib.Path("/proc").glob("[0-9]*/cmdline"):  # not every machine has `ps`
        with contextlib.suppress(OSError):  # it ended meanwhile
            running.append(line.read_bytes())
    assert pathlib.Path("/proc/self/cmdline").read_bytes() in running
    assert not any(bytes(path) in words for words in running)


def test_json_files_are_whole_or_old(tmp_path):
    path = tmp_path / "a.json"
    assert assets.read_json(path) is None
    assets.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        assets.write_json(path, {"a": object()})
    assert assets.read_json(path) == {"a": 1} == json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("{")
    assert assets.read_json(path) is None
