"""Ablations: what is run, in which order, what is chosen on what, and how it is compared."""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import processes
import pytest
from PIL import Image

from unime_jax import ablate, ablation, report, runtime
from unime_jax.ablation import Variant
from unime_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'smol_ablation.py'}"


def config_of(*flags: str):
    return ablate.parse(["ablate", *flags], "")


class Machine:
    """Stands for training and measuring; a run scores higher, the nearer its rate to `best`."""

    def __init__(self, monkeypatch, best=1.0):
        self.best, self.commands, self.tested, self.stop_at = best, [], [], None
        self.steps, self.diverges = 10**6, ""  # of a run; in the paths of those that fail
        monkeypatch.setattr(ablate, "_call", self.call)
        monkeypatch.setattr(ablate, "_Measure", lambda assets: self)

    def call(self, command, directory):
        if self.stop_at == len(self.commands):
            raise KeyboardInterrupt
        self.commands.append(command)
        (directory / "checkpoints" / str(self.steps)).mkdir(parents=True, exist_ok=True)
        if self.diverges and self.diverges in str(directory):
            (directory / "not_finite_step_3.json").write_text("{}")
            raise UserError("step 3: loss nan")

    def score(self, directory):
        rate = float(directory.name.rpartition("-rate")[2])
        return 50.0 - abs(np.log(rate / self.best))

    def validation(self, directory, stage):
        return self.score(directory)

    def test(self, directory, variant):
        self.tested.append(directory)
        cell = sum(map(int, filter(str.isdigit, directory.parent.name)))
        easy = "easy" in directory.name
        return dict.fromkeys((*ablation.PICTURES, *ablation.SENTENCES), 40.0 + cell - 3 * easy)

    def trained(self):
        return [dict(f[9:].split("=", 1) for f in c[4:]) for c in self.commands if "train" in c[2]]


plot_differences = report.plot_differences


@pytest.fixture
def machine(monkeypatch):
    # After every run a plot is drawn, which takes a second.
    monkeypatch.setattr(report, "plot_differences", lambda *_, **__: None)
    return Machine(monkeypatch)


@pytest.fixture
def assets(tmp_path):
    for split in (1, 2, 3):
        for smoke in (True, False):
            path = tmp_path / "cache" / runtime.smol_name(smoke=smoke, split=split)
            path.mkdir(parents=True)
            (path / "prepared.json").write_text("{}")
    return [f"--config.assets={tmp_path / 'cache'}", f"--config.output={tmp_path / 'out'}"]


def test_every_variant_chooses_its_rate_once_by_validation_alone(
    machine, assets, tmp_path, capsys, monkeypatch
):
    machine.best, drawn = 3.0, []
    monkeypatch.setattr(report, "plot_differences", lambda *args, **how: drawn.append((args, how)))
    flags = ["--config.seeds=(0, 1)", "--config.splits=(1, 2)"]
    ablate.run(config_of(CONFIG, *assets, *flags))
    variants = len(config_of(CONFIG).variants)
    trained = machine.trained()
    assert len(trained) == variants * (3 + 3)  # 3 rates in the first cell, one in 3 others
    tested = 4 * (variants - 1)  # the teacher's distillation stands in no table
    assert len(machine.tested) == len(set(machine.tested)) == tested
    assert all(directory.name.endswith("rate3") for directory in machine.tested)
    first = [run for run in trained if "split1-seed0/both-" in run["output"]]
    assert sorted(float(run["optim.learning_rate"]) for run in first) == [3.333e-6, 1e-5, 3e-5]
    for run in first:  # on the chosen run of its base, of the same split and seed
        assert run["model.path"] == str(tmp_path / "out" / "split1-seed0" / "stage-1-rate3")
    other = next(run for run in trained if "split2-seed1/easy" in run["output"])
    assert other["model.path"].endswith("split2-seed1/stage-1-rate3")
    assert other["loss.negatives"] == "easy" and other["seed"] == "1"
    assert other["data.path"].endswith("smol-split2/data")
    assert not (tmp_path / "out" / "split1-seed0" / "both-rate1" / "checkpoints").exists()
    assert (tmp_path / "out" / "split1-seed0" / "both-rate3" / "checkpoints").exists()
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {row["variant"]: row for row in content["tables"]["Negatives"]}
    assert rows["easy negatives"]["mean R@10 - both"] == "-3.0 ± 0.0"
    both = rows["hard negatives (both)"]
    assert both["mean R@10 - both"] is None and both["rate"] == "x 3"
    values = [40 + split + seed for split in (1, 2) for seed in (0, 1)]
    assert both["i2t R@1"] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert "[1/" in capsys.readouterr().out
    args, how = drawn[-1]
    plot_differences(*args, **how)
    with Image.open(tmp_path / "out" / "differences.png") as image:
        assert image.width > 900


