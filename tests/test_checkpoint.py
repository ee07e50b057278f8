"""Checkpoints: bit-equal restore, refusal of another configuration, what a reader finds."""

import errno
import json
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from test_steps import parts

from unime_jax import checkpoint, runtime, sharding, steps
from unime_jax.checkpoint import integrity, run_directory
from unime_jax.config import base_config
from unime_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]


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
    checkpoint.open_run(tmp_path, {"loss": {"k": 9, "margin": 0.1}, "log": {"every_steps": 1}})
    # Nothing was trained yet: a start that failed may be put right.
    checkpoint.open_run(tmp_path, {"loss": {"k": 8, "margin": 0.1}, "log": {"every_steps": 1}})
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    checkpoint.open_run(tmp_path, {"loss": {"k": 8, "margin": 0.1}, "log": {"every_steps": 9}})
    with pytest.raises(UserError, match="loss.k: 8 there, 4 now") as caught:
        checkpoint.open_run(tmp_path, {"loss": {"k": 4, "margin": 0.1}, "log": {"every_steps": 1}})
    assert "margin" not in str(caught.value)


def test_a_broken_run_file_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json"):
        checkpoint.read_run(tmp_path)


def count_up(directory, steps_wanted, **options):
    """A run whose state is its number of steps; saves after each, goes on from what is there."""
    state = steps.TrainState(jnp.int32(0), {"a/kernel": jnp.zeros(300)}, {"mu": jnp.zeros(300)})
    config = {"init_from": ""}
    saves = checkpoint.Checkpoints(directory, config=config, every_steps=1, **options)
    state = saves.restore(state) or state
    first = int(state.step)
    while int(state.step) < steps_wanted:
        moved = {"a/kernel": state.trainable["a/kernel"] + jnp.arange(300)}
        state = steps.TrainState(state.step + 1, moved, {"mu": state.opt_state["mu"] - 1})
        saves.save(state)
    saves.close()
    return first, state


