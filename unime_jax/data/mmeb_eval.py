"""Reads MMEB-eval as published: a parquet file for each set, images below one directory.

Columns `qry_text`, `qry_img_path` and the lists `tgt_text`, `tgt_img_path`, the right candidate
first. A column that holds one string for all candidates of a row instead of a list is read as well.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from unime_jax.data.eval_items import Items
from unime_jax.data.sources import ImageRef
from unime_jax.types import UserError, reason

COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


@dataclasses.dataclass(frozen=True)
class Rows:
    """A set, its queries and candidates by number of the item.

    Attributes:
      queries: int[Q].
      candidates: int[C] of each query, the right one first.
      total: queries in the file; without a limit those without candidates are not among `queries`.
    """

    queries: np.ndarray
    candidates: list[np.ndarray]
    total: int


def files_of(source: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Lists a set's files; [] where the set is not there."""
    wanted = _plain(name)
    try:
        folders = sorted(source.iterdir())
    except OSError as error:
        raise UserError(f"{source}: cannot be listed ({error.strerror})") from None
    for folder in folders:
        if folder.is_dir() and _plain(folder.name) == wanted:
            for pattern in ("test-*.parquet", "test.parquet", "*.parquet"):
                if found := sorted(folder.glob(pattern)):
                    return found
        elif folder.suffix == ".parquet" and _plain(folder.stem) == wanted:
            return [folder]
    return []


def read(
    files: list[pathlib.Path],
    items: Items,
    image: Callable[[str], ImageRef],
    *,
    limit: int = 0,
) -> Rows:
    """Reads a set.

    Args:
      files: of the set.
      items: gets what is not in it yet.
      image: of a path.
      limit: so many queries, evenly spread; 0: all.

    Raises:
      UserError: an unreadable file, a missing column, lists of different length.
    """
    table = _table(files)
    total = table.num_rows
    if limit and limit < total:
        table = table.take(np.unique(np.linspace(0, total - 1, limit).round().astype(int)))
    texts, paths = (_strings(files[0], table, column) for column in COLUMNS[:2])
    queries = np.array(
        [
            items.add(text, image(path) if path else None)
            for text, path in zip(texts, paths, strict=True)
        ],
        np.int64,
    )
    candidates = _candidates(files[0], table, items, image)
    kept = [i for i, found in enumerate(candidates) if len(found)]
    return Rows(queries[kept], [candidates[i] for i in kept], total)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def _table(files: list[pathlib.Path]):
    import pyarrow
    import pyarrow.parquet

    tables = []
    for path in files:
        try:
            file = pyarrow.parquet.ParquetFile(path)
            missing = [column for column in COLUMNS if column not in file.schema_arrow.names]
            if missing:
                raise UserError(
                    f"{path}: no column {', '.join(missing)}; is it a file of TIGER-Lab/MMEB-eval?"
                )
            tables.append(file.read(columns=list(COLUMNS)))
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{path}: not a readable parquet file ({reason(error)}); fetch it again"
            ) from None
    try:
        return pyarrow.concat_tables(tables, promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{files[0].parent}: files of different kinds of columns ({reason(error)})"
        ) from None


def _strings(path: pathlib.Path, table, name: str) -> list[str]:
    found = [value or "" for value in _values(path, table[name], name)]
    if not all(isinstance(value, str) for value in found):
        raise UserError(f"{path}: column {name} holds {table[name].type}, not strings")
    return found


def _values(path: pathlib.Path, column, name: str) -> list:
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: column {name} holds text that is not UTF-8 ({error})") from None


def _candidates(
    path: pathlib.Path, table, items: Items, image: Callable[[str], ImageRef]
) -> list[np.ndarray]:
    """Numbers each row's candidates; every text and every path is looked at once."""
    text_lengths, text_codes, texts = _lists(path, table, "tgt_text")
    path_lengths, path_codes, paths = _lists(path, table, "tgt_img_path")
    lengths = np.maximum(text_lengths, path_lengths)
    codes = []
    for name, own, found, values in (
        ("tgt_text", text_lengths, text_codes, texts),
        ("tgt_img_path", path_lengths, path_codes, paths),
    ):
        bad = np.flatnonzero((own != lengths) & (own > 1))
        if len(bad):
            row = int(bad[0])
            raise UserError(
                f"{path} row {row}: {own[row]} values in {name}, {lengths[row]} in the other list"
            )
        codes.append(_spread(own, lengths, found, empty=values.index("")))
    pairs, inverse = np.unique(codes[0] * len(paths) + codes[1], return_inverse=True)
    numbers = np.empty(len(pairs), np.int64)
    for i, pair in enumerate(pairs.tolist()):
        text, place = texts[pair // len(paths)], paths[pair % len(paths)]
        numbers[i] = items.add(text, image(place) if place else None)
    return np.split(numbers[inverse], np.cumsum(lengths)[:-1]) if len(lengths) else []


def _spread(own: np.ndarray, lengths: np.ndarray, found: np.ndarray, *, empty: int) -> np.ndarray:
    """Gives each of a row's `lengths` places its value; one value is for all, none is `empty`."""
    row = np.repeat(np.arange(len(own)), lengths)
    place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = (np.cumsum(own) - own)[row] + np.where(own[row] == 1, 0, place)
    return np.where(own[row] == 0, empty, np.append(found, empty)[np.minimum(at, len(found))])


def _lists(path: pathlib.Path, table, name: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns lengths int[Q], a code for each value of all lists together, and the values."""
    import pyarrow
    import pyarrow.compute

    column = table[name].combine_chunks()
    if isinstance(column, pyarrow.ChunkedArray):  # of pyarrow before 15
        column = pyarrow.concat_arrays(column.chunks)
    kind = column.type
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        lengths = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(column), 0)
        lengths = lengths.to_numpy(zero_copy_only=False).astype(np.int64)
        values = pyarrow.compute.list_flatten(column)
    else:
        lengths, values = np.ones(len(column), np.int64), column
    if pyarrow.types.is_null(values.type):  # every list is empty
        values = values.cast(pyarrow.string())
    if not (pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)):
        raise UserError(f"{path}: column {name} holds {kind}, not strings or lists of strings")
    encoded = pyarrow.compute.fill_null(values, "").dictionary_encode()
    found = _values(path, encoded.dictionary, name)
    found += [] if "" in found else [""]
    return lengths, encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), found