@pytest.fixture
def one(assets):
    """The quick comparison with a single seed."""
    return [CONFIG + ":quick", *assets, "--config.seeds=(0,)"]


def test_finished_runs_are_skipped_and_a_stop_costs_nothing(machine, one):
    config = config_of(*one)
    machine.stop_at = 14
    with pytest.raises(KeyboardInterrupt):
        ablate.run(config)
    machine.stop_at = None
    ablate.run(config)
    outputs = [run["output"] for run in machine.trained()]
    wanted = sum(len(config.rates[stage]) for *_, stage, _ in config.variants)
    assert len(outputs) == len(set(outputs)) == wanted
    count, tested = len(machine.commands), len(machine.tested)
    ablate.run(config)
    assert (len(machine.commands), len(machine.tested)) == (count, tested)
    with pytest.raises(UserError, match="holds a run of other settings"):
        ablate.run(config_of(*one, "--config.changes.align=(('train.steps', 7),)"))


def test_a_run_that_diverges_is_listed_and_the_rest_goes_on(machine, assets, tmp_path, capsys):
    machine.best = 8.0
    config = config_of(CONFIG + ":quick", *assets)

    def results():
        ablate.run(config)
        found = json.loads((tmp_path / "out/report.json").read_text())
        return found["missing"], found["rates"], {n: len(by) for n, by in found["scores"].items()}

    machine.diverges = "seed0/both-rate8"  # a trial loses
    missing, rates, _ = results()
    assert not missing and rates["both"] == 1
    lost = json.loads((tmp_path / "out/split1-seed0/both-rate8/ablation.json").read_text())
    assert lost["diverged"] and lost["validation"] is None
    count = len(machine.commands)
    ablate.run(config)  # it is not tried again
    assert len(machine.commands) == count

    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    machine.diverges = "seed1/stage-1-rate"  # what no longer chooses
    missing, rates, scores = results()
    assert missing["stage 1"] == [{"split": 1, "seed": 1, "reason": "diverged"}]
    assert missing["both"][0]["reason"] == "no run of 'stage 1' to start from"
    assert scores["stage 1"] == scores["both"] == 2 and scores["stage 2"] == 3
    out = capsys.readouterr().out
    assert "- both: no run of 'stage 1' to start from (split/seed 1/1)" in out
    total = sum(len(config.rates[stage]) + 2 for *_, stage, _ in config.variants)
    assert f"[{total}/{total}]" in out

    shutil.rmtree(tmp_path / "out")
    machine.diverges = "/both-rate"  # the reference, with every rate
    missing, rates, scores = results()
    assert rates["both"] is None and "both" not in scores and scores["easy negatives"] == 3
    reasons = [each["reason"] for each in missing["both"]]
    assert reasons == ["diverged", "diverged before", "diverged before"]


