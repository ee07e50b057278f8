"""A user's own pairs, with hard negatives and a judge's scores."""

import json
import math

import packages
import pytest

from unime_jax.data import image_files, items, json_files, mmeb_eval, sources, task_pairs
from unime_jax.data.eval_items import ImageFolder, Items
from unime_jax.data.prompts import Slotted
from unime_jax.types import UserError

ROWS = [
    {"query_text": "find <|image_1|> it", "query_image": "a.png", "target_text": "a cat"},
    {"query_text": "words", "target_image": "a.png", "target_id": 7, "set": "other"},
    {"query_text": "more", "target_text": "two", "target_id": "two", "set": "other"},
]
ROWS[1]["target_id"] = "seven"
# As UniME-V2 publishes them.
JUDGED = {
    "query_text": "<|image_1|>\nwhat is it", "query_image": "a.png", "pos_text": "a cat",
    "pos_image": None, "query_pos_scores": 0.9,
    "hard_negatives": [["a dog", ""], ["an owl", None]], "hard_negatives_scores": [0.25, 0.5],
}  # fmt: skip


def write(path, rows):
    (path.parent / "a.png").write_bytes(packages.png())
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        keys = dict.fromkeys(key for row in rows for key in row)
        table = pyarrow.table({key: [row.get(key) for row in rows] for key in keys})
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_rows_are_sorted_by_set_and_sides(tmp_path, ending):
    path = write(tmp_path / f"pairs.{ending}", ROWS)
    assert task_pairs.reads(path)
    found = {(part.name, part.direction): part for part in task_pairs.read(path)}
    assert {key: len(part) for key, part in found.items()} == {
        ("other", "text to image"): 1,
        ("other", "text to text"): 1,
        ("pairs", "image to text"): 1,
    }
    row = found["pairs", "image to text"][0]
    assert row.query_text == Slotted("find ", " it") and row.target_text == "a cat"
    assert row.query_image.load() == packages.png() and row.target_image is None
    row = found["other", "text to image"][0]
    assert (row.query_text, row.target_text) == ("words", None)
    assert row.target_image.load() == packages.png()
    assert (row.target_id, found["pairs", "image to text"][0].target_id) == ("id seven", "")


def test_images_may_lie_elsewhere(tmp_path):
    (tmp_path / "images").mkdir()
    path = write(tmp_path / "pairs.jsonl", ROWS[:1])
    (tmp_path / "a.png").rename(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match="cannot be read"):
        task_pairs.read(path)[0][0].query_image.load()
    (part,) = task_pairs.read(path, folder=image_files.Folder(tmp_path / "images"))
    assert part[0].query_image.load() == packages.png()


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_judged_negatives(tmp_path, ending):
    path = write(tmp_path / f"judged.{ending}", [JUDGED] * 3)
    (part,) = task_pairs.read(path, judged=3)
    row = part[1]
    assert [item.text for item in row.negatives] == ["a dog", "an owl", "a cat"]
    assert row.scores == (0.9, 0.25, 0.5, -math.inf)
    (part,) = task_pairs.read(path, judged=1)
    assert [item.text for item in part[0].negatives] == ["a dog"]
    assert part[0].scores == (0.9, 0.25)
    (part,) = task_pairs.read(path, rows_per_set=2)
    assert len(part) == 2 and part[0].scores == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_text": "", "query_image": ""}, 'give "query_text", "query_image" or both'),
        ({"target_text": 3}, '"target_text" is 3; give a string'),
        ({"hard_negatives": ["a dog"]}, "hard negative 'a dog' is no"),
        ({"hard_negatives": [["", ""]]}, "is no .text, image"),
        ({"hard_negatives_scores": [0.5]}, "2 hard negatives need as many"),
        ({"hard_negatives_scores": [0.5, 10**400]}, "2 hard negatives need as many finite"),
        ({"query_pos_scores": None}, "2 hard negatives need as many"),
        ({"query_pos_scores": "x"}, "2 hard negatives need as many"),
        ({"hard_negatives": None, "hard_negatives_scores": None}, 'config.stage="judge" needs'),
    ],
)
def test_a_malformed_row_is_named(tmp_path, change, message):
    row = {key: value for key, value in JUDGED.items() if not key.startswith("pos")}
    row = {**row, "target_text": "a cat", **change}
    path = write(tmp_path / "judged.jsonl", [JUDGED, row])
    with pytest.raises(UserError, match=f"judged.jsonl line 2: .*{message}"):
        task_pairs.read(path, judged=2)


