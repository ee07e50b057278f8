"""Trains variants of the small pipeline and compares them: stages, negatives, margin, k.

    python -m unime_jax.ablate --config configs/smol_ablation.py[:quick|:smoke]

Every variant is trained on each split of the data with each seed (config.splits, config.seeds). Its
learning rate is the best of config.rates on the validation data of the first split and seed; the
test data are seen by the chosen run alone. Finished runs are skipped: interrupted or killed, the
same command goes on. Writes report.md, report.json and differences.png to config.output, anew after
every split and seed.
"""

import contextlib
import itertools
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from unime_jax import ablation, cluster, embedder, metrics, report, runtime
from unime_jax.ablation import Run, Variant
from unime_jax.config import check, parse
from unime_jax.data import sources
from unime_jax.evaluation import smol
from unime_jax.types import UserError

MAIN = "mean R@10"
FAMILIES = {
    "stages": "Stages",
    "negatives": "Negatives",
    "margin": "False-negative margin",
    "k": "Negatives per query",
}
METRICS = ("i2t R@1", "t2i R@1", "i2t R@10", "t2i R@10", MAIN, "Spearman", "gloss R@10")


def main(argv: list[str]) -> None:
    config = parse(argv, __doc__)
    validate(config)
    # A GPU is shared with the training processes: nobody takes all of its memory beforehand.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    runtime.start()
    run(config)


def validate(config) -> None:
    """Checks the configuration before any work.

    Raises:
      UserError: the first impossible value, named with its key.
    """
    check(bool(config.output), "config.output is empty; name a directory with --config.output=DIR")
    for key in ("seeds", "splits", "rates"):
        found = config[key]
        check(len(found) > 0, f"config.{key} is empty")
        check(len(set(found)) == len(found), f"config.{key}={found}: the same twice")
    check(all(rate > 0 for rate in config.rates), f"config.rates={config.rates}: above 0")
    check(all(split > 0 for split in config.splits), f"config.splits={config.splits}: from 1 on")
    ablation.read_variants(config.variants)


def run(config) -> pathlib.Path:
    """Trains what is not trained yet and returns the path of report.md."""
    variants = ablation.read_variants(config.variants)
    cells = list(itertools.product(config.splits, config.seeds))
    output = pathlib.Path(config.output).expanduser()
    work = _Work(config, output, len(variants) * (len(config.rates) + len(cells) - 1))
    work.expect([v.stage for v in variants] * (len(config.rates) + len(cells) - 1))
    rates: dict[str, float] = {}
    scores: ablation.Scores = {}
    for split, seed in cells:
        chosen: dict[str, pathlib.Path] = {}
        for variant in variants:
            base = str(chosen[variant.base]) if variant.base else work.student(split)
            trial = variant.name not in rates
            wanted = config.rates if trial else (rates[variant.name],)
            runs = [Run(variant, split, seed, rate, trial) for rate in wanted]
            validation = {run.rate: work.train(run, base) for run in runs}
            if trial:
                rates[variant.name] = ablation.chosen_rate(validation)
            best = next(run for run in runs if run.rate == rates[variant.name])
            for other in runs:  # trials that lost need no more disk
                if other is not best:
                    shutil.rmtree(other.directory(output) / "checkpoints", ignore_errors=True)
            chosen[variant.name] = best.directory(output)
            scores.setdefault(variant.name, {})[split, seed] = work.test(best)
        path = _report(config, output, variants, scores, rates)
    print(f"\nreport  {path}\nplot    {output / 'differences.png'}")
    return path


