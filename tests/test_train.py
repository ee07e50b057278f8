"""Training end to end in miniature: every stage, resume after kill -9 and Ctrl-C, bad data."""

import json
import os
import signal
import subprocess
import sys
import time

import miniature
import numpy as np
import processes
import pytest

from unime_jax import checkpoint, embedder, report, runtime, teach, train
from unime_jax.config import validate_train
from unime_jax.evaluation import smol
from unime_jax.types import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = miniature.write_all(tmp_path_factory.mktemp("miniature"))
    teach.run(miniature.config("smol_stage1", root))
    return root


@pytest.fixture(scope="module")
def stages(root):
    """Runs all three stages; returns their directories."""
    changes = {"data.features": root / "features", "data.length_bins": 1}
    own = {
        "stage1": {},
        "align": {},
        # Dropout has tests of its own and takes most of the time to compile.
        "stage2": {
            "train.chunk": 6,
            "train.adapters.dropout": 0.0,
            "data.directions": ("image_to_text",),
            "eval.every_steps": 2,
            "optim.learning_rate": 1e-4,
        },
    }
    runs, model = {}, root / "student"
    for name, changed in own.items():
        runs[name] = root / "runs" / name
        places = {"model.path": model, "output": runs[name]}
        c = miniature.config(f"smol_{name}", root, **{**changes, **places, **changed})
        validate_train(c)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(smol, "validation_recall", _with_probe(smol.validation_recall))
            patch.setattr(smol, "read_pairs", _trained(smol.read_pairs))
            train.run(c)
        model = runs[name]
    return runs


def _trained(read_pairs):
    """Has a pairs.jsonl, which holds nothing out, be validated on what it trains on."""
    return lambda path, split: read_pairs(path, "train")


def _with_probe(measure):
    """Has validation say a number that every change of the text side changes."""

    def found(model, *, pairs):
        probe = float(model.embed(texts=["a red cat"])[0, 0])
        return {**measure(model, pairs=pairs), "validation/probe": probe}

    return found


def test_every_stage_runs_and_builds_on_the_one_before(root, stages):
    texts, images = ["a red cat", None], [None, root / "pairs" / "0.png"]
    found = [
        embedder.load(path, dtype="float32").embed(texts=texts, images=images)
        for path in (root / "student", *stages.values())
    ]
    for vectors in found:
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    text_moves = [np.abs(a[0] - b[0]).max() for a, b in zip(found, found[1:], strict=False)]
    image_moves = [np.abs(a[1] - b[1]).max() for a, b in zip(found, found[1:], strict=False)]
    assert text_moves[0] > 1e-3 and text_moves[2] > 1e-3
    assert text_moves[1] == 0, "alignment leaves the decoder alone"
    assert min(image_moves) > 1e-4


def test_metrics_and_configuration_are_stored(stages):
    history = report.read_metrics(stages["stage2"])
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    wanted = {"loss", "gradient_norm", "learning_rate", "positive_cosine", "hard_negative_cosine",
              "filtered_share", "short_rows", "pairs_per_second", "tokens_per_second",
              "padded_share"}  # fmt: skip
    assert wanted <= history[-1].keys()
    validated = [r["step"] for r in history if "validation/image_to_text_recall_at_10" in r]
    assert validated == [2, 4]
    assert checkpoint.read_run(stages["stage2"])["stage"] == "contrast"
    saved = sorted((stages["stage2"] / "checkpoints").glob("*/config/metadata"))
    assert json.loads(saved[-1].read_text())["loss"]["k"] == 4


def test_validation_is_of_the_step_it_stands_at(root, stages):
    rows = [r for r in report.read_metrics(stages["stage2"]) if "validation/probe" in r]
    before, after = (row["validation/probe"] for row in rows)
    assert abs(before - after) > 1e-4
    saved = embedder.load(stages["stage2"], dtype="float32").embed(texts=["a red cat"])
    assert saved[0, 0] == pytest.approx(after, abs=1e-5)


def test_started_again_a_finished_run_does_nothing(root, stages, capsys):
    changes = {"data.features": root / "features", "data.length_bins": 1}
    c = miniature.config("smol_stage1", root, output=stages["stage1"], **changes)
    assert train.run(c) == {}
    assert "all 4 steps are done" in capsys.readouterr().out


def test_a_run_goes_on_with_the_files_that_it_began_with_alone(root, stages, capsys):
    changes = {"data.features": root / "features", "data.length_bins": 1}
    c = miniature.config("smol_stage1", root, output=stages["stage1"], **changes)
    vectors = root / "vectors" / "vectors-00000.npy"
    replaced = {
        "config.teacher.vectors: vectors-00000.npy": vectors,
        "config.model.path: model.safetensors": root / "student" / "model.safetensors",
    }
    for told, path in replaced.items():
        content = path.read_bytes()
        path.write_bytes(content[:-4] + bytes(4))
        with pytest.raises(UserError, match=f"trained with so far .{told}.; put"):
            train.run(c)
        path.write_bytes(content)
    (stages["stage1"] / "files.json").unlink()  # a run of before
    assert train.run(c) == {}
    assert (stages["stage1"] / "files.json").is_file()


