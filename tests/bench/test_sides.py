"""What each side of a speed test does by itself, without running a model."""

import copy
import pathlib
import sys
import types

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import jax_side  # noqa: E402
import rows  # noqa: E402
import training  # noqa: E402


def test_a_report_that_fails_loses_no_figures():
    def fail():
        raise ValueError("no such chip\nhere")

    said = {"operations": {"model": 2e15, "hardware": 3e15}, "peak_rate": None}
    found = jax_side.report(fail, lambda: said)
    assert found == {**said, "not reported": "ValueError: here"}
    timed = training.Timed({"ours": [{"seconds": 2.0}]}, {"ours": found})
    assert training._notes(timed) == {
        "not reported": "ValueError: here", "PFLOP a step": {"model": 2.0, "hardware": 3.0}
    }  # fmt: skip


def test_a_planned_peak_is_said_where_the_compiler_says_one(monkeypatch):
    import jax

    def planned(platform, peak):
        memory = types.SimpleNamespace(peak_memory_in_bytes=peak)
        monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform=platform)])
        return jax_side._planned(types.SimpleNamespace(memory_analysis=lambda: memory))

    assert planned("gpu", 3 << 30) == {"planned_gib": 3.0}
    assert planned("gpu", 0) == planned("cpu", 3 << 30) == {}


def test_autocast_is_for_adapters_alone():
    torch = pytest.importorskip("torch")
    import torch_side

    model = object.__new__(torch_side.Model)
    model.torch, model.device = torch, "cpu"
    model._embed = lambda *_: torch.is_autocast_enabled("cpu")

    def mixed(dtype, adapted):
        model.dtype, model.adapted = dtype, adapted
        return model.embed(None, None)

    assert mixed(torch.bfloat16, object())
    assert not mixed(torch.bfloat16, None) and not mixed(torch.float32, object())


def test_pytorch_takes_one_pass_where_all_rows_fit_with_checkpoints(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    import torch_side

    class Step:
        at_once = None

        def __init__(self, model, rows, settings):
            taken.append(settings["train"]["chunk"])

        def __call__(self):
            return {}

    taken = []
    monkeypatch.setattr(torch_side, "Step", Step)
    monkeypatch.setattr(torch_side, "Model", lambda *_: types.SimpleNamespace(load_seconds=0))
    monkeypatch.setattr(rows, "load", lambda path: None)
    for one_pass in (True, False):
        case = {
            "train": {"chunk": 4},
            "model": {"dtype": "float32"},
            "case": {"one_pass": one_pass},
        }
        for variant in ("checkpoint", "eager"):
            monkeypatch.setattr(rows, "read_case", lambda folder, case=case: copy.deepcopy(case))
            torch_side.setup(tmp_path, variant, "cpu")
    assert taken == [0, 4, 4, 4]


def test_ours_embeds_as_the_library_does(monkeypatch):
    """In its groups, and through `Runner`, which narrows the last layer."""
    from unime_jax import runner

    class Runner:
        limits = types.SimpleNamespace(full=lambda tokens, tiles: 2)

        def __init__(self, graphdef, *, size, mesh):
            assert (graphdef, size) == ("model", 3)

        def run(self, params, groups):
            assert [*params] == ["a"]
            for group, places in groups:
                sizes.append(len(group.tokens))
                yield places, group.tokens[:, :1].astype(np.float32)

    monkeypatch.setattr(runner, "Runner", Runner)
    sizes = []

    def side(count):
        tokens = np.arange(count)[:, None] + np.zeros((1, 4), int)
        return [rows.Group(tokens, np.full(count, 4), tokens, np.zeros((count, 0, 2, 2, 3)))]

    orders = {"query": np.array([4, 3, 2, 1, 0]), "target": np.arange(1)}
    batch = jax_side.as_batch(rows.Rows({"query": side(5), "target": side(1)}, orders))
    act, at_once = jax_side.forward("model", {"a/b": np.zeros(3)}, batch, None)
    found = act()
    wanted = {"query": np.arange(5.0)[::-1, None], "target": np.zeros((1, 1))}
    wanted = {side: x.astype(np.float32) for side, x in wanted.items()}
    # The groups of both sides are one, as PyTorch has them.
    assert found == rows.fingerprint(wanted) and sizes == [2, 2, 2] and at_once == {"4": 2}


def test_vectors_that_differ_are_told_apart():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((6, 32)).astype(np.float32)
    same, mixed = ({"query": x} for x in (vectors[:4], vectors[3::-1]))
    target = {"target": vectors[4:]}
    first, other = (rows.fingerprint(sides | target) for sides in (same, mixed))
    assert training._parity(first, first) < 1e-12 and training._parity(first, other) > 0.1
    assert np.isnan(
        training._parity({"loss": np.nan, "gradient_norm": 1}, {"loss": 1, "gradient_norm": 1})
    )
