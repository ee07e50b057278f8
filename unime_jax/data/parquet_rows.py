"""Rows of Parquet files, with what in them is not what the file says it is."""

from collections.abc import Iterator
from typing import Any

from unime_jax.types import reason


class NotUnicode(bytes):
    """Stands for what a file holds where it promises UTF-8."""


def dicts(batch) -> Iterator[dict[str, Any]]:
    """Yields the rows of a pyarrow.RecordBatch; what is no UTF-8 comes as `NotUnicode`.

    Raises:
      ValueError: Python has no value for what a column holds.
    """
    columns = []
    for column in batch.columns:
        try:
            columns.append(column.to_pylist())
        except (OverflowError, LookupError) as error:  # times that Python has none for
            raise ValueError(f"of {column.type}: {reason(error)}") from None
        except UnicodeDecodeError:  # of one row, but nobody says of which
            columns.append(map(_value, column))
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


def broken(row: dict[str, Any]) -> str:
    """Returns the first key whose value is no UTF-8, "" if there is none."""
    return next((key for key, value in row.items() if isinstance(value, NotUnicode)), "")


def _value(scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return NotUnicode(error.object)
