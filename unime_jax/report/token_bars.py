"""Draws what models predict for the same rows, side by side."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from unime_jax.report.style import BLUE, DPI, INK, LINE, MUTED, cut, figure_of, has, square, wrap

BLANK = "\u2423"  # what stands for a blank in a token: an open box
_LINES = 5  # of a row's text
_TOKEN, _NAME = 14, 19  # letters of a token, and of a model's name
_ITEM, _PANEL = 1.85, 2.3  # inches wide
_LINE = 0.165  # inches high


def plot_token_bars(
    rows: Sequence[tuple[str, np.ndarray | None]],
    columns: Mapping[str, Sequence[Sequence[tuple[str, float]] | None]],
    path,
) -> pathlib.Path:
    """Draws a line of panels for each row: the row itself, then each model's tokens as bars.

    Args:
      rows: (text or "", RGB uint8[H, W, 3] or None).
      columns: name of a model -> for each row its (token, probability), the most probable first,
        or None. All panels share one scale.
      path: of the PNG.
    """
    found = [panel for panels in columns.values() for panel in panels if panel]
    k = max(len(panel) for panel in found)
    top = max(chance for panel in found for _, chance in panel)
    height = max(_LINE * k + 0.12, 1.2)
    head, foot = 0.34, 0.44
    width = _ITEM + _PANEL * len(columns) + 0.1
    total = head + foot + height * len(rows) + 0.16 * (len(rows) - 1)
    with figure_of(width, total, path, layout="none") as figure:
        for place, row in enumerate(rows):
            bottom = (total - head - height * (place + 1) - 0.16 * place) / total
            _row_cell(figure, row, bottom, height, (width, total))
            for number, (name, panels) in enumerate(columns.items()):
                left = _ITEM + _PANEL * number + 0.95
                box = (left / width, bottom, (_PANEL - 1.05) / width, height / total)
                ax = figure.add_axes(box)
                _bars(ax, panels[place], k, top)
                if place == 0:
                    figure.text(
                        (left - 0.5) / width, 1 - 0.2 / total, cut(name, _NAME),
                        fontsize=9, fontweight="bold", va="center", ha="left", parse_math=False,
                    )  # fmt: skip
                if place == len(rows) - 1:
                    ax.tick_params(axis="x", labelbottom=True)
                    ax.set_xlabel("probability, %")
    return pathlib.Path(path)


def _row_cell(figure, row, bottom: float, height: float, size: tuple[float, float]) -> None:
    """Draws a row's picture, and its text below or, without a picture, in the middle."""
    (text, image), (width, total) = row, size
    points = 8.5 if image is None else 8.0
    lines = wrap(figure, text, _ITEM - 0.3, size=points, lines=_LINES)
    words = "\n".join(lines)
    if image is None:
        figure.text(
            0.1 / width, bottom + height / 2 / total, f"“{words}”",
            fontsize=points, va="center", linespacing=1.25, parse_math=False,
        )  # fmt: skip
        return
    below = 0.15 * len(lines) + 0.04 * bool(lines)
    side = min(height - below, _ITEM - 0.3)
    y = bottom + (height - side) / total
    ax = figure.add_axes((0.1 / width, y, side / width, side / total))
    padded = square(np.asarray(image))
    smooth = "bicubic" if len(padded) < side * DPI else "antialiased"
    ax.imshow(padded, interpolation=smooth)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    ax.spines[:].set_visible(True)
    ax.spines[:].set_color(LINE)
    if lines:
        figure.text(
            0.1 / width, y - 0.05 / total, f"“{words}”",
            fontsize=points, va="top", linespacing=1.2, parse_math=False,
        )  # fmt: skip


def _bars(ax, panel: Sequence[tuple[str, float]] | None, k: int, top: float) -> None:
    """Fills an axis with one bar for each token."""
    ax.set_xlim(0, 118 * top)
    ax.set_ylim(k - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelbottom=False, length=0)
    ax.spines["left"].set_visible(False)
    if not panel:
        ax.set_yticks([])
        ax.text(0, (k - 1) / 2, "not read by this model", color=MUTED, style="italic", fontsize=8)
        return
    ax.barh(range(len(panel)), [100 * chance for _, chance in panel], 0.74, color=BLUE)
    ax.set_yticks(
        range(len(panel)), [_label(token) for token, _ in panel], color=INK, parse_math=False
    )
    for place, (_, chance) in enumerate(panel):
        label = f"{100 * chance:.1f}" if chance >= 0.0005 else "< 0.1"
        ax.text(
            100 * chance + 1.5 * top, place, label, va="center", fontsize=6.5, color=MUTED
        )  # fmt: skip


def visible(token: str) -> str:
    """Returns a token on one line; blanks are marked."""
    text = token.replace(" ", BLANK)
    return "".join(x if x.isprintable() else _code(x) for x in text)


def _label(token: str) -> str:
    """Returns a token as an axis shows it: letters that the font lacks by their code."""
    shown = "".join(x if has(x) else _code(x) for x in visible(token))
    return cut(shown, _TOKEN)


def _code(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
