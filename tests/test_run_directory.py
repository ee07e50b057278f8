"""The directory of a run: the files that it began with, checkpoints that other runs need."""

import os
import shutil

import jax.numpy as jnp
import pytest

from unime_jax import checkpoint, runtime, steps
from unime_jax.checkpoint import run_directory, runs
from unime_jax.types import UserError

FILES = {"config.model.path": {"a.safetensors": "1", "b.safetensors": "2"}}
NEWER = {"processor_config.json": "6"}
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
    # Of a version that did not count this one; a run of now knows whether it was there.
    more = {"config.model.path": {**FILES["config.model.path"], "processor_config.json": "5"}}
    check(more)
    (tmp_path / "new").mkdir()
    checkpoint.check_files(tmp_path / "new", lambda: more)
    begin(tmp_path / "new")
    for found in (FILES, {"config.model.path": {**more["config.model.path"], **NEWER}}):
        with pytest.raises(UserError, match="config.model.path: processor_config.json"):
            checkpoint.check_files(tmp_path / "new", lambda found=found: found)


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
    assert not checkpoint.keep(tmp_path / "checkpoints" / "2", tmp_path / "three"), "it is gone"
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["1", "lock"]


@pytest.mark.parametrize("key", ["model", "init_from"])
def test_what_a_failed_start_was_to_be_built_on_goes_what_a_moved_run_needs_stays(key, tmp_path):
    """Another run may stand where the one was that was moved."""
    first, output = tmp_path / "first", tmp_path / "run"

    def start(step):
        path = first / "checkpoints" / str(step)
        path.mkdir(parents=True)
        assert checkpoint.keep(path, output)
        checkpoint.open_run(output, {key: {"path": str(path)} if key == "model" else str(path)})

    def marks():
        return sorted(path.name for path in (first / "kept").iterdir() if path.name != "lock")

    start(1), start(2)  # the first has failed
    assert marks() == ["2"]
    begin(output)
    output.rename(tmp_path / "moved")
    start(3), start(4)
    assert marks() == ["2", "4"]
    (output / "run.json").write_text("{")
    start(5)
    assert marks() == ["2", "4", "5"]


def test_marks_of_a_start_that_was_killed_before_it_kept_its_settings_go(tmp_path):
    first, output = tmp_path / "first", tmp_path / "run"
    output.mkdir()  # as its lock makes it

    def start(step):
        path = first / "checkpoints" / str(step)
        path.mkdir(parents=True)
        assert checkpoint.keep(path, output)

    start(1), start(2), start(3)
    assert (first / "kept" / "3").is_file() and not (first / "kept" / "1").exists()
    assert not (first / "kept" / "2").exists()
    checkpoint.open_run(output, {"init_from": str(first / "checkpoints" / "3")})
    assert sorted(path.name for path in output.iterdir()) == ["run.json"]
    begin(output)
    output.rename(tmp_path / "moved")
    output.mkdir()
    start(4), start(5)
    marks = sorted(path.name for path in (first / "kept").iterdir() if path.name != "lock")
    assert marks == ["3", "5"], "the moved run needs its own"


def test_a_removal_that_was_cut_short_is_undone_where_the_checkpoint_is_needed(tmp_path):
    saves = checkpoint.Checkpoints(tmp_path, config={}, keep=2)
    for step in (1, 2):
        saves.save(steps.TrainState(jnp.int32(step), {"a": jnp.zeros(3)}, {}), force=True)
        saves._settle()
    saves.close()
    assert checkpoint.keep(tmp_path / "checkpoints" / "1", tmp_path / "run")
    for step in (1, 2):  # killed before it looked whether it is needed
        (tmp_path / "checkpoints" / str(step)).rename(tmp_path / "checkpoints" / f"{step}.removed")
    checkpoint.Checkpoints(tmp_path, config={}, keep=2).close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_run_goes_on_where_its_base_and_its_data_were_moved(tmp_path, monkeypatch):
    run, there = tmp_path / "run", {"model.path": "/gone/model", "data.path": "gone/pairs.jsonl"}
    monkeypatch.chdir(tmp_path)

    def settings(**changes):
        model, data = ({**there, **changes}[key] for key in ("model.path", "data.path"))
        return {
            "model": {"path": model},
            "data": {"path": data, "images": changes.get("images", "")},
        }

    checkpoint.open_run(run, settings())
    begin(run)
    moved = {"model.path": str(tmp_path), "data.path": str(tmp_path / "pairs.jsonl")}
    for key in moved:  # nothing tells what lay there
        with pytest.raises(UserError, match=f"of another configuration .{key}: "):
            checkpoint.check_continues(run, settings(**{key: moved[key]}))
    checkpoint.check_continues(run, settings(**{"data.path": f"{tmp_path}/gone/x/../pairs.jsonl"}))
    checkpoint.check_files(run, lambda: FILES)
    checkpoint.check_data(run, {"pairs": {"rows": 2, "digest": "a"}})
    checkpoint.check_continues(run, settings(**moved))
    with pytest.raises(UserError, match="of another configuration .data.images: '' there, 'x' now"):
        checkpoint.check_continues(run, settings(**moved, images="x"))
    with pytest.raises(UserError, match="of another configuration .data.path: .* there, '' now"):
        checkpoint.check_continues(run, settings(**{"data.path": ""}))
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "pairs.jsonl").touch()  # it was not moved: these are others
    with pytest.raises(UserError, match="of another configuration .data.path: "):
        checkpoint.check_continues(run, settings(**moved))
    with pytest.raises(
        UserError, match="not the rows that .*pairs: 2 rows .a. then, 2 rows .b. now"
    ):
        checkpoint.check_data(run, {"pairs": {"rows": 2, "digest": "b"}}, keep=False)


