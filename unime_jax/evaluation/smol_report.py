"""The report of the newcomer's run: every stage beside chance, baselines and teacher.

Sentences: rank correlation with the teacher's similarities, and WordNet's definitions that look for
their example. Pictures: retrieval of captions and back.
"""

import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from unime_jax import metrics, report, runtime
from unime_jax.benchmarks import smol
from unime_jax.config import check, check_choice, check_keys, check_path, lookup
from unime_jax.data import pictures
from unime_jax.evaluation.smol import IDF, RIDGE, TEACHER, Measured, in_order, measure, read

KEYS = (
    *("benchmark", "output", "dtype", "limit", "models", "teacher.path", "runs"),
    *("data.path", "data.split", "data.features", "data.variants"),
)
OPTIONAL = ("models.", "teacher.path", "runs.", "data.features")
KS = (1, 5, 10)
MATRIX_PAIRS, SHEET_IMAGES = 50, 12
RUN_TITLES = {
    "stage1": "Stage 1: distillation",
    "align": "Alignment of the projector",
    "stage2": "Stage 2: hard negatives",
}
CHANCE = "chance"


def validate(config) -> None:
    """Checks the configuration before any work.

    Raises:
      UserError: the first impossible value, named with its key.
    """
    check_keys(config, KEYS, OPTIONAL)
    check(bool(config.output), "config.output is empty; name a directory with --config.output=DIR")
    runtime.check_output(config.output, "config.output")
    check(config.limit >= 0, f"config.limit={config.limit}: must not be negative; 0 means all")
    check_choice(config, "data.split", ("test", "validation"))
    check_choice(config, "dtype", ("float32", "bfloat16"))
    check_path(config, "data.path")
    named = [f"models.{name}" for name in in_order(config.models)]
    check(bool(named), "config.models is all empty; name one with --config.models.raw=DIR")
    for key in [*named, *(["teacher.path"] if config.teacher.path else [])]:
        check_path(config, key)
    for name, path in config.runs.items():
        check(
            not path or pathlib.Path(lookup(config, f"runs.{name}")).expanduser().is_dir(),
            f"config.runs.{name}={path}: no such run directory; leave it empty to do without",
        )


def run(config) -> dict[str, Any]:
    """Evaluates what `config` names and returns what report.json holds."""
    started = time.perf_counter()
    sentences, pairs = read(config)
    measured = measure(config, sentences, pairs)
    output = pathlib.Path(config.output).expanduser()
    sections = [
        report.Section("Sentences", _sentence_text(sentences), _sentence_table(measured, sentences))
    ]
    if any(name != RIDGE for name in measured.pairs):
        sections += _pair_sections(config, measured, pairs)
        sections += _pair_plots(output, measured, pairs)
    runs = {
        RUN_TITLES.get(name, name): report.read_metrics(pathlib.Path(path).expanduser())
        for name, path in in_order(config.runs).items()
    }
    if any(runs.values()):
        report.plot_losses(runs, output / "losses.png")
        sections.append(report.Section("Training", image="losses.png"))
    models = in_order(config.models)
    about = {
        "models": models,
        "split": config.data.split,
        "limit": config.limit,
        "ridge_strength": measured.strength,
        "seconds": round(time.perf_counter() - started, 1),
    }
    path = report.write_report(output, "Evaluation", sections, **about)
    _print(path, sections, list(models.values())[-1])
    tables = {s.title: s.table.records() for s in sections if s.table is not None}
    return {"report": str(path), "tables": tables, **about}


# ---------------------------------------------------------------- tables and plots


def _sentence_text(sentences: smol.Sentences) -> str:
    text = (
        "Spearman: rank correlation with the teacher's cosines over all pairs of "
        f"{len(sentences.heldout)} held-out sentences."
    )
    if not sentences.glosses:
        return text
    count = len(sentences.glosses)
    return f"{text} R@k, %: {count} definitions look for their own example sentence among all."


def _sentence_table(measured: Measured, sentences: smol.Sentences) -> report.Table:
    ks = (1, 10) if sentences.glosses else ()
    rows = dict(measured.sentences)
    chance = smol.chance_recall(np.eye(len(sentences.glosses), dtype=bool), ks)
    lines = [(CHANCE, 0.0, *(100 * chance[k] for k in ks))]
    if measured.teacher is not None:
        rows[TEACHER] = measured.teacher
    for name, vectors in rows.items():
        spearman = None
        if measured.teacher is not None:
            spearman = metrics.similarity_spearman(vectors.heldout, measured.teacher.heldout)
        task = vectors.gloss_to_example()
        recall = metrics.recall_at_k(task.similarity, task.relevant, ks)
        lines.append((name, spearman, *(100 * recall[k] for k in ks)))
    return report.Table(
        ("row", "Spearman", *(f"R@{k}" for k in ks)),
        lines,
        ("", ".3f", *[".1f"] * len(ks)),
        best=("Spearman", *(f"R@{k}" for k in ks)),
        reference=(CHANCE, IDF, TEACHER),
    )


