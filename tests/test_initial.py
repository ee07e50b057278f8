"""`config.init_from`: a run starts from what another run or an adapter trained."""

import shutil
import weakref

import fabricated
import jax.numpy as jnp
import miniature
import numpy as np
import pytest

from unime_jax import checkpoint, convert, initial, runtime, steps, train, weights
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
    output = tmp_path / "other"
    checkpoint.open_run(output, {"model": {"path": f"{root}/first/checkpoints/1"}})
    (output / "checkpoints" / "2").mkdir(parents=True)
    assert initial.base(output, str(moved)) == str(moved), "the other one is still there"


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