def test_marks_are_of_any_name_and_whole_or_not_there(tmp_path, monkeypatch):
    path, other = tmp_path / "first" / "checkpoints" / "1", tmp_path / "\udcff"
    path.mkdir(parents=True)
    assert checkpoint.keep(path, other) and checkpoint.keep(path, other)
    mark = tmp_path / "first" / "kept" / "1"
    assert mark.read_bytes() == f"{tmp_path}/".encode() + b"\xff\n"

    def refuse(source, target):
        raise OSError

    with monkeypatch.context() as patch:  # as a kill before the file has its name
        patch.setattr(run_directory.os, "replace", refuse)
        assert not checkpoint.keep(path, tmp_path / "run")
    assert mark.read_bytes().count(b"\n") == 1
    assert checkpoint.keep(path, tmp_path / "run") and mark.read_bytes().count(b"\n") == 2


def test_a_checkpoint_that_is_marked_while_it_is_removed_comes_back(tmp_path, monkeypatch, capsys):
    """Whoever marked it saw it in its place."""
    replace, said = os.replace, []

    def late(source, target):
        if str(target).endswith(".removed"):
            said.append(checkpoint.keep(source, tmp_path / "run"))
        replace(source, target)

    monkeypatch.setattr(runs.os, "replace", late)
    saves = checkpoint.Checkpoints(tmp_path, config={}, keep=1)
    for step in (1, 2, 3):
        saves.save(steps.TrainState(jnp.int32(step), {"a": jnp.zeros(3)}, {}), force=True)
        saves._settle()
        (tmp_path / "run").mkdir(exist_ok=True)
        monkeypatch.setattr(runs.os, "replace", late if step == 1 else replace)
    saves.close()
    assert said == [True] and capsys.readouterr().out == ""
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "3"]
    shutil.rmtree(tmp_path / "run")
    checkpoint.Checkpoints(tmp_path, config={}, keep=2).close()
    assert capsys.readouterr().out == "", "the newest are kept in any case"
    checkpoint.Checkpoints(tmp_path, config={}, keep=1).close()
    message = f"1 is kept for {tmp_path}/run, which is not there any more; if that was removed"
    assert message in capsys.readouterr().out


def test_files_of_a_run_that_has_saved_nothing_are_those_that_it_recorded(tmp_path):
    """For a step of it that is taken again; another start may change all."""
    checkpoint.check_files(tmp_path, lambda: FILES)
    with pytest.raises(UserError, match="config.model.path: b.safetensors"):
        checkpoint.check_files(
            tmp_path, lambda: {"config.model.path": {"a.safetensors": "1"}}, keep=False
        )


def test_process_0_alone_says_whether_settings_continue_a_run(tmp_path, monkeypatch):
    """Each sees its own disk, and one that stops leaves the others waiting."""
    checkpoint.open_run(tmp_path, {"seed": 1})
    begin(tmp_path)
    checkpoint.check_continues(tmp_path, {"seed": 1, "teacher": {"path": "moved"}})
    for check in (checkpoint.check_continues, checkpoint.open_run):
        with pytest.raises(UserError, match="seed: 1 there, 2 now"):
            check(tmp_path, {"seed": 2})
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "is_main", lambda: False)
            check(tmp_path, {"seed": 2})
