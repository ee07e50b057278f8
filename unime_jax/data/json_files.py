"""Reads JSON that people wrote: what is wrong with it is said in a line."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from unime_jax.types import UserError

_SHOWN = 60  # letters of a value that a message repeats


_UNTOLD = "another malformed row"
_TOLD = 1000  # faults whose words are kept: a file may have millions


def parse(content: str | bytes, where: str) -> Any:
    """Parses a JSON value; every string in it can be written as UTF-8.

    Raises:
      UserError: it begins with `where`.
    """
    value, has_escapes = _loads(content, where)
    return check(value, where) if has_escapes else value


def _loads(content: str | bytes, where: str) -> tuple[Any, bool]:
    """Returns a value, and whether a string in it may be half of a surrogate pair: by an escape."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        return json.loads(text), "\\u" in text
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None


def check(value: Any, where: str) -> Any:
    """Returns the value.

    Raises:
      UserError: a string in it is none that can be written as UTF-8; it begins with `where`.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: half a surrogate pair in it, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    return value


def read(path: str | os.PathLike) -> Any:
    """Reads a JSON file; see `parse`.

    Raises:
      UserError: it cannot be read or parsed.
    """
    return parse(_content(path), str(path))


def rows(path: str | os.PathLike, faults: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Yields the items of a file that is a list, each with the words that name it.

    Args:
      path: of the file.
      faults: see `keep`.

    Raises:
      UserError: it cannot be read or parsed, or is no list.
    """
    found, has_escapes = _loads(_content(path), str(path))
    if not isinstance(found, list):
        raise UserError(f"{path}: a .json file holds a list of rows")
    for number, row in enumerate(found):
        where = f"{path} row {number}"
        try:
            yield where, check(row, where) if has_escapes else row
        except UserError as error:
            keep(faults, error)


def _content(path: str | os.PathLike) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def lines(path: str | os.PathLike) -> Iterator[tuple[str, bytes]]:
    """Yields the lines of a file that are not blank, each with the words that name it.

    Lines end at newlines alone: strings may hold the other characters that str.splitlines splits.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path} line {number}", line
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def short(value: Any) -> str:
    """Returns a value for a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def keep(faults: list[str] | None, error: UserError) -> None:
    """Lists the fault of a row that is left out, or raises it where there is no list."""
    if faults is None:
        raise error
    faults.append(str(error) if len(faults) < _TOLD else _UNTOLD)
