"""Inputs of every kind, row by row; what cannot be read is a row with a fault."""

import json
import os
import pathlib

import packages
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unime_jax.data import image_files, items, pictures, smol, sources, task_pairs
from unime_jax.data.eval_items import ImageFolder
from unime_jax.types import UserError


def read(name, **keys):
    return list(items.Input(str(name), items.Keys(**keys)))


def test_lines_of_json(tmp_path):
    lines = [
        b'\xef\xbb\xbf{"id": "a", "text": "one\\u2028two"}',
        b"",
        b'{"image": "sub/x.png"}\r',
        b'{"id": 7, "text": "", "image": "/abs.png", "other": 1}',
        b'{"id": null, "text": "no newline behind"}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    a, b, c, d = read(tmp_path / "in.jsonl")
    assert (a.row, a.id, a.text, a.image) == (0, "a", "one\u2028two", None)
    assert (b.row, b.id, b.image, b.label) == (1, "1", f"{tmp_path}/sub/x.png", "sub/x.png")
    assert (c.row, c.id, c.text, c.image) == (2, "7", None, "/abs.png")
    assert (d.row, d.id, d.text) == (3, "3", "no newline behind")
    assert not any(entry.fault for entry in (a, b, c, d))
    assert items.Input(str(tmp_path / "in.jsonl")).count() == 4


@pytest.mark.parametrize(
    "line, words",
    [
        (b"{", "line 2 is not JSON: Expecting property name .* at its letter 2"),
        (b'{"text": "\xff"}', "line 2 is not JSON: .*utf-8"),
        (b"[" * 100000, "line 2 is not JSON"),
        (b"3", "line 2 is a number, not"),
        (b'{"txt": "a", "id": 1}', "neither text nor image among txt"),
        (b"{}", "neither text nor image$"),
        (b'{"text": ""}', "^text is empty$"),
        (b'{"text": ["a"]}', "text is a list, not a string"),
        (b'{"text": "a", "image": 3}', "image is a number, not a path"),
        (b'{"text": "a", "id": {}}', "id is an object; give a string or a number"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"image": "\\ud800.png"}', "half a surrogate pair"),
        (b'{"image": {"path": "\\ud800.png"}}', "half a surrogate pair"),
        (b'{"\\ud800": "a"}', "neither text nor image among \\?"),
        (b'{"text": "a", "id": "b\\u0000"}', "id has a NUL character"),
        (b'{"image": "a\\u0000.png"}', "image has a NUL character"),
        (b'{"text": "a", "id": "%s"}' % (b"x" * 4097), "id has 4097 letters; 4096 are the most"),
        (b'{"image": {"path": "%s"}}' % (b"x" * 5000), "image has 5000 letters"),
        (b'{"image": "https://x.org/a.png"}', "https://x.org/a.png: pictures are not downloaded"),
    ],
)
def test_faults_have_reasons(tmp_path, line, words):
    (tmp_path / "in.jsonl").write_bytes(b"\n" + line + b'\n{"text": "fine"}\n')
    bad, fine = read(tmp_path / "in.jsonl")
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(bad.fault)
    assert bad.fault and not fine.fault and bad.digest != fine.digest


def test_stdin(tmp_path, monkeypatch):
    (tmp_path / "x").write_text('{"text": "a"}\n{"image": "b.png"}')
    with open(tmp_path / "x") as file:
        monkeypatch.setattr("sys.stdin", file)
        a, b = read("-")
    out, into = os.pipe()
    with open(out) as file, open(into, "wb", buffering=0) as pipe:
        monkeypatch.setattr("sys.stdin", file)
        pipe.write(b'\n{"text": "' + b"x" * 9000 + b'"}\n{"te')
        monkeypatch.setattr(items, "_WAIT", 0.01)
        rows = items.Input("-").read(stopped=lambda: True)
        assert next(rows).text == "x" * 9000
        pipe.write(b'xt": "b"}\n{')
        assert next(rows).text == "b"
        assert list(rows) == []  # does not wait for the rest of a line
        assert (a.text, b.image, b.label) == ("a", os.path.abspath("b.png"), "b.png")
    assert items.Input("-").count() is None and not items.Input("-").is_repeatable
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="^--input -: stdin is closed"):
        items.Input("-")


