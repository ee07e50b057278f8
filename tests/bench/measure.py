"""Statistics, the table, the JSON file and the plot of a speed test; no jax, no torch."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

SIDES = ("ours", "torch")
LEFT_OUT, FAILED = "left out", "failed"  # keys of notes
_TICKS = (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "peft")


@dataclasses.dataclass
class Result:
    """What one speed test found.

    Attributes:
      name: as `--only` takes it.
      title: what was measured, for people.
      unit: of the samples; "s" or bytes "GiB" are better small, anything a second better large.
      samples: side -> one number each round; sides take turns. "torch" may be missing.
      notes: further numbers and words, for the JSON file and a line below the table.
    """

    name: str
    title: str
    unit: str
    samples: dict[str, list[float]]
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def larger_is_better(self) -> bool:
        return self.unit.endswith("/s")

    @property
    def remark(self) -> str:
        """Says which of PyTorch's ways did not run, and why, or why all of it failed."""
        said = [
            f"without PyTorch's {way}: {why}" for way, why in self.notes.get(LEFT_OUT, {}).items()
        ]
        said += [self.notes[FAILED]] if FAILED in self.notes else []
        return "; ".join(textwrap.shorten(one, 90) for one in said)

    def ratio(self) -> tuple[float, float, float] | None:
        """How many times better ours is: of the medians, and the extremes over the rounds."""
        if not all(self.samples.get(side) for side in SIDES):
            return None
        ours, torch = (self.samples[side] for side in SIDES)
        if self.larger_is_better:
            ours, torch = torch, ours
        rounds = [t / o for o, t in zip(ours, torch, strict=True)]
        return median(torch) / median(ours), min(rounds), max(rounds)


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)


def cell(values: Sequence[float] | None) -> str:
    """Median and quartiles, to three digits."""
    if not values:
        return "-"
    low, high = spread(values)
    return f"{short(median(values))} ({short(low)} to {short(high)})"


def short(number: float) -> str:
    if number == 0 or abs(number) >= 100:
        return f"{number:.0f}"
    return f"{number:.{max(0, 2 - int(np.floor(np.log10(abs(number)))))}f}"


def table(results: Sequence[Result]) -> str:
    """Returns the results as Markdown: medians with quartiles, ratios with extremes.

    Where something of PyTorch was left out, another column says what and why.
    """
    rows = [["what", "unit", "ours", "PyTorch", "ours is better by"]]
    if any(result.remark for result in results):
        rows[0].append("left out, failed")
    for result in results:
        ratio = result.ratio()
        better = "" if ratio is None else "x {:.2f} ({:.2f} to {:.2f})".format(*ratio)
        ours, torch = (cell(result.samples.get(side)) for side in SIDES)
        row = [result.title, result.unit, ours, torch, better, result.remark]
        rows.append(row[: len(rows[0])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def notes(results: Sequence[Result]) -> str:
    """Returns what else was found, a line for each test that has some."""
    lines = []
    for result in results:
        words = [f"{key} {_plain(value)}" for key, value in result.notes.items()]
        if words:
            lines.append(f"{result.name}: {'; '.join(words)}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items())
    return str(value)


def machine() -> dict[str, Any]:
    """Describes where and with what a test ran."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {
        "when": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "gpu": _gpu(),
        "python": platform.python_version(),
        "packages": found,
    }


def _processor() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpu() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: pathlib.Path, where: dict[str, Any], results: Sequence[Result]) -> None:
    """Writes every sample with the machine and the versions."""
    content = {"machine": where, "results": [dataclasses.asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=1))


def plot(path: pathlib.Path, results: Sequence[Result], where: dict[str, Any]) -> None:
    """Draws how many times better ours is in every test that has another side, or had to have.

    Logarithmic: twice as good is as long to the right as half as good is to the left.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    found = [(result, result.ratio()) for result in results]
    found = [(result, ratio) for result, ratio in found if ratio or result.remark][::-1]
    if not found:
        return
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.45 * len(found)), layout="constrained")
    beside = axes.get_yaxis_transform()
    for place, (result, ratio) in enumerate(found):
        color, words = "grey", []
        if ratio is not None:
            middle, low, high = ratio
            color = "#2a6f97" if middle >= 1 else "#b5651d"
            axes.barh(place, middle - 1, left=1, color=color, height=0.6)
            axes.plot([low, high], [place, place], color="black", linewidth=1.2)
            ours, torch = (short(median(result.samples[side])) for side in SIDES)
            words = [f"x {middle:.2f}   {ours} against {torch} {result.unit}"]
        text = "\n".join([*words, *textwrap.wrap(result.remark, 60)])
        axes.text(1.02, place, text, va="center", fontsize=9, color=color, transform=beside)
    axes.axvline(1, color="grey", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(found)), [result.title for result, _ in found])
    ends = [end for _, ratio in found if ratio for end in ratio[1:]]
    axes.set_xscale("log")
    axes.set_xlim(min([0.5, *ends]) / 1.05, max([2.0, *ends]) * 1.05)
    ticks = [tick for tick in _TICKS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("times better than PyTorch (line: the extremes of all rounds)")
    axes.set_title(f"{where['gpu'] or where['processor']}, {where['cores']} cores", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
