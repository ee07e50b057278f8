"""Loaders of the published evaluation sets."""

import io
import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from unime_jax.data import caption_sets, eval_synthetic, mmeb_eval
from unime_jax.data.eval_items import ImageFolder, Items, shown
from unime_jax.types import UserError

TEXT = pyarrow.string()


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def read(path, items=None, **options):
    return mmeb_eval.read(
        [path], Items() if items is None else items, ImageFolder(path.parent), **options
    )


def test_columns_of_every_published_kind(tmp_path):
    path = write(
        tmp_path / "CIRR" / "test-00000-of-00001.parquet",
        qry_text=["a", "", None, "a"],
        qry_img_path=["", "x.jpg", "y.jpg", None],
        tgt_text=pyarrow.array([["b", "c", "b"], ["b"], [], None], pyarrow.list_(TEXT)),
        tgt_img_path=pyarrow.array(
            [["", "z.jpg", ""], [None], ["p.jpg", "q.jpg"], []],
            pyarrow.large_list(TEXT),
        ),
    )
    items = Items()
    rows = read(path, items)
    assert rows.total == 4 and len(rows.queries) == 3  # the last has no candidates
    names = [[(items[i].text, items[i].image and items[i].image.name) for i in found]
             for found in rows.candidates]  # fmt: skip
    assert names == [
        [("b", None), ("c", "z.jpg"), ("b", None)],
        [("b", None)],
        [(None, "p.jpg"), (None, "q.jpg")],
    ]
    assert rows.candidates[0][0] == rows.candidates[0][2] == rows.candidates[1][0]
    assert items[int(rows.queries[1])].image.file == path.parent / "x.jpg"


def test_one_string_is_for_all_candidates_of_a_row(tmp_path):
    path = write(
        tmp_path / "NIGHTS.parquet",
        qry_text=["q", "r"],
        qry_img_path=["", ""],
        tgt_text=["", "<|image_1|>\nGiven."],
        tgt_img_path=[["a", "b"], ["c"]],
    )
    items = Items()
    rows = read(path, items)
    texts = [[items[i].text for i in found] for found in rows.candidates]
    assert texts == [[None, None], ["<|image_1|>\nGiven."]]
    assert shown(items[int(rows.candidates[1][0])]) == "Given."
    assert mmeb_eval.files_of(tmp_path, "nights") == [path]


@pytest.mark.parametrize(
    "columns, named",
    [
        ({"tgt_text": [["a", "b"]], "tgt_img_path": [["", "", ""]]}, "row 0: 2 values in tgt_text"),
        ({"tgt_text": [[1, 2]], "tgt_img_path": [["", ""]]}, "column tgt_text holds"),
        ({"tgt_text": [["a"]]}, "no column tgt_img_path"),
    ],
)
def test_faults_are_named(tmp_path, columns, named):
    path = write(tmp_path / "X.parquet", qry_text=["q"], qry_img_path=[""], **columns)
    with pytest.raises(UserError, match=f"{path}.*{named}"):
        read(path)


def test_files_of_one_set_have_columns_of_one_kind(tmp_path):
    columns = {"qry_text": ["q"], "qry_img_path": [""], "tgt_img_path": [[""]]}
    files = [
        write(tmp_path / "A" / "1.parquet", tgt_text=[["a"]], **columns),
        write(tmp_path / "A" / "2.parquet", tgt_text=["a"], **columns),
    ]
    with pytest.raises(UserError, match=f"{tmp_path / 'A'}: files of different kinds of columns"):
        mmeb_eval.read(files, Items(), ImageFolder(tmp_path))


def test_columns_of_queries_that_are_no_text_are_named(tmp_path):
    rest = {"tgt_text": [["a"]], "tgt_img_path": [[""]]}
    path = write(tmp_path / "X.parquet", qry_text=[5], qry_img_path=[""], **rest)
    with pytest.raises(UserError, match=f"{path}: column qry_text holds int64"):
        read(path)
    text = pyarrow.Array.from_buffers(
        TEXT, 1, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")]
    )
    path = write(tmp_path / "Y.parquet", qry_text=text, qry_img_path=[""], **rest)
    with pytest.raises(UserError, match=f"{path}: column qry_text holds text that is not UTF-8"):
        read(path)


def test_damaged_captions_of_parquet_files_are_named(tmp_path):
    images = [{"bytes": b"x", "path": None}] * 2000
    path = write(
        tmp_path / "test-0.parquet", text=[f"caption {i}" for i in range(2000)], image=images
    )
    place = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    start = place.dictionary_page_offset or place.data_page_offset
    content[start : start + 200] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} row 0: damaged"):
        caption_sets.read_parquet(tmp_path, Items())
    write(path, text=[1, 2], image=images[:2])
    with pytest.raises(UserError, match=f"{path} row 0: text is not text"):
        caption_sets.read_parquet(tmp_path, Items())


def test_a_limit_takes_queries_from_all_over_the_set(tmp_path):
    count = 10
    path = write(
        tmp_path / "GQA.parquet",
        qry_text=[f"q{i}" for i in range(count)],
        qry_img_path=[""] * count,
        tgt_text=[["a", f"b{i}"] for i in range(count)],
        tgt_img_path=[["", ""]] * count,
    )
    items = Items()
    rows = read(path, items, limit=3)
    assert [items[int(i)].text for i in rows.queries] == ["q0", "q4", "q9"] and rows.total == count
    assert len(items) == 7  # nothing of the other rows