class _Work:
    """Trains and measures runs, and tells how far it is."""

    def __init__(self, config, output: pathlib.Path, total: int):
        self._config, self._output, self._total = config, output, total
        self._number = 0
        self._clock = ablation.Clock()
        self._left: list[str] = []
        self._stages: dict[str, Any] = {}  # their configs, as they are without changes
        self._measures: dict[int, _Measure] = {}

    def expect(self, stages: Sequence[str]) -> None:
        """Notes the stages of all runs to come."""
        self._left = list(stages)

    def student(self, split: int) -> str:
        return str(self._assets(split) / "student")

    def train(self, run: Run, base: str) -> float:
        """Trains a run, if it is not there, and returns its validation score in percent."""
        self._number += 1
        self._left.remove(run.variant.stage)
        directory = run.directory(self._output)
        flags = self._flags(run, base)
        known = ablation.read_result(directory)
        if known and known["flags"] != flags:
            raise UserError(
                f"{directory} holds a run of other settings: choose another config.output or "
                "remove that directory"
            )
        if not known:
            started = time.monotonic()
            self._say(run)
            if run.variant.stage == "stage1":
                self._teach(run.split)
            score = self._trained(run, flags)
            known = {"flags": flags, "validation": score, "seconds": time.monotonic() - started}
            ablation.write_result(directory, known)
        self._clock.add(run.variant.stage, known["seconds"])
        return -math.inf if known["validation"] is None else known["validation"]

    def _trained(self, run: Run, flags: Sequence[str]) -> float | None:
        """Trains a run and returns its validation score; None if a trial's loss was not finite."""
        directory, name = run.directory(self._output), self._stage_config(run.variant.stage)
        before = ablation.divergences(directory)
        try:
            _call([sys.executable, "-m", "unime_jax.train", *name, *flags], directory)
        except UserError:
            if run.trial and ablation.divergences(directory) - before:
                return None
            raise
        wanted, done = self._steps(run.variant.stage, flags), ablation.steps_done(directory)
        if done < wanted:
            raise UserError(
                f"{directory}: training was stopped after {done} of {wanted} steps; the same "
                "command goes on from there"
            )
        score = self._measure(run.split).validation(directory, run.variant.stage)
        return score if math.isfinite(score) else None

    def test(self, run: Run) -> dict[str, float]:
        """Returns a trained run's scores on the test data, in percent."""
        directory = run.directory(self._output)
        known = ablation.read_result(directory)
        if "test" not in known:
            started = time.monotonic()
            known["test"] = self._measure(run.split).test(directory, run.variant.stage)
            known["seconds"] += time.monotonic() - started
            ablation.write_result(directory, known)
        return known["test"]

    def _say(self, run: Run) -> None:
        left = self._clock.left([*self._left, run.variant.stage])
        ahead = "" if left is None else f"; about {report.format_seconds(left)} left"
        place = f"split {run.split}, seed {run.seed}"
        print(
            f"[{self._number}/{self._total}] {place}: {run.variant.name}, "
            f"learning rate x {run.rate:.3g}{ahead}",
            flush=True,
        )

    def _stage_config(self, stage: str) -> list[str]:
        variant = ":smoke" if self._config.smoke else ""
        return [f"--config={self._config.configs}/smol_{stage}.py{variant}"]

    def _default(self, stage: str) -> Any:
        if stage not in self._stages:
            self._stages[stage] = parse(["ablate", *self._stage_config(stage)], "")
        return self._stages[stage]

    def _steps(self, stage: str, flags: Sequence[str]) -> int:
        """Returns how many steps a run has; 0 where the data decide."""
        changed = dict(flag.removeprefix("--config.").split("=", 1) for flag in flags)
        train = self._default(stage).train
        by_data = float(changed.get("train.epochs", train.epochs)) > 0
        return 0 if by_data else int(changed.get("train.steps", train.steps))

    def _flags(self, run: Run, base: str) -> list[str]:
        """Returns what a run changes in the config of its stage."""
        stage, assets = run.variant.stage, self._assets(run.split)
        learning_rate = self._default(stage).optim.learning_rate * run.rate
        values: dict[str, Any] = {
            "seed": run.seed,
            "output": run.directory(self._output),
            "model.path": base,
            "data.path": assets / "data",
            "optim.learning_rate": float(f"{learning_rate:.4g}"),
            "eval.every_steps": 0,
            "checkpoint.keep": 1,
        }
        if stage == "stage1":
            values["teacher.path"] = assets / "teacher"
            values["teacher.vectors"] = assets / "teacher-vectors"
        else:
            values["data.features"] = assets / "features"
        if self._config.steps:
            values["train.steps"] = self._config.steps
        values |= dict(run.variant.changes)
        return [f"--config.{key}={value}" for key, value in values.items()]

    def _assets(self, split: int) -> pathlib.Path:
        """Returns the directory of a split's models and data, prepared if they are not there."""
        cache = pathlib.Path(self._config.assets).expanduser()
        path = cache / runtime.smol_name(smoke=self._config.smoke, split=split)
        if not (path / "prepared.json").is_file():
            print(f"preparing split {split}", flush=True)
            command = ["unime_jax.prepare", "smol", "--cache", str(cache), "--split", str(split)]
            smoke = ["--smoke"] if self._config.smoke else []
            _call([sys.executable, "-m", *command, *smoke], self._output / f"split{split}")
        return path

    def _teach(self, split: int) -> None:
        """Embeds the split's sentences with the teacher; what is there is kept."""
        assets = self._assets(split)
        values = {
            "data.path": assets / "data",
            "teacher.path": assets / "teacher",
            "teacher.vectors": assets / "teacher-vectors",
        }
        flags = [f"--config.{key}={value}" for key, value in values.items()]
        name = self._stage_config("stage1")
        place = self._output / f"split{split}"
        _call([sys.executable, "-m", "unime_jax.teach", *name, *flags], place)

    def _measure(self, split: int) -> "_Measure":
        if split not in self._measures:
            self._measures = {split: _Measure(self._assets(split))}
        return self._measures[split]


