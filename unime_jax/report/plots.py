"""Plots for the report, in one style.

Every function writes one PNG and returns its path.
"""

import itertools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unime_jax.report.style import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    INK,
    LINE,
    MUTED,
    ORANGE,
    SEQUENTIAL,
    SERIES,
    cut,
    figure_of,
    shade,
    square,
    wrap,
)

MAX_POINTS = 1000  # of a curve

# Lines of the second row of `plot_losses`: metric -> (label, colour), where a run has it.
COSINES = {
    "positive_cosine": ("matching pairs", BLUE),
    "hard_negative_cosine": ("hard negatives", ORANGE),
    "negative_cosine": ("all negatives", MUTED),
    "student_cosine": ("student", BLUE),
    "teacher_cosine": ("teacher", ORANGE),
}


def plot_losses(runs: Mapping[str, Sequence[Mapping[str, Any]]], path) -> pathlib.Path:
    """Draws loss, cosines and validation metrics of runs over their steps, one column a run.

    Args:
      runs: title -> metrics by step, as `read_metrics` returns them; runs without steps are left
        out. Metrics whose names begin with "validation/" fill a third row where there are any.
      path: of the PNG.
    """
    runs = {title: list(steps) for title, steps in runs.items() if len(steps)}
    if not runs:
        raise ValueError("no run has any metrics")
    names = {t: sorted({n for m in s for n in m if "validation/" in n}) for t, s in runs.items()}
    rows = 3 if any(names.values()) else 2
    with figure_of(3.15 * len(runs) + 0.35, 2.05 * rows + 0.3, path) as figure:
        axes = figure.subplots(rows, len(runs), squeeze=False, sharex="col")
        for column, (title, steps) in enumerate(runs.items()):
            top, middle = axes[0, column], axes[1, column]
            top.set_title(title)
            x, y = _series(steps, "loss")
            top.plot(x, y, color=BLUE, alpha=0.28, linewidth=0.9)
            top.plot(x, _smooth(y), color=BLUE, linewidth=1.7)
            top.set_ylim(bottom=0, top=_robust_top(y))
            for name, (label, color) in COSINES.items():
                x, y = _series(steps, name)
                if len(x):
                    middle.plot(x, _smooth(y), color=color, label=label, linewidth=1.7)
            _legend(middle)
            if rows == 3:
                for name, color in zip(names[title], itertools.cycle(SERIES), strict=False):
                    x, y = _series(steps, name)
                    label = _validation_label(name)
                    axes[2, column].plot(x, y, "o-", color=color, label=label, markersize=3.5)
                if names[title]:
                    axes[2, column].set_ylim(bottom=0)
                    _legend(axes[2, column])
                else:
                    axes[2, column].axis("off")
            for ax in axes[:, column]:
                ax.margins(x=0.02)
            last = axes[-1, column] if rows == 2 or names[title] else middle
            last.tick_params(labelbottom=True)
            last.set_xlabel("step")
        for ax, label in zip(axes[:, 0], ["loss", "mean cosine", "validation"], strict=False):
            ax.set_ylabel(label)
        figure.align_ylabels()
    return pathlib.Path(path)


