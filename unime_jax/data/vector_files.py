"""Files of vectors: .npz, .npy, .parquet and .safetensors, written and read in blocks of rows.

Each holds the vectors, for every vector the row of the input, the row's id, the start of its text
and the name of its image, and how they were made (`about`):

    .npz          arrays vectors, rows, ids, texts, images, about (JSON)
    .parquet      columns vector, row, id, text, image; about as the schema's metadata
    .safetensors  vectors and rows; ids, texts and images as UTF-8 with offsets; about as metadata
    .npy          vectors alone; NAME.npy.items.jsonl holds the rest, about on its first line
"""

import dataclasses
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from unime_jax.types import UserError, reason

SUFFIXES = (".npz", ".npy", ".parquet", ".safetensors")
DTYPES = {"f32": np.dtype("float32"), "f16": np.dtype("float16"), "int8": np.dtype("int8")}
NAMES = ("ids", "texts", "images")
BLOCK = 8192  # rows
_ABOUT = "unime_jax"


@runtime_checkable
class Rows(Protocol):
    """What is written: `count` rows that can be read again and again.

    Attributes:
      rows: the row of the input that each vector belongs to.
      width: of the vectors.
      dtype: one of DTYPES' values.
    """

    rows: Int64[np.ndarray, "N"]
    width: int
    dtype: np.dtype

    def vectors(self) -> Iterator[np.ndarray]:
        """Yields [n, E], at most BLOCK rows at a time."""

    def strings(self, name: str) -> Iterator[list[str]]:
        """Yields a field of NAMES in blocks as `vectors` does."""


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Is such a file, read.

    Attributes:
      vectors: f32[N, E], unit rows, whatever they were stored in.
      rows: int64[N], rows of the input.
      ids, texts, images: strings of each row, "" for none.
      about: how they were made.
    """

    vectors: Float32[np.ndarray, "N E"]
    rows: Int64[np.ndarray, "N"]
    ids: Sequence[str]
    texts: Sequence[str]
    images: Sequence[str]
    about: dict[str, Any]


def kind_of(path) -> str:
    """Returns the suffix of a file of vectors.

    Raises:
      UserError: another one.
    """
    suffix = pathlib.Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: a file of vectors ends in {', '.join(SUFFIXES)}")
    return suffix


def stored(vectors: Float32[np.ndarray, "N E"], dtype: np.dtype) -> np.ndarray:
    """Converts unit rows; int8 rows are scaled so that their largest number is 127 or -127."""
    if dtype != np.int8:
        return vectors.astype(dtype)
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    return np.rint(127 / np.maximum(largest, 1e-12) * vectors).astype(np.int8)


def write(path: str | os.PathLike, rows: Rows, about: dict[str, Any]) -> None:
    """Writes a file, whole or not at all."""
    path = pathlib.Path(path)
    writers = {
        ".npz": _write_npz,
        ".npy": _write_npy,
        ".parquet": _write_parquet,
        ".safetensors": _write_safetensors,
    }
    part = path.with_name(f".{path.name}.part")
    try:
        writers[kind_of(path)](part, rows, json.dumps(about, ensure_ascii=False))
        if kind_of(path) == ".npy":
            os.replace(_beside(part), _beside(path))
        os.replace(part, path)
    finally:
        for left in (part, _beside(part)):
            left.unlink(missing_ok=True)


def read_about(path: str | os.PathLike) -> dict[str, Any]:
    """Returns how the vectors of a file were made; {} where the file does not say.

    Raises:
      UserError: it is not there or damaged.
    """
    path = pathlib.Path(path)
    readers = {
        ".npz": _npz_about,
        ".npy": _npy_about,
        ".parquet": _parquet_about,
        ".safetensors": _safetensors_about,
    }
    return _guarded(path, readers[kind_of(path)])


def read(path: str | os.PathLike) -> Vectors:
    """Reads a file that `write` wrote.

    Raises:
      UserError: it is not there, damaged or of another origin.
    """
    path = pathlib.Path(path)
    about = read_about(path)
    if not about:
        raise UserError(f"{path} does not say which model made it; write it with unime_jax.embed")
    readers = {
        ".npz": _read_npz,
        ".npy": _read_npy,
        ".parquet": _read_parquet,
        ".safetensors": _read_safetensors,
    }
    vectors, rows, *strings = _guarded(path, readers[kind_of(path)])
    vectors = np.asarray(vectors, np.float32)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return Vectors(vectors / np.where(length > 0, length, 1), rows, *strings, about)


def _guarded(path: pathlib.Path, function):
    """Calls a reader; whatever it stumbles over becomes one line."""
    if not path.is_file():
        fault = "a directory, no file of vectors" if path.is_dir() else "no such file of vectors"
        raise UserError(f"{path}: {fault}")
    try:
        return function(path)
    except UserError:
        raise
    except Exception as error:  # of zipfile, numpy, pyarrow, safetensors: each its own kinds
        raise UserError(f"{path}: not a readable file of vectors ({reason(error)})") from None


def _beside(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.items.jsonl")


# ---------------------------------------------------------------- npz


def _write_npz(path: pathlib.Path, rows: Rows, about: str) -> None:
    shape = (len(rows.rows), rows.width)
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        _member(archive, "vectors", rows.dtype, shape, rows.vectors())
        _member(archive, "rows", rows.rows.dtype, shape[:1], [rows.rows])
        for name in NAMES:
            longest = max((len(x) for block in rows.strings(name) for x in block), default=0)
            dtype = np.dtype(f"<U{max(longest, 1)}")  # numpy has no strings of any length
            blocks = (np.array(block, dtype) for block in rows.strings(name))
            _member(archive, name, dtype, shape[:1], blocks, zipfile.ZIP_DEFLATED)
        text = np.array(about)
        _member(archive, "about", text.dtype, (), [text])


def _member(archive, name, dtype, shape, blocks, compression=zipfile.ZIP_STORED) -> None:
    """Writes an array of an npz file block by block."""
    info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
    info.compress_type = compression
    with archive.open(info, "w", force_zip64=True) as file:
        _write_array(file, dtype, shape, blocks)


def _write_array(file, dtype: np.dtype, shape: tuple[int, ...], blocks) -> None:
    described = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    for block in blocks:
        file.write(np.ascontiguousarray(block).tobytes())


def _npz_about(path: pathlib.Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return json.loads(str(archive["about"])) if "about" in archive.files else {}


def _read_npz(path: pathlib.Path):
    with np.load(path, allow_pickle=False) as archive:
        strings = (archive[name].tolist() for name in NAMES)
        return [archive["vectors"], archive["rows"], *strings]


# ---------------------------------------------------------------- npy


def _write_npy(path: pathlib.Path, rows: Rows, about: str) -> None:
    with open(path, "wb") as file:
        _write_array(file, rows.dtype, (len(rows.rows), rows.width), rows.vectors())
    with open(_beside(path), "w", encoding="utf-8") as file:
        file.write(about + "\n")
        place = 0
        for fields in zip(*map(rows.strings, NAMES), strict=True):
            for strings in zip(*fields, strict=True):
                line = {"row": int(rows.rows[place])}
                line |= {name[:-1]: value for name, value in zip(NAMES, strings, strict=True)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                place += 1


def _npy_about(path: pathlib.Path) -> dict[str, Any]:
    np.load(path, mmap_mode="r", allow_pickle=False)
    if not _beside(path).is_file():
        return {}
    with open(_beside(path), encoding="utf-8") as file:
        return json.loads(file.readline())


def _read_npy(path: pathlib.Path):
    with open(_beside(path), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file][1:]
    vectors = np.load(path, allow_pickle=False)
    if len(vectors) != len(lines):
        raise UserError(f"{_beside(path)} has {len(lines)} rows, {path.name} has {len(vectors)}")
    rows = np.array([line["row"] for line in lines], np.int64)
    return [vectors, rows, *([line[name[:-1]] for line in lines] for name in NAMES)]


# ---------------------------------------------------------------- parquet


def _write_parquet(path: pathlib.Path, rows: Rows, about: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = pa.from_numpy_dtype(rows.dtype)
    fields = [
        pa.field("row", pa.int64()),
        *(pa.field(name[:-1], pa.string()) for name in NAMES),
        pa.field("vector", pa.list_(number, rows.width)),
    ]
    schema = pa.schema(fields, metadata={_ABOUT: about})
    place = 0
    with pq.ParquetWriter(path, schema) as writer:
        for vectors, *strings in zip(rows.vectors(), *map(rows.strings, NAMES), strict=True):
            flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), number)
            numbers = rows.rows[place : place + len(vectors)]
            place += len(vectors)
            columns = [pa.array(numbers), *(pa.array(block, pa.string()) for block in strings)]
            columns.append(pa.FixedSizeListArray.from_arrays(flat, rows.width))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _parquet_about(path: pathlib.Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    metadata = pq.read_schema(path).metadata or {}
    return json.loads(metadata.get(_ABOUT.encode(), b"{}"))


def _read_parquet(path: pathlib.Path):
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    width = table.schema.field("vector").type.list_size
    parts = [
        chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        for chunk in table["vector"].chunks
    ]
    vectors = np.concatenate(parts) if parts else np.zeros((0, width), np.float32)
    strings = (table[name[:-1]].to_pylist() for name in NAMES)
    return [vectors, table["row"].to_numpy().astype(np.int64), *strings]


# ---------------------------------------------------------------- safetensors


def _write_safetensors(path: pathlib.Path, rows: Rows, about: str) -> None:
    count = len(rows.rows)
    kinds = {"float32": "F32", "float16": "F16", "int8": "I8"}
    # Wide numbers first, so that every tensor is aligned.
    tensors = [("rows", "I64", [count], 8 * count, lambda: [rows.rows])]
    for name in NAMES:
        tensors.append(
            (f"{name}_offsets", "I64", [count + 1], 8 * (count + 1), _offsets(rows, name))
        )
    size = count * rows.width * rows.dtype.itemsize
    tensors.append(("vectors", kinds[rows.dtype.name], [count, rows.width], size, rows.vectors))
    for name in NAMES:
        size = sum(len(x.encode()) for block in rows.strings(name) for x in block)
        tensors.append((f"{name}_utf8", "U8", [size], size, _letters(rows, name)))
    header, start = {"__metadata__": {_ABOUT: about}}, 0
    for name, kind, shape, size, _ in tensors:
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for *_, blocks in tensors:
            for block in blocks():
                file.write(np.ascontiguousarray(block).tobytes())


def _offsets(rows: Rows, name: str):
    def blocks() -> Iterator[np.ndarray]:
        end = np.int64(0)
        yield np.array([end])
        for block in rows.strings(name):
            ends = end + np.cumsum([len(x.encode()) for x in block], dtype=np.int64)
            end = ends[-1]
            yield ends

    return blocks


def _letters(rows: Rows, name: str):
    def blocks() -> Iterator[np.ndarray]:
        for block in rows.strings(name):
            yield np.frombuffer("".join(block).encode(), np.uint8)

    return blocks


def _safetensors_about(path: pathlib.Path) -> dict[str, Any]:
    import safetensors

    with safetensors.safe_open(path, "numpy") as file:
        return json.loads((file.metadata() or {}).get(_ABOUT, "{}"))


def _read_safetensors(path: pathlib.Path):
    import safetensors

    with safetensors.safe_open(path, "numpy") as file:
        strings = []
        for name in NAMES:
            ends, letters = file.get_tensor(f"{name}_offsets"), file.get_tensor(f"{name}_utf8")
            content = letters.tobytes()
            pairs = zip(ends[:-1], ends[1:], strict=True)
            strings.append([content[start:stop].decode() for start, stop in pairs])
        return [file.get_tensor("vectors"), file.get_tensor("rows"), *strings]
