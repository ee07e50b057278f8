"""Training end to end in miniature: every stage, bad data, exit codes."""

import subprocess
import sys

import miniature
import numpy as np
import pytest

from unime_jax import teach, train
from unime_jax.types import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = miniature.write_all(tmp_path_factory.mktemp("miniature"))
    teach.run(miniature.config("smol_stage1", root))
    return root


def test_vectors_of_other_sentences_are_refused(root, tmp_path):
    miniature.write_pairs(tmp_path / "pairs")
    path = tmp_path / "pairs" / "pairs.jsonl"
    path.write_text(path.read_text().replace("cat", "gnu"))
    c = miniature.config("smol_stage1", root, **{"data.path": path, "output": tmp_path / "run"})
    with pytest.raises(UserError, match="teach"):
        train.run(c)


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
    changes = {"output": output, "train.steps": 40, "checkpoint.every_steps": 1, **changes}
    flags = miniature.overrides(root, **changes)
    file = miniature.ROOT / "configs" / "smol_stage1.py"
    command = [sys.executable, "-m", "unime_jax.train", f"--config={file}:smoke", *flags]
    return subprocess.Popen(
        command, cwd=miniature.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_typo_ends_with_code_2_and_one_line(root, tmp_path):
    process = start(root, tmp_path / "run", **{"loss.tempreature": 0.1})
    said, _ = process.communicate()
    assert process.returncode == 2 and said.count("\n") == 1 and "tempreature" in said
