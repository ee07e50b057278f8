"""Two processes share a benchmark, each with a disk of its own."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import fake_models
import processes
import pytest
from test_mmeb_run import config_of

from unime_jax.data import eval_synthetic
from unime_jax.evaluation import mmeb as mmeb_run

TESTS = pathlib.Path(__file__).parents[1]
CODE = """
import json, pathlib, sys
address, process, directory = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
from unime_jax import cluster, runtime
cluster.take_flags(["", f"--coordinator={address}", "--processes=2", f"--process={process}"])
runtime.start()
import fake_models
from test_mmeb_run import SETTINGS, config_of
from unime_jax.evaluation import encode, hosts, mmeb as mmeb_run
from unime_jax.types import UserError
encode._TOGETHER = 8  # a batch for each set
agreed = hosts.same_sets([{"b": 0, "a": 0}, {"a": 1, "b": 1, "c": 1}][process])
try:
    told = str(hosts.same_sets([{"a": 0, "b": 0}, {"a": 1}][process]))
except UserError as error:
    told = str(error)
config = config_of(directory / "MMEB-eval", directory / "eval_images", directory / f"out{process}")
items, sets, problems = mmeb_run._read(config)
encoder = fake_models.encoder_of(items, fake_models.FakeModel(), directory / f"cache{process}")
found = mmeb_run.measure(config, encoder, items, sets, problems, SETTINGS)
(directory / f"{process}.json").write_text(json.dumps({
    "agreed": agreed,
    "told": told,
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
        **processes.environment(1),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, address, str(process), str(tmp_path)],
            env=environment,
        )
        for process in range(2)
    ]
    assert [process.wait(timeout=500) for process in started] == [0, 0]
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert list(first["agreed"].items()) == [("b", 0), ("a", 0)]
    assert list(second["agreed"].items()) == [("b", 1), ("a", 1)]  # the others' order, not its own
    assert "process 1 cannot read 1 of the 2 sets" in first["told"]
    assert "process 1 cannot read 1 of the 2 sets that process 0 has (b)" in second["told"]
    rows = first["rows"]
    # A damaged query of two sets, a candidate of two.
    assert len(first["failed"]) == len(second["failed"]) == 4
    assert first["embedded"] + second["embedded"] == rows - 4
    assert abs(first["embedded"] - second["embedded"]) <= 3
    assert first["kept"] == second["kept"] == rows - 4
    assert first["sets"] == ["N24News", "CIRR", "EDIS"] and second["sets"] == []
    assert (tmp_path / "out0/report.md").is_file() and not (tmp_path / "out1").exists()
