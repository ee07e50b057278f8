"""Draws pictures side by side, each with a few words."""

import pathlib
from collections.abc import Sequence

import numpy as np

from unime_jax.report.style import BLUE, DPI, INK, LINE, MUTED, figure_of, square, wrap

_COLUMNS = 5


def plot_contact_sheet(
    images: Sequence[np.ndarray | None],
    marks: Sequence[str],
    labels: Sequence[str],
    path,
    *,
    title: str = "",
    query: np.ndarray | None = None,
) -> pathlib.Path:
    """Draws pictures in rows of five; the query's own stands in front, framed.

    Args:
      images: RGB uint8[H, W, 3] of any size; None leaves an empty frame.
      marks: a short word or number at the left below each, as rank and cosine.
      labels: a line below each.
      path: of the PNG.
      title: above all.
      query: what was looked for, if it is a picture.
    """
    cells = list(zip(images, marks, labels, [INK] * len(images), strict=True))
    if query is not None:
        cells.insert(0, (query, "query", "", BLUE))
    columns = min(_COLUMNS, max(len(cells), 2))
    rows = -(-len(cells) // columns)
    top = 0.3 if title else 0.08  # inches
    width, height = 1.75 * columns, 2.1 * rows + top
    with figure_of(width, height, path, layout="none") as figure:
        if title:
            # Measured as wide as bold letters are.
            words = "".join(wrap(figure, title, width - 0.12, size=11.5, lines=1))
            figure.text(
                0.06 / width, 1 - 0.1 / height, words,
                fontsize=10, fontweight="bold", va="top", parse_math=False,
            )  # fmt: skip
        for place, (image, mark, label, color) in enumerate(cells):
            row, column = divmod(place, columns)
            left, bottom = 1.75 * column + 0.06, height - top - 2.1 * (row + 1) + 0.44
            box = (left / width, bottom / height, 1.63 / width, 1.63 / height)
            ax = figure.add_axes(box)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            ax.spines[:].set_visible(True)
            ax.spines[:].set(color=BLUE if color == BLUE else LINE, linewidth=1.0)
            if image is None:
                ax.text(0.5, 0.5, "no picture", ha="center", va="center", color=MUTED)
            else:
                padded = square(np.asarray(image))
                smooth = "bicubic" if len(padded) < 1.63 * DPI else "antialiased"
                ax.imshow(padded, interpolation=smooth)
            x, y = left / width, bottom / height
            style = {"fontsize": 8, "va": "top", "parse_math": False}
            figure.text(x, y - 0.05 / height, mark, color=color, fontweight="bold", **style)
            words = wrap(figure, label, 1.63, size=8.0, lines=1)
            figure.text(x, y - 0.21 / height, "".join(words), color=MUTED, **style)
    return pathlib.Path(path)
