"""Sets evaluations side by side, with the published rows."""

import contextlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unime_jax import arguments, report, runtime
from unime_jax.benchmarks import mmeb, sugarcrepe
from unime_jax.evaluation import published
from unime_jax.evaluation.mmeb_report import TASK_TITLES
from unime_jax.evaluation.page import is_partial, not_whole, percent, read_results, signed
from unime_jax.evaluation.retrieval_report import (
    LENGTHS,
    SHORT,
    TITLES,
    bars_of,
    not_whole_means,
    published_bars,
)  # fmt: skip
from unime_jax.types import UserError

DEFAULT_OUTPUT = "runs/compare"
_TITLE = "Comparison"


def main(argv: Sequence[str]) -> None:
    parser = arguments.Parser(
        prog="python -m unime_jax.evaluate compare",
        description=__doc__,
        epilog="Each RUN is the output directory of an evaluation; NAME=RUN gives it a name.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--output", default=DEFAULT_OUTPUT, help=f"default: {DEFAULT_OUTPUT}")
    args = parser.parse_args(list(argv))
    compare(args.runs, args.output)


def compare(runs: Sequence[str], output) -> pathlib.Path:
    """Writes the comparison and prints its tables; returns the path of report.md.

    Args:
      runs: output directories of evaluations of one benchmark, or NAME=DIRECTORY.
      output: directory of the comparison; an earlier one's is replaced.

    Raises:
      UserError: a run without results, or of another benchmark than the first; an output that
        holds another report.
    """
    runtime.check_output(output, "--output")
    _check_free(output)
    found = _read(runs)
    kinds = {each["results"]["benchmark"] for each in found.values()}
    if len(kinds) > 1:
        raise UserError(f"compare: runs of {' and '.join(sorted(kinds))}; give runs of one of them")
    output = pathlib.Path(output).expanduser()
    make = {"mmeb": _mmeb, "retrieval": _retrieval}[kinds.pop()]
    sections = make(found, output)
    sections += _cosines(found, output)
    path = report.write_report(
        output, _TITLE, sections, runs={name: each["model"] for name, each in found.items()}
    )
    report.print_report(path, sections)
    return path


def _check_free(output) -> None:
    """Raises `UserError` where the output holds a report of anything else."""
    there = pathlib.Path(output).expanduser() / "report.json"
    found = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(there.read_text())
    if there.exists() and not (isinstance(found, dict) and found.get("title") == _TITLE):
        raise UserError(
            f"--output={output}: its report.json is no comparison's; name another directory"
        )


