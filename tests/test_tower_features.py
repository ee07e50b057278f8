"""Cached vision features: whose they are, and what a full disk leaves of them."""

import errno
import os
import types

import numpy as np
import packages
import pytest

from unime_jax import embedder, runtime, tower_features
from unime_jax.data import image_files, sources
from unime_jax.types import ImageSpec, UserError

ROWS = 70  # written 32 at a time


class Tower(embedder.Embedder):
    """Gives the mean of a tile as its features; counts the tiles."""

    image_spec = ImageSpec("grid", 8, 3)
    params = {"vision_tower": {"kernel": np.ones(3, np.float32)}}

    def __init__(self):
        self.seen = 0
        self.preprocessor = types.SimpleNamespace(image_size=0, image=self._image)

    def _image(self, content, augment=None):
        if content == b"broken":
            raise UserError("no image")
        tiles = np.full((1, 8, 8, 3), content[0] + (augment is not None), np.uint8)
        return types.SimpleNamespace(tiles=tiles)

    def featurise(self, tiles):
        self.seen += len(tiles)
        return np.repeat(tiles.mean((1, 2, 3))[:, None, None], 3, 1) * np.ones((1, 1, 5))


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    monkeypatch.setenv(runtime.CACHE_VARIABLE, str(tmp_path / "cache"))
    packages.jsonl(tmp_path, ROWS)
    for number in range(ROWS):
        (tmp_path / f"{number}.png").write_bytes(bytes([number]))
    return lambda **where: sources.pairs(tmp_path / "pairs.jsonl", **where)


def features(pairs, directory):
    tower = Tower()
    found = tower_features.cache_features(pairs, tower, directory, variants=2)
    return np.array(found), tower.seen


def test_features_are_of_the_images_that_are_there_now(pairs, tmp_path):
    (tmp_path / "9.png").write_bytes(b"broken")
    found, seen = features(pairs(), tmp_path / "f")
    assert found.shape == (ROWS, 2, 3, 5) and seen == 1 + 2 * ROWS
    expected = np.arange(ROWS)[:, None] + [0, 1]
    expected[9] = 0
    np.testing.assert_array_equal(found[..., 0, 0], expected)
    again, seen = features(pairs(), tmp_path / "f")
    assert seen == 0 and (again == found).all()
    (tmp_path / "9.png").write_bytes(b"9")  # repaired
    found, seen = features(pairs(), tmp_path / "f")
    assert seen > 2 * ROWS and found[9, 0, 0, 0] == ord("9")
    (tmp_path / "elsewhere").mkdir()  # of the same names and captions
    for number in range(ROWS):
        (tmp_path / "elsewhere" / f"{number}.png").write_bytes(bytes([99]))
    others = pairs(folder=image_files.Folder(tmp_path / "elsewhere"))
    assert (features(others, tmp_path / "f")[0][:, 0] == 99).all()


def test_a_disk_that_fills_up_is_told_and_gone_on_with(pairs, tmp_path, monkeypatch):
    whole, _ = features(pairs(), tmp_path / "whole")
    write, left = os.pwrite, [1]

    def full(file, content, offset):
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()
        return write(file, content, offset)

    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(os, "pwrite", full)
        features(pairs(), tmp_path / "f")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename.endswith(".npy")
    rest, seen = features(pairs(), tmp_path / "f")
    assert seen == 2 * (ROWS - 32) and (rest == whole).all()


def test_too_small_a_disk_is_told_at_once(pairs, tmp_path, monkeypatch):
    usage = types.SimpleNamespace(free=4000)
    monkeypatch.setattr(tower_features.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="of 70 images take 4.2e-06 GB, and 4e-06 GB are free"):
        features(pairs(), tmp_path / "f")
    assert list((tmp_path / "f").iterdir()) == []
