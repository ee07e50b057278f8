"""`config.init_from`: a run starts from what another run or an adapter trained."""

import functools
import json
import os
import shutil
import weakref
from unittest import mock

import fabricated
import jax.numpy as jnp
import miniature
import numpy as np
import pytest

from unime_jax import checkpoint, convert, initial, runtime, steps, train, train_data, weights
from unime_jax.data import batch_info, fingerprint, sources
from unime_jax.types import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("initial")
    miniature.write_model(root / "student", miniature.STUDENT, seed=0)
    fabricated.write_run(root / "first", root / "student", miniature.STUDENT, seed=1)
    convert.main(
        ["convert", "adapters", "--model", str(root / "first"), "--output", str(root / "peft")]
    )
    return root


def read(root, source, *, alpha=6.0, base="student", extra=(), drop=()):
    trained = checkpoint.read_trainable(root / "first")
    trainable = {path: np.zeros_like(x) for path, x in trained.items() if path not in drop}
    trainable |= {path: np.full(shape, 7, np.float32) for path, shape in extra}
    settings = {
        "init_from": str(root / source),
        "model": {"path": str(root / base)},
        "train": {"adapters": {"rank": 3, "alpha": alpha}},
    }
    return initial.read(settings, trainable), trained


@pytest.mark.parametrize("source", ["first", "first/checkpoints/1", "peft"])
def test_starts_from_what_was_trained_there(source, root, capsys):
    bias = "multi_modal_projector/linear_1/bias"
    found, trained = read(root, source, extra=[(bias, (24,))])
    for path, value in trained.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    np.testing.assert_array_equal(found[bias], 7), "not trained there: its own value stays"
    assert (
        f"{len(trained)} arrays as they were trained there, 1 new ones" in capsys.readouterr().out
    )


def test_another_alpha_keeps_what_the_adapters_do(root):
    found, trained = read(root, "first", alpha=12.0)
    for path, value in trained.items():
        factor = 0.5 if path.endswith("lora_B") else 1.0
        np.testing.assert_array_equal(found[path], factor * value, err_msg=path)


def test_what_does_not_fit_is_named(root):
    with pytest.raises(UserError, match="^config.init_from=.*gone, which the run .*: put it back$"):
        read(root, "gone")
    path = "language_model/model/layers/self_attn/q_proj/lora_A"
    with pytest.raises(UserError, match="trained there, not here"):
        read(root, "first", drop=[path, path.replace("_A", "_B")])
    with pytest.raises(UserError, match=r"q_proj/lora_A: \(2, 32, 3\) there, \(2, 32, 5\) here"):
        read(root, "first", extra=[(path, (2, 32, 5))])


def test_another_base_is_refused(root):
    with pytest.raises(UserError, match="what it trained would count twice"):
        read(root, "first", base="first")
    miniature.write_model(root / "other", miniature.STUDENT, seed=0)
    with pytest.raises(UserError, match="was trained on .*student.* set config.model.path"):
        read(root, "first", base="other")
    (root / "bare").mkdir()
    (root / "bare" / "run.json").write_text('{"model": []}')
    with pytest.raises(UserError, match="bare/run.json: no model.path"):
        read(root, "bare")


def test_a_base_that_trained_on_is_another_base(root):
    read(root, "first", base="student")
    run = fabricated.write_run(
        root / "second", root / "first" / "checkpoints" / "1", miniature.STUDENT, seed=2
    )
    assert initial._check_base(run, str(root / "first" / "checkpoints" / "1")) is None
    assert initial._check_base(run, str(root / "first")) is None, "of a run of before"
    with pytest.raises(UserError, match="set config.model.path to the former"):
        initial._check_base(run, str(root / "first" / "checkpoints" / "2"))


def test_a_base_that_still_trains_is_its_checkpoint_of_now(root, tmp_path, capsys):
    first = fabricated.write_run(tmp_path / "first", root / "student", miniature.STUDENT, seed=1)
    output, pinned = tmp_path / "run", str(first / "checkpoints" / "1")
    assert initial.base(output, str(root / "student")) == str(root / "student")
    assert initial.base(output, str(first)) == pinned
    assert f"path={first}: its newest checkpoint now, 1, is the base" in capsys.readouterr().out
    fabricated.write_run(output, pinned, miniature.STUDENT, seed=2)
    before = weights.find(output).fingerprint

    config = checkpoint.read_run(first)
    saves = checkpoint.Checkpoints(first, config=config, keep=1)
    for step in (2, 3):  # it trains on, and keeps one checkpoint
        trained = {key: jnp.asarray(x + 1) for key, x in checkpoint.read_trainable(first).items()}
        saves.save(steps.TrainState(jnp.int32(step), trained, {}), force=True)
        saves._settle()
    saves.close()
    assert initial.base(tmp_path / "new", str(first)).endswith("checkpoints/3")
    capsys.readouterr()
    assert initial.base(output, str(first)) == initial.base(output, pinned) == pinned
    assert capsys.readouterr().out == "" and weights.find(output).fingerprint == before
    assert sorted(path.name for path in (first / "checkpoints").iterdir()) == ["1", "3"]

    (tmp_path / "moved").mkdir()
    for run in (first, output):
        run.rename(tmp_path / "moved" / run.name)
    assert weights.find(tmp_path / "moved" / "run").fingerprint == before
    shutil.rmtree(tmp_path / "moved" / "first" / "checkpoints" / "1")
    with pytest.raises(UserError, match="trained from first/checkpoints/1, which is neither"):
        weights.find(tmp_path / "moved" / "run")