def test_nothing_comes_of_what_starts_from_a_base_that_always_diverges(machine, assets, capsys):
    config = config_of(CONFIG + ":quick", *assets)
    machine.diverges = "/stage-1-rate"
    ablate.run(config)
    found = json.loads((pathlib.Path(config.output) / "report.json").read_text())
    reasons = [each["reason"] for each in found["missing"]["both"]]
    assert reasons == ["no run of 'stage 1' to start from"] * 3 and found["rates"]["both"] is None
    assert [each["reason"] for each in found["missing"]["stage 1"]][1:] == ["diverged before"] * 2
    assert len(found["scores"]["stage 2"]) == 3
    # Those that are passed over count as well, wherever they stand.
    total = sum(len(config.rates[stage]) + 2 for *_, stage, _ in config.variants)
    counted = re.findall(r"\[\d+/(\d+)\]", capsys.readouterr().out)
    assert set(counted) == {str(total)} and len(counted) > 10


def test_results_of_before_divergence_was_noted_are_read(machine, one):
    config = config_of(*one)
    ablate.run(config)
    count = len(machine.commands)
    for path in pathlib.Path(config.output).glob("*/*/ablation.json"):
        known = json.loads(path.read_text())
        del known["diverged"]
        path.write_text(json.dumps(known))
    ablate.run(config)
    assert len(machine.commands) == count


def test_a_training_that_was_stopped_early_is_not_measured(machine, one):
    machine.steps = 2
    with pytest.raises(UserError, match=r"stopped after 2 of \d\d+ steps"):
        ablate.run(config_of(*one))
    assert not machine.tested


def test_missing_splits_are_prepared(machine, assets, tmp_path):
    (tmp_path / "cache" / "smol-split2" / "prepared.json").unlink()
    flags = ["--config.seeds=(0,)", "--config.splits=(2,)"]
    ablate.run(config_of(CONFIG, *assets, *flags))
    first = machine.commands[0][2:]
    assert first == [
        "unime_jax.prepare",
        "smol",
        "--cache",
        str(tmp_path / "cache"),
        "--split",
        "2",
    ]


def test_configs_that_cannot_be_run_are_refused():
    rows = [("a", "reference", "", "stage1", ()), ("b", "k", "a", "stage2", (("loss.k", 3),))]
    assert ablation.read_variants(rows)[1] == Variant("b", "k", "a", "stage2", (("loss.k", 3),))
    for wrong, message in (
        ([*rows, rows[0]], "twice"),
        (rows[::-1], "'b' starts from 'a'"),
        ([("a", "reference", "", "stage3", ())], "'stage3' is not in the pipeline"),
        (rows[1:] + [("c", "k", "", "align", ())], "starts from"),
        ([("c", "k", "", "align", ())], "one, and no more"),
    ):
        with pytest.raises(UserError, match=message):
            ablation.read_variants(wrong)
    for flag, message in (
        ("--config.rates.align=()", "config.rates.align is empty"),
        ("--config.rates.stage2=(1.0, -1.0)", "config.rates.stage2=.* above 0"),
        ("--config.changes.stage2=(('loss.temprature', 1.0),)", "temprature"),
        ("--config.changes.align=(('train.steps', -1),)", "config.train.steps=-1"),
        ("--config.seeds=(1, 1)", "the same twice"),
        ("--config.splits=(0,)", "from 1 on"),
    ):
        with pytest.raises(UserError, match=message):
            ablate.validate(config_of(CONFIG, flag))
    with pytest.raises(UserError, match="of no ablation"):
        ablate.validate(config_of(CONFIG.replace("smol_ablation", "smol_stage1")))


