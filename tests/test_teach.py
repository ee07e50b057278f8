"""Teaching: any teacher, any sentences, shards that survive a kill, a manifest that tells them."""

import json
import os
import shutil

import fabricated
import miniature
import numpy as np
import pytest
import tolerances

import unime_jax
from unime_jax import config as config_lib
from unime_jax import runtime, teach
from unime_jax.data import nli, teacher_vectors
from unime_jax.types import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("teach")
    text = {**miniature.STUDENT["text_config"], "hidden_size": 16}
    miniature.write_model(root / "teacher", text, seed=1)
    rows = [f"a {a} runs,an {a} is {b},no {b}" for a in "abcdef" for b in "uvw"]
    (root / "nli.csv").write_text("\n".join(["sent0,sent1,hard_neg", *rows]))
    return root


def config(root, **changes):
    values = {
        "teacher.path": root / "teacher",
        "data.path": root / "nli.csv",
        "output": root / "vectors",
        **changes,
    }
    file = miniature.ROOT / "configs" / "teacher_nv_embed.py"
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return config_lib.parse(["teach", f"--config={file}:smoke", *flags], "doc")


@pytest.fixture(scope="module")
def taught(root):
    return teach.run(config(root))


def test_vectors_are_those_of_the_teacher_on_eight_devices(root, taught):
    sentences = nli.read(root / "nli.csv").sentences
    stored, manifest = teacher_vectors.read(taught, sentences)
    assert taught == root / "vectors" and len(sentences) == 6 + 18 + 3
    assert manifest["width"] == 16 and manifest["count"] == 27 and manifest["teacher"] == "teacher"
    assert manifest["pooling"] == "last token" and manifest["prompt"].startswith("{text}\nSummary")
    alone = unime_jax.load(root / "teacher", dtype="float32").embed(texts=list(sentences))
    tolerances.assert_near(stored[np.arange(27)], alone, tolerances.EMBEDDING)


def test_an_instruction_is_part_of_manifest_and_rows(root, taught, tmp_path):
    told = teach.run(config(root, **{"output": tmp_path, "teacher.instruction": "Find it."}))
    assert json.loads((told / "manifest.json").read_text())["instruction"] == "Find it."
    one, other = (np.load(directory / "vectors-00000.npy") for directory in (taught, told))
    assert np.abs(one - other).max() > 0.01


def test_vectors_of_other_settings_are_refused_not_overwritten(root, taught):
    before = (taught / "vectors-00000.npy").stat().st_mtime_ns
    with pytest.raises(UserError, match="vectors of another instruction; choose another"):
        teach.run(config(root, **{"teacher.instruction": "Find it."}))
    with pytest.raises(UserError, match="another dtype, instruction"):
        teach.run(config(root, **{"teacher.instruction": "x", "model.dtype": "bfloat16"}))
    teach.run(config(root))  # nothing to do
    assert (taught / "vectors-00000.npy").stat().st_mtime_ns == before


def test_a_teacher_replaced_in_place_is_another(root, taught, tmp_path):
    teacher = shutil.copytree(root / "teacher", tmp_path / "teacher")
    assert teach.run(config(root, **{"teacher.path": teacher})) == taught  # moved: the same
    file = teacher / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="vectors of another teacher_hash; choose another"):
        teach.run(config(root, **{"teacher.path": teacher}))


def test_vectors_of_versions_that_knew_teachers_by_another_hash_are_kept(root, taught, tmp_path):
    directory = shutil.copytree(taught, tmp_path / "vectors")
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["teacher_hash"]
    (directory / "manifest.json").write_text(json.dumps({**manifest, "teacher_sha256": "0"}))
    before = (directory / "vectors-00000.npy").stat().st_mtime_ns
    teach.run(config(root, output=directory))
    teach.run(config(root, **{"teacher.vectors": directory, "stage": "distill"}))
    assert (directory / "vectors-00000.npy").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="vectors of another instruction; choose another"):
        teach.run(config(root, output=directory, **{"teacher.instruction": "Find it."}))
    cut(directory / "vectors-00000.npy")  # the others may be of another teacher than this one
    with pytest.raises(UserError, match="a teacher that only its name tells, and not all 27; choo"):
        teach.run(config(root, output=directory))
    for content in ("[]", "{", "{}"):
        (directory / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="holds vectors and no whole manifest.json; choose"):
            teach.run(config(root, output=directory))