def largest(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut_short(step):
    path = largest(step / "trainable")
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(step):
    path = largest(step / "trainable")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


def without_manifest(step):
    """As a copy that was interrupted: Orbax's mark is there, most files are not."""
    shutil.rmtree(step / "trainable")
    (step / "manifest.json").unlink()


def cut_manifest(step):
    path = step / "manifest.json"
    path.write_text(path.read_text()[:-30])


def manifest_gone(step):
    (step / "manifest.json").unlink()


def manifest_gone_bit_flipped(step):
    manifest_gone(step)
    flip_a_bit(step)


def manifest_of(content):
    def write(step):
        (step / "manifest.json").write_text(content)

    return write


DAMAGES = {
    manifest_gone: "manifest.json is missing",
    manifest_gone_bit_flipped: "manifest.json is missing",
    manifest_of("[]"): "manifest.json is missing",
    manifest_of('{"files": {}}'): "manifest.json is missing",
    manifest_of('{"files": {"x": 3}}'): "manifest.json is missing",
    cut_short: "of .* bytes",
    flip_a_bit: "another checksum",
    lambda step: largest(step / "trainable").unlink(): "is missing",
    cut_manifest: "manifest.json is missing or cut short",
    empty: "manifest.json is missing or cut short",
    without_manifest: "manifest.json is missing",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(damage, tmp_path, capfd):
    _, whole = count_up(tmp_path, 3)
    damage(tmp_path / "checkpoints" / "3")
    found = checkpoint.read_trainable(tmp_path)["a/kernel"]
    np.testing.assert_array_equal(found, 2 * np.arange(300))
    said = capfd.readouterr()[1]
    assert re.search(f"3 is damaged .*{DAMAGES[damage]}.*checkpoint 2 is read", said), said
    assert (tmp_path / "checkpoints" / "3").is_dir(), "a reader moves nothing"

    first, state = count_up(tmp_path, 3)
    said = capfd.readouterr()[0]
    assert first == 2 and said.count("\n") == 1
    assert re.search(f"3 is damaged .*{DAMAGES[damage]}.*whole checkpoint is 2", said), said
    assert (tmp_path / "damaged" / "3").is_dir()
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)
    assert count_up(tmp_path, 3)[0] == 3, "the step was saved again"
    assert capfd.readouterr()[0] == ""


def test_a_checkpoint_of_before_there_were_manifests_is_read(tmp_path):
    _, state = count_up(tmp_path, 2)
    newest = tmp_path / "checkpoints" / "2"
    (newest / "manifest.json").unlink()
    (newest / "config" / "metadata").write_text('{"seed": 0}')
    found = checkpoint.read_trainable(tmp_path)["a/kernel"]
    np.testing.assert_array_equal(found, state.trainable["a/kernel"])


@pytest.mark.parametrize("where", ["manifest.json", "trainable"])
def test_a_file_system_that_fails_for_now_is_no_damage(where, tmp_path, monkeypatch):
    count_up(tmp_path, 2)
    opened = open

    def fail(path, *args, **options):
        if f"checkpoints/2/{where}" in str(path):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return opened(path, *args, **options)

    monkeypatch.setattr("builtins.open", fail)
    monkeypatch.setattr("io.open", fail)
    with pytest.raises(UserError, match=f"2/{where}.*cannot be read now .Stale"):
        count_up(tmp_path, 3)
    monkeypatch.undo()
    assert not (tmp_path / "damaged").exists() and count_up(tmp_path, 2)[0] == 2


def test_where_no_checkpoint_is_whole_nothing_is_touched(tmp_path):
    count_up(tmp_path, 3)
    for step in (tmp_path / "checkpoints").iterdir():
        flip_a_bit(step)
    before = sorted(tmp_path.rglob("*"))
    for read in (lambda: count_up(tmp_path, 3), lambda: checkpoint.read_trainable(tmp_path)):
        with pytest.raises(UserError, match="no checkpoint is whole .*3: trainable.*2: trainable"):
            read()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_state_of_another_shape_is_no_damage(tmp_path):
    count_up(tmp_path, 2)
    other = steps.TrainState(jnp.int32(0), {"a/kernel": jnp.zeros(7)}, {"mu": jnp.zeros(300)})
    saves = checkpoint.Checkpoints(tmp_path, config={})
    with pytest.raises(UserError, match="2 is whole but cannot be read"):
        saves.restore(other)
    saves.close()
    assert not (tmp_path / "damaged").exists()


def test_what_a_kill_left_of_a_save_is_removed(tmp_path):
    count_up(tmp_path, 2)
    left = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "2", left)
    (tmp_path / "checkpoints" / "1.removed").mkdir()
    own = ["2.best", "3.best", "notes.txt", "removed"]  # the user's
    for name in own:
        (tmp_path / "checkpoints" / name).mkdir()
    assert count_up(tmp_path, 3)[0] == 2
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == sorted(["2", "3", *own])


def test_a_score_that_is_no_number_keeps_nothing_and_removes_nothing(tmp_path, capsys):
    saves = checkpoint.Checkpoints(tmp_path, config={}, keep=1, keep_best=1)
    said = []
    for step, score in enumerate([0.5, float("nan"), float("inf"), 0.4]):
        state = steps.TrainState(jnp.int32(step), {"a": jnp.full(3, step)}, {})
        said.append(saves.is_best(score))
        saves.save(state, force=True, score=score)
    saves.close()
    assert said == [True, False, False, False]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0", "3"]
    assert (
        "step 1: the score is nan; its checkpoint is not one of the best" in capsys.readouterr()[0]
    )


