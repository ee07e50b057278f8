"""Tables for terminal, Markdown and JSON, and the report that holds them."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

ABSENT = "-"


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of one thing measured in several ways.

    Attributes:
      header: a name per column; the first column names the row.
      rows: a value per column: text, a number, or None where nothing was measured.
      formats: per column a format specification as in `format(value, spec)` for its numbers;
        "" leaves them as `str` would. A column with a format stands to the right.
      best: columns in which the largest number is set in bold (Markdown) or starred (terminal).
      reference: names of rows (first column) that never count as the best: baselines, teachers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    formats: Sequence[str] = ()
    best: Sequence[str] = ()
    reference: Sequence[str] = ()

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"row {row!r} has {len(row)} values, not {len(self.header)}")

    def markdown(self) -> str:
        """Returns a GitHub table, numbers to the right."""
        winners = self._winners()
        lines = [self.header, ["---" if not self._numeric(c) else "---:" for c in self._columns]]
        for r in range(len(self.rows)):
            cells = [self._cell(r, c).replace("|", "\\|") for c in self._columns]
            lines.append([f"**{x}**" if (r, c) in winners else x for c, x in enumerate(cells)])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def text(self) -> str:
        """Returns the table in aligned columns."""
        winners = self._winners()
        columns = []
        for c in self._columns:
            # Stars stand beside the numbers, not in their way.
            star = {True: "*", False: " "} if self.header[c] in self.best else {}
            cells = [
                self._cell(r, c) + star.get((r, c) in winners, "") for r in range(len(self.rows))
            ]
            head = self.header[c] + star.get(False, "")
            width = max(map(len, [head, *cells]))
            align = str.rjust if self._numeric(c) else str.ljust
            columns.append([align(head, width), "-" * width, *(align(x, width) for x in cells)])
        return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))

    def records(self) -> list[dict[str, Any]]:
        """Returns a dict per row, values unformatted; None where JSON has no number (nan)."""
        rows = [[value if _finite(value) else None for value in row] for row in self.rows]
        return [dict(zip(self.header, row, strict=True)) for row in rows]

    @property
    def _columns(self) -> range:
        return range(len(self.header))

    def _numeric(self, column: int) -> bool:
        if column < len(self.formats) and self.formats[column]:
            return True
        values = [row[column] for row in self.rows if row[column] is not None]
        return bool(values) and not any(isinstance(value, str) for value in values)

    def _cell(self, row: int, column: int) -> str:
        value = self.rows[row][column]
        if value is None:
            return ABSENT
        if isinstance(value, str) or column >= len(self.formats):
            return str(value)
        return format(value, self.formats[column])

    def _winners(self) -> set[tuple[int, int]]:
        winners = set()
        for name in self.best:
            column = list(self.header).index(name)
            running = [
                r
                for r, row in enumerate(self.rows)
                if row[0] not in self.reference and _finite(row[column])
            ]
            if running:
                # Compared as printed: equal figures are all the best.
                top = max(running, key=lambda r: self.rows[r][column])
                shown = self._cell(top, column)
                winners |= {(r, column) for r in running if self._cell(r, column) == shown}
        return winners


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
      title: its heading.
      text: Markdown below the heading.
      table: or None.
      image: file name of a plot in the report's directory, or "".
      note: Markdown below table and image: how to read them, what was left out.
    """

    title: str
    text: str = ""
    table: Table | None = None
    image: str = ""
    note: str = ""


def write_report(directory, title: str, sections: Sequence[Section], **extra) -> pathlib.Path:
    """Writes report.md and report.json.

    Args:
      directory: where both go; made if needed.
      title: of the report.
      sections: in order.
      **extra: stored in report.json as they are (JSON types), beside the tables.

    Returns:
      The path of report.md.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        if section.text:
            parts.append(section.text)
        if section.table is not None:
            parts.append(section.table.markdown())
        if section.image:
            parts.append(f"![{section.title}]({section.image})")
        if section.note:
            parts.append(section.note)
    tables = {s.title: s.table.records() for s in sections if s.table is not None}
    images = {s.title: s.image for s in sections if s.image}
    content = {"title": title, "tables": tables, "images": images, **extra}
    replace_text(directory / "report.json", json.dumps(content, indent=2) + "\n")
    path = directory / "report.md"
    replace_text(path, "\n\n".join(parts) + "\n")
    return path


def print_report(path: pathlib.Path, sections: Sequence[Section]) -> None:
    """Prints a report's tables, and where it and its plots are."""
    for section in sections:
        if section.table is not None:
            print(f"\n{section.title}. {section.text}".rstrip() + f"\n\n{section.table.text()}")
            if section.note:
                print(f"\n{section.note}")
        elif section.text and not section.image:
            print(f"\n{section.title}\n{section.text}")
    print(f"\nreport  {path}")
    for section in sections:
        if section.image:
            print(f"plot    {path.parent / section.image}")


def _finite(value) -> bool:
    """Whether there is a value, and one that counts."""
    return value is not None and (isinstance(value, str) or math.isfinite(value))


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