def test_files_that_are_no_pairs(tmp_path):
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"image": "a.png", "text": "a"}')
    assert not task_pairs.reads(plain) and not task_pairs.reads(tmp_path)
    for name, content, message in (
        ("a.jsonl", '{"query_text": "a", "target_text": "b"}\n{', "line 2: not valid JSON"),
        ("a.json", "{}", "holds a list of rows"),
        ("b.json", "[", "b.json: not valid JSON"),
        ("c.json", "[]", "no rows in it"),
        ("a.parquet", "x", "not a readable parquet file"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            task_pairs.read(tmp_path / name)


def test_a_bad_row_of_a_list_is_left_out_alone(tmp_path):
    bad = [{**ROWS[0], "query_text": "\ud800"}, {**JUDGED, "query_pos_scores": 10**400}]
    path = write(tmp_path / "pairs.json", [*bad, *ROWS[:1]])
    faults = []
    (part,) = task_pairs.read(path, faults=faults)
    assert len(part) == 1 and len(faults) == 2
    assert "row 0: half a surrogate pair" in faults[0] and "row 1: 2 hard negatives" in faults[1]


def test_rows_of_a_list_are_looked_at_again_only_where_an_escape_may_harm(tmp_path, monkeypatch):
    looked, check = [], json_files.check
    monkeypatch.setattr(json_files, "check", lambda *args: looked.append(args) or check(*args))
    for text, count in (("é", 0), ("\\u00e9", 3)):
        path = tmp_path / "pairs.json"
        path.write_text(f"[{', '.join(3 * [json.dumps(ROWS[2]).replace('two', text)])}]", "utf-8")
        ((row, *_),) = task_pairs.read(path)
        assert row.target_text == "é" and len(looked) == count


def test_columns_that_are_not_asked_for_may_be_anything(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "pairs.parquet"
    texts = {"query_text": ["a", "b"], "target_text": ["c", "d"]}
    times = pa.array([2**62, 1], pa.timestamp("us"))  # Python's end in the year 9999
    zones = pa.array([1, 2], pa.timestamp("us", "Nowhere/Town"))
    pa.parquet.write_table(pa.table({**texts, "time": times, "zone": zones}), path)
    (part,) = task_pairs.read(path)
    assert [part[i].query_text for i in range(2)] == ["a", "b"]
    for values in (times, zones):
        pa.parquet.write_table(pa.table({**texts, "set": values}), path)
        with pytest.raises(UserError, match="not a readable parquet file"):
            task_pairs.read(path)
    pa.parquet.write_table(pa.table({"time": times}), path)
    with pytest.raises(UserError, match="no column of pairs in it, but time"):
        task_pairs.read(path)


def test_words_of_a_thousand_faults_are_kept(tmp_path):
    path = write(tmp_path / "pairs.json", [{}] * 1500 + ROWS[:1])
    faults = []
    task_pairs.read(path, faults=faults)
    assert len(faults) == 1500 and len(set(faults)) == 1001


def test_an_error_without_words_is_named(tmp_path, monkeypatch):
    import pyarrow.parquet

    def fail(path):
        raise OSError

    path = write(tmp_path / "pairs.parquet", ROWS)
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", fail)
    with pytest.raises(UserError, match="not a readable parquet file .OSError"):
        task_pairs.read(path)
    with pytest.raises(UserError, match="cannot be read as Parquet .OSError"):
        list(items.Input(str(path)))
    with pytest.raises(UserError, match="not a readable parquet file .OSError"):
        mmeb_eval.read([path], Items(), ImageFolder(tmp_path))
    with pytest.raises(UserError, match="is damaged .KeyError"), sources.damage(path):
        raise KeyError
