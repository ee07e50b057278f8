"""Reads nli_for_simcse.csv: sentences with an entailed and a contradicting one.

Texts are held once, as one block of UTF-8; rows are three numbers.
"""

import array
import csv
import dataclasses
import pathlib

import numpy as np
from jaxtyping import Int32

from unime_jax.data import json_files
from unime_jax.data.texts import Sentences
from unime_jax.types import UserError

COLUMNS = ("sent0", "sent1", "hard_neg")
_CELL = 1 << 26  # bytes; a longer one is no text but a quote that was not closed


@dataclasses.dataclass(frozen=True)
class Nli:
    """Is the content of a csv.

    Attributes:
      sentences: every sentence once, in order of appearance.
      rows: int32[n, 3], places in `sentences` of sent0, sent1 and hard_neg.
      empty_rows: rows left out, for a cell is empty.
      repeated_rows: rows left out, for the same three sentences stand further up.
    """

    sentences: Sentences
    rows: Int32[np.ndarray, "N 3"]
    empty_rows: int = 0
    repeated_rows: int = 0

    def describe(self) -> str:
        return (
            f"{len(self.rows)} rows of {len(self.sentences)} sentences; left out: "
            f"{self.empty_rows} rows with an empty cell, {self.repeated_rows} repeated rows"
        )


def is_nli(path) -> bool:
    """Says whether a path of `config.data.path` is read by this module."""
    return pathlib.Path(path).suffix == ".csv"


def read(path, faults: list[str] | None = None) -> Nli:
    """Reads the csv as published: a header with sent0, sent1 and hard_neg, one triple a line.

    Args:
      path: of the file.
      faults: gets what is wrong with rows that are left out; None: the first one stops.

    Raises:
      UserError: the file or a line cannot be read, a column is missing, no row is left.
    """
    path = pathlib.Path(path).expanduser()
    sentences = Sentences()
    rows = array.array("i")
    seen: set[bytes] = set()
    empty = repeated = 0
    line = 0
    csv.field_size_limit(_CELL)
    try:
        # What is no UTF-8 is a fault of its row: it comes as surrogates, which UTF-8 never holds.
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().removeprefix("\ufeff") for name in next(reader, [])]
            if missing := [name for name in COLUMNS if name not in header]:
                raise UserError(
                    f"{path} line 1: no column {', '.join(missing)}; the header must name "
                    f"{','.join(COLUMNS)}"
                )
            places = [header.index(name) for name in COLUMNS]
            for cells in reader:
                line = reader.line_num
                if not cells:
                    continue
                if fault := _fault(cells, header):
                    json_files.keep(faults, UserError(f"{path} line {line}: {fault}"))
                    continue
                texts = [cells[place].strip() for place in places]
                if not all(texts):
                    empty += 1
                    continue
                row = array.array("i", map(sentences.add, texts))
                if row.tobytes() in seen:
                    repeated += 1
                    continue
                seen.add(row.tobytes())
                rows.extend(row)
    except (OSError, csv.Error) as error:
        raise UserError(f"{path} after line {line}: cannot be read ({error})") from None
    if not rows:
        first = f"; {faults[0]}" if faults else ""
        raise UserError(f"{path}: no row with three sentences in it{first}")
    numbers = np.frombuffer(rows, np.int32).reshape(-1, 3)
    return Nli(sentences.frozen(), numbers, empty, repeated)


def _fault(cells: list[str], header: list[str]) -> str:
    """Returns what is wrong with a line, or ""."""
    if len(cells) != len(header):
        return (
            f"{len(cells)} cells instead of {len(header)}; texts with commas stand in double quotes"
        )
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return "cannot be read as UTF-8"
    return ""
