"""The report of zero-shot retrieval: tables, plots, and the same as JSON for `compare`."""

from collections.abc import Mapping
from typing import Any

from unime_jax import report
from unime_jax.benchmarks import caption_retrieval, sugarcrepe
from unime_jax.evaluation import opening, page, published
from unime_jax.evaluation.page import THIS, is_partial, not_whole, number, percent, signed

KS = caption_retrieval.KS
TITLES = {each.name: each.title for each in caption_retrieval.SETS}
SHORT = {"text_to_image": "t2i", "image_to_text": "i2t"}
ARROWS = {"text_to_image": "text to image", "image_to_text": "image to text"}
LENGTHS = ("short", "long", "compositional")


class Page(page.Page):
    """Writes the report as far as it is; see `page.Page`."""

    benchmark, title = "retrieval", "Zero-shot retrieval"
    pair_sets = tuple(f"{TITLES[name]} i2t" for name in ("coco", "flickr30k"))

    def __init__(self, config, settings: opening.Settings, problems: dict[str, str]):
        super().__init__(config, settings, problems)
        self._sets: dict[str, dict[str, Any]] = {}
        self._files: dict[str, dict[str, Any]] = {}
        self._notes: dict[str, dict[str, str]] = {}

    def add(
        self, name: str, outcomes: Mapping[str, caption_retrieval.Outcome], images: int
    ) -> None:
        """Keeps the recalls of a set in both directions."""
        self._sets[name] = {
            "images": images,
            **{
                direction: {
                    "recall": {str(k): number(found.recall(k)) for k in KS},
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
                "accuracy": number(found.accuracy),
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

    def results(self) -> dict[str, Any]:
        return {
            "sets": self._sets,
            "sugarcrepe": {"files": self._files, "means": self.kinds()},
            "means": self.overall(),
        }

    # ---- sections

    def tables(self) -> list[report.Section]:
        found = (self._recalls(), self._sugarcrepe(), self._means())
        return [section for section in found if section is not None]

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
        notes = [not_whole([TITLES[name] for name in partial_sets(self.results())])]
        if self._config.limit:
            notes.append(
                f"At most {self._config.limit} images of each set: a sample, easier than the whole."
            )
        return report.Section(
            "Captions and images", text, report.Table(header, rows, formats),
            note=" ".join(filter(None, notes)),
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
        partial = [name for name, found in self._files.items() if is_partial(found)]
        return report.Section(
            "SugarCrepe", text, report.Table(header, rows, formats), note=not_whole(partial)
        )

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
        notes = [not_whole_means(self.results())]
        if self._config.limit:
            notes.append("Of samples, easier than the whole.")
        return report.Section(
            "Means", text, report.Table(["row", *LENGTHS], rows, ["", *[".1f"] * 3]),
            note=" ".join(filter(None, notes)),
        )  # fmt: skip

    def lacking(self) -> list[str]:
        lines = []
        for name, found in self._notes.items():
            first, reason = next(iter(found.items()))
            lines.append(f"- {name}: {len(found)} items without a vector; {reason or first}")
        return lines

    # ---- plots

    def pair_axes(self, name: str) -> tuple[str, str]:
        return ("image", "caption") if name.endswith("i2t") else ("caption", "image")

    def bars(self) -> list[report.Section]:
        own = bars_of(self._sets, self.kinds())
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


def partial_sets(results: Mapping[str, Any]) -> list[str]:
    """Names the sets, SugarCrepe's aside, of which something could not be embedded."""
    return [
        name
        for name, found in results["sets"].items()
        if any(is_partial(found[way]) for way in ARROWS)
    ]


def not_whole_means(results: Mapping[str, Any]) -> str:
    """Says which of the three means are over sets that lack items."""
    lengths = {each.name: each.length for each in caption_retrieval.SETS}
    lacking = {lengths[name] for name in partial_sets(results)}
    if any(map(is_partial, results["sugarcrepe"]["files"].values())):
        lacking.add("compositional")
    return not_whole([length for length in LENGTHS if length in lacking & set(results["means"])])


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
