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
STAGES = ("stage1", "align", "stage2")  # of the pipeline
KEYS = (
    *("output", "assets", "configs", "smoke", "seeds", "splits", "variants", "reference"),
    *(f"{part}.{stage}" for part in ("rates", "changes") for stage in STAGES),
)
REFERENCE = "reference"  # family of the variant that the others are compared with
MAIN = "mean R@10"
PICTURES = ("i2t R@1", "t2i R@1", "i2t R@10", "t2i R@10", MAIN)
SENTENCES = ("Spearman", "gloss R@10")
FAMILIES = {
    "stages": "Stages",
    "negatives": "Negatives",
    "margin": "False-negative margin",
    "k": "Negatives per query",
}
# Of the variants that differ in their stages; the others tune on pairs alone, and the same ones.
WITH_SENTENCES = ("stages", REFERENCE)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One stage of training on top of another variant.

    Attributes:
      name: of its line in the tables.
      family: of variants that are shown together; "" for a step on the way.
      base: name of the variant that it starts from; "": the raw student.
      stage: one of STAGES.
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
        if stage not in STAGES:
            raise UserError(f"config.variants: {name!r}: stage {stage!r} is not in the pipeline")
        variants.append(Variant(name, family, base, stage, tuple(map(tuple, changes))))
    if sum(variant.family == REFERENCE for variant in variants) != 1:
        raise UserError(f"config.variants: one, and no more, is of the family {REFERENCE!r}")
    return variants


def chosen_rate(scores: Mapping[float, float | None]) -> float | None:
    """Returns the rate of the highest validation score; of equal ones the lowest rate.

    None stands for a run that diverged, and is returned if all did.
    """
    finite = {rate: score for rate, score in scores.items() if score is not None}
    return min(finite, key=lambda rate: (-finite[rate], rate), default=None)


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


@dataclasses.dataclass
class Findings:
    """What came of the variants so far, by name.

    Attributes:
      rates: that they chose; None: they diverged with all.
      scores: on the test data.
      missing: cells without a run, and why.
    """

    rates: dict[str, float | None] = dataclasses.field(default_factory=dict)
    scores: Scores = dataclasses.field(default_factory=dict)
    missing: dict[str, dict[Cell, str]] = dataclasses.field(default_factory=dict)

    def missing_lines(self) -> str:
        """Lists what is missing, a line for each variant and reason."""
        lines = []
        for name, cells in self.missing.items():
            for reason in dict.fromkeys(cells.values()):
                where = [f"{s}/{n}" for (s, n), why in cells.items() if why == reason]
                lines.append(f"- {name}: {reason} (split/seed {', '.join(where)})")
        return "\n".join(lines)


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
    found: Findings,
    metrics: Sequence[str],
    main: str,
    title: str = "",
) -> report.Table:
    """Has a line for each variant: its rate, its metrics, and its paired difference in `main`.

    Args:
      variants: with the reference.
      found: of them; those that have neither scores nor a reason are left out.
      metrics: columns; main: one of them.
      title: of the reference among these variants; "": its name.
    """
    (reference,) = (variant.name for variant in variants if variant.family == REFERENCE)
    rows = []
    for variant in variants:
        if variant.name not in found.rates:
            continue
        name = title if title and variant.name == reference else variant.name
        rate, cells = found.rates[variant.name], found.scores.get(variant.name, {})
        line: list[Any] = [name, None if rate is None else f"x {rate:.3g}", len(cells)]
        for metric in metrics:
            values = [cell[metric] for cell in cells.values() if metric in cell]
            line.append(spread(values) if values else None)
        gap = paired(found.scores, variant.name, reference, main)
        if gap is None or variant.name == reference:
            line.append(None)
        elif gap.error is None:
            line.append(f"{gap.mean:+.1f}")
        else:
            line.append(f"{gap.mean:+.1f} ± {gap.error:.1f}")
        rows.append(line)
    header = ("variant", "rate", "runs", *metrics, f"{main} - {reference}")
    return report.Table(header, rows, ("", "", "d", *[".1f"] * (len(header) - 3)))


# ---------------------------------------------------------------- report


def write_report(
    config, output: pathlib.Path, variants: Sequence[Variant], found: Findings
) -> tuple[pathlib.Path, list[report.Section]]:
    """Writes the report of what is there so far; returns the path of report.md and its sections."""
    (reference,) = (v.name for v in variants if v.family == REFERENCE)
    sections, panels, titles = [], {}, dict(config.reference)
    for family, title in FAMILIES.items():
        members = [v for v in variants if v.family in (family, REFERENCE)]
        if len(members) < 2:
            continue
        own = titles.get(family, reference)
        columns = (*PICTURES, *(SENTENCES if family in WITH_SENTENCES else ()))
        sections.append(report.Section(title, table=table(members, found, columns, MAIN, own)))
        panels[title] = [
            (own if v.name == reference else v.name, gap.values, gap.mean, gap.error)
            for v in members
            if (gap := paired(found.scores, v.name, reference, MAIN))
        ]
    if any(panels.values()):
        label = f"{MAIN} on the test pairs, difference to “{reference}” in points"
        report.plot_differences(panels, output / "differences.png", label=label)
        sections.append(report.Section("Paired differences", image="differences.png"))
    if found.missing:
        sections.append(report.Section("What is missing", found.missing_lines()))
    sections.insert(0, report.Section("How to read it", _explanation(config, reference)))
    path = report.write_report(
        output,
        "Ablations",
        sections,
        rates=found.rates,
        changes=config.changes.to_dict(),
        scores=_records(found.scores),
        missing=_records(
            {
                name: {cell: {"reason": why} for cell, why in by.items()}
                for name, by in found.missing.items()
            }
        ),
    )
    return path, sections


def _records(by_name: Mapping[str, Mapping[Cell, Mapping[str, Any]]]) -> dict[str, Any]:
    """Returns what JSON can hold: a list of records instead of a key that is a pair."""
    return {
        name: [{"split": split, "seed": seed, **record} for (split, seed), record in by.items()]
        for name, by in by_name.items()
    }


def _explanation(config, reference: str) -> str:
    tried = "; ".join(
        f"{stage} {', '.join(f'x {rate:.3g}' for rate in config.rates[stage])}"
        for stage in ("align", "stage2")
    )
    text = (
        "Runs: trainings of a variant, splits x seeds. Mean ± standard deviation over them; the "
        f"last column is the mean of the paired differences to “{reference}” ± its standard error. "
        "Rate: times the learning rate of the stage's config, the best on validation data of the "
        f"first run of {tried}. In percent; R@k of the test pairs, Spearman (x 100) of held-out "
        "sentences."
    )
    changed = {stage: dict(config.changes[stage]) for stage in STAGES}
    told = [f"{stage} {key}={value}" for stage in changed for key, value in changed[stage].items()]
    if told:
        text = f"{text} Other than in the stages' configs: {', '.join(told)}."
    return f"A smoke run: the numbers mean nothing. {text}" if config.smoke else text
