"""The smoke configurations with real, tiny models: the vectors on disk are the embedder's own."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from tolerances import EMBEDDING, assert_near

from unime_jax import embedder as embedder_lib
from unime_jax import evaluate, tiny, weights
from unime_jax.data import prompts
from unime_jax.evaluation import mmeb as mmeb_run
from unime_jax.evaluation import opening

pytestmark = pytest.mark.slow
CONFIG = f"{pathlib.Path(__file__).parents[2]}/configs/eval_mmeb.py:smoke"


def test_vectors_on_disk_are_the_embedders_and_a_rerun_needs_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.runtime, "start", lambda: None)  # this process is up already
    opened = []
    real = opening._open
    monkeypatch.setattr(opening, "_open", lambda *args: opened.append(args) or real(*args))
    kept = []
    measure = mmeb_run.measure
    monkeypatch.setattr(mmeb_run, "measure", lambda *args: kept.append(args) or measure(*args))
    command = ["x", "--config", CONFIG, "--sets", "CIRR,N24News,WebQA", "--limit", "2"]
    command += [f"--config.output={tmp_path / 'out'}", f"--config.cache={tmp_path / 'cache'}"]
    evaluate.main(command)
    _, encoder, items, *_ = kept[0]
    assert len(opened) == 1 and encoder.embedded == encoder.rows
    first = json.loads((tmp_path / "out/report.json").read_text())

    path = tiny.backbone("phi35v")
    rows = [items[i] for i in range(0, len(items), 5)]
    texts = [prompts.slotted(item.text or "") if item.image else item.text for item in rows]
    texts = [prompts.Slotted("", "") if text == "" else text for text in texts]
    embedder = prepared(path)
    expected = embedder.embed(
        texts=texts, images=[item.image.file if item.image else None for item in rows]
    )
    numbers = np.arange(0, len(items), 5)
    assert encoder.usable[numbers].all()
    assert_near(encoder.vectors(numbers), expected, EMBEDDING)

    evaluate.main(command)
    again = json.loads((tmp_path / "out/report.json").read_text())
    assert len(opened) == 1 and again["rows_embedded"] == 0
    for name, record in again["results"]["sets"].items():
        assert record["precision"] == first["results"]["sets"][name]["precision"]
    evaluate.main([*command, f"--config.before={tmp_path / 'out'}"])
    assert "before" in (tmp_path / "out/report.md").read_text()


def prepared(path):
    """Returns the model as the smoke configuration prepares it."""
    found = weights.find(path)
    preparation = {"prompt": "mmeb", "fusion": "together", "image_size": 56, "image_crops": 1}
    found = dataclasses.replace(found, preparation=preparation)
    return embedder_lib.load_weights(found, dtype="float32")