def test_runs_of_before_are_gone_on_with():
    """Of every key that a configuration has gained, it is known what runs without it did.

    Where that is not what runs do by now, going on asks for it by name.
    """
    changed = {"data.joint_bins"}
    old = set((ROOT / "tests" / "golden" / "run_keys.txt").read_text().split())
    now = run_directory._flat(base_config().to_dict())
    assert old <= now.keys()
    for key in now.keys() - old:
        if not key.startswith(run_directory.FREE_KEYS):
            assert (run_directory.NEW_KEYS[key] == now[key]) == (key not in changed), key


@pytest.mark.parametrize("mode, best", [("max", ["1", "3"]), ("min", ["0", "2"])])
def test_the_newest_and_the_best_are_kept(mode, best, tmp_path):
    kept = [*best, "5", "6"]
    saves = checkpoint.Checkpoints(tmp_path, config={}, keep=2, keep_best=2, best_mode=mode)
    said = []
    for step, score in enumerate([0.1, 0.8, 0.2, 0.9, 0.5, None, None]):
        state = steps.TrainState(jnp.int32(step), {"a": jnp.full(3, step)}, {})
        said.append(score is not None and saves.is_best(score))
        saves.save(state, force=True, score=score)
    saves.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept
    assert said[:5] == [True, True, True, mode == "max", False]
    for step in kept:
        path = tmp_path / "checkpoints" / step
        np.testing.assert_array_equal(checkpoint.read_trainable(path)["a"], [int(step)] * 3)
    with pytest.raises(UserError, match="checkpoints/4: no such checkpoint; there are "):
        checkpoint.read_trainable(tmp_path / "checkpoints" / "4")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_named(number, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_directory.fcntl, "lockf", refuse)
    if number == errno.EIO:
        with pytest.raises(UserError, match="cannot be written"), checkpoint.lock(tmp_path):
            pass
        return
    with checkpoint.lock(tmp_path):
        assert "its file system has no locks" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["[]", '{"a": 3}', '{"a": {"rows": 3}}', "{"])
def test_a_damaged_list_of_the_data_is_named(content, tmp_path):
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(UserError, match="data.json.*(is the file damaged|cannot be read)"):
        checkpoint.check_data(tmp_path, {"a": {"rows": 3, "digest": "x"}})


def test_processes_that_read_other_data_are_named(tmp_path, monkeypatch):
    same, other = ({"a": {"rows": rows, "digest": "x"}} for rows in (3, 4))
    said = [json.dumps(data) for data in (same, same, other)]
    monkeypatch.setattr(runtime, "exchange", lambda text: said)
    with pytest.raises(UserError, match=r"a: 3 rows \(x\) in process 0, 4 rows .* in process 2"):
        checkpoint.check_data(tmp_path, same)
    assert not (tmp_path / "data.json").exists()


def test_process_0_alone_makes_checksums(tmp_path, monkeypatch):
    """The others take its word, and read the checkpoint that it chose."""
    count_up(tmp_path, 2)
    monkeypatch.setattr(integrity, "_digest", pytest.fail)
    path, problems = tmp_path / "checkpoints", iter(["[1, 2]", "has rust", ""])
    found = integrity.newest_whole(path, str, agree=lambda find: next(problems))
    assert found == (1, str(path / "1"), {2: "has rust"})


def test_one_damaged_checkpoint_that_was_asked_for_is_no_end_of_a_run(tmp_path):
    count_up(tmp_path, 3)
    flip_a_bit(tmp_path / "checkpoints" / "3")
    with pytest.raises(UserError, match=r"3: trainable.*others are there \(2\)") as caught:
        checkpoint.read_trainable(tmp_path / "checkpoints" / "3")
    assert "anew" not in str(caught.value)


def test_a_reader_that_loses_a_race_with_a_removal_looks_again(tmp_path):
    count_up(tmp_path, 3)
    looked = []

    def agree(find):
        found = find()
        looked.append(found)
        if len(looked) == 1:  # the run goes on, and removes 2 and 3
            count_up(tmp_path, 5)
        return found

    found = integrity.newest_whole(tmp_path / "checkpoints", str, agree=agree)
    assert found is not None and found[0] == 5
