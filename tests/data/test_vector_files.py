"""Files of vectors of every format and dtype: what was written is read, by others as well."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from unime_jax.data import vector_files
from unime_jax.types import UserError

ABOUT = {"model": "m", "instruction": None, "word": "é"}


class Rows:
    """Vectors in two blocks, as `vector_files.Rows`."""

    def __init__(self, count=5, width=6, dtype="f32"):
        rng = np.random.default_rng(0)
        found = rng.standard_normal((count, width)).astype(np.float32)
        self.unit = found / np.linalg.norm(found, axis=1, keepdims=True)
        self.dtype, self.width = vector_files.DTYPES[dtype], width
        self.rows = np.arange(count, dtype=np.int64) * 3
        self.fields = {
            "ids": [f"id {i}" for i in range(count)],
            "texts": ["", "ü\n\u2028x", "日本", "a" * 200, "b"][:count],
            "images": ["x.png"] * count,
        }

    def _blocks(self, rows):
        return (rows[start : start + 3] for start in range(0, len(rows), 3))

    def vectors(self):
        return (vector_files.stored(block, self.dtype) for block in self._blocks(self.unit))

    def strings(self, name):
        return self._blocks(self.fields[name])


@pytest.mark.parametrize("suffix", vector_files.SUFFIXES)
@pytest.mark.parametrize("dtype, atol", [("f32", 1e-7), ("f16", 4e-4), ("int8", 5e-3)])
def test_what_was_written_is_read(tmp_path, suffix, dtype, atol):
    path = tmp_path / f"v{suffix}"
    rows = Rows(dtype=dtype)
    vector_files.write(path, rows, ABOUT)
    found = vector_files.read(path)
    np.testing.assert_allclose(found.vectors, rows.unit, rtol=0, atol=atol)
    assert found.vectors.dtype == np.float32 and found.about == ABOUT
    np.testing.assert_array_equal(found.rows, rows.rows)
    for name in vector_files.NAMES:
        assert list(getattr(found, name)) == rows.fields[name]
    assert not [p for p in tmp_path.iterdir() if "part" in p.name]


@pytest.mark.parametrize("suffix", vector_files.SUFFIXES)
def test_no_rows_are_a_file_of_no_rows(tmp_path, suffix):
    vector_files.write(tmp_path / f"v{suffix}", Rows(0), ABOUT)
    found = vector_files.read(tmp_path / f"v{suffix}")
    assert found.vectors.shape == (0, 6) and list(found.ids) == []


def test_others_read_them(tmp_path):
    rows = Rows(dtype="f16")
    for suffix in vector_files.SUFFIXES:
        vector_files.write(tmp_path / f"v{suffix}", rows, ABOUT)
    expected = rows.unit.astype(np.float16)
    with np.load(tmp_path / "v.npz") as archive:
        np.testing.assert_array_equal(archive["vectors"], expected)
        assert archive["ids"].tolist() == rows.fields["ids"]
        assert json.loads(str(archive["about"])) == ABOUT
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), expected)
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.column_names == ["row", "id", "text", "image", "vector"]
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), np.float16), expected)
    tensors = safetensors.numpy.load_file(tmp_path / "v.safetensors")
    np.testing.assert_array_equal(tensors["vectors"], expected)


def test_int8_uses_its_whole_range():
    found = vector_files.stored(Rows().unit, np.dtype("int8"))
    assert found.dtype == np.int8 and (np.abs(found).max(axis=1) == 127).all()


def test_files_of_others_and_damaged_ones(tmp_path):
    with pytest.raises(UserError, match="v.csv: a file of vectors ends in .npz, .npy, .parquet"):
        vector_files.kind_of(tmp_path / "v.csv")
    with pytest.raises(UserError, match="no such file of vectors"):
        vector_files.read(tmp_path / "v.npz")
    np.save(tmp_path / "v.npy", np.zeros((2, 3)))
    np.savez(tmp_path / "v.npz", vectors=np.zeros((2, 3)))
    for name in ("v.npy", "v.npz"):
        assert vector_files.read_about(tmp_path / name) == {}
        with pytest.raises(UserError, match="does not say which model made it"):
            vector_files.read(tmp_path / name)
    for suffix in vector_files.SUFFIXES:
        path = tmp_path / f"w{suffix}"
        vector_files.write(path, Rows(), ABOUT)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(UserError, match=f"w{suffix}: not a readable file of vectors"):
            vector_files.read(path)