def test_a_run_is_no_base_of_itself(root, tmp_path):
    for name in ("first", "first/checkpoints/1"):
        with pytest.raises(UserError, match="config.model.path=.* is config.output as well"):
            initial.base(root / "first", str(root / name))
    with pytest.raises(UserError, match="no checkpoint there yet"):
        checkpoint.open_run(tmp_path / "bare", {})
        initial.base(tmp_path / "run", str(tmp_path / "bare"))


def test_an_adapter_of_a_base_of_another_name_is_said(root, capsys):
    read(root, "peft")
    assert "was trained on" not in capsys.readouterr().out
    miniature.write_model(root / "renamed", miniature.STUDENT, seed=0)
    read(root, "peft", base="renamed")
    assert "peft: was trained on " in capsys.readouterr().out


def test_a_run_stands_for_its_newest_checkpoint_until_this_one_has_begun(root, tmp_path, capsys):
    output, first = tmp_path / "run", str(root / "first")
    pinned = str(root / "first" / "checkpoints" / "1")
    assert initial.resolve(output, "") == ""
    assert initial.resolve(output, first) == initial.resolve(output, pinned) == pinned
    assert (root / "first" / "kept" / "1").read_text() == f"{output}\n"
    assert initial.resolve(output, str(root / "peft")) == str(root / "peft")
    with pytest.raises(UserError, match="config.init_from=/no/such/run: no such file"):
        initial.resolve(output, "/no/such/run")
    # Begun: what it began from counts, there or not, whatever is asked for.
    checkpoint.open_run(output, {"init_from": "/gone/checkpoints/7", "seed": 1})
    (output / "checkpoints" / "2").mkdir(parents=True)
    for asked in ("", first, "/gone"):
        capsys.readouterr()
        assert initial.resolve(output, asked) == "/gone/checkpoints/7"
        checkpoint.open_run(output, {"init_from": "/gone/checkpoints/7", "seed": 1})
        said = f"goes on from its own checkpoint, not from {asked}" in capsys.readouterr().out
        assert said == bool(asked)
    checkpoint.check_continues(output, {"init_from": first, "seed": 1})


def test_a_base_that_was_moved_is_its_checkpoint_of_then(root, tmp_path):
    output, moved = tmp_path / "run", shutil.copytree(root / "first", tmp_path / "moved")
    checkpoint.open_run(output, {"model": {"path": "/gone/first/checkpoints/1"}})
    (output / "checkpoints" / "2").mkdir(parents=True)
    shutil.copytree(moved / "checkpoints" / "1", moved / "checkpoints" / "9")
    assert initial.base(output, str(moved)) == f"{moved}/checkpoints/1"
    assert initial.base(output, f"{moved}/checkpoints/9") == f"{moved}/checkpoints/9"
    assert (moved / "kept" / "9").read_text() == f"{output}\n"
    assert initial.base(output, str(moved), replays=True) == f"{moved}/checkpoints/1"


def copied(run, place):
    return shutil.copytree(run, place, ignore=shutil.ignore_patterns("kept"))


def test_a_copy_of_a_base_is_its_checkpoint_of_then_and_keeps_it(root, tmp_path):
    output, copy = tmp_path / "run", copied(root / "first", tmp_path / "copy")
    checkpoint.open_run(output, {"model": {"path": f"{root}/first/checkpoints/1"}})
    (output / "checkpoints" / "2").mkdir(parents=True)
    shutil.copytree(copy / "checkpoints" / "1", copy / "checkpoints" / "9")
    assert initial.base(output, str(copy), replays=True) == f"{copy}/checkpoints/1"
    assert not (copy / "kept").exists()
    assert initial.base(output, str(copy)) == f"{copy}/checkpoints/1"
    assert (copy / "kept" / "1").read_text() == f"{output}\n"
    # Refused, for what lies there is another one: the next start takes the mark back.
    checkpoint.release(output, [f"{root}/first/checkpoints/1"])
    assert not (copy / "kept" / "1").exists()


