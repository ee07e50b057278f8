"""Two processes share a benchmark, each with a disk of its own."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import fake_models
import pytest
from test_mmeb_run import config_of

from unime_jax.data import eval_synthetic
from unime_jax.evaluation import mmeb as mmeb_run

TESTS = pathlib.Path(__file__).parents[1]
CODE = """
import json, pathlib, sys
import jax
address, process, directory = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
jax.distributed.initialize(address, 2, process)
import fake_models
from test_mmeb_run import SETTINGS, config_of
from unime_jax.evaluation import encode, mmeb as mmeb_run
encode._TOGETHER = 8  # a batch for each set
config = config_of(directory / "MMEB-eval", directory / "eval_images", directory / f"out{process}")
items, sets, problems = mmeb_run._read(config)
encoder = fake_models.encoder_of(items, fake_models.FakeModel(), directory / f"cache{process}")
found = mmeb_run.measure(config, encoder, items, sets, problems, SETTINGS)
print(json.dumps({
    "embedded": encoder.embedded, "rows": encoder.rows, "kept": len(encoder._store),
    "failed": sorted(encoder.failed.values()),
    "sets": list(found["results"]["sets"]) if found else [],
}))
"""


@pytest.mark.slow
def test_each_row_is_embedded_by_one_process_and_known_to_both(tmp_path):
    eval_synthetic.write_mmeb(
        tmp_path,
        {"N24News": 24, "CIRR": 8, "EDIS": 8},
        queries=5,
        most_candidates=6,
        oddities=eval_synthetic.Oddities(damaged_image=True),
    )
    # Process 1 has a set's vectors already: it goes through the same batches all the same.
    places = tmp_path / "MMEB-eval", tmp_path / "eval_images", tmp_path / "out"
    items, sets, _ = mmeb_run._read(config_of(*places, sets="N24News"))
    known = fake_models.encoder_of(items, fake_models.FakeModel(), tmp_path / "cache1")
    list(known.embed({name: mmeb_run._wanted(rows) for name, rows in sets.items()}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    paths = [str(TESTS.parent), str(TESTS / "evaluation"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, address, str(process), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for process in range(2)
    ]
    outputs = [process.communicate(timeout=500)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    first, second = (json.loads(text.strip().splitlines()[-1]) for text in outputs)
    rows = first["rows"]
    # A damaged query of two sets, a candidate of two.
    assert len(first["failed"]) == len(second["failed"]) == 4
    assert first["embedded"] + second["embedded"] == rows - 4
    assert abs(first["embedded"] - second["embedded"]) <= 3
    assert first["kept"] == second["kept"] == rows - 4
    assert first["sets"] == ["N24News", "CIRR", "EDIS"] and second["sets"] == []
    assert (tmp_path / "out0/report.md").is_file() and not (tmp_path / "out1").exists()
