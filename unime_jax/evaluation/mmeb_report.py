"""The report of MMEB: tables, plots, and the same as JSON for `compare`."""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from unime_jax import report
from unime_jax.benchmarks import mmeb
from unime_jax.evaluation import examples, opening, published
from unime_jax.report.tables import ABSENT
from unime_jax.types import UserError

TASK_TITLES = {
    "classification": "Classification",
    "vqa": "Visual question answering",
    "retrieval": "Retrieval",
    "grounding": "Visual grounding",
}
THIS, DIFFERENCE = "this model", "difference"
_FAILURES, _EXAMPLES = 8, 8
_NAMED = 6  # sets in a note
# Of the cosine matrix: images with captions, as the paper's; else the first set that was measured.
PAIRS_SETS = ("MSCOCO_i2t", "VisualNews_i2t", "MSCOCO_t2i")


def percent(value: float | None) -> float | None:
    """Returns a share in percent; None where there is no number."""
    return None if value is None or math.isnan(value) else 100 * value


class Page:
    """Writes the report as far as it is.

    Args:
      config: of the evaluation.
      settings: see `opening.Settings`.
      problems: sets that could not be read or scored, and why; grows.
    """

    def __init__(self, config, settings: opening.Settings, problems: dict[str, str]):
        self._config, self._settings, self._problems = config, settings, problems
        self._output = pathlib.Path(config.output).expanduser()
        self._before = read_results(config.before) if config.before else None
        self._records: dict[str, dict[str, Any]] = {}
        self.sections: list[report.Section] = []

    def add(self, name: str, measured) -> None:
        """Keeps the answers of a set: one line for each query in answers/SET.jsonl."""
        each, outcome = mmeb.BY_NAME[name], measured.outcome
        self._records[name] = {
            "task": each.task,
            "in_distribution": each.in_distribution,
            "precision": None if math.isnan(outcome.precision) else outcome.precision,
            "ties": outcome.ties,
            "scored": len(outcome.answers),
            "queries": measured.queries,
            "left_out": outcome.left_out,
            "dropped_candidates": outcome.dropped,
            "candidates_per_query": measured.per_query,
            "candidates": measured.candidates,
            "chance": None if math.isnan(outcome.chance) else outcome.chance,
            "seconds": round(measured.seconds, 2),
            "problems": len(measured.problems),
            "first_problems": dict(list(measured.problems.items())[:5]),
        }
        directory = self._output / "answers"
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f"{name}.jsonl.part"
        with open(part, "w") as file:
            for answer in outcome.answers:
                line = {
                    "query": answer.query,
                    "hit": answer.hit,
                    "tied": answer.tied,
                    "rank": answer.rank,
                    "cosine": round(answer.right, 6),
                    "top": answer.top,
                    "top_cosines": [round(cosine, 6) for cosine in answer.cosines],
                }
                file.write(json.dumps(line) + "\n")
        os.replace(part, directory / f"{name}.jsonl")

    @property
    def precision(self) -> dict[str, float]:
        """Precision@1 of every set that has one."""
        return {
            name: record["precision"]
            for name, record in self._records.items()
            if record["precision"] is not None
        }

    @property
    def partial(self) -> list[str]:
        """Names the sets of which something could not be embedded."""
        return [name for name, record in self._records.items() if is_partial(record)]

    def write(self, measured, *, seconds: float, rows: int, plots=(), **more) -> pathlib.Path:
        """Writes report.md and report.json."""
        sections = [self._summary(), self._sets(), *plots]
        if self._problems or any(record["problems"] for record in self._records.values()):
            sections.append(self._trouble())
        means = mmeb.means(self.precision)
        results = {
            "benchmark": "mmeb",
            "sets": self._records,
            "means": {
                name: {"precision": None if math.isnan(m.value) else m.value,
                       "measured": m.measured, "sets": m.sets}
                for name, m in means.items()
            },
            "problems": self._problems,
            **more,
        }  # fmt: skip
        self.sections = sections
        return report.write_report(
            self._output,
            "MMEB",
            sections,
            model=self._config.model.path,
            settings={
                "model_type": self._settings.model_type,
                "dtype": self._settings.dtype,
                **self._settings.preparation,
            },
            limit=self._config.limit,
            rows_embedded=rows,
            seconds=round(seconds, 1),
            results=results,
        )

    # ---- sections

    def _summary(self) -> report.Section:
        rival = published.rival("mmeb", self._settings.model_type)
        means = mmeb.means(self.precision)
        header = ["row", *(mmeb.LABELS[name] for name in mmeb.MEANS)]
        rows: list[list[Any]] = [[THIS, *(percent(means[name].value) for name in mmeb.MEANS)]]
        whole = {n: p for n, p in self.precision.items() if n not in self.partial}
        comparable = [name for name, mean in mmeb.means(whole).items() if mean.complete]
        incomplete = [name for name in mmeb.MEANS if not means[name].complete]
        if incomplete:
            counts = [f"{means[name].measured}/{means[name].sets}" for name in mmeb.MEANS]
            rows.append(["  sets measured", *counts])
        if rival is not None:
            gaps = [
                None if name not in comparable or self._config.limit
                else 100 * means[name].value - rival[name]
                for name in mmeb.MEANS
            ]  # fmt: skip
            rows.append([f"  {DIFFERENCE} to {rival['name']}", *map(signed, gaps)])
        for row in published.rows("mmeb", self._settings.model_type):
            rows.append([row["name"], *(row[name] for name in mmeb.MEANS)])
        text = (
            "Precision@1, %. Means weigh sets equally: mean of 36 is the leaderboard's score, mean "
            'of 4 (of the meta-tasks) the paper\'s "Overall". Ties lose. '
            f"Below this model's row the published ones ({published.source()})."
        )
        notes = []
        if incomplete:
            notes.append("Not all sets are measured: compare no mean that lacks some of its sets.")
        if self.partial:
            notes.append(not_whole(self.partial))
        if self._config.limit:
            notes.append(f"At most {self._config.limit} queries of each set: a sample.")
        return report.Section(
            "MMEB", text, report.Table(header, rows, ("", *[".1f"] * len(mmeb.MEANS))),
            note=" ".join(notes),
        )  # fmt: skip

    def _sets(self) -> report.Section:
        before = {} if self._before is None else self._before["results"]["sets"]
        rows = []
        for name, record in self._records.items():
            row = [
                name,
                mmeb.SHORT[record["task"]],
                "IND" if record["in_distribution"] else "OOD",
                percent(record["precision"]),
                percent(record["chance"]),
                record["ties"],
                record["scored"],
                record["left_out"],
                round(record["candidates_per_query"]),
                record["candidates"],
            ]
            if self._before is not None:
                row.insert(4, percent(before.get(name, {}).get("precision")))
            rows.append(row)
        header = ["set", "task", "", "P@1", "chance", "ties", "queries", "left out",
                  "candidates", "different"]  # fmt: skip
        formats = ["", "", "", ".1f", ".1f"]
        if self._before is not None:
            header.insert(4, "before")
            formats.append(".1f")
        note = (
            "ties: queries lost only because another candidate was exactly as near. left out: the "
            "query or its right candidate could not be embedded. candidates: of one query; "
            "different: over all of them."
        )
        return report.Section("Sets", table=report.Table(header, rows, formats), note=note)

    def _trouble(self) -> report.Section:
        lines = [f"- **{name}**: {reason}" for name, reason in self._problems.items()]
        for name, record in self._records.items():
            if record["problems"]:
                first, reason = next(iter(record["first_problems"].items()))
                lines.append(
                    f"- {name}: {record['problems']} items without a vector, "
                    f"{record['dropped_candidates']} times a wrong candidate was left out; the "
                    f"first: {reason or first}"
                )
        return report.Section("What is missing", "\n".join(lines))

    # ---- plots

    def finish(
        self, measured, gallery: examples.Gallery, seconds: float, rows: int
    ) -> dict[str, Any]:
        """Draws the plots and writes the whole report; returns what report.json holds."""
        plots = [self._bars(), self._dumbbells()] if self.precision else []
        plots += self._cosines(gallery)
        spread = gallery.examples[:: max(1, len(gallery.examples) // _EXAMPLES)][:_EXAMPLES]
        for title, name, chosen in (
            ("Queries and their nearest candidates", "sheet.png", spread),
            ("Hardest failures", "failures.png", examples.hardest(gallery.failures, _FAILURES)),
        ):
            if chosen:
                report.plot_sheet(gallery.sheet(chosen), self._output / name)
                plots.append(report.Section(title, image=name))
        pairs = {name: matrix.round(3).tolist() for name, matrix in self._pairs(gallery).items()}
        path = self.write(measured, seconds=seconds, rows=rows, plots=plots, pairs=pairs)
        return json.loads((path.parent / "report.json").read_text()) | {"report": str(path)}

    def _bars(self) -> report.Section:
        means = mmeb.means(self.precision)
        names = {name: mmeb.LABELS[name] for name in mmeb.MEANS}
        rows: dict[str, dict[str, float | None]] = {
            THIS: {label: percent(means[name].value) for name, label in names.items()}
        }
        if self._before is not None:
            found = self._before["results"]["means"]
            before = {label: percent(found[n]["precision"]) for n, label in names.items()}
            rows = {"before": before, **rows}
        others = published.rows("mmeb", self._settings.model_type)[-2:]
        for row in others:
            rows[row["name"]] = {label: row[name] for name, label in names.items()}
        references = [row["name"] for row in others]
        report.plot_groups(
            rows, self._output / "tasks.png", label="Precision@1, %", reference=references
        )
        return report.Section("By meta-task", image="tasks.png", note="Grey: published.")

    def _dumbbells(self) -> report.Section:
        before = {} if self._before is None else self._before["results"]["sets"]

        def earlier(name: str, record: Mapping[str, Any]) -> float | None:
            if self._before is None:
                return percent(record["chance"])
            return percent(before.get(name, {}).get("precision"))

        groups = {
            TASK_TITLES[task]: [
                (name, earlier(name, record), percent(record["precision"]))
                for name, record in self._records.items()
                if record["task"] == task and record["precision"] is not None
            ]
            for task in mmeb.TASKS
        }
        first = "chance" if self._before is None else "before"
        muted = [each.name for each in mmeb.SETS if not each.in_distribution]
        report.plot_dumbbells(
            groups, self._output / "sets.png", names=(first, "this model"),
            label="Precision@1, %", muted=muted,
        )  # fmt: skip
        note = "" if self._before is None else f"Before: {self._before['model']}."
        return report.Section("Set by set", image="sets.png", note=note)

    def _pairs(self, gallery: examples.Gallery) -> dict[str, Any]:
        for name in (*PAIRS_SETS, *gallery.pairs):
            if name in gallery.pairs:
                return {name: gallery.pairs[name]}
        return {}

    def _cosines(self, gallery: examples.Gallery) -> list[report.Section]:
        found = self._pairs(gallery)
        if not found:
            return []
        ((name, matrix),) = found.items()
        report.plot_cosine_matrices(
            [(name, matrix)], self._output / "cosine.png", axes=("query", "candidate")
        )
        note = "Rows: queries; columns: their right candidates. As UniME, Fig. 4."
        title = f"Cosines of {len(matrix)} pairs of {name}"
        return [report.Section(title, image="cosine.png", note=note)]


def read_results(path) -> dict[str, Any]:
    """Reads the report.json of an evaluation.

    Raises:
      UserError: there is none, or it is of something else.
    """
    place = pathlib.Path(path).expanduser()
    place = place / "report.json" if place.is_dir() else place
    try:
        found = json.loads(place.read_text())
        found["results"]["benchmark"]
    except FileNotFoundError:
        raise UserError(f"{path}: no report.json there; give the output of an evaluation") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{place}: not the report of MMEB or of retrieval") from None
    return found


def is_partial(record: Mapping[str, Any]) -> bool:
    """Tells whether a query or a candidate of a set or a direction had no vector."""
    return bool(record.get("left_out") or record.get("dropped_candidates"))


def not_whole(names: Sequence[str]) -> str:
    """Says which sets lack queries or candidates."""
    listed = ", ".join(names[:_NAMED]) + (
        f" and {len(names) - _NAMED} more" if names[_NAMED:] else ""
    )
    return f"Not comparable, for some of their items have no vector: {listed}."


def signed(value: float | None) -> str:
    return ABSENT if value is None else f"{value:+.1f}"
