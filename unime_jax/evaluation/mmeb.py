"""Runs MMEB: 36 sets, each item embedded once, a result kept after every set."""

import dataclasses
import pathlib
import time
from typing import Any

import numpy as np

from unime_jax import metrics, report, weights
from unime_jax.benchmarks import mmeb
from unime_jax.config import check_path
from unime_jax.data import mmeb_eval
from unime_jax.data.eval_items import ImageFolder, Items
from unime_jax.evaluation import checks, examples, hosts, mmeb_report, opening
from unime_jax.evaluation.encode import Encoder
from unime_jax.evaluation.page import read_results
from unime_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Measured:
    """What came of a set.

    Attributes:
      outcome: see `mmeb.Outcome`.
      queries: of its file.
      candidates: different ones, over all its queries.
      per_query: candidates of a query, the mean.
      problems: items without a vector and why, the first few.
      seconds: embedding and scoring.
    """

    outcome: mmeb.Outcome
    queries: int
    candidates: int
    per_query: float
    problems: dict[str, str]
    seconds: float


def validate(config) -> None:
    """Checks the configuration before any work."""
    checks.common(config, "of MMEB-eval's sets")
    mmeb.choose(config.sets)
    check_path(config, "images")
    if config.before and read_results(config.before)["results"]["benchmark"] != "mmeb":
        raise UserError(f"config.before={config.before}: not the output of an evaluation on MMEB")


def run(config) -> dict[str, Any]:
    """Measures what `config` names and returns what report.json holds."""
    found = weights.find(config.model.path)
    settings = opening.settings_of(found, config, benchmark="mmeb")
    items, sets, problems = _read(config)
    sets = hosts.same_sets(sets)
    encoder = opening.open_encoder(config, found, list(items), settings)
    return measure(config, encoder, items, sets, problems, settings)


def _read(config) -> tuple[Items, dict[str, mmeb_eval.Rows], dict[str, str]]:
    """Reads the sets that are there; returns them and what is wrong with the others."""
    source = pathlib.Path(config.data.path).expanduser()
    open_image = ImageFolder(pathlib.Path(config.images).expanduser(), config.image_root)
    items, sets, problems = Items(), {}, {}
    chosen = mmeb.choose(config.sets)
    with report.Progress(len(chosen), "reading sets", unit="set") as progress:
        for each in chosen:
            try:
                if files := mmeb_eval.files_of(source, each.name):
                    sets[each.name] = mmeb_eval.read(files, items, open_image, limit=config.limit)
                else:
                    problems[each.name] = f"not in {source}"
            except UserError as error:
                problems[each.name] = str(error)
            progress.advance(1, each.name)
    if not sets:
        first = next(iter(problems.values()))
        raise UserError(f"config.data.path={config.data.path}: no set of MMEB-eval in it ({first})")
    return items, sets, problems


def measure(
    config,
    encoder: Encoder,
    items: Items,
    sets: dict[str, mmeb_eval.Rows],
    problems: dict[str, str],
    settings: opening.Settings,
) -> dict[str, Any]:
    """Embeds and scores set by set; whatever ends it, the finished sets are in the report."""
    started = time.perf_counter()
    queries = sum(len(rows.queries) for rows in sets.values())
    print(f"{len(sets)} sets, {queries} queries, {encoder.describe()}", flush=True)
    page = mmeb_report.Page(config, settings, problems)
    shown = examples.Gallery(items)
    wanted = {name: _wanted(rows) for name, rows in sets.items()}
    begun = started

    def score(name: str) -> None:
        nonlocal begun
        rows = sets[name]
        task = _task(encoder, rows)
        outcome = mmeb.score(
            task, encoder.vectors, encoder.same, encoder.usable, metrics.first_places
        )
        measured = Measured(
            outcome,
            rows.total,
            len(np.unique(np.concatenate(task.candidates or [task.queries]))),
            float(np.mean([len(found) for found in task.candidates] or [0])),
            encoder.problems(items, wanted[name]),
            time.perf_counter() - begun,
        )
        shown.take(name, examples.of_mmeb(name, task, outcome), encoder)
        page.add(name, measured)
        if not outcome.answers:
            problems[name] = "no query could be scored; " + _hint(config, measured)
        begun = time.perf_counter()

    return page.fill(encoder, wanted, shown, score, lambda: time.perf_counter() - started)


def _wanted(rows: mmeb_eval.Rows) -> np.ndarray:
    return np.unique(np.concatenate([rows.queries, *rows.candidates]))


def _task(encoder: Encoder, rows: mmeb_eval.Rows) -> mmeb.Task:
    """Numbers items of the same content alike: the right candidate's copy is right as well."""
    return mmeb.Task(
        encoder.canonical[rows.queries], [encoder.canonical[found] for found in rows.candidates]
    )


def _hint(config, found: Measured) -> str:
    first = next(iter(found.problems.values()), "it has no queries")
    return f"{first} (config.images={config.images} is where the paths of its images start)"