def test_vectors_of_another_teacher_are_not_mixed_with_those_of_this_one(
    root, tmp_path, monkeypatch
):
    """In the cache of a run all are made anew where any is missing and theirs is not known."""
    monkeypatch.setattr(teach, "SHARD_ROWS", 20)
    c = config(root, **{"teacher.vectors": tmp_path, "stage": "distill"})
    teach.run(c)
    first, second = (tmp_path / f"vectors-0000{number}.npy" for number in range(2))
    before = [path.read_bytes() for path in (first, second)]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["teacher_hash"]
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "teacher_sha256": "0"}))
    np.save(first, -np.load(first))  # of another teacher
    cut(second)
    teach.run(c)
    assert [path.read_bytes() for path in (first, second)] == before


def test_what_is_there_process_0_alone_says(root, taught, tmp_path, monkeypatch):
    """Others may not see it, or not yet."""
    asked = []

    def by_main(work, **options):
        asked.append(work())
        return asked[-1]

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "by_main", by_main)
        patch.setattr(teach, "_missing", lambda *_, keep: [])
        assert teach.run(config(root, output=tmp_path / "none")) == tmp_path / "none"
    assert asked[1:] == ["[]"]
    monkeypatch.setattr(runtime, "exchange", lambda text: [text, "another"])
    with pytest.raises(UserError, match="config.data.path=.*: processes read different sentences"):
        teach.run(config(root))


def test_a_manifest_that_cannot_be_read_is_named(root, tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UserError, match="manifest.json: cannot be read .Is a directory.; put"):
        teach.run(config(root, output=tmp_path))


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def fill_up(path):
    path.write_bytes(path.read_bytes() + b"\0")


def shorten(path):
    np.save(path, np.load(path)[:-1])


@pytest.mark.parametrize("damage", [cut, fill_up, shorten])
def test_taught_again_damaged_shards_are_made_anew(damage, root, taught, tmp_path):
    """As the reader who finds them advises."""
    directory = shutil.copytree(taught, tmp_path / "vectors")
    damage(directory / "vectors-00000.npy")
    with pytest.raises(UserError, match="vectors-00000.npy.*teach` again"):
        teacher_vectors.read(directory)
    teach.run(config(root, output=directory))
    (one, _), (other, _) = map(teacher_vectors.read, (directory, taught))
    np.testing.assert_array_equal(one[np.arange(27)], other[np.arange(27)])


def test_a_shard_is_on_the_disk_before_it_has_its_name(root, tmp_path, monkeypatch):
    synced, sync, replace = [], os.fsync, os.replace

    def fsync(file):
        sync(file)
        synced.append(os.stat(file).st_ino)

    def rename(source, target):
        if str(target).endswith(".npy"):
            assert os.stat(source).st_ino in synced
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    teach.run(config(root, output=tmp_path))
    assert synced


def test_a_run_teaches_as_the_model_that_it_is(root, taught, tmp_path):
    """All processes find it, as they read its checkpoint together; process 0 alone hashes."""
    text = json.loads((root / "teacher" / "config.json").read_text())
    run = fabricated.write_run(tmp_path / "run", root / "teacher", text, targets=".*q_proj$")
    told = teach.run(config(root, **{"teacher.path": run, "output": tmp_path / "vectors"}))
    stored, _ = teacher_vectors.read(told)
    alone = unime_jax.load(run, dtype="float32").embed(texts=["a a runs"])
    sentences = list(nli.read(root / "nli.csv").sentences)
    tolerances.assert_near(stored[[sentences.index("a a runs")]], alone, tolerances.EMBEDDING)


