"""Checkpoints: bit-equal restore, refusal of another configuration, what a reader finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from test_steps import parts

from unime_jax import checkpoint, sharding, steps
from unime_jax.types import UserError


def run(directory, steps, *, config=None):
    """Trains up to `steps`, saving at each, going on from what is there."""
    _, state, frozen, step = parts(dropout=True)
    checkpoint.open_run(directory, config or {"seed": 0})
    saves = checkpoint.Checkpoints(directory, config={"seed": 0}, every_steps=1)
    state = saves.restore(state) or state
    while int(state.step) < steps:
        state, _ = step(state, frozen, toy.batch(seed=int(state.step)))
        saves.save(state)
    saves.close()
    return state


def test_interrupted_equals_uninterrupted_bit_for_bit(tmp_path):
    run(tmp_path / "cut", 3)
    cut, whole = run(tmp_path / "cut", 6), run(tmp_path / "whole", 6)
    assert jax.tree.structure(cut) == jax.tree.structure(whole)
    for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_reader_finds_the_newest_trainable_parameters(tmp_path):
    state = run(tmp_path, 4)
    np.testing.assert_array_equal(
        checkpoint.read_trainable(tmp_path)["kernel"], state.trainable["kernel"]
    )
    assert checkpoint.is_run(tmp_path) and checkpoint.read_run(tmp_path) == {"seed": 0}


def test_what_was_sharded_is_read_on_the_host(tmp_path):
    """Its reader may have fewer devices."""
    mesh = sharding.make_mesh(fsdp=8)
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    value = np.arange(16, dtype=np.float32).reshape(8, 2)
    state = steps.TrainState(jnp.int32(1), {"a/b": jax.device_put(value, placed)}, {})
    checkpoint.open_run(tmp_path, {})
    saves = checkpoint.Checkpoints(tmp_path, config={}, every_steps=1)
    saves.save(state, force=True)
    saves.close()
    found = checkpoint.read_trainable(tmp_path)["a/b"]
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, value)


def test_saves_by_steps_by_time_and_by_force(tmp_path):
    _, state, frozen, step = parts()
    state, _ = step(state, frozen, toy.batch())
    quiet = checkpoint.Checkpoints(tmp_path / "a", config={}, every_steps=2)
    assert not quiet.save(state)
    assert quiet.save(state, force=True)
    timed = checkpoint.Checkpoints(tmp_path / "b", config={}, every_seconds=1e-9)
    assert timed.save(state)
    quiet.close(), timed.close()


def test_no_checkpoint_yet(tmp_path):
    checkpoint.open_run(tmp_path, {})
    with pytest.raises(UserError, match="no checkpoint there yet"):
        checkpoint.read_trainable(tmp_path)


def test_another_configuration_is_refused_and_the_keys_named(tmp_path):
    checkpoint.open_run(tmp_path, {"loss": {"k": 8, "margin": 0.1}, "log": {"every_steps": 1}})
    checkpoint.open_run(tmp_path, {"loss": {"k": 8, "margin": 0.1}, "log": {"every_steps": 9}})
    with pytest.raises(UserError, match="loss.k: 8 there, 4 now") as caught:
        checkpoint.open_run(tmp_path, {"loss": {"k": 4, "margin": 0.1}, "log": {"every_steps": 1}})
    assert "margin" not in str(caught.value)


def test_a_broken_run_file_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json"):
        checkpoint.read_run(tmp_path)
