"""Saves: what a step waits for, and what they keep in memory."""

import threading
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from unime_jax import checkpoint, sharding, steps
from unime_jax.checkpoint import integrity, orbax_arrays


@pytest.mark.parametrize("on_cpu", [True, False])
def test_saves_wait_for_a_copy_alone(on_cpu, tmp_path, monkeypatch):
    """The step that donates the state goes on before Orbax has seen it.

    Devices that have no room for a second state beside a step are never given one.
    """
    if not on_cpu:
        monkeypatch.setattr(orbax_arrays, "_is_on_cpu", lambda state: False)
        monkeypatch.setattr(orbax_arrays, "_copy", pytest.fail)
    saves, go_on = checkpoint.Checkpoints(tmp_path, config={}), threading.Event()
    write = saves._write

    def slow(step):
        assert go_on.wait(20)
        write(step)

    saves._write = slow
    state = steps.TrainState(jnp.int32(1), {"a": jnp.arange(3)}, {"mu": jnp.ones(2)})
    assert saves.save(state, force=True)
    assert all(isinstance(x, jax.Array) == on_cpu for x in jax.tree.leaves(saves._copied))
    jax.tree.map(lambda x: x.delete(), state)
    assert not (tmp_path / "checkpoints" / "1").exists()
    go_on.set()
    saves.close()
    assert checkpoint.read_trainable(tmp_path)["a"].tolist() == [0, 1, 2]


def test_saves_copy_a_state_once(tmp_path):
    """And that copy is XLA's; the host's memory holds it a second time nowhere."""
    value = jnp.arange(4_000_000.0)
    saves = checkpoint.Checkpoints(tmp_path, config={})
    tracemalloc.start()
    saves.save(steps.TrainState(jnp.int32(1), {"a": value}, {"mu": value}), force=True)
    saves.close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < value.nbytes / 2
    np.testing.assert_array_equal(checkpoint.read_trainable(tmp_path)["a"], value)


def test_saves_do_not_wait_for_checksums(tmp_path, monkeypatch):
    """They are made by the writer's thread, before the checkpoint gets its name."""
    begun, go_on = threading.Event(), threading.Event()
    write = integrity.write_manifest

    def slow(directory, **notes):
        begun.set()
        assert go_on.wait(60)
        write(directory, **notes)

    monkeypatch.setattr(integrity, "write_manifest", slow)
    saves = checkpoint.Checkpoints(tmp_path, config={}, every_steps=1)
    saves.save(steps.TrainState(jnp.int32(1), {"a": jnp.ones(3)}, {}))
    assert begun.wait(60)
    assert not (tmp_path / "checkpoints" / "1").exists()
    go_on.set()
    saves.close()
    assert checkpoint.read_trainable(tmp_path)["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("fsdp", [1, 8])
def test_saves_read_no_metrics_and_specs_of_tensorstore(fsdp, tmp_path, monkeypatch):
    """It would keep 50 KB a save for good, and .3 KB for each array in an OCDBT database."""

    def refuse(*_):
        raise AssertionError("read")

    monkeypatch.setattr(tensorstore, "experimental_collect_matching_metrics", refuse)
    mesh = sharding.make_mesh(1, fsdp, devices=jax.devices()[:fsdp])
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    value = jax.device_put(jnp.arange(16.0).reshape(8, 2), placed)
    saves = checkpoint.Checkpoints(tmp_path, config={})
    saves.save(steps.TrainState(jnp.int32(1), {"a": value}, {"mu": value}), force=True)
    saves.close()
    assert integrity.find_problem(tmp_path / "checkpoints" / "1") == ""
    assert not list(tmp_path.rglob("*ocdbt*"))
