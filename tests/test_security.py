"""Nothing that others wrote is run, and nothing outside of what they may name is read."""

import ast
import io
import json
import os
import pathlib
import tarfile
import zipfile

import numpy as np
import packages
import pytest

from unime_jax import tiny, weights
from unime_jax.data import assets, image_files, items, pictures, sources, task_pairs
from unime_jax.data.eval_items import ImageFolder
from unime_jax.types import UserError

PACKAGE = pathlib.Path(__file__).parents[1] / "unime_jax"
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib",
           "torch", "jinja2", "runpy", "yaml", "code"}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "getattr_static"}


def tree(path: pathlib.Path):
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_module_can_run_what_a_file_says(path):
    for node in tree(path):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
            assert not names & MODULES, f"{where} imports {names & MODULES}"
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in MODULES, where
        elif isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            assert called not in CALLS, f"{where} calls {called}"
            if isinstance(node.func, ast.Attribute):
                assert node.func.attr not in ("import_module", "extractall", "system"), where
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                assert not (keyword.arg == "allow_pickle" and value is not False), where
                assert keyword.arg != "trust_remote_code", where
                assert not (keyword.arg == "shell" and value is not False), where


def model(tmp_path) -> pathlib.Path:
    directory = tmp_path / "model"
    return tiny.backbone("nv_embed", directory)


def test_code_beside_a_model_is_left_alone(tmp_path):
    directory = model(tmp_path)
    trap = f"import pathlib\npathlib.Path({str(tmp_path / 'was-here')!r}).touch()\n"
    for name in ("modeling_trap.py", "configuration_trap.py", "tokenization_trap.py",
                 "__init__.py", "sitecustomize.py"):  # fmt: skip
        (directory / name).write_text(trap)
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_trap.Model", "AutoConfig": "configuration_trap.C"}
    config["trust_remote_code"] = True
    (directory / "config.json").write_text(json.dumps(config))
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    settings = {"chat_template": evil, "auto_map": {"AutoTokenizer": ["tokenization_trap.T", None]},
                "tokenizer_class": "Trap"}  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    import unime_jax

    embedder = unime_jax.load(directory, dtype="float32")
    embedder.preprocess(texts=["a cat"])
    assert not (tmp_path / "was-here").exists()


def test_pickled_weights_are_refused(tmp_path):
    directory = model(tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin may run code.*convert it to safetens"):
        weights.find(directory)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "a/b", "a\\b", "a\0b"])