def _recalls(measured: Measured, pairs: smol.Pairs, queries=None):
    """Returns direction -> row -> k -> recall, chance first; of some queries or of all."""
    queries = np.ones(len(pairs), bool) if queries is None else queries
    out: dict[str, dict[str, dict[int, float]]] = {}
    for name, vectors in measured.pairs.items():
        for direction, task in vectors.retrievals(pairs.keys).items():
            task = task.subset(queries)
            rows = out.setdefault(direction, {})
            rows.setdefault(CHANCE, smol.chance_recall(task.relevant, KS))
            rows[name] = metrics.recall_at_k(task.similarity, task.relevant, KS)
    return out


def _recall_table(measured: Measured, pairs: smol.Pairs, queries=None) -> report.Table:
    """Has a column for each direction and k, in percent."""
    recalls = _recalls(measured, pairs, queries)
    columns = {"i2t": recalls["image to text"], "t2i": recalls["text to image"]}
    header = ["row", *(f"{way} R@{k}" for way in columns for k in KS)]
    rows = []
    for name in columns["i2t"]:
        values = [100 * rows[name][k] for rows in columns.values() for k in KS]
        rows.append([name, *values])
    return report.Table(
        header,
        rows,
        ("", *[".1f"] * (len(header) - 1)),
        best=header[1:],
        reference=(CHANCE, RIDGE),
    )


def _pair_sections(config, measured: Measured, pairs: smol.Pairs) -> list[report.Section]:
    note = ""
    if measured.strength is not None:
        note = (
            "Ridge regression: from the pooled features of the frozen vision tower to the "
            "teacher's caption vectors, fitted on the training pairs in this run; its strength, "
            f"{measured.strength:.3g}, was chosen on the validation pairs."
        )
    text = (
        f"R@k, %, among all {len(pairs)} {config.data.split} pairs. "
        "i2t: an image looks for its caption; t2i: the reverse."
    )
    sections = [report.Section("Pictures", text, _recall_table(measured, pairs), note=note)]
    seen = np.array(pairs.seen, bool)
    for word, queries, what in (
        ("seen", seen, "whose caption's every content word occurs in a training caption"),
        ("unseen", ~seen, "with a content word that no training caption has"),
    ):
        if queries.any():
            text = f"The {queries.sum()} pairs {what}; candidates are all {len(pairs)}."
            table = _recall_table(measured, pairs, queries)
            sections.append(report.Section(f"Pictures, {word} words", text, table))
    return sections


def _pair_plots(output, measured: Measured, pairs: smol.Pairs) -> list[report.Section]:
    recalls = {way.capitalize(): rows for way, rows in _recalls(measured, pairs).items()}
    report.plot_recall(recalls, output / "recall.png", reference=(CHANCE, RIDGE))
    models = {name: vectors for name, vectors in measured.pairs.items() if name != RIDGE}
    some = smol.spread(len(pairs), MATRIX_PAIRS)
    matrices = [(name, v.images[some] @ v.captions[some].T) for name, v in models.items()]
    report.plot_cosine_matrices(matrices, output / "cosine.png")
    name, vectors = list(models.items())[-1]
    shown = smol.spread(len(pairs), SHEET_IMAGES)
    report.plot_retrieval_sheet(
        [np.asarray(pictures.load_rgb(pairs.images[i])) for i in shown],
        pairs.captions,
        vectors.images[shown] @ vectors.captions.T,
        shown.tolist(),
        output / "retrieval.png",
    )
    return [
        report.Section("Recall", image="recall.png"),
        report.Section(
            f"Cosines of {len(some)} pairs",
            image="cosine.png",
            note="Rows: images. As UniME, Fig. 4.",
        ),
        report.Section(
            f"Nearest captions, {name}",
            image="retrieval.png",
            note=f"Pictures evenly spread over all {len(pairs)}, candidates all captions. "
            "The longer the bar, the higher the cosine.",
        ),
    ]


def _print(path: pathlib.Path, sections: Sequence[report.Section], model: str) -> None:
    report.print_report(path, sections)
    print(
        "next    python -c \"import unime_jax; m = unime_jax.load('" + model + "'); "
        "v = m.embed(texts=['a puppy', 'a young dog', 'a car']); print(v @ v.T)\""
    )
