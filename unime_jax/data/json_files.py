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


def parse(content: str | bytes, where: str, *, checked: bool = True) -> Any:
    """Parses a JSON value; every string in it can be written as UTF-8, if it is `checked`.

    Raises:
      UserError: it begins with `where`.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    # An escape may be half of a surrogate pair.
    return check(value, where) if checked and "\\u" in text else value


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


def read(path: str | os.PathLike, *, checked: bool = True) -> Any:
    """Reads a JSON file; see `parse`.

    Raises:
      UserError: it cannot be read or parsed.
    """
    try:
        return parse(pathlib.Path(path).read_bytes(), str(path), checked=checked)
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