def plot_cosine_matrices(
    matrices: Sequence[tuple[str, np.ndarray]],
    path,
    *,
    axes: tuple[str, str] = ("image", "caption"),
) -> pathlib.Path:
    """Draws cosine matrices of the same matching pairs side by side, on one colour scale.

    A good embedding shows a dark diagonal on a light ground; a collapsed one is dark all over.
    Below each title stand the mean cosine of matching pairs and of all others. As Fig. 4 of UniME.

    Args:
      matrices: (title, cosines f32[N, N]); row i and column i match.
      path: of the PNG.
      axes: what rows and columns are.
    """
    from matplotlib.colors import LinearSegmentedColormap

    values = np.concatenate([np.asarray(m).ravel() for _, m in matrices])
    low = min(0.0, math.floor(10 * float(values.min())) / 10)
    colors = LinearSegmentedColormap.from_list("paper", SEQUENTIAL)
    with figure_of(2.75 * len(matrices) + 0.75, 3.35, path) as figure:
        panels = figure.subplots(1, len(matrices), squeeze=False)[0]
        for ax, (title, matrix) in zip(panels, matrices, strict=True):
            matrix = np.asarray(matrix)
            same = np.eye(len(matrix), dtype=bool)
            image = ax.imshow(matrix, cmap=colors, vmin=low, vmax=1, interpolation="nearest")
            ax.set_title(cut(title, 26), pad=19)
            others = f"{matrix[~same].mean():z.2f}" if len(matrix) > 1 else "-"
            ax.text(
                0, 1.025, f"pairs {matrix[same].mean():z.2f}   others {others}",
                transform=ax.transAxes, color=MUTED, fontsize=8.5, va="bottom",
            )  # fmt: skip
            ticks = [0, len(matrix) - 1]
            ax.set_xticks(ticks, [str(t + 1) for t in ticks])
            ax.set_yticks(ticks, [str(t + 1) for t in ticks])
            ax.set_xlabel(axes[1], labelpad=-6)
            ax.grid(False)
            ax.spines[:].set_visible(True)
            ax.spines[:].set_color(LINE)
            ax.tick_params(length=0)
        panels[0].set_ylabel(axes[0], labelpad=-6)
        bar = figure.colorbar(image, cax=panels[-1].inset_axes([1.06, 0.0, 0.05, 1.0]))
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        bar.set_label("cosine")
    return pathlib.Path(path)


def plot_retrieval_sheet(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    similarity: np.ndarray,
    right: Sequence[int],
    path,
    *,
    columns: int = 3,
    top: int = 5,
) -> pathlib.Path:
    """Draws images, each with its nearest captions; the right one is green and ticked.

    Args:
      images: RGB uint8[H, W, 3] of any size.
      captions: the candidates.
      similarity: f32[images, captions].
      right: for each image the index of its caption.
      path: of the PNG.
      columns: images side by side.
      top: captions shown; where the right one is not among them, its rank is told.
    """
    similarity = np.asarray(similarity)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    # A bar's length compares captions of one sheet: from the lowest shown to the highest.
    order = np.argsort(-similarity, axis=1, kind="stable")
    shown = np.take_along_axis(similarity, order[:, :top], axis=1)
    low, high = float(shown.min()), float(shown.max())
    with figure_of(4.0 * columns, 1.42 * rows + 0.05, path, layout="none") as figure:
        grid = figure.add_gridspec(
            rows, 2 * columns, width_ratios=[1, 2] * columns, wspace=0.06, hspace=0.16,
            left=0.008, right=0.992, bottom=0.012, top=0.988,
        )  # fmt: skip
        for n, image in enumerate(images):
            row, column = divmod(n, columns)
            picture = figure.add_subplot(grid[row, 2 * column])
            padded = square(np.asarray(image))
            # matplotlib's own choice shows the pixels of images that it enlarges.
            smooth = "bicubic" if len(padded) < 1.4 * DPI else "antialiased"
            picture.imshow(padded, interpolation=smooth)
            picture.set_xticks([])
            picture.set_yticks([])
            picture.grid(False)
            picture.spines[:].set_visible(True)
            picture.spines[:].set_color(LINE)
            _captions(
                figure.add_subplot(grid[row, 2 * column + 1]),
                captions, similarity[n], order[n], int(right[n]), top, (low, high),
            )  # fmt: skip
    return pathlib.Path(path)


def plot_recall(
    panels: Mapping[str, Mapping[str, Mapping[int, float | None]]],
    path,
    *,
    reference: Sequence[str] = (),
) -> pathlib.Path:
    """Draws recall at several k as bars: a panel a direction, a bar a row, a shade a k.

    Args:
      panels: title -> row name -> k -> recall in [0, 1] or None; all panels have the same rows.
      path: of the PNG.
      reference: rows drawn in grey: chance, baselines, teachers.
    """
    names = list(next(iter(panels.values())))
    ks = sorted({k for rows in panels.values() for row in rows.values() for k in row})
    height = 0.72 / len(ks)
    with figure_of(3.4 * len(panels) + 1.2, 0.42 * len(names) + 1.15, path) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True, sharex=True)[0]
        for ax, (title, rows) in zip(axes, panels.items(), strict=True):
            ax.set_title(title)
            for i, name in enumerate(names):
                base = GREY if name in reference else BLUE
                for j, k in enumerate(ks):
                    value = rows[name].get(k)
                    if value is None:
                        continue
                    y = i + (j - (len(ks) - 1) / 2) * height
                    ax.barh(y, 100 * value, height * 0.88, color=shade(base, j, len(ks)))
                    ax.text(
                        100 * value + 0.8, y, f"{100 * value:.1f}",
                        va="center", fontsize=6.5, color=MUTED,
                    )  # fmt: skip
            ax.grid(False, axis="y")
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
            ax.set_xlabel("recall, %")
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        best = max(v or 0 for rows in panels.values() for r in rows.values() for v in r.values())
        axes[0].set_xlim(0, min(108, 112 * best + 4))
        _shade_legend(figure, ks)
    return pathlib.Path(path)