def test_paths_that_leave_the_root_are_not_read(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"x")
    folder = ImageFolder(tmp_path / "images")
    for path in ("../secret.jpg", str(tmp_path / "secret.jpg"), "..\\secret.jpg"):
        assert folder(path).file is None
        with pytest.raises(UserError, match="leaves the image root"):
            folder(path).load()
    with pytest.raises(UserError, match="no such image"):
        folder("absent.jpg").load()


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return eval_synthetic.write_captions(tmp_path_factory.mktemp("captions"), images=6)


def test_parquet_sets_take_five_captions_and_read_images_one_by_one(captions):
    items = Items()
    found = caption_sets.read_parquet(captions / "coco_test", items)
    assert len(found.images) == 6 and len(found.captions) == 30  # of 7 captions 5
    assert found.owner.tolist() == [i // 5 for i in range(30)]
    sizes = [Image.open(io.BytesIO(items[int(i)].image.load())).size for i in found.images]
    again = [Image.open(io.BytesIO(items[int(i)].image.load())).size for i in found.images[::-1]]
    assert sizes == again[::-1] and len(set(sizes)) > 1
    assert len(caption_sets.read_parquet(captions / "coco_test", Items(), limit=2).images) == 2


def test_the_other_layouts(captions):
    items = Items()
    folder = captions / "ShareGPT4V"
    found = caption_sets.read_sharegpt4v(folder, folder, items)
    text = items[int(found.captions[2])].text
    assert len(found.images) == 6 and "\n" not in text
    assert caption_sets.first_image(folder) == "sam/images/sa_0.jpg"
    found = caption_sets.read_urban1k(captions / "Urban1k", items)
    assert len(found.images) == 6 and items[int(found.captions[0])].text.endswith("street 0.")
    assert items[int(found.images[5])].image.file.name == "6.jpg"
    path = captions / "sugar_crepe" / "add_obj.json"
    rows = caption_sets.read_sugarcrepe(path, captions / "val2017", items, limit=4)
    assert rows.images.shape == rows.captions.shape == rows.negatives.shape == (4,)
    assert caption_sets.first_filename(path) == "000000000000.jpg"


def test_a_long_json_list_is_read_as_far_as_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_sets, "_READ", 64)
    entry = {"image": "a.jpg", "conversations": [{}, {"value": 'one, [two] {three} ]\n"four"'}]}
    path = tmp_path / caption_sets.SHAREGPT4V_FILE
    path.write_text(" [ " + ",\n ".join([json.dumps(entry)] * 3) + ", {broken")
    found = caption_sets.read_sharegpt4v(tmp_path, tmp_path, Items(), limit=3)
    assert len(found.images) == 3
    with pytest.raises(UserError, match="ends in the middle of an entry"):
        caption_sets.read_sharegpt4v(tmp_path, tmp_path, Items())
    path.write_text(json.dumps([entry, {"image": "b.jpg"}]))
    with pytest.raises(UserError, match="entry 1: no image, or no conversations"):
        caption_sets.read_sharegpt4v(tmp_path, tmp_path, Items())
    path.write_text("{}")
    with pytest.raises(UserError, match="not a JSON list"):
        caption_sets.read_sharegpt4v(tmp_path, tmp_path, Items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"caption": ["a"]}, "stands where a text should"),
        ({"filename": 5}, "stands where a text should"),
        ({"negative_caption": "\ud800"}, "half a surrogate pair"),
        ({"filename": "\ud800.jpg"}, "half a surrogate pair"),
    ],
)
def test_rows_that_hold_no_text_are_named(tmp_path, change, message):
    row = {"filename": "a.jpg", "caption": "a", "negative_caption": "b"}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row, row | change]))
    with pytest.raises(UserError, match=f"{path} row 1: .*{message}"):
        caption_sets.read_sugarcrepe(path, tmp_path, Items())
    fields = {"filename": "image", "caption": "value", "negative_caption": "value"}
    ((name, value),) = change.items()
    entry = {"image": "a.jpg", "conversations": [{}, {"value": "a"}]}
    (entry if fields[name] == "image" else entry["conversations"][1])[fields[name]] = value
    path.write_text(json.dumps([entry]))
    with pytest.raises(UserError, match=f"{path} entry 0: .*{message}"):
        caption_sets.read_sharegpt4v(tmp_path, tmp_path, Items())


def test_files_may_start_with_a_byte_order_mark(captions, tmp_path):
    names = ("ShareGPT4V/*.json", "sugar_crepe/add_obj.json", "Urban1k/caption/1.txt")
    for name in names:
        (source,) = captions.glob(name)
        copy = tmp_path / source.relative_to(captions)
        copy.parent.mkdir(parents=True)
        copy.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    items = Items()
    assert len(caption_sets.read_sharegpt4v(tmp_path / "ShareGPT4V", tmp_path, items).images) == 6
    path = tmp_path / "sugar_crepe/add_obj.json"
    assert len(caption_sets.read_sugarcrepe(path, tmp_path, items, limit=2).images) == 2
    found = caption_sets.read_urban1k(tmp_path / "Urban1k", items)
    assert not items[int(found.captions[0])].text.startswith("\ufeff")


def test_items_are_numbered_once():
    items = Items()
    folder = ImageFolder(pathlib.Path("x"))
    numbers = [
        items.add("a"),
        items.add("a", folder("p")),
        items.add("a"),
        items.add("", folder("p")),
    ]
    assert numbers == [0, 1, 0, 2] and len(items) == 3
    assert np.array([item.text or "" for item in items]).tolist() == ["a", "a", ""]
