"""Trains variants of the small pipeline and compares them: stages, negatives, margin, k.

    python -m unime_jax.ablate --config configs/smol_ablation.py[:quick|:smoke]

Every variant is trained on each split of the data with each seed (config.splits, config.seeds). Its
learning rate is the best of its stage's in config.rates on the validation data of the first split
and seed; the test data are seen by the chosen run alone. A run whose loss is not finite is listed
as diverged, with what would have started from it, and the rest goes on. Finished runs are skipped:
interrupted or killed, the same command goes on. Writes report.md, report.json and differences.png
to config.output, anew after every variant.
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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from unime_jax import ablation, cluster, embedder, metrics, report, runtime
from unime_jax.ablation import Run, Variant
from unime_jax.config import check, check_keys, parse, validate_values
from unime_jax.data import sources
from unime_jax.evaluation import smol
from unime_jax.types import UserError


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
    check("variants" in config, "this config is of no ablation: take configs/smol_ablation.py")
    check_keys(config, ablation.KEYS)
    check(bool(config.output), "config.output is empty; name a directory with --config.output=DIR")
    runtime.check_output(config.output, "config.output")
    lists = {"seeds": config.seeds, "splits": config.splits}
    lists |= {f"rates.{stage}": config.rates[stage] for stage in ablation.STAGES}
    for key, found in lists.items():
        check(len(found) > 0, f"config.{key} is empty")
        check(len(set(found)) == len(found), f"config.{key}={found}: the same twice")
        if key != "seeds":
            low = "from 1 on" if key == "splits" else "above 0"
            check(all(value > 0 for value in found), f"config.{key}={found}: {low}")
    for variant in ablation.read_variants(config.variants):
        changes = dict(config.changes[variant.stage]) | dict(variant.changes)
        flags = [f"--config.{key}={value}" for key, value in changes.items()]
        validate_values(parse(["ablate", *_stage_flags(config, variant.stage), *flags], ""))


def _stage_flags(config, stage: str) -> list[str]:
    """Returns the arguments of a training command that name the config of a stage."""
    return [f"--config={config.configs}/smol_{stage}.py{':smoke' if config.smoke else ''}"]


def run(config) -> pathlib.Path:
    """Trains what is not trained yet and returns the path of report.md."""
    variants = ablation.read_variants(config.variants)
    output = pathlib.Path(config.output).expanduser()
    cells = list(itertools.product(config.splits, config.seeds))
    work = _Work(config, output)
    work.expect(stage for v in variants for stage in [v.stage] * (len(cells) - 1))
    work.expect(stage for v in variants for stage in [v.stage] * len(config.rates[v.stage]))
    found = ablation.Findings()
    for cell in cells:
        chosen: dict[str, Run] = {}
        for variant in variants:
            if best := _best(work, variant, cell, chosen, found):
                chosen[variant.name] = best
                if variant.family:  # a step on the way stands in no table
                    found.scores.setdefault(variant.name, {})[cell] = work.test(best)
            path, sections = ablation.write_report(config, output, variants, found)
        report.print_report(path, sections)
    return path


def _best(
    work: "_Work",
    variant: Variant,
    cell: ablation.Cell,
    chosen: Mapping[str, Run],
    found: ablation.Findings,
) -> Run | None:
    """Trains a variant, with every rate in the first cell; None where nothing came of it.

    Args:
      work: trains.
      variant: to train.
      cell: split and seed.
      chosen: runs of this cell, by variant; the base is one of them.
      found: rates of earlier cells; gets the variant's, or why there is no run.
    """
    trial = variant.name not in found.rates
    rates = work.rates(variant) if trial else [found.rates[variant.name]]
    runs = [Run(variant, *cell, rate, trial) for rate in rates if rate is not None]
    baseless = bool(variant.base) and variant.base not in chosen
    if not runs or baseless:
        work.pass_over(variant.stage, len(rates))
        if trial:  # nothing will come of its base in other cells either
            found.rates[variant.name] = None
        reason = f"no run of {variant.base!r} to start from" if baseless else "diverged before"
        found.missing.setdefault(variant.name, {})[cell] = reason
        return None
    base = chosen[variant.base].directory(work.output) if variant.base else work.student(cell[0])
    results = {run: work.train(run, str(base)) for run in runs}
    if trial:
        scores = {run.rate: result["validation"] for run, result in results.items()}
        found.rates[variant.name] = ablation.chosen_rate(scores)
    kept = [run for run in runs if run.rate == found.rates[variant.name]]
    for run in set(runs) - set(kept):  # trials that lost need no more disk
        shutil.rmtree(run.directory(work.output) / "checkpoints", ignore_errors=True)
    if not kept or results[kept[0]]["diverged"]:
        found.missing.setdefault(variant.name, {})[cell] = "diverged"
        return None
    return kept[0]


class _Work:
    """Trains and measures runs, and tells how far it is."""

    def __init__(self, config, output: pathlib.Path):
        self._config, self.output = config, output
        self._number = 0
        self._clock = ablation.Clock()
        self._left: list[str] = []
        self._stages: dict[str, Any] = {}  # their configs, as they are without changes
        self._measures: dict[int, _Measure] = {}

    def expect(self, stages: Iterable[str]) -> None:
        """Notes the stages of runs to come."""
        self._left += stages

    def pass_over(self, stage: str, count: int) -> None:
        """Notes that runs of a stage, expected before, will not be."""
        self._number += count
        for _ in range(count):
            self._left.remove(stage)

    def rates(self, variant: Variant) -> Sequence[float]:
        return self._config.rates[variant.stage]

    def student(self, split: int) -> pathlib.Path:
        return self._assets(split) / "student"

    def train(self, run: Run, base: str) -> dict[str, Any]:
        """Trains a run, if it is not there, and returns what is known of it.

        "diverged": whether its loss was not finite. "validation": of a trial, its score in percent,
        None where it diverged.
        """
        self._number += 1
        self._left.remove(run.variant.stage)
        directory = run.directory(self.output)
        flags = self._flags(run, base)
        known = ablation.read_result(directory)
        if known and known["flags"] != flags:
            raise UserError(
                f"{directory} holds a run of other settings: choose another config.output or "
                "remove that directory"
            )
        if known:  # of before it was noted: only a trial without a score had diverged
            known.setdefault("diverged", run.trial and known.get("validation") is None)
        else:
            started = time.monotonic()
            self._say(run)
            if run.variant.stage == "stage1":
                self._teach(run.split)
            diverged, score = not self._finishes(run, flags), None
            if run.trial and not diverged:
                score = self._measure(run.split).validation(directory, run.variant.stage)
                diverged = not math.isfinite(score)
            known = {
                "flags": flags,
                "diverged": diverged,
                "validation": None if diverged else score,
                "seconds": time.monotonic() - started,
            }
            ablation.write_result(directory, known)
            if diverged:
                print("  diverged: its loss was not finite", flush=True)
        self._clock.add(run.variant.stage, known["seconds"])
        return known

    def _finishes(self, run: Run, flags: Sequence[str]) -> bool:
        """Trains a run to its end; False if its loss was not finite."""
        directory, name = run.directory(self.output), _stage_flags(self._config, run.variant.stage)
        before = ablation.divergences(directory)
        try:
            _call([sys.executable, "-m", "unime_jax.train", *name, *flags], directory)
        except UserError:
            if ablation.divergences(directory) - before:
                return False
            raise
        wanted, done = self._steps(run.variant.stage, flags), ablation.steps_done(directory)
        if done < wanted:
            raise UserError(
                f"{directory}: training was stopped after {done} of {wanted} steps; the same "
                "command goes on from there"
            )
        return True

    def test(self, run: Run) -> dict[str, float]:
        """Returns a trained run's scores on the test data, in percent."""
        directory = run.directory(self.output)
        known = ablation.read_result(directory)
        if "test" not in known:
            started = time.monotonic()
            known["test"] = self._measure(run.split).test(directory, run.variant)
            known["seconds"] += time.monotonic() - started
            ablation.write_result(directory, known)
        return known["test"]

    def _say(self, run: Run) -> None:
        left = self._clock.left([*self._left, run.variant.stage])
        ahead = "" if left is None else f"; about {report.format_seconds(left)} left"
        place = f"split {run.split}, seed {run.seed}"
        print(
            f"[{self._number}/{self._number + len(self._left)}] {place}: {run.variant.name}, "
            f"learning rate x {run.rate:.3g}{ahead}",
            flush=True,
        )

    def _default(self, stage: str) -> Any:
        if stage not in self._stages:
            self._stages[stage] = parse(["ablate", *_stage_flags(self._config, stage)], "")
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
            "output": run.directory(self.output),
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
        values |= dict(self._config.changes[stage]) | dict(run.variant.changes)
        return [f"--config.{key}={value}" for key, value in values.items()]

    def _assets(self, split: int) -> pathlib.Path:
        """Returns the directory of a split's models and data, prepared if they are not there."""
        cache = pathlib.Path(self._config.assets).expanduser()
        path = cache / runtime.smol_name(smoke=self._config.smoke, split=split)
        if not (path / "prepared.json").is_file():
            print(f"preparing split {split}", flush=True)
            command = ["unime_jax.prepare", "smol", "--cache", str(cache), "--split", str(split)]
            smoke = ["--smoke"] if self._config.smoke else []
            _call([sys.executable, "-m", *command, *smoke], self.output / f"split{split}")
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
        name = _stage_flags(self._config, "stage1")
        place = self.output / f"split{split}"
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
        return self._recalls(model, "validation")[ablation.MAIN]

    def test(self, directory: pathlib.Path, variant: Variant) -> dict[str, float]:
        model = self._model(directory)
        found = {} if variant.stage == "stage1" else self._recalls(model, "test")
        if variant.family not in ablation.WITH_SENTENCES:
            return found
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
        found[ablation.MAIN] = (found["i2t R@10"] + found["t2i R@10"]) / 2
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


if __name__ == "__main__":
    runtime.run_entry(main)