def test_comparisons_are_paired():
    rng = np.random.default_rng(0)
    cells = [(split, seed) for split in (1, 2, 3) for seed in (0, 1, 2)]
    level = 30 * rng.random(9)  # of the cell, far larger than what tells the variants apart
    gain = 2 + 0.3 * rng.standard_normal(9)
    scores = {
        "a": {cell: {"m": x} for cell, x in zip(cells, level, strict=True)},
        "b": {cell: {"m": x} for cell, x in zip(cells, level + gain, strict=True)},
    }
    found = ablation.paired(scores, "b", "a", "m")
    assert found.mean == pytest.approx(gain.mean())
    assert found.error == pytest.approx(gain.std(ddof=1) / 3)
    del scores["a"][1, 0]
    assert ablation.paired(scores, "b", "a", "m").values == pytest.approx(gain[1:].tolist())
    assert ablation.paired(scores, "c", "a", "m") is None
    one = {name: {cells[1]: found[cells[1]]} for name, found in scores.items()}
    assert ablation.paired(one, "b", "a", "m").error is None
    assert ablation.spread([3.0]) == "3.0" and ablation.spread([1.0, 3.0]) == "2.0 ± 1.4"
    assert ablation.chosen_rate({3.0: 5.0, 1.0: 5.0, 0.3: 4.0}) == 1.0
    assert ablation.chosen_rate({9.0: None, 3.0: 5.0, 1.0: None}) == 3.0
    assert ablation.chosen_rate({9.0: None}) is None


def test_time_left_is_by_stage():
    clock = ablation.Clock()
    assert clock.left(["align"]) is None
    clock.add("stage1", 100.0)
    clock.add("stage1", 200.0)
    assert clock.left(["stage1", "align"]) == pytest.approx(300.0)  # unknown: as the others
    clock.add("align", 30.0)
    assert clock.left(["stage1", "align", "align"]) == pytest.approx(210.0)


def test_a_command_that_fails_is_named(tmp_path):
    with pytest.raises(UserError, match="unime_jax.train --config=none.py failed with exit code 2"):
        ablate._call([sys.executable, "-m", "unime_jax.train", "--config=none.py"], tmp_path / "a")
    assert (tmp_path / "a" / "train.log").is_file()
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(UserError, match="was ended by SIGKILL, as by a lack of memory"):
        ablate._call([sys.executable, "-c", kill], tmp_path / "b")


def test_sigterm_is_passed_on_and_stops_the_whole(tmp_path):
    """A child that saves and ends with 0 has not finished its work."""
    child = "import os, signal, time; signal.signal(15, lambda *_: os._exit(0)); "
    child += "os.kill(os.getppid(), 15); time.sleep(60)"
    before = signal.getsignal(signal.SIGTERM)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ablate._call([sys.executable, "-c", child], tmp_path)
    assert time.monotonic() - started < 50 and signal.getsignal(signal.SIGTERM) is before


def test_differences_are_drawn(tmp_path):
    panels = {"A": [("both", [0.0], 0.0, None), ("x $y$", [1.0, 2.0], 1.5, 0.5)]}
    path = report.plot_differences(panels, tmp_path / "plot.png", label="points")
    with Image.open(path) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert (0x2E, 0x62, 0x96) in colors


@pytest.mark.slow
def test_the_smoke_run_ends_with_a_report_and_goes_on_from_there(tmp_path):
    directory = runtime.cache_directory() / "smol-smoke"
    if not (directory / "prepared.json").is_file():
        pytest.skip("needs the small assets: python -m unime_jax.prepare smol --smoke")
    command = [sys.executable, "-m", "unime_jax.ablate", f"{CONFIG}:smoke"]
    command.append(f"--config.output={tmp_path}")
    options = {"check": True, "capture_output": True, "text": True, "cwd": ROOT}
    options["env"] = processes.environment(1)
    out = subprocess.run(command, **options).stdout
    assert "[6/6]" in out and (tmp_path / "differences.png").is_file()
    rows = json.loads((tmp_path / "report.json").read_text())["tables"]["Stages"]
    assert {row["variant"] for row in rows} == {"none", "stage 1", "stage 2", "both"}
    started = time.monotonic()
    again = subprocess.run(command, **options).stdout
    assert "[1/6]" not in again and time.monotonic() - started < 60