# ---------------------------------------------------------------- small helpers


def _series(steps, name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(m["step"], m[name]) for m in steps if m.get(name) is not None]
    x, y = zip(*points, strict=True) if points else ((), ())
    x, y = np.array(x, float), np.array(y, float)
    if len(x) > MAX_POINTS:  # more than there are pixels: means of equal stretches
        parts = np.array_split(np.arange(len(x)), MAX_POINTS)
        x, y = (np.array([values[part].mean() for part in parts]) for values in (x, y))
    return x, y


def _smooth(y: np.ndarray) -> np.ndarray:
    """Local lines under Gaussian weights, about a tenth of the curve wide; straight at its ends."""
    if len(y) < 3:
        return y
    at = np.arange(len(y), dtype=float)
    offset = at[None, :] - at[:, None]
    weight = np.exp(-((offset / max(0.8, len(y) / 40)) ** 2) / 2)
    total, first, second = ((weight * offset**n).sum(axis=1) for n in range(3))
    level, slope = weight @ y, (weight * offset) @ y
    return (second * level - first * slope) / (second * total - first**2)


def _robust_top(y: np.ndarray) -> float | None:
    """The upper end of a loss axis: the first steps' outliers may leave the frame."""
    if not len(y):
        return None
    return 1.08 * float(max(np.percentile(y, 98), _smooth(y).max())) or 1.0


def _validation_label(name: str) -> str:
    """validation/image_to_text_recall_at_1 -> i2t R@1."""
    label = re.sub(r"_(?:r|recall|recall_at_|r_at_)_?(\d+)$", r" R@\1", name.split("/", 1)[1])
    label = label.replace("image_to_text", "i2t").replace("text_to_image", "t2i")
    return label.replace("_", " ")


def _legend(ax) -> None:
    if ax.get_legend_handles_labels()[0]:
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": 2}
        ax.legend(**place, borderaxespad=0.1, columnspacing=1.0, labelspacing=0.3)


def _captions(ax, captions, scores, order, right: int, top: int, limits) -> None:
    """Fills an axis with the nearest captions, best first, each on a bar as long as its cosine."""
    ax.set_xlim(0, 1)
    ax.set_ylim(top + 1, 0)
    ax.axis("off")
    low, high = limits

    def line(caption: str, inches: float) -> str:
        return "".join(wrap(ax.figure, caption, inches, size=8.2, lines=1))

    for place, index in enumerate(order[:top]):
        hit = index == right
        color = GREEN if hit else INK
        length = 0.12 + 0.88 * (float(scores[index]) - low) / max(high - low, 1e-6)
        fill = shade(GREEN if hit else GREY, 1, 2, 0.8)
        ax.barh(place + 0.5, 0.925 * length, 0.84, left=0.075, color=fill)
        mark, text = "✓" if hit else str(place + 1), line(captions[index], 2.0 if hit else 2.25)
        style = dict(fontsize=8.2, va="center", parse_math=False)
        weight = "bold" if hit else "normal"
        ax.text(0.035, place + 0.5, mark, color=color if hit else MUTED, ha="center", **style)
        ax.text(0.095, place + 0.5, text, color=color, fontweight=weight, **style)
    rank = int(np.flatnonzero(order == right)[0]) + 1
    if rank > top:
        text = f"rank {rank}:  {line(captions[right], 1.7)}"
        ax.text(0.095, top + 0.5, text, color=MUTED, style="italic", **style)


def _shade_legend(figure, ks) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=shade(MUTED, j, len(ks)), label=f"R@{k}") for j, k in enumerate(ks)]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(ks), borderaxespad=0.3)
