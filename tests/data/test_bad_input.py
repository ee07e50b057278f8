"""Rows that cannot be used, injected one kind after the other: told, counted, and limited."""

import io
import json
import resource

import numpy as np
import packages
import pytest
from PIL import Image

from unime_jax import train_data
from unime_jax.data import (
    items,
    nli,
    pictures,
    pipeline,
    preprocess,
    sources,
    stream,
    task_pairs,
)
from unime_jax.types import ImageSpec, UserError

SPECS = {
    "smol": ImageSpec("grid", 8, 3),
    "phi35v": ImageSpec("phi_hd", 56, 4, crops=4),
    "llava16": ImageSpec("llava_anyres", 56, 16, grids=((56, 112), (112, 56), (112, 112))),
}


def encoded(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def floats(value) -> bytes:
    return encoded(Image.fromarray(np.full((6, 8), value, np.float32)), "TIFF")


JPEG = encoded(Image.effect_noise((90, 70), 99).convert("RGB"), "JPEG")
PNG = encoded(Image.effect_noise((90, 70), 99))
# name of the file -> (content, what the reason says)
BAD_FILES = {
    "zero.jpg": (b"", "no known format"),
    "text.png": (b"this is a text", "no known format"),
    "page.png": (b"<html><body>404</body></html>", "no known format"),
    "vector.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no known format"),
    "cut.png": (PNG[: len(PNG) // 2], "not a readable image"),
    "header.png": (PNG[:30], "not a readable image"),
    "cut.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "bomb.png": (packages.bomb(50_000, 50_000), "more than 100 MP"),
    "wide.png": (packages.bomb(2_000_000_000, 1), "more than 100 MP"),
    "just.png": (packages.bomb(10_001, 10_000), "more than 100 MP"),
    "nan.tif": (floats(np.nan), "NaN or infinite"),
    "inf.tif": (floats(np.inf), "NaN or infinite"),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known format"),
}
GOOD_FILES = {
    "png.jpg": PNG,
    "jpg.png": JPEG,
    "nothing": PNG,
    "cmyk.jpg": encoded(Image.new("CMYK", (9, 7)), "JPEG"),
    "palette.png": encoded(Image.new("P", (9, 7)), transparency=0),
    "grey.png": encoded(Image.new("LA", (9, 7))),
    "bit.png": encoded(Image.new("1", (9, 7))),
    "deep.png": encoded(Image.fromarray(np.full((7, 9), 40_000, np.uint16))),
    "float.tif": floats(0.25),
    "one.png": encoded(Image.new("RGB", (1, 1))),
    "still.gif": encoded(Image.new("P", (9, 7)), "GIF", save_all=True,
                         append_images=[Image.new("P", (9, 7), 3)]),
}  # fmt: skip


@pytest.fixture(scope="module")
def smol(byte_level):
    return preprocess.Preprocessor(byte_level, SPECS["smol"], prompt="smol", max_tokens=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every good and every bad file, and rows that name them."""
    root = tmp_path_factory.mktemp("pictures")
    for name, content in GOOD_FILES.items():
        (root / name).write_bytes(content)
    for name, (content, _) in BAD_FILES.items():
        (root / name).write_bytes(content)
    names = [*GOOD_FILES, *BAD_FILES, "gone.png", "../secret.png"]
    rows = [json.dumps({"id": name, "image": name, "text": f"text {name}"}) for name in names]
    (root / "rows.jsonl").write_text("\n".join(rows))
    return root


# ---------------------------------------------------------------- images


def test_good_and_bad_files_are_told_apart_by_content(folder, smol):
    """As `embed` reads them: bad rows have reasons, the others come out in order."""
    faults = {}
    entries = {e.id: e for e in items.Input(str(folder / "rows.jsonl"))}
    rows = (stream.Item(e.id, e.text, e.image) for e in entries.values())
    found = stream.Stream(smol, rows, instruction=None, bad=faults.__setitem__)
    embedded = [key for _, keys in found for key in keys]
    assert sorted(embedded) == sorted(GOOD_FILES)
    assert set(faults) == {*BAD_FILES, "gone.png", "../secret.png"}
    for name, (_, reason) in BAD_FILES.items():
        assert reason in faults[name] and name in faults[name], faults[name]
    assert "cannot be read" in faults["gone.png"]
    assert "leaves the image root" in faults["../secret.png"]


def test_a_bomb_takes_no_memory():
    pictures.size_of(PNG)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("bomb.png", "wide.png", "just.png"):
        for read in (pictures.size_of, pictures.load_rgb):
            with pytest.raises(UserError, match="more than 100 MP"):
                read(BAD_FILES[name][0])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # KiB


@pytest.mark.parametrize(
    ("values", "grey"),
    [([0.0, 0.5, 1.0], [0, 127, 255]), ([0.0, 100.0, 200.0], [0, 100, 200]),
     ([0.0, 25700.0, 65535.0], [0, 100, 255]), ([-3.0, 0.5, 1.0], [0, 127, 255])],
)  # fmt: skip
def test_floats_are_brought_to_eight_bits(values, grey):
    found = pictures.load_rgb(encoded(Image.fromarray(np.array([values], np.float32)), "TIFF"))
    assert np.asarray(found)[0, :, 0].tolist() == grey


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (2, 3)])
def test_thin_images_are_cut_or_refused(name, size, byte_level):
    model = preprocess.Preprocessor(byte_level, SPECS[name], prompt=name, max_tokens=4096)
    try:
        picture = model.image(Image.new("RGB", size, "red"))
    except UserError as error:
        assert name == "phi35v" and "too thin" in str(error)
        return
    assert picture.tiles.dtype == np.uint8 and picture.layout == model.layout(*size)


# ---------------------------------------------------------------- training


def rows_of(folder, more=(), count=40) -> list[bytes]:
    """Good rows, and what else a file should hold."""
    (folder / "a.png").write_bytes(PNG)
    good = [json.dumps({"image": "a.png", "text": f"thing {i}"}).encode() for i in range(count)]
    return [*good, *more]


def open_pairs(path, smol, *, limit=0.5, size=8):
    faults: list[str] = []
    pairs = sources.pairs(path, faults=faults)
    batches = pipeline.Batches(
        [pairs], smol, batch_size=size, max_tokens=48, max_bad_share=limit, faults=faults
    )
    return train_data.TrainData(
        batches, steps=6, epochs=0.0, threads=1, bad_file=path.parent / "bad_rows.jsonl"
    )


MALFORMED = [
    b'{"image": "a.png", "text": "\xff\xfe"}',
    b'{"image": "a.png", "text": "\\ud800"}',
    b'{"image": "a.png", "text": ""}',
    b'{"image": "a.png", "text": " \\n"}',
    b'{"image": "a.png"}',
    b'{"image": ["a.png", "b.png"], "text": "x"}',
    b'{"image": "a\\u0000.png", "text": "x"}',
    b"[1, 2]",
    b'{"image": ',
    b"[" * 100_000,
    b"\x00\x00",
]


def test_bad_rows_are_counted_listed_and_replaced(tmp_path, smol):
    images = [json.dumps({"image": name, "text": "x"}).encode() for name in BAD_FILES]
    images += [b'{"image": "gone.png", "text": "x"}', b'{"image": "../../etc/passwd", "text": "x"}']
    for name, (content, _) in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join(rows_of(tmp_path, [*MALFORMED, *images])))
    data = open_pairs(path, smol, limit=0.6, size=20)
    assert f"left out, for they cannot be read: {len(MALFORMED)} malformed rows" in data.describe()
    assert data.counts["bad_rows"] == len(MALFORMED)
    found = list(data.batches(0))
    assert [sum(group.rows for group in batch.query) for batch in found] == [20] * 6
    assert all(group.tiles.any() for batch in found for group in batch.query)
    bad = len(MALFORMED) + len(images)
    assert data.counts["bad_rows"] == bad
    words = f"{len(BAD_FILES)} unreadable, {len(MALFORMED)} malformed, 1 missing"
    assert f"bad rows skipped: {bad} ({words}, 1 outside the image root" in data.summary()
    listed = [json.loads(x) for x in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert len(listed) == bad and {line["kind"] for line in listed} == {
        "malformed", "unreadable", "missing", "outside the image root"
    }  # fmt: skip
    assert any("pairs.jsonl line 41: not UTF-8" in line["problem"] for line in listed)
    # Started again, with the last step alone.
    again = open_pairs(path, smol, limit=0.6, size=20)
    next(again.batches(5))
    assert again.counts["bad_rows"] == bad and again.summary() == data.summary()
    assert len((tmp_path / "bad_rows.jsonl").read_text().splitlines()) == bad
    # A batch brings the rows that it met, not all that were met before.
    met = [len(data._batches._with_problems(step)[1]) for step in range(6)]
    assert 0 < min(met) < len(images)
    next(open_pairs(path, smol, limit=0.6, size=20).batches(0))  # another run in that place
    assert len((tmp_path / "bad_rows.jsonl").read_text().splitlines()) < bad


def test_too_many_bad_rows_stop_the_run_with_a_summary(tmp_path, smol):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join(rows_of(tmp_path, MALFORMED)))
    with pytest.raises(UserError, match="11 of 51 rows are unreadable.*=0.1 allows.*line 41.*43"):
        open_pairs(path, smol, limit=0.1)
    lost = [json.dumps({"image": f"{i}.png", "text": "x"}).encode() for i in range(20)]
    path.write_bytes(b"\n".join(rows_of(tmp_path, lost)))
    data = open_pairs(path, smol, limit=0.1)
    with pytest.raises(UserError, match=r"(\d+) of 60 rows.*\1 missing.*png: cannot.*bad_rows.js"):
        list(data.batches(0))
    listed = len((tmp_path / "bad_rows.jsonl").read_text().splitlines())
    assert 7 <= listed <= len(lost)  # threads that make later batches may have met more by then


def test_nothing_usable_is_an_error(tmp_path, smol):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join(MALFORMED))
    with pytest.raises(UserError, match="no pairs in it; .*line 1: not UTF-8"):
        open_pairs(path, smol, limit=0.99)
    path.write_bytes(b"\n".join(b'{"image": "no.png", "text": "%d"}' % i for i in range(9)))
    with pytest.raises(UserError, match="9 of 9 rows are unreadable"):
        list(open_pairs(path, smol, limit=0.99, size=2).batches(0))
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"query_text": ""}\n{"query_text": 3}\n')
    with pytest.raises(UserError, match="no rows in it; .*line 1"):
        task_pairs.read(tasks, faults=[])
    (tmp_path / "nli.csv").write_bytes(b"sent0,sent1,hard_neg\n\xff,b,c\n")
    with pytest.raises(UserError, match="no row with three sentences.*line 2.*UTF-8"):
        nli.read(tmp_path / "nli.csv", faults=[])


def test_unreadable_images_of_cached_features_are_bad_rows(smol):
    rows = [sources.PairRow(caption=f"c{i}", key=f"{i}", source="a") for i in range(20)]
    pairs = sources.Pairs(rows, lambda number: b"", name="a")
    features = np.ones((20, 1, 3, 5), np.float16)
    features[[3, 4]] = 0
    batches = pipeline.Batches([pairs], smol, batch_size=10, features=features, max_bad_share=0.2)
    assert all(group.features.all() for step in range(4) for group in batches[step].query)
    assert len(batches.bad) == 2 and "features" in batches.bad.problems()[0]


def test_lines_end_at_newlines_alone(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    (tmp_path / "a.png").write_bytes(PNG)
    row = {"image": "a.png", "text": text}
    (tmp_path / "p.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert sources.pairs(tmp_path / "p.jsonl").captions() == [text]
    row = {"query_image": "a.png", "target_text": text}
    (tmp_path / "t.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert task_pairs.read(tmp_path / "t.jsonl")[0][0].target_text == text


def test_rows_of_csv_that_are_no_utf8_are_left_out(tmp_path):
    long = b"x" * 1_000_000
    path = tmp_path / "nli.csv"
    rows = [b"sent0,sent1,hard_neg", b"a,b,c", b"\xff\xfe,b,c", long + b",e,f", b"1,2", b"g\0,h,i"]
    path.write_bytes(b"\n".join(rows))
    faults: list[str] = []
    found = nli.read(path, faults)
    assert len(found.rows) == 3 and len(faults) == 2
    assert "line 3" in faults[0] and "line 5: 2 cells" in faults[1]
    with pytest.raises(UserError, match="line 3"):
        nli.read(path)


def test_rows_of_parquet_that_are_no_utf8_are_left_out(tmp_path):
    import pyarrow
    import pyarrow.parquet

    ends = pyarrow.array([0, 2, 4, 8], pyarrow.int32()).buffers()[1]
    texts = pyarrow.StringArray.from_buffers(3, ends, pyarrow.py_buffer(b"ok\xff\xfefine"))
    table = pyarrow.table({"text": texts, "query_text": texts, "target_text": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    found = list(items.Input(str(tmp_path / "x.parquet")))
    assert [entry.text for entry in found] == ["ok", None, "fine"]
    assert found[1].fault == "text is not UTF-8"
    faults: list[str] = []
    (part,) = task_pairs.read(tmp_path / "x.parquet", faults=faults)
    assert len(part) == 2 and "row 1: query_text is not UTF-8" in faults[0]
