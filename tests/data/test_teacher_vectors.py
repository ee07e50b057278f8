"""Vectors of the teacher, read from shards."""

import json

import numpy as np
import pytest

from unime_jax.data import teacher_vectors
from unime_jax.types import UserError


def write_vectors(directory, texts, *, count=5, shard_rows=2):
    array = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
    for number, start in enumerate(range(0, count, shard_rows)):
        np.save(directory / f"vectors-{number:05d}.npy", array[start : start + shard_rows])
    manifest = {
        "count": count,
        "shard_rows": shard_rows,
        "sentences_sha256": teacher_vectors.sentences_hash(texts),
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return array


def test_vectors_across_shards(tmp_path):
    texts = list("abcde")
    array = write_vectors(tmp_path, texts)
    vectors, manifest = teacher_vectors.read(tmp_path, texts)
    assert vectors.shape == (5, 3) and len(vectors) == manifest["count"]
    rows = [4, 0, 3, 3, 1]
    np.testing.assert_array_equal(vectors[np.array(rows)], array[rows])
    np.testing.assert_array_equal(vectors[2], array[2])


def test_vectors_that_do_not_fit_are_refused(tmp_path):
    write_vectors(tmp_path, list("abcde"))
    with pytest.raises(UserError, match="other sentences.*teach"):
        teacher_vectors.read(tmp_path, list("abcdf"))
    np.save(tmp_path / "vectors-00001.npy", np.zeros((1, 3), np.float32))
    with pytest.raises(UserError, match="vectors-00001.npy: 1 rows, 2 expected: run .* again"):
        teacher_vectors.read(tmp_path)
    np.save(tmp_path / "vectors-00001.npy", np.zeros((2, 4), np.float32))
    with pytest.raises(UserError, match="vectors of 2 widths: remove it and run"):
        teacher_vectors.read(tmp_path)
    (tmp_path / "vectors-00001.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match="vectors-00001.npy: cannot be read"):
        teacher_vectors.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json is damaged"):
        teacher_vectors.read(tmp_path)
    with pytest.raises(UserError, match="holds no teacher vectors"):
        teacher_vectors.read(tmp_path / "nowhere")


def test_the_hash_knows_order_and_borders():
    digest = teacher_vectors.sentences_hash
    assert digest(["a", "b"]) != digest(["b", "a"])
    assert digest(["ab", "c"]) != digest(["a", "bc"])
