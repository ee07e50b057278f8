"""The loop: a loss that is not finite ends the run, traces, what is saved when."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_steps
import toy

from unime_jax import checkpoint, loop, optim, report, runtime, sharding, steps
from unime_jax.checkpoint import integrity
from unime_jax.config import base_config, check_profile
from unime_jax.planning import topology
from unime_jax.train_data import TrainData
from unime_jax.types import UserError


class Data(TrainData):
    """Batches without files."""

    def __init__(self):
        self.steps = 6
        self.counts = {"rows": 16.0, "tokens": 80.0, "padded_share": 0.25}

    def batches(self, first):
        return iter([toy.batch(seed=step) for step in range(first, self.steps)])

    def rows_of(self, step):
        return [{"set": "toy", "row": 10 * step + place} for place in range(3)]

    def summary(self):
        return ""


def step_until(bad):
    """Returns a step that counts; its loss is not finite after so many."""

    def step(state, frozen, batch):
        done = state.step + 1
        loss = jnp.where(done >= bad, jnp.nan, 1.0)
        kernel = state.trainable["kernel"]
        state = steps.TrainState(done, {"kernel": kernel + 1}, {})
        return state, {"loss": loss, "gradient_norm": kernel @ kernel}

    return jax.jit(step)


def run(directory, *, bad=100, every=1, profile="", data=None, validate=None, **best):
    settings = base_config().to_dict()
    settings["output"] = str(directory)
    settings["log"] |= {"tensorboard": False, "profile": profile}
    settings["checkpoint"] |= best
    settings["eval"]["every_steps"] = 1 if validate else 0
    checkpoint.open_run(directory, settings)
    kept = {"keep": 1, "keep_best": best["keep_best"]} if best else {}
    saves = checkpoint.Checkpoints(directory, config=settings, every_steps=every, **kept)
    state = steps.TrainState(jnp.int32(0), {"kernel": jnp.zeros(2)}, {})
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    data = data or Data()
    return loop.Loop(settings, step_until(bad), {}, data, saves, validate, mesh).run(state)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(tmp_path):
    with pytest.raises(UserError, match="step 3: loss nan.*not_finite_step_3.json") as caught:
        run(tmp_path, bad=3)
    assert "\n" not in str(caught.value)
    found = json.loads((tmp_path / "not_finite_step_3.json").read_text())
    assert found["step"] == 3 and found["loss"] == "nan"
    assert found["rows"] == Data().rows_of(2)
    assert found["command"].endswith("--config.train.replay=3") and found["command"] in str(
        caught.value
    )
    assert [row["step"] for row in report.read_metrics(tmp_path)] == [1, 2]
    # The state that gave it is not saved, so a restart goes on from the one before.
    np.testing.assert_array_equal(checkpoint.read_trainable(tmp_path)["kernel"], [2, 2])
    assert run(tmp_path)["loss"] == 1.0
    assert [row["step"] for row in report.read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_save_under_way_ends_before_an_error_ends_the_run(tmp_path, monkeypatch):
    class Ends(Data):
        def batches(self, first):
            for step, batch in enumerate(super().batches(first)):
                if step == 3:
                    raise UserError("too many rows are bad")
                yield batch

    write = integrity.write_manifest

    def slow(*args, **options):
        time.sleep(0.5)
        write(*args, **options)

    monkeypatch.setattr(integrity, "write_manifest", slow)
    with pytest.raises(UserError, match="too many"):
        run(tmp_path, every=3, data=Ends())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_spike_is_said_at_the_first_step_after_a_restart_as_well(tmp_path, monkeypatch, capsys):
    def step(state, frozen, batch):
        done, guard = state.step + 1, state.opt_state
        skipped = guard.skipped + (done >= 3)
        state = steps.TrainState(done, state.trainable, guard._replace(skipped=skipped))
        one = jnp.float32(1)
        return state, {"loss": one, "gradient_norm": one, "skipped_updates": skipped}

    make = steps.TrainState
    guard = optim.SpikeState(jnp.zeros(2), jnp.int32(0), {})
    monkeypatch.setattr("test_loop.step_until", lambda bad: jax.jit(step))
    monkeypatch.setattr(steps, "TrainState", lambda *args: make(*args[:2], args[2] or guard))
    data = Data()
    data.steps = 3
    run(tmp_path, data=data)
    assert capsys.readouterr().out.count("is a spike") == 1
    run(tmp_path)
    said = capsys.readouterr().out
    assert [f"step {n}: loss 1.0000 is a spike" in said for n in (3, 4, 5, 6)] == [
        False,
        *[True] * 3,
    ]


def test_steps_asked_for_are_traced_by_the_first_process_alone(tmp_path, monkeypatch, capsys):
    metrics = run(tmp_path / "a", every=6, profile="2-3")
    assert list((tmp_path / "a" / "profile").rglob("*.xplane.pb"))
    assert "trace of steps 2 to 3" in capsys.readouterr().out
    assert 0.01 < metrics["memory_gib"] < 100
    assert metrics["tflops_per_second"] > 0 and "mfu" not in metrics, "a CPU's peak is not known"
    monkeypatch.setattr(runtime, "_PLACE", (1, 2))
    with loop.Trace("2-3", tmp_path / "b", steps=6) as trace:
        trace.before(2), trace.after(3)
    assert not (tmp_path / "b").exists()
    assert not report.MetricsWriter(tmp_path / "c", write=runtime.is_main()).write(1, {"loss": 1})
    assert not (tmp_path / "c").exists()


def test_a_trace_of_a_run_that_ends_early_is_kept(tmp_path, capsys):
    with pytest.raises(UserError, match="step 3: loss nan"):
        run(tmp_path, bad=3, profile="2-5")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert "trace of steps 2 to the end" in capsys.readouterr().out
    with pytest.raises(UserError, match="config.log.profile=5-7: the run has 6 steps"):
        run(tmp_path / "other", profile="5-7")


def test_a_step_lasts_as_long_as_the_device_works(tmp_path, monkeypatch):
    """10 s each, wherever the loop waits for it; a save, of 100 s, is not part of any."""
    now, ready = [0.0], {}
    count, save = step_until(100), checkpoint.Checkpoints.save

    def step(state, *args):
        state, values = count(state, *args)
        if not isinstance(state.step, jax.core.Tracer):  # dispatched; the device works on it
            ends = max([now[0], *(end for end, _ in ready.values())]) + 10
            ready[id(values)] = ends, values
        return state, values

    def wait(values):
        now[0] = max(now[0], ready[id(values)][0])
        return jax.device_get(values)

    def slow_save(*args, **options):
        now[0] += 100
        return save(*args, **options)

    fake = {"device_get": staticmethod(wait), "block_until_ready": staticmethod(wait)}
    monkeypatch.setattr(loop, "jax", type("Jax", (), {**vars(jax), **fake}))
    monkeypatch.setattr(loop, "compile_ahead", lambda *args: None)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(checkpoint.Checkpoints, "save", slow_save)
    monkeypatch.setattr("test_loop.step_until", lambda bad: step)
    run(tmp_path, every=3)
    assert [row["seconds"] for row in report.read_metrics(tmp_path)] == [10] * 6


def test_the_best_by_a_metric_are_kept_and_saved_for_it(tmp_path):
    """Saves are due at the end alone."""

    def validate(parameters):  # the kernel counts the steps
        return {
            "validation/recall": [0.3, 0.9, 0.5, 0.8, 0.1, 0.2][int(parameters["kernel"][0]) - 1]
        }

    best = {"keep_best": 2, "best_metric": "validation/recall"}
    run(tmp_path / "a", every=6, validate=validate, **best)
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir()) == list("246")
    best["best_metric"] = "validation/recal"
    with pytest.raises(
        UserError, match="best_metric=validation/recal: no such .*validation/recall"
    ):
        run(tmp_path / "b", validate=validate, **best)


class Mortal(Data):
    """Its readers die before some batches, as grain says it."""

    def __init__(self, deaths):
        super().__init__()
        self.deaths = dict(deaths)

    def batches(self, first):
        for step, batch in enumerate(super().batches(first), first):
            if self.deaths.get(step):
                self.deaths[step] -= 1
                raise RuntimeError(
                    "Worker process was terminated unexpectedly with exit code -9. Search the logs."
                )
            yield batch


def test_readers_that_are_killed_are_replaced_until_it_makes_no_sense(tmp_path, capsys):
    run(tmp_path / "whole")
    run(tmp_path / "a", data=Mortal({2: 2, 4: 1}))
    said = capsys.readouterr().out
    assert said.count("exit code -9; new ones go on from there") == 3 and "step 3: Worker" in said
    found, expected = (
        [row["gradient_norm"] for row in report.read_metrics(tmp_path / name)]
        for name in ("a", "whole")
    )
    assert found == expected and len(found) == 6
    with pytest.raises(UserError, match="step 3: no batch after 3 starts .* exit code -9"):
        run(tmp_path / "b", data=Mortal({2: 3}))


@pytest.mark.parametrize("wanted", ["4-3", "0-2", "a", "3-", "-3"])
def test_impossible_traces_are_refused(wanted):
    for fine in ("", "3", "3-4"):
        check_profile(fine)
    with pytest.raises(UserError, match="config.log.profile"):
        check_profile(wanted)


@pytest.mark.parametrize(
    "kind, chip",
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("cpu", None),
    ],
)
def test_the_share_of_the_peak_is_that_of_the_device(kind, chip):
    """MFU: operations of a step, by its seconds, devices, and a device's peak."""

    class Mesh:
        devices = np.array([type("Device", (), {"device_kind": kind})()] * 4, object)
        size = 4

    found = loop.Loop.__new__(loop.Loop)
    found._mesh, found._flops = Mesh, 8e15
    found._settings = {"model": {"dtype": "bfloat16"}}
    speed = found._speed(2.0)
    assert speed["tflops_per_second"] == 1000
    if chip is None:
        assert "mfu" not in speed
    else:
        assert speed["mfu"] == pytest.approx(1e15 / topology.CHIPS[chip].flops)
        found._settings = {"model": {"dtype": "float32"}}
        slower = 2 if "NVIDIA" in kind else 1  # TF32
        assert found._speed(2.0)["mfu"] == pytest.approx(slower * speed["mfu"])


@pytest.mark.parametrize("devices", [1, 8])
def test_what_is_compiled_ahead_is_what_is_called(devices, monkeypatch):
    """Else each run compiles its step twice. On several devices the state is sharded."""
    split = ("^kernel$", jax.sharding.PartitionSpec("fsdp"))
    others = [rule for rule in sharding.RULES if rule[0] != split[0]]
    monkeypatch.setattr(sharding, "RULES", (*others, split))
    names, compiled = [], "/jax/core/compile/backend_compile_duration"

    def listen(name, seconds, **_):
        names.append(name)

    mesh = sharding.make_mesh(1, devices, devices=jax.devices()[:devices])
    _, state, frozen, step = test_steps.parts(mesh=mesh)
    batch = steps.place_batch(toy.batch(16), mesh)
    frozen = jax.device_put(frozen, sharding.state_shardings(frozen, mesh))
    assert state.trainable["kernel"].is_fully_replicated == (devices == 1)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        loop.compile_ahead(step, state, frozen, batch)
        ahead = names.count(compiled)
        for _ in range(2):
            state, metrics = step(state, frozen, batch)
        jax.block_until_ready(metrics)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert (ahead, names.count(compiled)) == (1, 1)
