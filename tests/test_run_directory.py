"""The directory of a run: the files that it began with, checkpoints that other runs need."""

import jax.numpy as jnp
import pytest

from unime_jax import checkpoint, steps
from unime_jax.types import UserError

FILES = {"config.model.path": {"a.safetensors": "1", "b.safetensors": "2"}}
VECTORS = {"config.teacher.vectors": {"vectors-00000.npy": "3"}}


def begin(directory):
    (directory / "checkpoints" / "1").mkdir(parents=True)


def test_files_are_those_that_the_run_began_with(tmp_path):
    def check(found, **options):
        checkpoint.check_files(tmp_path, lambda: found, **options)

    check({"config.model.path": {}})
    check(FILES | VECTORS)  # nothing was trained yet
    begin(tmp_path)
    check(FILES | VECTORS)
    check(FILES), check(FILES | VECTORS | {"config.new": {"x": "4"}})  # of another version
    other = {"config.model.path": {"a.safetensors": "1", "b.safetensors": "9", "c": "0"}}
    with pytest.raises(UserError) as caught:
        check(other | VECTORS)
    assert "(config.model.path: b.safetensors, c); put them back" in str(caught.value)
    with pytest.raises(UserError, match="b.safetensors; config.teacher.vectors: vectors-00000.npy"):
        check({**FILES, "config.model.path": {"a.safetensors": "1"}, "config.teacher.vectors": {}})
    check(FILES | VECTORS)


def test_a_run_that_kept_no_hashes_of_files_keeps_those_of_now(tmp_path):
    begin(tmp_path)
    checkpoint.check_files(tmp_path, lambda: FILES, keep=False)
    assert not (tmp_path / "files.json").exists()
    checkpoint.check_files(tmp_path, lambda: FILES)
    with pytest.raises(UserError, match="config.model.path: a.safetensors, b.safetensors"):
        checkpoint.check_files(tmp_path, lambda: {"config.model.path": {}}, keep=False)


@pytest.mark.parametrize("content", ["[]", '{"config.model.path": 3}', "{", ""])
def test_damaged_hashes_are_named(content, tmp_path):
    begin(tmp_path)
    (tmp_path / "files.json").write_text(content)
    with pytest.raises(UserError, match="files.json: (is the file damaged|cannot be read)"):
        checkpoint.check_files(tmp_path, lambda: FILES)


def test_what_another_run_needs_is_kept(tmp_path):
    saves = checkpoint.Checkpoints(tmp_path, config={}, keep=1)
    for step in range(5):
        saves.save(steps.TrainState(jnp.int32(step), {"a": jnp.zeros(3)}, {}), force=True)
        if step == 1:
            saves._settle()
            for output in ("one", "two", "one"):
                assert checkpoint.keep(tmp_path / "checkpoints" / "1", tmp_path / output)
    saves.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "4"]
    listed = (tmp_path / "kept" / "1").read_text().splitlines()
    assert listed == [str(tmp_path / "one"), str(tmp_path / "two")]
    kept = tmp_path / "kept"
    # What a run needs last is all that it needs; what is gone is not marked.
    assert checkpoint.keep(tmp_path / "checkpoints" / "4", tmp_path / "one")
    assert (kept / "1").read_text() == f"{tmp_path}/two\n"
    assert (kept / "4").read_text() == f"{tmp_path}/one\n"
    assert checkpoint.keep(tmp_path / "checkpoints" / "4", tmp_path / "two")
    assert sorted(path.name for path in kept.iterdir()) == ["4", "lock"]
    assert not checkpoint.keep(tmp_path / "checkpoints" / "2", tmp_path / "three"), "it is gone"
    assert sorted(path.name for path in kept.iterdir()) == ["4", "lock"]


def test_files_of_a_run_that_has_saved_nothing_are_those_that_it_recorded(tmp_path):
    """For a step of it that is taken again; another start may change all."""
    checkpoint.check_files(tmp_path, lambda: FILES)
    with pytest.raises(UserError, match="config.model.path: b.safetensors"):
        checkpoint.check_files(
            tmp_path, lambda: {"config.model.path": {"a.safetensors": "1"}}, keep=False
        )
