"""`config.init_from`: a run starts from what another run or an adapter trained."""

import fabricated
import miniature
import numpy as np
import pytest

from unime_jax import checkpoint, convert, initial
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