def _read(runs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reads results by name; equal names are told apart by their directories."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        name, equals, place = run.partition("=")
        if not equals or pathlib.Path(run).expanduser().exists():  # a directory may be lr=1e-4
            place = run
            path = pathlib.Path(run).expanduser().resolve()
            path = path.parent if path.suffix == ".json" else path
            name = path.name if path.name not in found else f"{path.parent.name}/{path.name}"
        if name in found:
            raise UserError(f"compare: two runs are called {name}; give them names: NAME={place}")
        found[name] = read_results(place)
    return found


def _types(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the model type of all runs, "" where they differ."""
    kinds = {each["settings"]["model_type"] for each in found.values()}
    return kinds.pop() if len(kinds) == 1 else ""


def _sampled(found: Mapping[str, Mapping[str, Any]]) -> str:
    names = [f"{name} ({each['limit']})" for name, each in found.items() if each["limit"]]
    return f"Samples of so many queries a set: {', '.join(names)}." if names else ""


def _counts(record: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns what is equal where two runs measured the same; 0 for what a report does not say."""
    return tuple(record.get(key) or 0 for key in ("scored", "left_out", "dropped_candidates"))


# ---------------------------------------------------------------- MMEB


def _mmeb(found: Mapping[str, Mapping[str, Any]], output: pathlib.Path) -> list[report.Section]:
    means = {name: each["results"]["means"] for name, each in found.items()}
    sections = [_mmeb_summary(found, means), _mmeb_sets(found)]
    if not any(map(_scores, found.values())):
        return sections
    labels = mmeb.LABELS
    bars = {
        name: {labels[mean]: percent(found[mean]["precision"]) for mean in mmeb.MEANS}
        for name, found in means.items()
    }
    others = published.rows("mmeb", _types(found))[-2:]
    bars |= {row["name"]: {labels[mean]: row[mean] for mean in mmeb.MEANS} for row in others}
    report.plot_groups(
        bars, output / "tasks.png", label="Precision@1, %",
        reference=[row["name"] for row in others],
    )  # fmt: skip
    sections.append(report.Section("By meta-task", image="tasks.png", note="Grey: published."))
    runs = list(found.values())
    if len(runs) > 1 and (_scores(runs[0]) or _scores(runs[-1])):
        sections.append(_mmeb_dumbbells(found, output))
    return sections


def _mmeb_summary(found, means) -> report.Section:
    rows: list[list[Any]] = []
    incomplete = False
    for name, own in means.items():
        rows.append([name, *(percent(own[mean]["precision"]) for mean in mmeb.MEANS)])
        if any(own[mean]["measured"] < own[mean]["sets"] for mean in mmeb.MEANS):
            incomplete = True
            counts = [f"{own[mean]['measured']}/{own[mean]['sets']}" for mean in mmeb.MEANS]
            rows.append(["  sets measured", *counts])
    if len(means) > 1:
        first, last = list(means)[0], list(means)[-1]
        gaps = [_gap(found, first, last, mean) for mean in mmeb.MEANS]
        rows.append([f"  {last} minus {first}", *map(signed, gaps)])
    for row in published.rows("mmeb", _types(found)):
        rows.append([row["name"], *(row[mean] for mean in mmeb.MEANS)])
    text = (
        "Precision@1, %. mean of 36: the leaderboard's; mean of 4: the paper's. Below, published "
        f"({published.source()})."
    )
    partial = [
        each.name
        for each in mmeb.SETS
        if any(is_partial(run["results"]["sets"].get(each.name, {})) for run in found.values())
    ]
    notes = [_sampled(found), not_whole(partial)]
    if incomplete:
        notes.append("Not all sets are measured: a mean that lacks some of its sets is no score.")
    if incomplete or partial or notes[0]:
        notes.append("Differences are over the sets of which both runs scored equally much.")
    table = report.Table(
        ["row", *(mmeb.LABELS[mean] for mean in mmeb.MEANS)], rows, ["", *[".1f"] * len(mmeb.MEANS)]
    )
    return report.Section("MMEB", text, table, note=" ".join(filter(None, notes)))


def _gap(found, first: str, last: str, mean: str) -> float | None:
    """Returns the difference of a mean over the sets that both have, in points."""
    scores = [_scores(found[name]) for name in (first, last)]
    both = _alike(found[first], found[last])
    pair = [mmeb.means({name: s[name] for name in both})[mean] for s in scores]
    return 100 * (pair[1].value - pair[0].value) if pair[0].measured else None


def _scores(run: Mapping[str, Any]) -> dict[str, float]:
    sets = run["results"]["sets"]
    return {name: s["precision"] for name, s in sets.items() if s["precision"] is not None}


def _alike(first: Mapping[str, Any], last: Mapping[str, Any]) -> set[str]:
    """Returns the sets that both runs have scores of, over as many queries and candidates."""
    sets = [run["results"]["sets"] for run in (first, last)]
    both = set(_scores(first)) & set(_scores(last))
    return {name for name in both if _counts(sets[0][name]) == _counts(sets[1][name])}


def _mmeb_sets(found) -> report.Section:
    scores = {name: _scores(run) for name, run in found.items()}
    alike = _alike(next(iter(found.values())), list(found.values())[-1])
    rows = []
    for each in mmeb.SETS:
        values = [percent(own.get(each.name)) for own in scores.values()]
        if all(value is None for value in values):
            continue
        row = [each.name, mmeb.SHORT[each.task], "IND" if each.in_distribution else "OOD", *values]
        if len(values) > 1:
            row.append(signed(values[-1] - values[0] if each.name in alike else None))
        rows.append(row)
    header = ["set", "task", "", *found, *(["difference"] if len(found) > 1 else [])]
    formats = ["", "", "", *[".1f"] * (len(header) - 3)]
    return report.Section("Sets", table=report.Table(header, rows, formats))


def _mmeb_dumbbells(found, output: pathlib.Path) -> report.Section:
    first, last = list(found)[0], list(found)[-1]
    before, after = _scores(found[first]), _scores(found[last])
    groups = {
        title: [
            (each.name, percent(before.get(each.name)), percent(after.get(each.name)))
            for each in mmeb.SETS
            if each.task == task and (each.name in before or each.name in after)
        ]
        for task, title in TASK_TITLES.items()
    }
    report.plot_dumbbells(
        groups, output / "sets.png", names=(first, last), label="Precision@1, %",
        muted=[each.name for each in mmeb.SETS if not each.in_distribution],
    )  # fmt: skip
    return report.Section("Set by set", image="sets.png", note=f"From {first} to {last}.")


# ---------------------------------------------------------------- retrieval


def _retrieval(found, output: pathlib.Path) -> list[report.Section]:
    bars = {
        name: bars_of(run["results"]["sets"], run["results"]["sugarcrepe"]["means"])
        for name, run in found.items()
    }
    others = published.rows("retrieval", _types(found))
    labels = list(dict.fromkeys(label for own in bars.values() for label in own))
    all_rows = bars | {row["name"]: published_bars(row) for row in others}
    counts = [_retrieval_counts(run["results"]) for run in found.values()]
    rows = []
    for label in labels:
        values = [own.get(label) for own in all_rows.values()]
        rows.append([label.replace("\n", " "), *values])
        if len(bars) > 1:
            a, b = values[0], values[len(bars) - 1]
            alike = None not in (a, b) and counts[0].get(label) == counts[-1].get(label)
            rows[-1].append(signed(b - a if alike else None))
    first, last = list(bars)[0], list(bars)[-1]
    header = ["score", *all_rows, *([f"{last} minus {first}"] if len(bars) > 1 else [])]
    table = report.Table(header, rows, ["", *[".1f"] * (len(header) - 1)])
    text = "R@1 and SugarCrepe's accuracy, %. t2i: a text looks for its image; i2t: the reverse."
    partial = [
        label.replace("\n", " ")
        for label in labels
        if any(any(own.get(label, ())[1:]) for own in counts)
    ]
    notes = [_sampled(found), not_whole(partial)]
    sections = [report.Section("Retrieval", text, table, note=" ".join(filter(None, notes)))]
    means = [
        [name, *(percent(run["results"]["means"].get(length)) for length in LENGTHS)]
        for name, run in found.items()
    ]
    means += [
        [row["name"], *(row[length] for length in LENGTHS)]
        for row in published.rows("ablation", _types(found))
    ]
    if any(value is not None for row in means[: len(found)] for value in row[1:]):
        table = report.Table(["row", *LENGTHS], means, ["", *[".1f"] * len(LENGTHS)])
        lacking = dict.fromkeys(not_whole_means(run["results"]) for run in found.values())
        note = " ".join(filter(None, [_sampled(found), *lacking]))
        sections.append(report.Section("Means", "The paper's three means.", table, note=note))
    if labels:
        drawn = {
            name: {label: row.get(label) for label in labels} for name, row in all_rows.items()
        }
        report.plot_groups(
            drawn, output / "retrieval.png", label="R@1 or accuracy, %",
            reference=[row["name"] for row in others],
        )  # fmt: skip
        sections.append(report.Section("R@1", image="retrieval.png", note="Grey: published."))
    return sections


def _retrieval_counts(results: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the counts behind each number, by the labels of `bars_of`."""
    found = {}
    for name, directions in results["sets"].items():
        for direction, short in SHORT.items():
            found[f"{TITLES[name]}\n{short}"] = _counts(directions[direction])
    for kind in sugarcrepe.KINDS:
        files = [f for name, f in results["sugarcrepe"]["files"].items() if name.startswith(kind)]
        if files:
            found[f"SugarCrepe\n{kind}"] = tuple(map(sum, zip(*map(_counts, files), strict=True)))
    return found


# ---------------------------------------------------------------- both


def _cosines(found, output: pathlib.Path) -> list[report.Section]:
    """Draws the matrices of the set that all runs have one of, as UniME's Fig. 4."""
    pairs = {name: run["results"].get("pairs") or {} for name, run in found.items()}
    shared = [
        key for key in next(iter(pairs.values())) if all(key in own for own in pairs.values())
    ]
    if not shared or len(found) < 2:
        return []
    name = shared[0]
    matrices = [(run, np.array(own[name])) for run, own in pairs.items()]
    if len({matrix.shape for _, matrix in matrices}) > 1:
        return []
    report.plot_cosine_matrices(matrices, output / "cosine.png", axes=("query", "candidate"))
    title = f"Cosines of {len(matrices[0][1])} pairs of {name}"
    return [report.Section(title, image="cosine.png", note="As UniME, Fig. 4.")]