@pytest.fixture
def start(root, tmp_path, monkeypatch):
    """Starts a run without a model and without steps; what it says if it is refused."""

    def open_run(config, settings):
        found, keep = weights.find(settings["model"]["path"]), not config.train.replay
        checkpoint.check_files(config.output, lambda: train._hashes(found, settings), keep=keep)
        if settings["data"]["path"].endswith("tasks.jsonl"):
            rows = train_data._open_tasks(settings, [])
        else:
            folder = train_data._images(settings["data"])
            rows = sources.pairs(settings["data"]["path"], folder=folder)
            rows = rows.directed("text_to_image").by_source()
        found = functools.partial(fingerprint.fingerprint, rows)
        return mock.Mock(data=mock.Mock(spec=train_data.TrainData, fingerprint=found))

    def train_on(*_, **__):
        (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_open", open_run)
    monkeypatch.setattr(checkpoint, "Checkpoints", train_on)
    monkeypatch.setattr(train.replay, "run", train_on)
    monkeypatch.setattr(steps, "create_state", lambda *_, **__: None)

    def begin(base, data="data/pairs.jsonl", **changes):
        monkeypatch.chdir(tmp_path)
        paths = {"output": tmp_path / "run", "model.path": base, "data.path": data}
        c = miniature.config("smol_stage2", root, **{**paths, "data.features": "", **changes})
        try:
            train.run(c)
        except KeyboardInterrupt:
            return ""
        except UserError as error:
            return str(error)

    miniature.write_pairs(tmp_path / "data")
    return begin


def test_a_start_that_is_refused_changes_no_setting(start, root, tmp_path):
    first, other = (copied(root / "first", tmp_path / name) for name in ("first", "other"))
    pinned = f"{first}/checkpoints/1"
    shutil.copytree(first / "checkpoints" / "1", first / "checkpoints" / "9")
    trained = checkpoint.read_trainable
    text = (tmp_path / "data" / "pairs.jsonl").read_text()
    (tmp_path / "data" / "typo.jsonl").write_text(text.replace("cat", "kitten"))
    assert start(pinned) == ""
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:  # the others were trained on

        def read(path):
            return {key: x + (str(path) != pinned) for key, x in trained(path).items()}

        patch.setattr(checkpoint, "read_trainable", read)
        for base in (root / "student", f"{first}/checkpoints/9", other):
            said = start(base)
            assert said.startswith("not the files that"), said
            assert (tmp_path / "run" / "run.json").read_bytes() == before
    (tmp_path / "data" / "pairs.jsonl").rename(tmp_path / "data" / "kept.jsonl")
    assert "not the rows that" in start(pinned, "data/typo.jsonl")
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    (tmp_path / "data" / "kept.jsonl").rename(tmp_path / "data" / "pairs.jsonl")
    assert start(first) == start(pinned, **{"log.every_steps": 7}) == ""
    assert checkpoint.read_run(tmp_path / "run")["log"]["every_steps"] == 7
    assert sorted(os.listdir(first / "kept")) == ["1", "lock"]
    assert not (other / "kept" / "1").exists()


def test_a_start_that_saved_nothing_leaves_no_mark(start, root, tmp_path):
    """Another one may begin from elsewhere."""
    one, other = (copied(root / "first", tmp_path / name) for name in ("one", "other"))
    for base in (one, other, root / "student"):
        assert start(base) == ""
        for run in (one, other):
            assert (run / "kept" / "1").exists() == (run == base)
        shutil.rmtree(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("name", ["pairs", "tasks"])
def test_own_pairs_with_pictures_may_move(name, start, root, tmp_path):
    here, there = tmp_path / "data", tmp_path / "there"
    task = {"query_text": "a cat", "query_image": "0.png", "target_image": "sub/../1.png"}
    (here / "tasks.jsonl").write_text(json.dumps(task))
    assert start(root / "student", f"data/{name}.jsonl") == ""
    assert start(root / "student", f"{here}/{name}.jsonl") == "", "spelled another way"
    shutil.move(here, there)
    assert start(root / "student", f"{there}/{name}.jsonl") == ""
    text = (there / f"{name}.jsonl").read_text()
    (there / f"{name}.jsonl").write_text(text.replace('"0.png', '"./2.png'))
    assert "not the rows that" in start(root / "student", f"{there}/{name}.jsonl")


@pytest.mark.parametrize("name", ["pairs", "tasks"])
def test_rows_that_an_earlier_version_recorded_may_move(name, start, root, tmp_path, monkeypatch):
    """It counted a picture by its path, as it was spelled then."""
    task = {"query_text": "a cat", "query_image": "0.png", "target_image": "./1.png"}
    (tmp_path / "data" / "tasks.jsonl").write_text(json.dumps(task))
    name_row = batch_info.name_row
    with monkeypatch.context() as patch:
        patch.setattr(batch_info, "name_row", lambda source, number, _: name_row(source, number))
        assert start(root / "student", f"data/{name}.jsonl") == ""
    record = tmp_path / "run" / "data.json"
    before = record.read_text()
    shutil.move(tmp_path / "data", tmp_path / "there")
    there = f"{tmp_path}/there/{name}.jsonl"
    assert start(root / "student", there, **{"train.replay": 1}) == ""
    assert record.read_text() == before
    assert start(root / "student", there) == "" and record.read_text() != before
    shutil.move(tmp_path / "there", tmp_path / "data")
    assert start(root / "student", f"data/{name}.jsonl") == ""


def test_keys_that_a_run_was_begun_without_do_what_was_done_then(start, root, tmp_path, capsys):
    assert start(root / "student") == ""
    file = tmp_path / "run" / "run.json"
    config = json.loads(file.read_text())
    del config["data"]["joint_bins"], config["optim"]["spike_factor"]
    config["my"] = {"own": 3}
    config["init_from"] = config["data"]["images"] = None
    file.write_text(json.dumps(config))
    for _ in range(2):
        assert start(root / "student", **{"data.joint_bins": True}) == ""
        said = f"config.data.joint_bins=False: {tmp_path}/run was begun before there was this key"
        assert f"{said}\n" in capsys.readouterr().out
    dropout = {"train.feature_dropout": 0.1}
    assert "feature_dropout" in start(root / "student", **dropout)
    assert f"{said}; from here on it draws other dropout masks\n" in capsys.readouterr().out
    assert "data.max_tokens: 64 there" in start(root / "student", **{"data.max_tokens": 63})


def test_a_step_taken_again_before_the_first_checkpoint_is_of_the_run_that_was(
    root, tmp_path, monkeypatch
):
    """Where the others have trained on since."""
    opened = []

    def open_run(config, settings):
        opened.append((settings["model"]["path"], settings["init_from"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_open", open_run)
    first = shutil.copytree(root / "first", tmp_path / "first")
    for replay, base in ((0, first), (1, first), (0, root / "student"), (1, root / "student")):
        places = {"output": tmp_path / base.name / "run", "model.path": base, "init_from": first}
        c = miniature.config("smol_stage2", root, **places, **{"train.replay": replay})
        with pytest.raises(KeyboardInterrupt):
            train.run(c)
        shutil.copytree(first / "checkpoints" / "1", first / "checkpoints" / f"{len(opened) + 1}")
    assert opened[0] == opened[1] == (f"{first}/checkpoints/1", f"{first}/checkpoints/1")
    assert opened[2] == opened[3] == (str(root / "student"), f"{first}/checkpoints/3")


def test_a_base_that_goes_before_it_is_marked_gives_way_to_a_newer_one(
    root, tmp_path, monkeypatch, capsys
):
    first = shutil.copytree(root / "first", tmp_path / "first")
    keep = checkpoint.keep

    def late(found, output):
        if found.name == "1":
            found.rename(found.with_name("2"))
        return keep(found, output)

    monkeypatch.setattr(checkpoint, "keep", late)
    assert initial.base(tmp_path / "run", str(first)) == f"{first}/checkpoints/2"
    assert "cannot be marked" not in capsys.readouterr().out
    monkeypatch.setattr(checkpoint, "keep", lambda found, output: False)
    assert initial.base(tmp_path / "run", str(first)) == f"{first}/checkpoints/2"
    assert "2 cannot be marked as needed by" in capsys.readouterr().out


def test_what_a_base_was_trained_to_is_not_held_beside_the_model(root, tmp_path, monkeypatch):
    """A whole decoder, of a base that is a run."""
    held = []

    class Found:
        directory = tmp_path / "there"

    def find(name):
        found = Found()
        held.append(weakref.ref(found))
        return found

    def embed(model, *, directory, **_):
        assert directory == Found.directory and held[0]() is None
        raise KeyboardInterrupt

    monkeypatch.setattr(train.weights, "find", find)
    monkeypatch.setattr(train.embedder, "build", lambda found, **_: None)
    monkeypatch.setattr(train.embedder, "Embedder", embed)
    monkeypatch.setattr(checkpoint, "check_files", lambda path, hashes, keep: None)
    c = miniature.config("smol_stage2", root, output=tmp_path, **{"model.path": root / "student"})
    with pytest.raises(KeyboardInterrupt):
        train._open(c, c.to_dict())
    assert held


def test_the_others_wait_for_checksums_of_a_whole_decoder(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(runtime, "by_main", lambda work, wait=0: waits.append(wait) or "")
    initial.base(tmp_path, "first"), initial.resolve(tmp_path, "first")
    assert waits == [runtime.HASHING_MS] * 2
