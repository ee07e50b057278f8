"""Search over files of vectors: the nearest rows, their pictures, and indices of other models."""

import argparse
import json
import os
import shutil
import sys

import miniature
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tolerances
from PIL import Image

import unime_jax
from unime_jax import embed, embedder, report, runtime, search, weights
from unime_jax.data import items, vector_files
from unime_jax.types import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = miniature.write_all(tmp_path_factory.mktemp("search"))
    lines = [{"id": "cat", "text": "a red cat"}, {"id": "both", "text": "a dog", "image": "1.png"},
             {"id": "two", "image": "2.png"}, {"id": "long", "text": "a fox " * 50}]  # fmt: skip
    (root / "pairs" / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.fixture(scope="module")
def model(root):
    return unime_jax.load(root / "student", dtype="float32")


@pytest.fixture(autouse=True)
def quick(monkeypatch, model):
    """Loads the model once for all, and leaves the compile cache of the tests alone."""
    monkeypatch.setattr(runtime, "start", lambda: None)
    load = embedder.load_weights
    monkeypatch.setattr(
        embedder, "load_weights",
        lambda found, **how: model if found.directory == model.directory else load(found, **how),
    )  # fmt: skip


def write(root, output, *flags, input="pairs/items.jsonl"):
    arguments = ["--model", root / "student", "--input", root / input, "--output", output, *flags]
    embed.main(["embed", *map(str, arguments)])
    return output


def find(index, *flags):
    embed.main(["embed", "search", "--index", str(index), *map(str, flags)])


def test_the_nearest_rows_and_their_pictures(root, model, tmp_path, capsys):
    index = write(root, tmp_path / "v.npz")
    capsys.readouterr()
    find(index, "--text", "a red cat", "-k", 3)
    table = capsys.readouterr().out.split("\n")
    assert table[0].split() == ["cosine", "id", "text", "image"] and len(table) == 7
    assert table[2].split()[:3] == ["1", "1.000", "cat"]
    pictures = [None, root / "pairs/1.png", root / "pairs/2.png", None]
    texts = ["a red cat", "a dog", None, "a fox " * 50]
    vectors = model.embed(texts=texts, images=pictures)
    order = np.argsort(-(vectors @ vectors[0]))[:3]
    ids = np.array(["cat", "both", "two", "long"])[order]
    assert [line.split()[2] for line in table[2:5]] == ids.tolist()
    assert table[5] == f"pictures: {index}.search.png"
    with Image.open(f"{index}.search.png") as sheet:
        shown = np.asarray(sheet.convert("RGB"))
    for number in (1, 2):  # the pictures have one colour each
        colour = np.asarray(Image.open(root / f"pairs/{number}.png"))[0, 0, :3]
        assert ((np.abs(shown.astype(int) - colour).max(-1) < 3).mean() > 0.1) == (
            ["both", "two"][number - 1] in ids
        )
    find(index, "--image", root / "pairs" / "2.png", "-k", 99, "--sheet", tmp_path / "my.png")
    found = capsys.readouterr().out
    assert found.split("\n")[2].split()[:3] == ["1", "1.000", "two"] and "my.png" in found
    assert len(found.strip().split("\n")) == 2 + 4 + 1 and (tmp_path / "my.png").is_file()


def test_fewer_numbers_and_the_index_own_instruction(root, tmp_path, capsys):
    index = write(root, tmp_path / "v.safetensors", "--dim", 8, "--dtype", "f16",
                  "--instruction", "Which animal?")  # fmt: skip
    capsys.readouterr()
    find(index, "--text", "a red cat", "-k", 1)
    assert capsys.readouterr().out.split("\n")[2].split()[1:3] == ["1.000", "cat"]
    find(index, "--text", "a red cat", "-k", 1, "--query-instruction", "Another word")
    assert "1.000" not in capsys.readouterr().out
    find(index, "--text", "a red cat", "-k", 1, "--instruction", "Which animal?")
    with pytest.raises(UserError, match="made with the instruction 'Which animal.', not 'Which'"):
        find(index, "--text", "a red cat", "--instruction", "Which")


def test_pictures_inside_a_parquet_file(root, tmp_path, capsys):
    images = [(root / "pairs" / f"{n}.png").read_bytes() for n in (4, 5)]
    pq.write_table(pa.table({"image": images}), root / "in.parquet")
    index = write(root, tmp_path / "v.parquet", input="in.parquet")
    find(index, "--image", root / "pairs" / "5.png")
    assert "image of row 1" in capsys.readouterr().out
    colour = np.asarray(Image.open(root / "pairs/4.png"))[0, 0, :3]
    with Image.open(f"{index}.search.png") as sheet:
        shown = np.asarray(sheet.convert("RGB")).astype(int)
    assert (np.abs(shown - colour).max(-1) < 3).mean() > 0.1


def test_indices_of_other_models(root, tmp_path):
    index = write(root, tmp_path / "v.npy")
    with pytest.raises(UserError, match="v.npy was made with another model than .*teacher is"):
        find(index, "--text", "a", "--model", root / "teacher")
    moved = shutil.copytree(root / "student", tmp_path / "moved")
    find(index, "--text", "a", "--model", moved)  # the same one elsewhere
    with open(moved / "model.safetensors", "r+b") as file:  # as a merged adapter would
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(UserError, match="v.npy was made with another model than .*moved is"):
        find(index, "--text", "a", "--model", moved)
    beside = index.with_name("v.npy.items.jsonl")
    beside.write_text(beside.read_text().replace(str(root / "student"), str(root / "gone")))
    with pytest.raises(
        UserError, match="gone, which made .*v.npy, is not there: name it with --mo"
    ):
        find(index, "--text", "a")


def test_fingerprints_read_every_byte(tmp_path):
    moved = shutil.copytree(miniature.ROOT / "tests" / "golden" / "phi3v_tiny", tmp_path / "model")
    before = weights.find(moved).fingerprint
    with open(moved / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    after = weights.find(moved).fingerprint
    assert after != before
    # Settings of images, which transformers 5 writes into another file.
    (moved / "preprocessor_config.json").rename(tmp_path / "preprocessor_config.json")
    processor = moved / "processor_config.json"
    for crops in (4, 16):
        processor.write_text(json.dumps({"image_processor": {"num_crops": crops}}))
        before, after = after, weights.find(moved).fingerprint
        assert after != before and "processor_config.json" in weights.find(moved).digests
    (tmp_path / "preprocessor_config.json").rename(moved / "preprocessor_config.json")  # is read
    assert "processor_config.json" not in weights.find(moved).digests


def test_what_cannot_be_searched(root, tmp_path):
    with pytest.raises(UserError, match="give --text, --image or both"):
        find(tmp_path / "v.npz")
    with pytest.raises(UserError, match="^--text is empty"):
        find(tmp_path / "v.npz", "--text", " ")
    with pytest.raises(UserError, match="^--image=nope.png: cannot be read"):
        find(tmp_path / "v.npz", "--image", "nope.png")
    with pytest.raises(UserError, match="^--image is empty: name a picture"):
        find(tmp_path / "v.npz", "--image", "")
    with pytest.raises(UserError, match="v.jsonl: a file of vectors ends in .npz, .npy"):
        find(tmp_path / "v.jsonl", "--text", "a")
    with pytest.raises(UserError, match="v.npz: no such file of vectors"):
        find(tmp_path / "v.npz", "--text", "a")
    (root / "bad.jsonl").write_text('{"caption": "a"}')
    with pytest.raises(UserError, match="none of the 1 rows could be embedded"):
        write(root, tmp_path / "v.npz", input="bad.jsonl")
    with pytest.raises(UserError, match="v.npz holds no vectors"):
        find(tmp_path / "v.npz", "--text", "a")


def test_sheets_that_cannot_be_written(root, tmp_path, capsys, monkeypatch):
    index = write(root, tmp_path / "v.npz")
    (tmp_path / "v.npz.search.png").mkdir()
    find(index, "--text", "a red cat")
    said = capsys.readouterr().out
    assert "1.000  cat" in said and "no sheet of the pictures: " in said and "--sheet" in said
    monkeypatch.setattr(embedder, "load_weights", None)
    for sheet in ("v.npz.search.png", "out.jpg"):
        with pytest.raises(UserError, match="^--sheet=.*: the sheet is a file, FILE.png$"):
            find(index, "--text", "a red cat", "--sheet", tmp_path / sheet)
    with pytest.raises(UserError, match="^--sheet=.*v.npz is no directory"):
        find(index, "--text", "a red cat", "--sheet", index / "x.png")


def test_a_sheet_replaces_no_picture(root, tmp_path, monkeypatch):
    pairs = shutil.copytree(root / "pairs", tmp_path / "pairs")
    index = write(root, tmp_path / "v.npz", input=pairs / "items.jsonl")
    monkeypatch.setattr(embedder, "load_weights", None)  # nothing is embedded before it is told
    (pairs / "link.png").hardlink_to(pairs / "1.png")
    before = {path: path.read_bytes() for path in pairs.glob("*.png")}
    for sheet in ("1.png", "link.png"):
        with pytest.raises(UserError, match=f"^--sheet={pairs}/{sheet}: is a picture of .*v.npz; "):
            find(index, "--text", "a red cat", "--sheet", pairs / sheet)
    with pytest.raises(UserError, match="^--sheet=.*4.png: is the picture that is looked for; "):
        find(index, "--image", pairs / "4.png", "--sheet", pairs / ".." / "pairs" / "4.png")
    shutil.copy(pairs / "4.png", f"{index}.search.png")
    with pytest.raises(UserError, match="search.png: is the picture that is looked for; n"):
        find(index, "--image", f"{index}.search.png")
    assert before == {path: path.read_bytes() for path in pairs.glob("*.png")}


def test_a_sheet_of_before_is_compared_with_pictures_of_its_name_alone(tmp_path, monkeypatch):
    """Of an index with many, each of which would be looked at."""
    asked, samefile = [], os.path.samefile
    monkeypatch.setattr(
        search.os.path, "samefile", lambda one, other: asked.append(one) or samefile(one, other)
    )
    sheet = tmp_path / "v.npz.search.png"
    sheet.touch()
    vectors, rows = np.eye(4, dtype=np.float32), np.arange(4)
    names = ["a.png", "", "sub/v.npz.search.png", "link.png"]
    about = {"folder": str(tmp_path)}
    index = vector_files.Vectors(vectors, rows, ids=names, texts=names, images=names, about=about)
    args = argparse.Namespace(index=str(tmp_path / "v.npz"), sheet=None, image=None)
    search._check_sheet(args, index)
    assert asked == [f"{tmp_path}/sub/v.npz.search.png"]
    (tmp_path / "link.png").hardlink_to(sheet)
    with pytest.raises(UserError, match="is a picture of .*v.npz; name another file"):
        search._check_sheet(args, index)


def test_the_search_is_exact():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((500, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines, places = search.nearest(vectors, vectors[7], 20)
    expected = np.argsort(-(vectors @ vectors[7]))[:20]
    np.testing.assert_array_equal(places, expected)
    tolerances.assert_near(cosines, vectors[expected] @ vectors[7], 1e-5)
    vectors[:499] = np.nan  # of a file that others wrote
    cosines, places = search.nearest(vectors, vectors[499], 20)
    assert places.tolist() == [499] and cosines == pytest.approx(1)


def test_missing_faiss_is_told_before_the_model_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"search needs FAISS: pip install -e '.\[search\]'"):
        find(tmp_path / "none.npz", "--text", "a")


def test_an_input_that_cannot_be_read_any_more_shows_no_pictures(tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").touch()
    monkeypatch.setattr(items.Input, "__iter__", lambda self: (_ for _ in ()).throw(OSError(5)))
    about = {"input": str(tmp_path / "in.jsonl"), "keys": ["id", "text", "image"]}
    assert search._from_input(about, {0: 0}) == {}


def test_what_an_index_names_need_not_be_a_picture(root, tmp_path, monkeypatch):
    """Pipes are not waited for; an input that is another kind now is passed over."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("no picture")
    shutil.copy(root / "pairs" / "1.png", tmp_path / "good.png")
    names = ["pipe.png", "text.png", "gone.png", "a\0.png", "http://x.org/a.png", ".", "good.png"]
    about = {"folder": str(tmp_path), "input": str(tmp_path / "text.png"), "keys": ["i", "t", "p"]}
    count = len(names)
    index = vector_files.Vectors(
        vectors=np.eye(count, dtype=np.float32), rows=np.arange(count), ids=names,
        texts=[""] * count, images=names, about=about,
    )  # fmt: skip
    drawn = []

    def draw(images, *_, **__):
        drawn.extend(images)
        return tmp_path

    monkeypatch.setattr(report, "plot_contact_sheet", draw)
    args = argparse.Namespace(index="v.npz", sheet=None, text="a", image=None)
    search._draw(args, index, np.ones(count), np.arange(count))
    assert [image is not None for image in drawn] == [False] * (count - 1) + [True]
