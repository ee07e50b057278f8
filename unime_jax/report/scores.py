"""Plots of benchmark scores: groups of bars, and sets before and after."""

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence

from unime_jax.report.style import (
    BLUE,
    GREY,
    INK,
    MUTED,
    SERIES,
    cut,
    figure_of,
    legend_above,
    shade,
)

_BAR_COLORS = (BLUE, *SERIES[1:])
_NAME = 48  # letters of a row's name in a legend


def plot_groups(
    rows: Mapping[str, Mapping[str, float | None]],
    path,
    *,
    label: str,
    reference: Sequence[str] = (),
    chance: Mapping[str, float] | None = None,
) -> pathlib.Path:
    """Draws groups of bars, a bar for each row.

    Args:
      rows: name -> group -> score in percent, or None where there is none.
      path: of the PNG.
      label: of the axis.
      reference: rows in grey: published ones.
      chance: of each group, in percent; drawn as a line.
    """
    groups = list(dict.fromkeys(group for row in rows.values() for group in row))
    width = 0.8 / len(rows)
    inches = max(4.2, len(groups) * (0.28 + 0.25 * len(rows)) + 0.7)
    with figure_of(inches, 3.0, path) as figure:
        ax = figure.subplots()
        own = [name for name in rows if name not in reference]
        greys = [name for name in rows if name in reference]
        legend = []
        for number, (name, row) in enumerate(rows.items()):
            if name in reference:
                color = shade(GREY, len(greys) - 1 - greys.index(name), max(len(greys), 2))
            else:
                color = _BAR_COLORS[own.index(name) % len(_BAR_COLORS)]
            offset = (number - (len(rows) - 1) / 2) * width
            drawn = [(i, row[g]) for i, g in enumerate(groups) if _is_number(row.get(g))]
            places, values = [i + offset for i, _ in drawn], [value for _, value in drawn]
            legend.append((ax.bar(places, values, 0.92 * width, color=color), cut(name, _NAME)))
            for i, value in drawn:
                ax.text(i + offset, value + 0.8, f"{value:.1f}", ha="center", va="bottom",
                        fontsize=6.2 if len(rows) < 4 else 5.4, color=INK)  # fmt: skip
        for i, group in enumerate(groups):
            if chance and _is_number(chance.get(group)):
                (line,) = ax.plot([i - 0.42, i + 0.42], [chance[group]] * 2, color=INK,
                                  linewidth=0.9, linestyle=(0, (2, 2)))  # fmt: skip
                legend += [(line, "chance")] if i == 0 else []
        ax.set_xticks(range(len(groups)), groups)
        ax.tick_params(axis="x", length=0, labelsize=8.5)
        ax.grid(False, axis="x")
        ax.set_ylabel(label)
        ax.set_xlim(-0.6, len(groups) - 0.4)
        values = [v for row in rows.values() for v in row.values() if _is_number(v)]
        ax.set_ylim(0, min(106, 1.12 * max(values, default=1) + 2))
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
        legend_above(figure, legend)
    return pathlib.Path(path)


def plot_dumbbells(
    groups: Mapping[str, Sequence[tuple[str, float | None, float | None]]],
    path,
    *,
    names: tuple[str, str],
    label: str,
    muted: Sequence[str] = (),
) -> pathlib.Path:
    """Draws each set's score before and after, joined by a line, sets in groups.

    Args:
      groups: title -> (set, before, after) in percent, None where there is none.
      path: of the PNG.
      names: of before and after.
      label: of the axis.
      muted: sets written in italics: out of distribution.
    """
    groups = {title: rows for title, rows in groups.items() if rows}
    counts = [len(rows) for rows in groups.values()]
    height = 0.2 * sum(counts) + 0.32 * len(groups) + 1.0
    with figure_of(5.6, height, path) as figure:
        axes = figure.subplots(
            len(groups), 1, sharex=True, squeeze=False, height_ratios=[n + 0.6 for n in counts]
        )[:, 0]
        for ax, (title, rows) in zip(axes, groups.items(), strict=True):
            for y, (_, before, after) in enumerate(rows):
                _dumbbell(ax, y, before, after)
            ax.set_title(title, fontsize=9)
            ax.set_yticks(range(len(rows)), [name for name, _, _ in rows])
            for tick, (name, _, _) in zip(ax.get_yticklabels(), rows, strict=True):
                if name in muted:
                    tick.set_style("italic")
            ax.set_ylim(len(rows) - 0.4, -0.6)
            ax.set_xlim(-8, 106)
            ax.tick_params(axis="y", length=0)
            ax.tick_params(axis="x", length=0)
            ax.spines["left"].set_visible(False)
            ax.spines["bottom"].set_visible(False)
        axes[-1].set_xlabel(label)
        _dumbbell_legend(figure, names, bool(muted))
    return pathlib.Path(path)


def _dumbbell(ax, y: int, before: float | None, after: float | None) -> None:
    if _is_number(before) and _is_number(after):
        color = BLUE if after >= before else SERIES[1]
        ax.plot([before, after], [y, y], color=color, linewidth=2.2, alpha=0.35,
                solid_capstyle="butt", zorder=2)  # fmt: skip
    if _is_number(before):
        ax.plot(before, y, "o", color="white", markeredgecolor=MUTED, markersize=4.6, zorder=3)
    if _is_number(after):
        worse = _is_number(before) and after < before
        ax.plot(after, y, "o", color=SERIES[1] if worse else BLUE, markersize=5.4, zorder=4)
        right = not _is_number(before) or after >= before
        ax.text(after + (1.6 if right else -1.6), y, f"{after:.1f}", va="center", fontsize=6.4,
                ha="left" if right else "right", color=INK)  # fmt: skip


def _dumbbell_legend(figure, names: tuple[str, str], italics: bool) -> None:
    from matplotlib.lines import Line2D

    names = (cut(names[0], _NAME), cut(names[1], _NAME))
    dot = functools.partial(Line2D, [], [], marker="o", linestyle="none")
    handles = [
        (dot(color="white", markeredgecolor=MUTED, markersize=4.6), names[0]),
        (dot(color=BLUE, markersize=5.4), names[1]),
        (dot(color=SERIES[1], markersize=5.4), f"{names[1]}, lower"),
    ]
    if italics:
        handles.append((Line2D([], [], linestyle="none"), "italics: out of distribution"))
    legend_above(figure, handles, columnspacing=1.2, handletextpad=0.2, fontsize=7.5)


def _is_number(value) -> bool:
    return value is not None and math.isfinite(value)
