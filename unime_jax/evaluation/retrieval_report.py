"""The report of zero-shot retrieval: tables, plots, and the same as JSON for `compare`."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from unime_jax import report
from unime_jax.benchmarks import caption_retrieval, sugarcrepe
from unime_jax.evaluation import examples, opening, published
from unime_jax.evaluation.mmeb_report import THIS, is_partial, not_whole, percent, signed

KS = caption_retrieval.KS
TITLES = {each.name: each.title for each in caption_retrieval.SETS}
SHORT = {"text_to_image": "t2i", "image_to_text": "i2t"}
ARROWS = {"text_to_image": "text to image", "image_to_text": "image to text"}
LENGTHS = ("short", "long", "compositional")
_FAILURES, _EXAMPLES = 8, 8


class Page:
    """Writes the report as far as it is.

    Args:
      config: of the evaluation.
      settings: see `opening.Settings`.
      problems: sets that could not be read, and why.
    """

    def __init__(self, config, settings: opening.Settings, problems: dict[str, str]):
        self._config, self._settings, self._problems = config, settings, problems
        self._output = pathlib.Path(config.output).expanduser()
        self._sets: dict[str, dict[str, Any]] = {}
        self._files: dict[str, dict[str, Any]] = {}
        self._notes: dict[str, dict[str, str]] = {}
        self.sections: list[report.Section] = []

    def add(
        self, name: str, outcomes: Mapping[str, caption_retrieval.Outcome], images: int
    ) -> None:
        """Keeps the recalls of a set in both directions."""
        self._sets[name] = {
            "images": images,
            **{
                direction: {
                    "recall": {str(k): _number(found.recall(k)) for k in KS},
                    "ties": found.ties,
                    "scored": len(found.answers),
                    "left_out": found.left_out,
                    "candidates": found.candidates,
                    "dropped_candidates": found.dropped,
                }
                for direction, found in outcomes.items()
            },
        }

    def add_files(self, outcomes: Mapping[str, sugarcrepe.Outcome]) -> None:
        """Keeps the scores of SugarCrepe's files."""
        self._files = {
            name: {
                "accuracy": _number(found.accuracy),
                "ties": found.ties,
                "scored": len(found.hits),
                "left_out": found.left_out,
            }
            for name, found in outcomes.items()
        }

    def note(self, name: str, problems: Mapping[str, str]) -> None:
        """Keeps which items of a set have no vector, and why."""
        if problems:
            self._notes[name] = dict(problems)

    # ---- numbers

    def kinds(self) -> dict[str, float]:
        """Returns SugarCrepe's three means, as far as their files are there."""
        scores = {n: f["accuracy"] for n, f in self._files.items() if f["accuracy"] is not None}
        return sugarcrepe.means(scores)

    def overall(self) -> dict[str, float]:
        """Returns the paper's three means, 0 to 1: R@1 of short and of long captions over sets and
        directions, and SugarCrepe's; only those that are complete."""
        found = {}
        for length in LENGTHS[:2]:
            values = [
                self._sets.get(each.name, {}).get(way, {}).get("recall", {}).get("1")
                for each in caption_retrieval.SETS
                for way in ARROWS
                if each.length == length
            ]
            if all(value is not None for value in values):
                found[length] = sum(values) / len(values)
        kinds = self.kinds()
        if len(kinds) == len(sugarcrepe.KINDS):
            found["compositional"] = sum(kinds.values()) / len(kinds)
        return found

    # ---- files

    def write(self, *, seconds: float, rows: int, plots=(), **more) -> pathlib.Path:
        """Writes report.md and report.json."""
        self.sections = [section for section in (
            self._recalls(), self._sugarcrepe(), self._means(), *plots, self._trouble()
        ) if section is not None]  # fmt: skip
        return report.write_report(
            self._output,
            "Zero-shot retrieval",
            self.sections,
            model=self._config.model.path,
            settings={
                "model_type": self._settings.model_type,
                "dtype": self._settings.dtype,
                **self._settings.preparation,
            },
            limit=self._config.limit,
            rows_embedded=rows,
            seconds=round(seconds, 1),
            results={
                "benchmark": "retrieval",
                "sets": self._sets,
                "sugarcrepe": {"files": self._files, "means": self.kinds()},
                "means": self.overall(),
                "problems": self._problems,
                **more,
            },
        )

    def _recalls(self) -> report.Section | None:
        if not self._sets:
            return None
        kind = self._settings.model_type
        rival = published.rival("retrieval", kind)
        rows = []
        for name, found in self._sets.items():
            for direction, words in ARROWS.items():
                result = found[direction]
                recalls = [percent(result["recall"][str(k)]) for k in KS]
                row = [TITLES[name], words, *recalls]
                others = [row[name][direction] for row in published.rows("retrieval", kind)]
                gap = None
                whole = not self._config.limit and not is_partial(result)
                if rival is not None and whole and recalls[0] is not None:
                    gap = recalls[0] - rival[name][direction]
                row += [*others, *([signed(gap)] if rival is not None else [])]
                row += [result["ties"], result["scored"], result["left_out"], result["candidates"]]
                rows.append(row)
        names = [row["name"] for row in published.rows("retrieval", kind)]
        header = ["set", "direction", *(f"R@{k}" for k in KS), *(f"{n} R@1" for n in names)]
        header += ["difference"] if rival is not None else []
        formats = ["", "", *[".1f"] * (len(KS) + len(names)), *([".1f"] if rival else [])]
        header += ["ties", "queries", "left out", "candidates"]
        text = "R@k, %. Ties lose. Published: " + published.source() + "."
        partial = {
            n: any(map(is_partial, (f[way] for way in ARROWS))) for n, f in self._sets.items()
        }
        notes = (
            [not_whole([TITLES[n] for n in partial if partial[n]])] if any(partial.values()) else []
        )
        if self._config.limit:
            notes.append(
                f"At most {self._config.limit} images of each set: a sample, easier than the whole."
            )
        return report.Section(
            "Captions and images", text, report.Table(header, rows, formats),
            note=" ".join(notes),
        )  # fmt: skip

    def _sugarcrepe(self) -> report.Section | None:
        if not self._files:
            return None
        kinds, kind = self.kinds(), self._settings.model_type
        rows: list[list[Any]] = []
        for name in sugarcrepe.FILES:
            if name in self._files:
                f = self._files[name]
                blank = [None] * len(published.rows("retrieval", kind))
                counts = [f["ties"], f["scored"], f["left_out"]]
                rows.append([name, percent(f["accuracy"]), *blank, *counts])
        for name in sugarcrepe.KINDS:
            others = [row["sugarcrepe"][name] for row in published.rows("retrieval", kind)]
            rows.append([f"{name}, mean", percent(kinds.get(name)), *others, None, None, None])
        names = [row["name"] for row in published.rows("retrieval", kind)]
        header = ["file", THIS, *names, "ties", "rows", "left out"]
        formats = ["", *[".1f"] * (1 + len(names))]
        text = "Share of rows, %, whose image is nearer to its caption than to the wrong one."
        partial = [name for name, found in self._files.items() if found["left_out"]]
        note = not_whole(partial) if partial else ""
        return report.Section("SugarCrepe", text, report.Table(header, rows, formats), note=note)

    def _means(self) -> report.Section | None:
        overall = self.overall()
        if not overall:
            return None
        rows: list[list[Any]] = [[THIS, *(percent(overall.get(name)) for name in LENGTHS)]]
        for row in published.rows("ablation", self._settings.model_type):
            rows.append([row["name"], *(row[name] for name in LENGTHS)])
        text = (
            "Means of R@1 over sets and directions: short captions (Flickr30K, COCO), long ones "
            "(ShareGPT4V, Urban1K); compositional is the mean of SugarCrepe's three. Below, the "
            "paper's ablation of the stages."
        )
        return report.Section(
            "Means", text, report.Table(["row", *LENGTHS], rows, ["", *[".1f"] * 3])
        )

    def _trouble(self) -> report.Section | None:
        lines = [f"- **{name}**: {reason}" for name, reason in self._problems.items()]
        for name, found in self._notes.items():
            first, reason = next(iter(found.items()))
            lines.append(f"- {name}: {len(found)} items without a vector; {reason or first}")
        return report.Section("What is missing", "\n".join(lines)) if lines else None

    # ---- plots

    def finish(self, gallery: examples.Gallery, seconds: float, rows: int) -> dict[str, Any]:
        """Draws the plots and writes the whole report; returns what report.json holds."""
        plots = self._bars() + self._cosines(gallery)
        spread = gallery.examples[:: max(1, len(gallery.examples) // _EXAMPLES)][:_EXAMPLES]
        for title, name, chosen in (
            ("Queries and their nearest candidates", "sheet.png", spread),
            ("Hardest failures", "failures.png", examples.hardest(gallery.failures, _FAILURES)),
        ):
            if chosen:
                report.plot_sheet(gallery.sheet(chosen), self._output / name)
                plots.append(report.Section(title, image=name))
        pairs = {name: matrix.round(3).tolist() for name, matrix in self._pairs(gallery).items()}
        path = self.write(seconds=seconds, rows=rows, plots=plots, pairs=pairs)
        return json.loads((path.parent / "report.json").read_text()) | {"report": str(path)}

    def bars(self) -> dict[str, float | None]:
        """Returns R@1 of every set and direction and SugarCrepe's means, in percent, by label."""
        return bars_of(self._sets, self.kinds())

    def _bars(self) -> list[report.Section]:
        own = self.bars()
        if not own:
            return []
        rows: dict[str, dict[str, float | None]] = {THIS: own}
        others = published.rows("retrieval", self._settings.model_type)
        for row in others:
            rows[row["name"]] = {label: published_bars(row).get(label) for label in own}
        report.plot_groups(
            rows, self._output / "retrieval.png", label="R@1 or accuracy, %",
            reference=[row["name"] for row in others],
        )  # fmt: skip
        note = "t2i: a text looks for its image; i2t: the reverse. Grey: published."
        return [report.Section("R@1", image="retrieval.png", note=note)]

    def _pairs(self, gallery: examples.Gallery) -> dict[str, Any]:
        wanted = [f"{TITLES[name]} i2t" for name in ("coco", "flickr30k")]
        for name in (*wanted, *gallery.pairs):
            if name in gallery.pairs:
                return {name: gallery.pairs[name]}
        return {}

    def _cosines(self, gallery: examples.Gallery) -> list[report.Section]:
        found = self._pairs(gallery)
        if not found:
            return []
        ((name, matrix),) = found.items()
        axes = ("image", "caption") if name.endswith("i2t") else ("caption", "image")
        report.plot_cosine_matrices([(name, matrix)], self._output / "cosine.png", axes=axes)
        title = f"Cosines of {len(matrix)} pairs of {name}"
        return [report.Section(title, image="cosine.png", note="As UniME, Fig. 4.")]


def bars_of(
    sets: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, float]
) -> dict[str, float | None]:
    """Returns R@1 and SugarCrepe's means in percent, by the labels of plots and of `compare`."""
    found = {}
    for name, directions in sets.items():
        for direction, short in SHORT.items():
            found[f"{TITLES[name]}\n{short}"] = percent(directions[direction]["recall"]["1"])
    for name, value in kinds.items():
        found[f"SugarCrepe\n{name}"] = percent(value)
    return found


def published_bars(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns a published row by the labels of `bars_of`."""
    found = {}
    for name, title in TITLES.items():
        if name == "sugarcrepe":
            found |= {f"{title}\n{kind}": value for kind, value in row[name].items()}
        else:
            found[f"{title}\nt2i"] = row[name]["text_to_image"]
            found[f"{title}\ni2t"] = row[name]["image_to_text"]
    return found


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