def test_a_folder_of_pictures(tmp_path):
    names = ("b.png", "a.JPG", "sub/c.webp", ".hidden.png", ".git/d.png", "notes.txt")
    for name in (*names, "v.npz.search.png"):  # what a search has drawn is no input
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):
        pass
    found = read(tmp_path)
    assert [entry.id for entry in found] == ["a.JPG", "b.png", "\ufffd.png", "sub/c.webp"]
    assert found[3].image == f"{tmp_path}/sub/c.webp" and len(found[2].digest) == 16
    folder = items.Input(str(tmp_path))
    assert folder.count() == 4
    assert folder.describe_left_out().endswith("by the ends of their names: 2")
    (tmp_path / "nothing").mkdir()
    for look in (list, items.Input.count):
        with pytest.raises(UserError, match="no pictures in this folder"):
            look(items.Input(str(tmp_path / "nothing")))


def test_linked_folders_are_followed_inside_the_image_root_alone(tmp_path):
    for name in ("data/a.png", "data/real/b.jfif", "elsewhere/c.avif", "elsewhere/in/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    data = tmp_path / "data"
    (data / "again").symlink_to("real")
    (data / "inner").symlink_to("../elsewhere/in")
    (data / "other").symlink_to("../elsewhere")
    (data / "self").symlink_to("self")
    (tmp_path / "elsewhere" / "back").symlink_to("../data/real")
    (tmp_path / "elsewhere" / "in" / "out").symlink_to("..")
    (data / "real" / "up").symlink_to("..")  # does not end
    (data / "gone").symlink_to("../nowhere")
    narrow, wide = read(data), list(items.Input(str(data), image_root=str(tmp_path)))
    assert [entry.id for entry in narrow] == ["a.png", "inner", "other", "real/b.jfif"]
    once = ["inner/d.png", "inner/out/c.avif"]  # what has come by one link is not taken again
    assert [entry.id for entry in wide] == ["a.png", *once, "real/b.jfif"]
    assert all(image_files.OUTSIDE in entry.fault for entry in narrow[1:3])
    assert not any(entry.fault for entry in wide) and wide[2].image.checked().is_file()


def test_hidden_folders_are_reached_by_links(tmp_path):
    """As Kubernetes mounts what is configured, and stores keep what is named otherwise."""
    for name in ("..2026/a.png", ".store/in/b.png", ".never/c.png", "seen/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(packages.png())
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "pics").symlink_to("..data")
    (tmp_path / "current").symlink_to(".store")
    (tmp_path / "newest").symlink_to(".store/in")
    (tmp_path / ".store" / "up").symlink_to("..")
    found = read(tmp_path)
    assert [entry.id for entry in found] == ["current/in/b.png", "pics/a.png", "seen/d.png"]
    assert all(pictures.size_of(entry.image) == (20, 12) for entry in found)


def test_pictures_of_folders_that_link_to_each_other_are_taken_once(tmp_path):
    for name in "abcdefg":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"")
        for other in set("abcdefg") - {name}:
            (tmp_path / name / f"to-{other}").symlink_to(f"../{other}")
    (tmp_path / "latest").symlink_to("g")
    (tmp_path / "all").symlink_to(".")
    assert [entry.id for entry in read(tmp_path)] == [f"{name}/x.png" for name in "abcdefg"]
    (tmp_path.parent / "by-a-link").symlink_to(tmp_path)
    found = read(tmp_path.parent / "by-a-link")
    assert [entry.id for entry in found] == [f"{name}/x.png" for name in "abcdefg"]


def test_names_of_pictures_end_as_pillow_knows():
    from PIL import Image

    Image.init()
    kinds = Image.registered_extensions().items()
    assert {end for end, kind in kinds if kind in pictures.FORMATS} <= set(items.PICTURES)


def test_parquet(tmp_path):
    png = packages.png()
    images = [{"bytes": png, "path": "x.png"}, {"bytes": None, "path": "y.png"}, None]
    table = pa.table({"name": ["a", "b", "c"], "caption": ["one", None, "three"], "image": images})
    pq.write_table(table, tmp_path / "in.parquet")
    source = items.Input(str(tmp_path / "in.parquet"), items.Keys("name", "caption", "image"))
    a, b, c = source
    assert source.count() == 3
    assert (a.id, a.text, a.image, a.label) == ("a", "one", png, "x.png")
    assert (b.text, b.image, b.label) == (None, f"{tmp_path}/y.png", "y.png")
    assert (c.text, c.image) == ("three", None)
    pq.write_table(pa.table({"image": [png], "id": [3]}), tmp_path / "bytes.parquet")
    (row,) = read(tmp_path / "bytes.parquet")
    assert (row.id, row.image, row.label) == ("3", png, "image of row 0")
    with pytest.raises(UserError, match="neither a column 'text' nor 'picture'; it has name, capt"):
        read(tmp_path / "in.parquet", image="picture")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "in.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match="cut.parquet: cannot be read as Parquet"):
        read(tmp_path / "cut.parquet")


