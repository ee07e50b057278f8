"""What the reports of all benchmarks of published sets share: files, plots of single queries."""

import abc
import functools
import json
import math
import operator
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from unime_jax import report
from unime_jax.benchmarks import mmeb
from unime_jax.evaluation import examples, hosts, opening
from unime_jax.evaluation.encode import Encoder
from unime_jax.report.tables import ABSENT
from unime_jax.types import UserError

THIS = "this model"
_FAILURES, _EXAMPLES = 8, 8
_NAMED = 6  # sets in a note
# What report.json has, so that `compare` reads it.
_OF_ALL = ("model", "limit", "settings/model_type", "results/means", "results/sets")
_OF_BENCHMARK = {
    "mmeb": [f"results/means/{name}/precision" for name in mmeb.MEANS],
    "retrieval": ["results/sugarcrepe/means", "results/sugarcrepe/files"],
}


class Page(abc.ABC):
    """Writes the report of a benchmark as far as it is; its children know the benchmark.

    Attributes:
      benchmark: in report.json.
      title: of the report.
      pair_sets: of the matrix of cosines, the first of which there is one; else whatever is there.
      sections: of the newest report.

    Args:
      config: of the evaluation.
      settings: see `opening.Settings`.
      problems: sets that could not be read or scored, and why; grows.
    """

    benchmark: str
    title: str
    pair_sets: Sequence[str]

    def __init__(self, config, settings: opening.Settings, problems: dict[str, str]):
        self._config, self._settings, self._problems = config, settings, problems
        self._output = pathlib.Path(config.output).expanduser()
        self.sections: list[report.Section] = []

    @abc.abstractmethod
    def tables(self) -> list[report.Section]:
        """Returns the sections of numbers."""

    @abc.abstractmethod
    def results(self) -> dict[str, Any]:
        """Returns the numbers for report.json, which `compare` reads."""

    @abc.abstractmethod
    def bars(self) -> list[report.Section]:
        """Draws the plots of numbers."""

    @abc.abstractmethod
    def lacking(self) -> list[str]:
        """Returns a line for each set that lacks items."""

    @abc.abstractmethod
    def pair_axes(self, name: str) -> tuple[str, str]:
        """Returns what the rows and columns of a set's matrix of cosines are."""

    def fill(
        self,
        encoder: Encoder,
        wanted: Mapping[str, np.ndarray],
        gallery: examples.Gallery,
        score: Callable[[str], None],
        seconds: Callable[[], float],
    ) -> dict[str, Any]:
        """Embeds and scores set by set; whatever ends it, the finished sets are in the report.

        Args:
          encoder: of the items.
          wanted: items of each set.
          gallery: what is shown of single queries.
          score: adds a set, whose items are embedded.
          seconds: since the start.

        Returns:
          What report.json holds, and the report's path; {} in all processes but the first.
        """
        for name in encoder.embed(wanted):
            if hosts.is_first():
                score(name)
                self.write(seconds=seconds(), rows=encoder.embedded)
        if not hosts.is_first():
            return {}
        plots, pairs = [*self.bars(), *self._cosines(gallery), *self._sheets(gallery)], {}
        for name in self._shown(gallery):
            pairs[name] = gallery.pairs[name].round(3).tolist()
        path = self.write(seconds=seconds(), rows=encoder.embedded, plots=plots, pairs=pairs)
        report.print_report(path, self.sections)
        return json.loads((path.parent / "report.json").read_text()) | {"report": str(path)}

    def write(self, *, seconds: float, rows: int, plots=(), **more) -> pathlib.Path:
        """Writes report.md and report.json."""
        lines = [f"- **{name}**: {reason}" for name, reason in self._problems.items()]
        lines += self.lacking()
        self.sections = [*self.tables(), *plots]
        if lines:
            self.sections.append(report.Section("What is missing", "\n".join(lines)))
        return report.write_report(
            self._output,
            self.title,
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
                "benchmark": self.benchmark,
                **self.results(),
                "problems": self._problems,
                **more,
            },
        )

    def _sheets(self, gallery: examples.Gallery) -> list[report.Section]:
        spread = gallery.examples[:: max(1, len(gallery.examples) // _EXAMPLES)][:_EXAMPLES]
        found = []
        for title, name, chosen in (
            ("Queries and their nearest candidates", "sheet.png", spread),
            ("Hardest failures", "failures.png", examples.hardest(gallery.failures, _FAILURES)),
        ):
            if chosen:
                report.plot_sheet(gallery.sheet(chosen), self._output / name)
                found.append(report.Section(title, image=name))
        return found

    def _shown(self, gallery: examples.Gallery) -> list[str]:
        """Names the set whose matrix of cosines is shown, if there is one."""
        names = [name for name in (*self.pair_sets, *gallery.pairs) if name in gallery.pairs]
        return names[:1]

    def _cosines(self, gallery: examples.Gallery) -> list[report.Section]:
        found = []
        for name in self._shown(gallery):
            matrix, (rows, columns) = gallery.pairs[name], self.pair_axes(name)
            place = self._output / "cosine.png"
            report.plot_cosine_matrices([(name, matrix)], place, axes=(rows, columns))
            note = f"A row for each {rows}, a column for its right {columns}. As UniME, Fig. 4."
            title = f"Cosines of {len(matrix)} pairs of {name}"
            found.append(report.Section(title, image="cosine.png", note=note))
        return found


def read_results(path) -> dict[str, Any]:
    """Reads the report.json of an evaluation.

    Raises:
      UserError: there is none, or it is of something else.
    """
    place = pathlib.Path(path).expanduser()
    place = place / "report.json" if place.is_dir() else place
    try:
        found = json.loads(place.read_text())
        kind = found["results"]["benchmark"] if "results" in found else found["title"]
        if kind not in _OF_BENCHMARK:
            raise UserError(f"{place}: the report of {kind!r}, not of MMEB or of retrieval")
        for key in (*_OF_ALL, *_OF_BENCHMARK[kind]):
            functools.reduce(operator.getitem, key.split("/"), found)
    except FileNotFoundError:
        raise UserError(f"{path}: no report.json there; give the output of an evaluation") from None
    except KeyError as error:
        why = f"it lacks {error.args[0]}"
        raise UserError(f"{place}: not the report of MMEB or of retrieval ({why})") from None
    except (OSError, ValueError, TypeError):
        raise UserError(f"{place}: not the report of MMEB or of retrieval") from None
    return found


# ---------------------------------------------------------------- numbers


def number(value: float) -> float | None:
    """Returns what JSON can hold: None where there is no number."""
    return None if math.isnan(value) else value


def percent(value: float | None) -> float | None:
    """Returns a share in percent; None where there is no number."""
    return None if value is None or math.isnan(value) else 100 * value


def signed(value: float | None) -> str:
    return ABSENT if value is None else f"{value:+.1f}"


def is_partial(record: Mapping[str, Any]) -> bool:
    """Tells whether a query or a candidate of a set or a direction had no vector."""
    return bool(record.get("left_out") or record.get("dropped_candidates"))


def not_whole(names: Sequence[str]) -> str:
    """Says which sets lack queries or candidates; "" where none does."""
    if not names:
        return ""
    listed = ", ".join(names[:_NAMED]) + (
        f" and {len(names) - _NAMED} more" if names[_NAMED:] else ""
    )
    return f"Not comparable, for some of their items have no vector: {listed}."
