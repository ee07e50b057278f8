"""Variants of a pipeline that grow on each other, what is known of their runs, and comparisons."""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unime_jax import report
from unime_jax.types import UserError

RESULT_FILE = "ablation.json"  # in a run's directory, once it is trained and measured
REFERENCE = "reference"  # family of the variant that the others are compared with


@dataclasses.dataclass(frozen=True)
class Variant:
    """One stage of training on top of another variant.

    Attributes:
      name: of its line in the tables.
      family: of variants that are shown together; "" for a step on the way.
      base: name of the variant that it starts from; "": the raw student.
      stage: of the pipeline: "stage1", "align" or "stage2".
      changes: keys of the stage's config -> other values.
    """

    name: str
    family: str
    base: str
    stage: str
    changes: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
      rate: times the learning rate of the stage's config.
      trial: whether the variant still chooses its rate, by this run among others.
    """

    variant: Variant
    split: int
    seed: int
    rate: float
    trial: bool

    def directory(self, output: pathlib.Path) -> pathlib.Path:
        name = self.variant.name.replace(" ", "-")
        return output / f"split{self.split}-seed{self.seed}" / f"{name}-rate{self.rate:.3g}"


def read_variants(rows: Sequence[Sequence[Any]]) -> list[Variant]:
    """Reads `config.variants`.

    Raises:
      UserError: a name twice, a base that does not stand before its variant, not one reference.
    """
    variants: list[Variant] = []
    for name, family, base, stage, changes in rows:
        known = {variant.name for variant in variants}
        if name in known:
            raise UserError(f"config.variants: {name!r} twice")
        if base and base not in known:
            raise UserError(f"config.variants: {name!r} starts from {base!r}, which is not above")
        if stage not in ("stage1", "align", "stage2"):
            raise UserError(f"config.variants: {name!r}: stage {stage!r} is not in the pipeline")
        variants.append(Variant(name, family, base, stage, tuple(map(tuple, changes))))
    if sum(variant.family == REFERENCE for variant in variants) != 1:
        raise UserError(f"config.variants: one, and no more, is of the family {REFERENCE!r}")
    return variants


def chosen_rate(scores: Mapping[float, float]) -> float:
    """Returns the rate of the highest validation score; of equal ones the lowest rate.

    Raises:
      UserError: no score is finite.
    """
    finite = {rate: score for rate, score in scores.items() if math.isfinite(score)}
    if not finite:
        tried = ", ".join(f"{rate:.3g}" for rate in scores)
        raise UserError(
            f"training diverged with every one of config.rates ({tried}): add a lower one"
        )
    return min(finite, key=lambda rate: (-finite[rate], rate))


def divergences(directory: pathlib.Path) -> set[tuple[str, int]]:
    """Returns which reports of a loss that was not finite a run has left, and when."""
    found = directory.glob("not_finite_step_*.json")
    return {(path.name, path.stat().st_mtime_ns) for path in found}


def steps_done(directory: pathlib.Path) -> int:
    """Returns the steps of a run's newest checkpoint, 0 without one."""
    found = (directory / "checkpoints").glob("*")
    return max((int(path.name) for path in found if path.name.isdecimal()), default=0)


def read_result(directory: pathlib.Path) -> dict[str, Any]:
    """Returns what is known of a run, {} where it is not finished."""
    try:
        return json.loads((directory / RESULT_FILE).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{directory / RESULT_FILE}: not readable ({error}); remove it") from None


def write_result(directory: pathlib.Path, result: Mapping[str, Any]) -> None:
    report.replace_text(directory / RESULT_FILE, json.dumps(result, indent=1) + "\n")


class Clock:
    """Estimates how long is left from how long the runs of each stage took."""

    def __init__(self):
        self._seconds: dict[str, list[float]] = {}

    def add(self, stage: str, seconds: float) -> None:
        self._seconds.setdefault(stage, []).append(seconds)

    def left(self, stages: Sequence[str]) -> float | None:
        """Returns the seconds that runs of these stages will take, None where none is known."""
        if not self._seconds:
            return None
        means = {stage: float(np.mean(found)) for stage, found in self._seconds.items()}
        other = float(np.mean(list(itertools.chain(*self._seconds.values()))))
        return sum(means.get(stage, other) for stage in stages)


# ---------------------------------------------------------------- comparisons

Cell = tuple[int, int]  # split, seed
Scores = dict[str, dict[Cell, dict[str, float]]]  # name of a variant -> cell -> metric -> value


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of a variant to the reference, in the cells that both have.

    Attributes:
      values: by cell.
      mean: of them.
      error: standard error of the mean; None of a single cell.
    """

    values: list[float]
    mean: float
    error: float | None


def paired(scores: Scores, name: str, reference: str, metric: str) -> Difference | None:
    """Compares cell by cell: what a split or seed does to both falls out. None: none in common."""
    cells = [cell for cell in scores.get(name, {}) if cell in scores.get(reference, {})]
    found = [
        scores[name][cell][metric] - scores[reference][cell][metric]
        for cell in cells
        if metric in scores[name][cell] and metric in scores[reference][cell]
    ]
    if not found:
        return None
    error = float(np.std(found, ddof=1) / math.sqrt(len(found))) if len(found) > 1 else None
    return Difference(found, float(np.mean(found)), error)


def spread(values: Sequence[float]) -> str:
    """Returns "mean ± standard deviation", the mean alone of a single value."""
    mean = np.mean(values)
    return f"{mean:.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{mean:.1f}"


def table(
    variants: Sequence[Variant],
    scores: Scores,
    rates: Mapping[str, float],
    metrics: Sequence[str],
    main: str,
    title: str = "",
) -> report.Table:
    """Has a line for each variant: its rate, its metrics, and its paired difference in `main`.

    Args:
      variants: with the reference.
      scores: of them.
      rates: that they chose.
      metrics: columns; main: one of them.
      title: of the reference among these variants; "": its name.
    """
    (reference,) = (variant.name for variant in variants if variant.family == REFERENCE)
    rows = []
    for variant in variants:
        cells = scores.get(variant.name, {})
        if not cells:
            continue
        name = title if title and variant.name == reference else variant.name
        line: list[str | float | None] = [name, f"x {rates[variant.name]:.3g}"]
        for metric in metrics:
            values = [cell[metric] for cell in cells.values() if metric in cell]
            line.append(spread(values) if values else None)
        found = paired(scores, variant.name, reference, main)
        if found is None or variant.name == reference:
            line.append(None)
        elif found.error is None:
            line.append(f"{found.mean:+.1f}")
        else:
            line.append(f"{found.mean:+.1f} ± {found.error:.1f}")
        rows.append(line)
    return report.Table(("variant", "rate", *metrics, f"{main} - {reference}"), rows)
