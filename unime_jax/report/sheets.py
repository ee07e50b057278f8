"""Sheets of single queries: each with its nearest candidates, pictures and texts alike."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from unime_jax.report.style import GREEN, INK, LINE, MUTED, RED, figure_of, square, wrap

_CELL, _GAP, _HEIGHT, _HEAD = 1.5, 0.1, 1.8, 0.16  # inches
_ROOM = _CELL - 2 * 0.09  # of a line, inside the frame
_LINES, _LINE = 4, 0.108  # lines below a picture, inches a line


@dataclasses.dataclass(frozen=True)
class SheetCell:
    """A query or a candidate.

    Attributes:
      text: "" for an image alone.
      image: RGB uint8[H, W, 3] of any size, or None for a text alone.
      cosine: of a candidate; None for a query.
      right: whether it is the right candidate.
    """

    text: str
    image: np.ndarray | None = None
    cosine: float | None = None
    right: bool = False


@dataclasses.dataclass(frozen=True)
class SheetRow:
    """A query with its nearest candidates.

    Attributes:
      title: of the row: its data set.
      query: the one that looks.
      candidates: best first.
      rank: of the right candidate, from 0.
      missed: whether the last cell is the right candidate, which is not among the nearest.
    """

    title: str
    query: SheetCell
    candidates: Sequence[SheetCell]
    rank: int
    missed: bool = False


def plot_sheet(rows: Sequence[SheetRow], path) -> pathlib.Path:
    """Draws queries on the left and their nearest candidates, best first, to the right.

    The right candidate has a green frame; where it is not among the nearest it stands behind them,
    with its rank.

    Args:
      rows: from top to bottom.
      path: of the PNG.
    """
    columns = 1 + max(len(row.candidates) for row in rows)
    width = columns * (_CELL + _GAP) + 3 * _GAP
    height = len(rows) * (_HEIGHT + _GAP) + _GAP
    with figure_of(width, height, path, layout="none") as figure:
        for number, row in enumerate(rows):
            top = height - _GAP - number * (_HEIGHT + _GAP)
            label = f"{row.title}, query"
            _draw(figure, row.query, label, (_GAP, top), (width, height), frame=INK)
            for place, cell in enumerate(_without_common_start(row.candidates)):
                left = 3 * _GAP + (place + 1) * (_CELL + _GAP)
                last = row.missed and place == len(row.candidates) - 1
                head = f"rank {row.rank + 1}" if last else f"{place + 1}"
                mark = "✓ " if cell.right else ""
                label = f"{mark}{head}   {cell.cosine:.3f}"
                frame = GREEN if cell.right else (RED if place == 0 else LINE)
                _draw(figure, cell, label, (left, top), (width, height), frame=frame)
    return pathlib.Path(path)


def _draw(figure, cell: SheetCell, label: str, corner, size, *, frame: str) -> None:
    """Draws a cell whose upper left corner is given in inches."""
    (left, top), (width, height) = corner, size
    body = _HEIGHT - _HEAD
    ax = figure.add_axes((left / width, (top - _HEIGHT) / height, _CELL / width, _HEIGHT / height))
    ax.set_xlim(0, _CELL)
    ax.set_ylim(0, _HEIGHT)
    ax.axis("off")
    strong = cell.right or cell.cosine is None
    ax.text(
        0.0, _HEIGHT - 0.01, label, fontsize=7.4, va="top", parse_math=False,
        color=GREEN if cell.right else (INK if cell.cosine is None else MUTED),
        fontweight="bold" if strong else "normal",
    )  # fmt: skip
    style = {"va": "top", "linespacing": 1.2, "color": INK, "parse_math": False}
    if cell.image is None:
        words = cell.text or "(no text)"
        lines = wrap(figure, words, _ROOM, size=7.6, lines=11)
        ax.text(0.09, body - 0.07, "\n".join(lines), fontsize=7.6, **style)
    else:
        lines = wrap(figure, cell.text, _ROOM, size=6.4, lines=_LINES)
        side = min(_CELL - 0.1, body - 0.09 - (0.04 + _LINE * len(lines) if lines else 0.0))
        picture = figure.add_axes(
            ((left + (_CELL - side) / 2) / width, (top - _HEAD - 0.05 - side) / height,
             side / width, side / height)
        )  # fmt: skip
        picture.imshow(square(cell.image), interpolation="antialiased")
        picture.axis("off")
        ax.text(0.09, body - side - 0.09, "\n".join(lines), fontsize=6.4, **style)
    from matplotlib.patches import FancyBboxPatch

    line = 1.7 if frame != LINE else 0.9
    ax.add_patch(
        FancyBboxPatch(
            (0.03, 0.03), _CELL - 0.06, body - 0.06, boxstyle="round,pad=0,rounding_size=0.04",
            fill=False, ec=frame, lw=line,
        )
    )  # fmt: skip


def _without_common_start(cells: Sequence[SheetCell]) -> list[SheetCell]:
    """Drops the words that all candidates begin with: they tell nothing apart."""
    texts = [cell.text.split() for cell in cells]
    shortest = min(map(len, texts))
    same = 0
    while same < shortest and len({text[same] for text in texts}) == 1:
        same += 1
    if same < 3 or len(cells) < 2:
        return list(cells)
    return [
        dataclasses.replace(cell, text="… " + " ".join(text[same:]) if text[same:] else "")
        for cell, text in zip(cells, texts, strict=True)
    ]
