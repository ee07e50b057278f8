"""The report of MMEB: tables, plots, and the same as JSON for `compare`."""

import json
import os
from collections.abc import Mapping
from typing import Any

from unime_jax import report
from unime_jax.benchmarks import mmeb
from unime_jax.evaluation import opening, page, published
from unime_jax.evaluation.page import THIS, is_partial, not_whole, number, percent, signed

TASK_TITLES = {
    "classification": "Classification",
    "vqa": "Visual question answering",
    "retrieval": "Retrieval",
    "grounding": "Visual grounding",
}
DIFFERENCE = "difference"


class Page(page.Page):
    """Writes the report as far as it is; see `page.Page`."""

    benchmark, title = "mmeb", "MMEB"
    # Images with captions, as the paper's.
    pair_sets = ("MSCOCO_i2t", "VisualNews_i2t", "MSCOCO_t2i")

    def __init__(self, config, settings: opening.Settings, problems: dict[str, str]):
        super().__init__(config, settings, problems)
        self._before = page.read_results(config.before) if config.before else None
        self._records: dict[str, dict[str, Any]] = {}

    def add(self, name: str, measured) -> None:
        """Keeps the answers of a set: one line for each query in answers/SET.jsonl."""
        each, outcome = mmeb.BY_NAME[name], measured.outcome
        self._records[name] = {
            "task": each.task,
            "in_distribution": each.in_distribution,
            "precision": number(outcome.precision),
            "ties": outcome.ties,
            "scored": len(outcome.answers),
            "queries": measured.queries,
            "left_out": outcome.left_out,
            "dropped_candidates": outcome.dropped,
            "candidates_per_query": measured.per_query,
            "candidates": measured.candidates,
            "chance": number(outcome.chance),
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

    def results(self) -> dict[str, Any]:
        means = {
            name: {
                "precision": number(mean.value),
                "measured": mean.measured,
                "sets": mean.sets,
            }
            for name, mean in mmeb.means(self.precision).items()
        }
        return {"sets": self._records, "means": means}

    # ---- sections

    def tables(self) -> list[report.Section]:
        return [self._summary(), self._sets()]

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
        notes.append(not_whole(self.partial))
        if self._config.limit:
            notes.append(f"At most {self._config.limit} queries of each set: a sample.")
        return report.Section(
            "MMEB", text, report.Table(header, rows, ("", *[".1f"] * len(mmeb.MEANS))),
            note=" ".join(filter(None, notes)),
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

    def lacking(self) -> list[str]:
        lines = []
        for name, record in self._records.items():
            if record["problems"]:
                first, reason = next(iter(record["first_problems"].items()))
                lines.append(
                    f"- {name}: {record['problems']} items without a vector, "
                    f"{record['dropped_candidates']} times a wrong candidate was left out; the "
                    f"first: {reason or first}"
                )
        return lines

    # ---- plots

    def pair_axes(self, name: str) -> tuple[str, str]:
        return "query", "candidate"

    def bars(self) -> list[report.Section]:
        return [self._bars(), self._dumbbells()] if self.precision else []

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
