"""Draws paired differences to a reference, run by run."""

import pathlib
from collections.abc import Mapping, Sequence

from unime_jax.report.style import BLUE, GREY, INK, MUTED, figure_of


def plot_differences(
    panels: Mapping[str, Sequence[tuple[str, Sequence[float], float, float | None]]],
    path,
    *,
    label: str,
) -> pathlib.Path:
    """Draws a line for each variant: a grey dot for each pair, their mean with its standard error.

    Args:
      panels: title -> (name, differences, their mean, its standard error or None).
      path: of the PNG.
      label: of the axis that all panels share.
    """
    counts = [len(rows) for rows in panels.values()]
    height = 0.3 * sum(counts) + 0.42 * len(counts) + 0.5
    with figure_of(6.4, height, path) as figure:
        axes = figure.subplots(
            len(panels), 1, squeeze=False, sharex=True, height_ratios=[c + 0.4 for c in counts]
        )[:, 0]
        for ax, (title, rows) in zip(axes, panels.items(), strict=True):
            ax.set_title(title)
            ax.axvline(0, color=INK, linewidth=0.9)
            for place, (_, values, mean, error) in enumerate(rows):
                ax.plot(values, [place] * len(values), "o", color=GREY, markersize=4, alpha=0.7)
                ax.errorbar(
                    mean, place, xerr=error, fmt="D", color=BLUE, markersize=5, capsize=3,
                    linewidth=1.4,
                )  # fmt: skip
                ax.annotate(
                    f"{mean:+.1f}" if any(values) else "", (mean, place), (0, 6),
                    textcoords="offset points", ha="center", fontsize=6.5, color=MUTED,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                )  # fmt: skip
            ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
            ax.set_ylim(len(rows) - 0.4, -0.6)
            ax.grid(False, axis="y")
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
            ax.margins(x=0.08)
        axes[-1].set_xlabel(label)
    return pathlib.Path(path)
