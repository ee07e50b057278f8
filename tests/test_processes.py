"""A run of several processes: the same losses anywhere, a common stop, files from one of them."""

import json
import shutil
import signal
import time

import jax
import miniature
import numpy as np
import processes
import pytest

from unime_jax import report, sharding, steps, train
from unime_jax.config import parse, validate_train

TEXT = {**miniature.STUDENT["text_config"], "num_hidden_layers": 1}
STEPS = 30


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("miniature")
    miniature.write_model(root / "student", {**miniature.STUDENT, "text_config": TEXT}, seed=0)
    rows = [{"query_text": f"find a {name}", "target_text": name} for name in miniature.NAMES]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def flags(root, output, **changes):
    file = miniature.ROOT / "configs" / "smol_stage2.py"
    changes = {
        "output": output,
        "data.path": root / "pairs.jsonl",
        "data.features": "",
        "train.trainable": (),
        "train.batch_size": 8,
        "train.chunk": 0,
        "train.steps": STEPS,
        "train.adapters.dropout": 0.0,
        "train.adapters.targets": "language_model/.*(q|v)_proj$",  # fewer compile faster
        "checkpoint.every_steps": STEPS,
        "log.tensorboard": False,
        **changes,
    }
    return [f"--config={file}:smoke", *miniature.overrides(root, **changes)]


def run_here(root, output, monkeypatch, **changes):
    """Trains in this process, on one device."""
    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda **_: make(1, 1, devices=jax.devices()[:1]))
    make_step = steps.from_settings

    def guarded(*args, **options):
        """Nothing moves between host and device inside a step."""
        optimizer, step = make_step(*args, **options)

        def run(*args):
            with jax.transfer_guard("disallow"):
                return step(*args)

        run.lower = step.lower
        return optimizer, run

    monkeypatch.setattr(steps, "from_settings", guarded)
    c = parse(["train", *flags(root, output, **changes)], "doc")
    validate_train(c)
    train.run(c)
    monkeypatch.undo()
    return [row["loss"] for row in report.read_metrics(output)]


def wait_for_checkpoint(process, output):
    while not any(path.name.isdigit() for path in (output / "checkpoints").glob("*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def test_sigterm_to_one_stops_all_and_one_device_goes_on(root, tmp_path, monkeypatch):
    whole = run_here(root, tmp_path / "whole", monkeypatch)
    assert len(whole) == STEPS and len({round(loss, 4) for loss in whole}) > 3
    cut = tmp_path / "cut"
    several = {"checkpoint.every_steps": 1, "mesh.data": 2}
    started = processes.start(flags(root, cut, **several), root, processes=2, devices=2)
    wait_for_checkpoint(started[0], cut)
    started[1].send_signal(signal.SIGTERM)
    first, second = processes.finish(started)
    assert "2 processes, 4 cpu devices" in first and "saved after step" in first, first
    assert "loss" not in second and "saved after step" not in second, second
    done = [row["loss"] for row in report.read_metrics(cut)]
    assert 1 <= len(done) < STEPS
    saved = [int(path.name) for path in (cut / "checkpoints").iterdir()]
    assert max(saved) == len(done), "all saved after the same step"
    assert len((cut / "metrics.jsonl").read_text().splitlines()) == len(done)

    again = run_here(root, cut, monkeypatch)
    assert len(again) == STEPS and again[: len(done)] == done
    np.testing.assert_allclose(again, whole, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, changes",
    [
        ("llava16_stage1", {"train.quantize": None}),  # one block of 64 does not divide
        (
            "phi35v_stage2",
            {
                "data.sets": ("ImageNet_1K", "CIRR", "MSCOCO_t2i"),
                "train.batch_size": 12,
                "train.chunk": 4,
            },
        ),
    ],
)
def test_what_two_processes_began_one_goes_on_with(name, changes, tmp_path):
    """Both stages as their :smoke configs have them, sharded over data x fsdp."""
    changes = {
        "train.steps": 4,
        "train.adapters.targets": "language_model/.*(q|v|qkv)_proj$",
        "optim.learning_rate": 1e-3,
        "checkpoint.every_steps": 2,
        "checkpoint.keep": 9,
        "log.tensorboard": False,
        **changes,
    }

    def run(output, mesh, **where):
        places = {"output": output, "mesh.data": mesh[0], "mesh.fsdp": mesh[1]}
        flags = [f"--config.{key}={value}" for key, value in {**changes, **places}.items()]
        file = miniature.ROOT / "configs" / f"{name}.py"
        processes.finish(
            processes.start([f"--config={file}:smoke", *flags], tmp_path / "cache", **where)
        )
        return [row["loss"] for row in report.read_metrics(output)]

    whole = run(tmp_path / "whole", (2, 2), processes=2, devices=2)
    assert len(whole) == 4 and len({round(loss, 3) for loss in whole}) == 4
    for other, mesh, devices in (("one", (1, 1), 1), ("four", (1, 4), 4)):
        shutil.copytree(tmp_path / "whole", tmp_path / other)
        shutil.rmtree(tmp_path / other / "checkpoints" / "4")
        found = run(tmp_path / other, mesh, devices=devices)
        assert found[:2] == whole[:2]
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_what_process_0_said_outlives_it_until_the_others_have_heard():
    for number, said in enumerate(
        processes.finish(processes.start_program("failing_together.py"), [2, 2])
    ):
        assert f"error (process {number} of 2): what process 0 found is no good" in said


@pytest.mark.slow
def test_a_fault_of_one_ends_all(root, tmp_path):
    """The second start finds another run there."""
    a = flags(root, tmp_path / "run")
    processes.finish(processes.start([*a, "--config.train.steps=1"], root))
    started = processes.start([*a, "--config.train.steps=2"], root, processes=2)
    for said in processes.finish(started, [2, 2]):
        assert "holds a run of another configuration" in said and "of 2): " in said
        assert "Traceback" not in said