def test_other_vectors_of_a_run_make_room_once(root, taught, tmp_path, monkeypatch):
    """Process 0 alone removes them, and all make all of their own anew."""
    c = config(root, **{"teacher.vectors": tmp_path, "stage": "distill"})
    stale = [tmp_path / f"vectors-{number:05d}.npy" for number in (0, 7)]
    for path in stale:
        path.write_text("stale")
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "is_main", lambda: False)
        patch.setattr(runtime, "by_main", lambda work, **_: work())
        teach.run(c)
    assert [path.read_text() for path in stale] == ["stale"] * 2
    teach.run(c)
    assert [path.exists() for path in stale] == [True, False]
    np.testing.assert_array_equal(np.load(stale[0]), np.load(taught / stale[0].name))


def test_a_killed_teacher_goes_on_with_the_next_shard(root, taught, tmp_path, monkeypatch):
    monkeypatch.setattr(teach, "SHARD_ROWS", 10)
    wanted = np.load(taught / "vectors-00000.npy")
    saved, calls = teach.np.save, []

    def dying(file, vectors):
        calls.append(len(vectors))
        if len(calls) == 2:
            file.write(b"\x93NUMPY half of it")
            raise KeyboardInterrupt
        saved(file, vectors)

    monkeypatch.setattr(teach.np, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        teach.run(config(root, output=tmp_path))
    assert [path.name for path in tmp_path.glob("*.npy")] == ["vectors-00000.npy"]
    with pytest.raises(UserError, match="vectors-00001.npy"):
        teacher_vectors.read(tmp_path)
    kept = (tmp_path / "vectors-00000.npy").stat().st_mtime_ns
    teach.run(config(root, output=tmp_path))
    assert calls == [10, 10, 10, 7]
    assert (tmp_path / "vectors-00000.npy").stat().st_mtime_ns == kept
    stored, _ = teacher_vectors.read(tmp_path, nli.read(root / "nli.csv").sentences)
    tolerances.assert_near(stored[np.arange(27)], wanted, tolerances.EMBEDDING)


def test_what_is_missing_is_said_in_one_line(root):
    for change, message in (
        ({"teacher.path": ""}, "config.teacher.path is empty"),
        ({"data.path": root / "none.csv"}, "config.data.path=.*no such file"),
        ({"output": ""}, "config.output is empty"),
        ({"output": root / "nli.csv" / "x"}, "config.output=.*nli.csv is no directory"),
        ({"model.dtype": "float16"}, "config.model.dtype='float16'"),
    ):
        changed = {"teacher.path": root / "teacher", "data.path": root / "nli.csv", **change}
        flags = [f"--config.{key}={value}" for key, value in changed.items()]
        file = miniature.ROOT / "configs" / "teacher_nv_embed.py"
        with pytest.raises(UserError, match=message):
            teach.main(["teach", f"--config={file}", *flags])


@pytest.mark.parametrize(
    "file, change, message",
    [
        (
            "eval_smol",
            "output=x",
            "^this is no configuration of a training run: it has no .*stage$",
        ),
        (
            "eval_mmeb",
            "output=x",
            "^this is no configuration of a training run: it has no .*stage$",
        ),
        ("teacher_nv_embed", "stage=teech", "^config.stage='teech': choose one of .*teach$"),
        ("teacher_nv_embed", "data.max_bad_share=7", "^config.data.max_bad_share=7.0: must be in"),
        ("teacher_nv_embed", "teacher={}", "^config.teacher lacks instruction, path, vectors: set"),
    ],
)
def test_configs_that_teach_nothing(file, change, message):
    path = miniature.ROOT / "configs" / f"{file}.py"
    with pytest.raises(UserError, match=message):
        teach.main(["teach", f"--config={path}", f"--config.{change}"])


def test_the_mesh_is_looked_at_before_the_teacher(root):
    with pytest.raises(UserError, match="^config.mesh.data=0.*sizes are positive"):
        teach.run(config(root, **{"mesh.data": 0, "teacher.path": root / "none"}))
