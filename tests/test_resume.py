"""A run goes on with other devices and other readers as if nothing had changed."""

import json
import shutil

import jax
import miniature
import numpy as np
import pytest

from unime_jax import report, sharding, steps, train
from unime_jax.config import validate_train

TEXT = {**miniature.STUDENT["text_config"], "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("miniature")
    miniature.write_model(root / "student", {**miniature.STUDENT, "text_config": TEXT}, seed=0)
    rows = [{"query_text": f"find a {name}", "target_text": name} for name in miniature.NAMES]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def run(root, output, monkeypatch, **changes):
    """Trains 4 steps, or what is left of them; returns the batches as the step got them."""
    batches, place = [], steps.place_batch

    def watched(batch, *where):
        batches.append(batch)
        return place(batch, *where)

    monkeypatch.setattr(steps, "place_batch", watched)
    c = miniature.config(
        "smol_stage2",
        root,
        output=output,
        **{
            "data.path": root / "pairs.jsonl",
            "data.features": "",
            "train.trainable": (),
            "train.batch_size": 8,
            "train.chunk": 0,
            "train.adapters.dropout": 0.1,
            "train.adapters.targets": "language_model/.*(q|v)_proj$",  # fewer compile faster
            "checkpoint.every_steps": 2,
            "optim.learning_rate": 1e-3,
            **changes,
        },
    )
    validate_train(c)
    train.run(c)
    monkeypatch.undo()
    return batches


def test_other_devices_and_workers_go_on_with_the_same_losses(root, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert jax.device_count() == 8
    batches = run(root, whole, monkeypatch)
    losses = [row["loss"] for row in report.read_metrics(whole)]
    assert len(losses) == 4 and len({round(loss, 4) for loss in losses}) == 4
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "4")

    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda **_: make(1, 1, devices=jax.devices()[:1]))
    rest = run(root, cut, monkeypatch, **{"data.workers": 2, "data.threads": 1})
    assert len(rest) == 2
    for one, other in zip(jax.tree.leaves(rest), jax.tree.leaves(batches[2:]), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    again = [row["loss"] for row in report.read_metrics(cut)]
    assert again[:2] == losses[:2]
    np.testing.assert_allclose(again[2:], losses[2:], rtol=0, atol=1e-5)
