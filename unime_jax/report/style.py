"""The one style of all plots.

Figures are made without pyplot: nothing global is touched, no display is needed, and matplotlib
is loaded by the first plot.
"""

import contextlib
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

INK, MUTED, LINE = "#23272e", "#7d858f", "#e4e7eb"
BLUE, ORANGE, GREEN, GREY = "#2e6296", "#d97b3c", "#3b8c62", "#a9b0b8"
RED = "#b5483f"
SERIES = (BLUE, ORANGE, GREEN, "#8a5a9e", "#b8902f", MUTED)
# From paper white to deep blue: monotonous in lightness, so it survives a grey print.
SEQUENTIAL = ("#fbfcfd", "#d5e3f0", "#94b9d9", "#4d86b8", "#245a8d", "#10305a")
FONT = "DejaVu Sans"
STYLE = {
    "font.family": FONT,
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "legend.handlelength": 1.4,
}
DPI = 170


@contextlib.contextmanager
def figure_of(width: float, height: float, path, layout: str = "constrained"):
    """Yields a figure of so many inches in the common style and saves it."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, format="png")


def cut(text: str, letters: int) -> str:
    """Shortens a name without blanks in its middle: names of runs differ at their ends."""
    end = (letters - 1) // 2
    return text if len(text) <= letters else f"{text[: letters - 1 - end]}…{text[-end:]}"


def legend_above(figure, handles: Sequence[tuple[Any, str]], **style) -> None:
    """Draws a legend above all axes, of as many columns as the figure is wide for.

    The figure grows by its further rows.

    Args:
      figure: that it is drawn on.
      handles: each with its name, of any letters; matplotlib hides labels that begin with "_".
      style: of `figure.legend`.
    """
    if not handles:
        return
    style = {"loc": "outside upper left", "borderaxespad": 0.4, **style}
    room = figure.bbox.width - 2 * 0.4 * 8 / 72 * figure.dpi  # its pad, in units of its font
    artists, places = [artist for artist, _ in handles], list(map(str, range(len(handles))))
    for columns in range(min(4, len(handles)), 0, -1):
        legend = figure.legend(artists, places, ncols=columns, **style)
        for text, (_, name) in zip(legend.get_texts(), handles, strict=True):
            text.set_parse_math(False)
            text.set_text(name)
        box = legend.get_window_extent(figure.canvas.get_renderer())
        if columns == 1 or box.width <= room:
            break
        legend.remove()
    rows = -(-len(handles) // columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + box.height / figure.dpi * (rows - 1) / rows)


def square(image: np.ndarray) -> np.ndarray:
    """The image in the middle of a white square; grey images become RGB, alpha goes on white."""
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.shape[2] == 4:
        alpha = image[..., 3:] / 255
        image = (image[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    height, width = image.shape[:2]
    side = max(height, width)
    canvas = np.full((side, side, 3), 255, np.uint8)
    y, x = (side - height) // 2, (side - width) // 2
    canvas[y : y + height, x : x + width] = image
    return canvas


def shade(color: str, step: int, steps: int, palest: float = 0.62):
    """The colour itself for the first step, paler for the next."""
    from matplotlib.colors import to_rgb

    pale = palest * step / max(1, steps - 1)
    return tuple((1 - pale) * c + pale for c in to_rgb(color))


def wrap(figure, text: str, inches: float, *, size: float, lines: int) -> list[str]:
    """Breaks a text into as long lines as fit, at most so many.

    Args:
      figure: that it is drawn on.
      text: any letters.
      inches: room for a line.
      size: of the font.
      lines: the most; what is left is cut off.
    """
    from matplotlib.font_manager import FontProperties

    font, renderer = FontProperties(family=FONT, size=size), figure.canvas.get_renderer()

    def fits(line: str) -> bool:
        width, _, _ = renderer.get_text_width_height_descent(line, font, False)
        return width <= inches * figure.dpi

    most = int(inches * 72 / (0.2 * size))  # letters of a line, if all are narrow ones
    words = drawable(text[: 2 * most * lines]).split()
    found, line = [], ""
    while words and len(found) <= lines:
        longer = f"{line} {words[0]}".lstrip()
        if fits(longer):
            line = longer
            words.pop(0)
            continue
        if not line:  # a word that is longer than a line
            line = next(part for end in range(most, 0, -1) if fits(part := words[0][:end]))
            words[0] = words[0].removeprefix(line)
        found.append(line)
        line = ""
    found += [line] if line else []
    if len(found) > lines:
        last = found[lines - 1]
        while last and not fits(f"{last} …"):
            last = last.rpartition(" ")[0] or last[:-1]
        found = [*found[: lines - 1], f"{last} …"]
    return found


def drawable(text: str) -> str:
    """Returns a text with a box for each letter that the font lacks."""
    return "".join(letter if has(letter) else "\u25a1" for letter in text)


@functools.cache
def has(letter: str) -> bool:
    """Says whether the font has a letter."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(FONT))
    return letter.isspace() or bool(font.get_char_index(ord(letter)))