def test_an_index_names_no_files_elsewhere(tmp_path, name):
    directory = model(tmp_path)
    (directory / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"weight_map": {"embedding_model.norm.weight": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names files elsewhere"):
        weights.find(directory)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", "[", "(?P<x>a", ".*.*.*.*.*.*q", "a" * 2000]
)
def test_patterns_of_an_adapter_cannot_take_for_ever(tmp_path, pattern):
    import readers

    readers.READERS["adapter"].write(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rank_pattern": {pattern: 4}}))
    with pytest.raises(UserError, match="rank_pattern with .*regular expression"):
        weights.find(tmp_path)


# ---------------------------------------------------------------- paths of images


@pytest.fixture()
def rooms(tmp_path):
    """An image root and a secret beside it."""
    (tmp_path / "root" / "deep").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(packages.png())
    (tmp_path / "root" / "a.png").write_bytes(packages.png())
    os.symlink(tmp_path / "secret.png", tmp_path / "root" / "link.png")
    os.symlink(tmp_path, tmp_path / "root" / "up")
    os.symlink(tmp_path / "root" / "a.png", tmp_path / "root" / "deep" / "inside.png")
    os.symlink("loop.png", tmp_path / "root" / "loop.png")
    os.mkfifo(tmp_path / "root" / "pipe.png")
    return tmp_path


def outside(rooms) -> list[str]:
    return [
        "../secret.png", "../../../../etc/passwd", "/etc/passwd", str(rooms / "secret.png"),
        f"file://{rooms}/secret.png", "deep/../../secret.png", "..\\secret.png", "link.png",
        "up/secret.png", "~/secret.png", "~root/secret.png", f"{rooms}/root/../secret.png",
    ]  # fmt: skip


BAD = ["http://x.org/a.png", "s3://bucket/a.png", "a\0.png", "pipe.png", "loop.png", "\ud800.png"]
GOOD = ["a.png", "deep/inside.png", "deep\\..\\a.png"]
ABSENT = ["%2e%2e%2fsecret.png", "..%2fsecret.png", "..%5csecret.png", "none.png", "a.png/b"]


def test_no_path_leaves_the_root(rooms):
    folder = image_files.Folder(rooms / "root", option="--x")
    assert folder.read("a.png") == folder.read("deep/inside.png") == packages.png()
    assert folder.read(str(rooms / "root" / "a.png")) == folder.read("deep\\..\\a.png")
    for name in outside(rooms):
        with pytest.raises(image_files.Outside, match="leaves the image root .*--x"):
            folder.read(name)
    for name in BAD + ABSENT:
        with pytest.raises(UserError):
            folder.read(name)
    wide = image_files.Folder(rooms / "root", rooms)
    assert wide.read("../secret.png") == wide.read("link.png") == packages.png()
    assert image_files.Folder(rooms / "root", "/").read(str(rooms / "secret.png"))


@pytest.mark.parametrize("relative", [False, True])
def test_rows_of_every_kind_stay_inside(rooms, relative, monkeypatch):
    """The good ones are read, so that no refusal is one of everything."""
    names = [*outside(rooms), *BAD, *ABSENT, *GOOD]
    lines = [json.dumps({"image": name, "text": "x"}) for name in names]
    path = rooms / "root" / "rows.jsonl"
    path.write_text("\n".join(lines))
    (rooms / "root" / "tasks.jsonl").write_text(
        "\n".join(json.dumps({"query_image": n, "target_text": "x"}) for n in names)
    )

    tasks_path = path.with_name("tasks.jsonl")
    if relative:
        monkeypatch.chdir(rooms)
        path, tasks_path = path.relative_to(rooms), tasks_path.relative_to(rooms)

    def is_read(image) -> bool:
        try:
            pictures.load_rgb(image if isinstance(image, str) else image.load())
        except UserError:
            return False
        return True

    entries = list(items.Input(str(path)))
    assert len(entries) == len(names)
    good = sum(entry.fault == "" and is_read(entry.image) for entry in entries)
    assert good == len(GOOD) and all(is_read(entry.image) for entry in entries[-good:])
    faults = []
    pairs = sources.pairs(path, faults=faults)
    assert len(pairs) + len(faults) == len(names)
    for rows in (pairs, *task_pairs.read(tasks_path, faults=faults)):
        found = [is_read(rows[i].query_image) for i in range(len(rows))]
        assert sum(found) == len(GOOD) and all(found[-len(GOOD) :])
    images = [ImageFolder(path.parent)(name) for name in names]
    assert [is_read(image) for image in images] == [name in GOOD for name in names]
    with_root = [e for e in items.Input(str(path), image_root=str(rooms)) if not e.fault]
    assert sum(is_read(entry.image) for entry in with_root) >= 6 + len(GOOD)


def test_a_refused_link_is_called_one(rooms):
    """Data sets are laid out by links, and Hugging Face's cache is: what to do is said."""
    blobs, snapshot = rooms / "hub" / "blobs", rooms / "hub" / "snapshots" / "x"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "0123").write_bytes(packages.png())
    os.symlink("../../blobs/0123", snapshot / "a.png")
    os.symlink(blobs, snapshot / "COCO")
    hub = os.path.realpath(rooms / "hub")
    for name, blob in (("a.png", "0123"), ("COCO/0123", "0123")):
        words = f"{name}: leaves the image root .*/x by a link to {hub}/blobs/{blob}, not read "
        with pytest.raises(UserError, match=f"{words}.config.image_root .*, {hub} holds both"):
            ImageFolder(snapshot)(name).load()
        assert ImageFolder(snapshot, hub)(name).load() == packages.png()
    with pytest.raises(UserError) as refusal:
        ImageFolder(snapshot)("../../blobs/0123").load()
    assert "by a link" not in str(refusal.value) and "holds both" not in str(refusal.value)
    with pytest.raises(UserError, match="config.image_root /none: no such directory"):
        ImageFolder(snapshot, "/none")


def test_links_in_a_folder_lead_nowhere_else(rooms):
    entries = {entry.id: entry for entry in items.Input(str(rooms / "root"))}
    assert pictures.size_of(entries["a.png"].image) == (20, 12)
    for name in ("link.png", "pipe.png", "loop.png"):
        with pytest.raises(UserError):
            pictures.size_of(entries[name].image)


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    import subprocess

    def refuse(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(UserError, match="not a readable image"):
        pictures.load_rgb(postscript)


# ---------------------------------------------------------------- archives


def test_a_wheel_is_never_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../evil/model.txt", b"text")
    assert assets.read_wheel(path, "model.txt") == b"text"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["x.whl"]
    assert not (tmp_path.parent / "evil").exists()
    monkeypatch.setattr(assets, "MAX_BYTES", 1000)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.txt", b"\0" * 100_000)
    with pytest.raises(UserError, match="unpacks to more than"):
        assets.read_wheel(path, "model.txt")


class _Dpkg:
    """Stands for dpkg-deb: gives a tar archive."""

    def __init__(self, content: bytes):
        self.stdout, self.stderr = io.BytesIO(content), io.BytesIO()

    def wait(self) -> int:
        return 0

    def kill(self) -> None:
        pass


def test_only_files_of_a_package_are_read(tmp_path, monkeypatch):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE),
                           ("device", tarfile.CHRTYPE), ("fifo", tarfile.FIFOTYPE),
                           ("../up", tarfile.REGTYPE), ("/abs", tarfile.REGTYPE)):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = 3 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"abc"))
    monkeypatch.setattr(assets.subprocess, "Popen", lambda *a, **k: _Dpkg(file.getvalue()))
    monkeypatch.chdir(tmp_path)
    found = dict(assets.read_deb(tmp_path / "x.deb", lambda name: True))
    assert found == {"../up": b"abc", "/abs": b"abc"} and not list(tmp_path.iterdir())
    monkeypatch.setattr(assets, "MAX_BYTES", 2)
    with pytest.raises(UserError, match="unpacks to more than"):
        list(assets.read_deb(tmp_path / "x.deb", lambda name: True))


def test_vectors_hold_no_objects(tmp_path):
    from unime_jax.data import vector_files

    objects = np.array([{"a": 1}], object)
    np.savez(tmp_path / "v.npz", vectors=objects, about=np.array(json.dumps({"model": "x"})))
    with pytest.raises(UserError, match="not a readable file of vectors"):
        vector_files.read(tmp_path / "v.npz")