def test_a_run_is_built_on_one_checkpoint_of_another(stages):
    assert checkpoint.read_run(stages["stage2"])["model"]["path"] == str(
        stages["align"] / "checkpoints" / "4"
    )


def test_alignment_refuses_a_model_without_projector(root, tmp_path):
    c = miniature.config(
        "smol_align", root, **{"model.path": root / "teacher", "output": tmp_path / "run"}
    )
    with pytest.raises(UserError):
        train.run(c)


def test_models_that_drop_no_features_say_so(root, tmp_path):
    changes = {"output": tmp_path, "train.feature_dropout": 0.5}
    with pytest.raises(UserError, match="feature_dropout=0.5: only the projector of a unime_smol"):
        train.run(miniature.config("smol_stage1", root, **changes))


def test_vectors_of_other_sentences_are_refused(root, tmp_path):
    miniature.write_pairs(tmp_path / "pairs")
    path = tmp_path / "pairs" / "pairs.jsonl"
    path.write_text(path.read_text().replace("cat", "gnu"))
    c = miniature.config("smol_stage1", root, **{"data.path": path, "output": tmp_path / "run"})
    with pytest.raises(UserError, match="teach"):
        train.run(c)


def test_bad_images_are_skipped_counted_and_reported(root, tmp_path, capsys):
    path = miniature.write_pairs(tmp_path / "pairs", broken=3)
    changes = {
        "data.path": path,
        "data.features": "",
        "data.length_bins": 1,
        "data.directions": ("text_to_image",),
        "train.chunk": 0,
        "train.adapters.dropout": 0.0,
        "train.steps": 3,
        "output": tmp_path / "run",
    }
    train.run(miniature.config("smol_stage2", root, **changes, **{"data.max_bad_share": 0.2}))
    assert "bad rows skipped: " in capsys.readouterr().out
    changes["output"] = tmp_path / "strict"
    with pytest.raises(UserError, match="max_bad_share"):
        train.run(miniature.config("smol_stage2", root, **changes, **{"data.max_bad_share": 0.0}))


def test_teaching_goes_on_where_it_stopped(root, tmp_path, monkeypatch):
    monkeypatch.setattr(teach, "SHARD_ROWS", 16)
    c = miniature.config("smol_stage1", root, **{"teacher.vectors": tmp_path / "vectors"})
    teach.run(c)
    shards = sorted((tmp_path / "vectors").glob("vectors-*.npy"))
    before = [np.load(shard) for shard in shards]
    assert len(shards) == 4 and sum(map(len, before)) == 60
    kept = shards[0].stat().st_mtime_ns
    shards[2].unlink()
    teach.run(c)
    assert shards[0].stat().st_mtime_ns == kept
    np.testing.assert_array_equal(np.load(shards[2]), before[2])


def start(root, output, **changes):
    """Starts stage 1 as users do, on one device; compiled programs are shared by all starts."""
    changes = {
        "output": output,
        "train.steps": 24,
        "checkpoint.every_steps": 1,
        "data.length_bins": 1,
        "log.tensorboard": False,
        **changes,
    }
    file = miniature.ROOT / "configs" / "smol_stage1.py"
    overrides = miniature.overrides(root, **changes)
    command = [sys.executable, "-m", "unime_jax.train", f"--config={file}:smoke", *overrides]
    env = {**processes.environment(1), runtime.CACHE_VARIABLE: str(root / "cache")}
    return subprocess.Popen(
        command,
        cwd=miniature.ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process, output, step):
    """Waits for a checkpoint; a process that ends before says why."""
    while process.poll() is None:
        steps = [int(p.name) for p in (output / "checkpoints").glob("*") if p.name.isdigit()]
        if max(steps, default=0) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(
        f"ended with {process.returncode} before step {step}: {process.stdout.read()}"
    )


def test_killed_and_restarted_equals_uninterrupted_bit_for_bit(root, tmp_path):
    whole = start(root, tmp_path / "whole")
    wait_for_step(whole, tmp_path / "whole", 1)  # what it has compiled the others find
    cut = start(root, tmp_path / "cut")
    wait_for_step(cut, tmp_path / "cut", 4)
    os.kill(cut.pid, signal.SIGKILL)
    cut.communicate()
    stopped = start(root, tmp_path / "cut")
    wait_for_step(stopped, tmp_path / "cut", 10)
    os.kill(stopped.pid, signal.SIGINT)
    said, _ = stopped.communicate()
    assert stopped.returncode == 130 and "the same command goes on from there" in said, said
    resumed = start(root, tmp_path / "cut")
    for process in (resumed, whole):
        said, _ = process.communicate()
        assert process.returncode == 0, said
    a, b = (checkpoint.read_trainable(tmp_path / name) for name in ("cut", "whole"))
    assert miniature.same(a, b)
    losses = [[m["loss"] for m in report.read_metrics(tmp_path / n)] for n in ("cut", "whole")]
    assert len(losses[0]) == 24 and losses[0] == losses[1]


def test_a_typo_ends_with_code_2_and_one_line(root, tmp_path):
    process = start(root, tmp_path / "run", **{"loss.tempreature": 0.1})
    said, _ = process.communicate()
    assert process.returncode == 2 and said.count("\n") == 1 and "tempreature" in said