class _Measure:
    """Scores runs on a split: half of the held-out sentences are for validation, half for tests."""

    def __init__(self, assets: pathlib.Path):
        data = assets / "data"
        self._pairs = {part: smol.read_pairs(data, part) for part in ("validation", "test")}
        self._heldout = smol.read_heldout(data, teacher=str(assets / "teacher"))
        self._glosses = sources.split_sentences(data, "gloss_to_example")
        self._loaded: tuple[pathlib.Path, embedder.Embedder] | None = None

    def _model(self, directory: pathlib.Path) -> embedder.Embedder:
        """Loads a run; the last one is kept, for its tests mostly follow its validation."""
        if self._loaded is None or self._loaded[0] != directory:
            self._loaded = None  # before the next one is in memory
            self._loaded = directory, embedder.load(directory, dtype="float32")
        return self._loaded[1]

    def validation(self, directory: pathlib.Path, stage: str) -> float:
        model = self._model(directory)
        if stage == "stage1":
            return self._spearman(model, first=0)
        return self._recalls(model, "validation")[MAIN]

    def test(self, directory: pathlib.Path, stage: str) -> dict[str, float]:
        model = self._model(directory)
        found = {} if stage == "stage1" else self._recalls(model, "test")
        found["Spearman"] = self._spearman(model, first=1)
        definitions = model.embed(texts=[row["text"] for row in self._glosses])
        examples = model.embed(texts=[row["second"] for row in self._glosses])
        own = np.arange(len(examples))
        found["gloss R@10"] = 100 * metrics.recall_at_k(definitions @ examples.T, own, (10,))[10]
        return found

    def _spearman(self, model: embedder.Embedder, *, first: int) -> float:
        """Compares every second held-out sentence with the teacher."""
        vectors = model.embed(texts=self._heldout.texts[first::2])
        return 100 * metrics.similarity_spearman(vectors, self._heldout.teacher[first::2])

    def _recalls(self, model: embedder.Embedder, part: str) -> dict[str, float]:
        recalls = smol.validation_recall(model, self._pairs[part])
        found = {
            f"{short} R@{k}": 100 * recalls[f"validation/{way}_recall_at_{k}"]
            for short, way in (("i2t", "image_to_text"), ("t2i", "text_to_image"))
            for k in (1, 10)
        }
        found[MAIN] = (found["i2t R@10"] + found["t2i R@10"]) / 2
        return found


def _call(command: Sequence[str], directory: pathlib.Path) -> None:
    """Runs a command of ours; what it prints goes to a file, its progress to the terminal.

    Raises:
      UserError: it failed.
      KeyboardInterrupt: the user stopped it, once it has saved what it did.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / f"{command[2].rpartition('.')[2]}.log"
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, env=cluster.environment_alone())
        stopped = False
        with _passing_on(process):
            while process.poll() is None:
                try:
                    process.wait()
                except KeyboardInterrupt:  # Ctrl-C reaches the child as well: it saves and ends
                    stopped = True
    if stopped or -process.returncode in (signal.SIGINT, signal.SIGTERM):
        raise KeyboardInterrupt
    if process.returncode:
        how = f"failed with exit code {process.returncode}"
        if process.returncode < 0:
            how = f"was ended by {signal.Signals(-process.returncode).name}"
            how += ", as by a lack of memory" if -process.returncode == signal.SIGKILL else ""
        raise UserError(f"python {' '.join(command[1:4])} {how}, see above and {log}")


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen):
    """Passes SIGTERM on to a child, and takes it as Ctrl-C."""

    def stop(*_):
        process.terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------- report


def _report(
    config,
    output: pathlib.Path,
    variants: Sequence[Variant],
    scores: ablation.Scores,
    rates: dict[str, float],
) -> pathlib.Path:
    """Writes the report of what is there so far, and prints its tables."""
    (reference,) = (v.name for v in variants if v.family == ablation.REFERENCE)
    cells = list(dict.fromkeys(cell for found in scores.values() for cell in found))
    sections, panels, titles = [], {}, dict(config.reference)
    for family, title in FAMILIES.items():
        members = [v for v in variants if v.family in (family, ablation.REFERENCE)]
        if len(members) < 2:
            continue
        own = titles.get(family, reference)
        table = ablation.table(members, scores, rates, METRICS, MAIN, own)
        sections.append(report.Section(title, table=table))
        panels[title] = [
            (own if v.name == reference else v.name, found.values, found.mean, found.error)
            for v in members
            if (found := ablation.paired(scores, v.name, reference, MAIN))
        ]
    label = f"{MAIN} on the test pairs, difference to “{reference}” in points"
    report.plot_differences(panels, output / "differences.png", label=label)
    sections.append(report.Section("Paired differences", image="differences.png"))
    text = (
        f"{len(cells)} trainings of each variant (splits x seeds). Mean ± standard deviation over "
        f"them; the last column is the mean of the paired differences to “{reference}” ± its "
        "standard error. Rate: times the learning rate of the stage's config, the best of "
        f"{len(config.rates)} on validation data. In percent; R@k of the test pairs, Spearman "
        "(x 100) of held-out sentences."
    )
    if config.smoke:
        text = f"A smoke run of {config.steps} steps: the numbers mean nothing. {text}"
    sections.insert(0, report.Section("How to read it", text))
    path = report.write_report(
        output, "Ablations", sections,
        rates=rates,
        scores={
            name: [{"split": split, "seed": seed, **found} for (split, seed), found in by.items()]
            for name, by in scores.items()
        },
    )  # fmt: skip
    for section in sections:
        if section.table is not None:
            print(f"\n{section.title}, {len(cells)} of each\n\n{section.table.text()}", flush=True)
    return path


if __name__ == "__main__":
    runtime.run_entry(main)