def test_nan_is_no_value(tmp_path):
    table = pa.table({"id": [1.5, float("nan")], "text": ["a", "b"], "image": [float("nan")] * 2})
    pq.write_table(table, tmp_path / "in.parquet")
    assert [(e.id, e.text, e.fault) for e in read(tmp_path / "in.parquet")] == [
        ("1.5", "a", ""),
        ("1", "b", ""),
    ]


def test_what_is_no_input(tmp_path):
    with pytest.raises(UserError, match="absent: no such file or folder"):
        read(tmp_path / "absent")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match="a.csv: an input is a .jsonl file"):
        read(tmp_path / "a.csv")


def test_digests_tell_rows_apart():
    rows = [
        items.Entry(0, "a", "x"),
        items.Entry(0, "a", "xy"),
        items.Entry(0, "ax", None, "x"),
        items.Entry(0, "a", None, "x"),
        items.Entry(0, "a", None, b"x!"),
        items.Entry(0, "a", fault="x"),
    ]
    assert len({row.digest for row in rows}) == len(rows)
    moved = [items.Entry(0, "a", None, f"/{place}/x.png", "x.png") for place in "ab"]
    assert moved[0].digest == moved[1].digest
    assert rows[0].digest == items.Entry(9, "a", "x").digest


@pytest.mark.parametrize("image_root", ["", "in", ".", "in/../in/pics"])
@pytest.mark.parametrize("kind", ["pics", "in/pics/", "rows.jsonl", "./in/rows.parquet", "-"])
def test_pictures_of_inputs_that_are_named_relatively(tmp_path, monkeypatch, kind, image_root):
    """As README names them, with a folder in the path and without one."""
    pictures_at = tmp_path / "in" / "pics"
    pictures_at.mkdir(parents=True)
    (pictures_at / "x.png").write_bytes(packages.png())
    rows = [{"image": "pics/x.png"}, {"image": str(pictures_at / "x.png")}]
    (tmp_path / "in" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "rows.parquet")
    here = kind.startswith(("in", "./in"))
    monkeypatch.chdir(tmp_path if here else tmp_path / "in")
    if not here:
        image_root = {"in": "../in", "in/../in/pics": "pics"}.get(image_root, image_root)
    with open(tmp_path / "in" / "rows.jsonl") as file:
        monkeypatch.setattr("sys.stdin", file)
        entries = list(items.Input(kind, image_root=image_root))
    assert len(entries) == (1 if "pics" in kind else 2)
    for entry in entries:
        assert pictures.size_of(entry.image) == (20, 12), entry


def test_pictures_of_pairs_that_are_named_relatively(tmp_path, monkeypatch):
    (tmp_path / "in" / "pics").mkdir(parents=True)
    (tmp_path / "in" / "pics" / "x.png").write_bytes(packages.png())
    rows = tmp_path / "in" / "rows.jsonl"
    rows.write_text(json.dumps({"image": "pics/x.png", "text": "x"}))
    tasks = tmp_path / "in" / "tasks.json"
    tasks.write_text(json.dumps([{"query_image": "pics/x.png", "target_text": "x"}]))
    monkeypatch.chdir(tmp_path)
    rows, tasks = (path.relative_to(tmp_path) for path in (rows, tasks))
    for root in (None, "in", ".", str(tmp_path)):
        folder = image_files.Folder("in", root)
        (part,) = task_pairs.read(tasks, folder=folder)
        assert part[0].query_image.load() == packages.png()
        assert sources.pairs(rows, folder=folder)[0].query_image.load() == packages.png()
    assert task_pairs.read(tasks)[0][0].query_image.load() == packages.png()
    assert sources.pairs(rows)[0].query_image.load() == packages.png()
    (pair,) = smol.own_pairs(rows)
    assert pictures.size_of(os.fsdecode(pair.content)) == (20, 12)
    assert ImageFolder(pathlib.Path("in"))("pics/x.png").load() == packages.png()
