"""The one style of all plots.

Figures are made without pyplot: nothing global is touched, no display is needed, and matplotlib
is loaded by the first plot.
"""

import contextlib
import pathlib
import textwrap

import numpy as np

INK, MUTED, LINE = "#23272e", "#7d858f", "#e4e7eb"
BLUE, ORANGE, GREEN, GREY = "#2e6296", "#d97b3c", "#3b8c62", "#a9b0b8"
RED = "#b5483f"
SERIES = (BLUE, ORANGE, GREEN, "#8a5a9e", "#b8902f", MUTED)
# From paper white to deep blue: monotonous in lightness, so it survives a grey print.
SEQUENTIAL = ("#fbfcfd", "#d5e3f0", "#94b9d9", "#4d86b8", "#245a8d", "#10305a")
STYLE = {
    "font.family": "DejaVu Sans",
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


def shorten(text: str, width: int) -> str:
    return textwrap.shorten(str(text), width, placeholder=" …")
