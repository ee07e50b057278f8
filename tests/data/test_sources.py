"""Reading data with random access."""

import json
import shutil
import time

import packages
import pytest

from unime_jax.data import bad_rows, smol_builders, smol_split, sources
from unime_jax.data.smol_pictures import RawPair
from unime_jax.types import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")

    def pair(caption, source, **kwargs):
        raw = RawPair(source, "animals", "x", caption, (), b"")
        return smol_split.Pair(raw, packages.png(), caption.lower(), **kwargs)

    train = [
        pair("Cat", "tuxpaint", keywords=("pet", "animal"), gloss="a feline"),
        pair("Dog", "emoji", keywords=("pet",)),
        pair("Owl", "tuxpaint"),
    ]
    sentences = {
        "train": [smol_split.Sentence("one two three", "gloss", "n1")],
        "heldout": [smol_split.Sentence("four", "gloss")],
        "captions": [smol_split.Sentence("Cat", "caption"), smol_split.Sentence("pet", "keyword")],
        "gloss_to_example": [smol_split.Sentence("a", "gloss", "n2", "b")],
    }
    test = [pair("Cow", "tuxpaint", seen=False)]
    smol_builders.write(directory, {"train": train, "test": test}, sentences)
    return directory


def test_pairs_come_back_in_order(prepared):
    pairs = sources.pairs(prepared)
    assert pairs.captions() == ["Cat", "Dog", "Owl"]
    assert pairs.texts() == ["Cat", "Dog", "Owl", "pet", "animal", "a feline"]
    assert pairs.texts(others=False) == ["Cat", "Dog", "Owl"]
    assert list(pairs.images()) == [packages.png()] * 3
    example = pairs[0]
    assert (example.query_text, example.target_text) == (None, "Cat")
    assert example.query_image.load() == packages.png()
    assert example.other_texts == ("pet", "animal", "a feline")
    assert example.target_id == "cat"
    assert not sources.pairs(prepared, "test").rows[0].seen


def test_the_other_direction(prepared):
    example = sources.pairs(prepared).directed("text_to_image")[1]
    assert (example.query_text, example.target_text) == ("Dog", None)
    assert example.target_image.number == 1
    with pytest.raises(UserError, match="unknown direction"):
        sources.pairs(prepared).directed("sideways")


def test_parts_keep_the_image_numbers_of_the_whole(prepared):
    parts = {part.name: part for part in sources.pairs(prepared).by_source()}
    assert {name: len(part) for name, part in parts.items()} == {"tuxpaint": 2, "emoji": 1}
    assert [parts["tuxpaint"][i].query_image.number for i in range(2)] == [0, 2]
    assert parts["emoji"][0].set == "emoji"


def test_sentences_are_wordnets_and_captions(prepared):
    found = sources.sentences(prepared)
    assert found == ["one two three", "Cat"]
    assert sources.split_sentences(prepared, "gloss_to_example")[0]["second"] == "b"


def test_what_is_not_there_is_said(prepared, tmp_path):
    with pytest.raises(UserError, match="has no split 'tset'; it has .*test"):
        sources.pairs(prepared, "tset")
    with pytest.raises(UserError, match="holds no smol_pairs, as"):
        sources.pairs(tmp_path)
    with pytest.raises(UserError, match="pairs.jsonl has no split 'validation'"):
        sources.pairs(packages.jsonl(tmp_path, 3), "validation")


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("*/dataset_info.json", lambda path: path.write_text("{")),
        ("*/*train*array_record*", lambda path: path.write_bytes(path.read_bytes()[:-900])),
        ("*/*train*array_record*", lambda path: path.unlink()),
    ],
    ids=["info", "truncated", "missing"],
)
def test_a_damaged_directory_is_named(prepared, tmp_path, pattern, damage):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    damage(next((copy / "smol_pairs").glob(pattern)))
    with pytest.raises(UserError, match="copy is damaged .*delete it and run prepare again"):
        sources.pairs(copy)


# ---- pairs.jsonl


def test_own_pairs(tmp_path):
    pairs = sources.pairs(packages.jsonl(tmp_path, 3))
    assert pairs.captions() == ["thing 0", "thing 1", "thing 2"]
    assert pairs.image(1) == (tmp_path / "1.png").read_bytes()
    assert pairs[2].query_image.name == str(tmp_path / "2.png")
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match="1.png: cannot be read"):
        pairs.image(1)
    assert sources.sentences(tmp_path / "pairs.jsonl") == pairs.captions()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ('{"image": "a.png"}', 'line 2: "text" is missing or empty'),
        ('{"image": "a.png", "text": " "}', 'line 2: "text" is missing or empty'),
        ('{"image": 3, "text": "x"}', 'line 2: "image" is missing or empty'),
        ("[1]", 'line 2: "image" is missing or empty'),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"image": "a.png", "text": "a"}\n' + line)
    with pytest.raises(UserError, match=message):
        sources.pairs(path)


def test_an_unreadable_or_empty_list(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        sources.pairs(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="no pairs in it"):
        sources.pairs(tmp_path / "empty.jsonl")


# ---- bad rows


def test_bad_rows_count_once_and_stop_the_run():
    bad = bad_rows.BadRows(100, 0.02)
    for _ in range(3):
        bad.add((0, 7), "a.png: broken")
    bad.add((1, 7), "b.png: broken")
    assert len(bad) == 2 and bad.problems() == ["a.png: broken", "b.png: broken"]
    with pytest.raises(UserError, match="3 of 100 rows are unreadable.*max_bad_share.*c.png"):
        bad.add((0, 8), "c.png: broken")


def test_a_restart_goes_on_with_the_list_of_bad_rows(tmp_path):
    file = tmp_path / "bad_rows.jsonl"
    first = bad_rows.BadRows(100, 0.02)
    first.add((0, 7), "a.png: broken")
    first.add((0, 9), "c.png: gone", "missing")
    first.list_in(file), first.list_in(file)
    file.write_text(file.read_text() + '{"kind": "unreada')  # as a kill leaves it
    before = file.read_text()
    again = bad_rows.BadRows(100, 0.02)
    again.go_on(file)
    assert len(again) == 2 and again.kinds() == "1 unreadable, 1 missing"
    again.add((0, 7), "a.png: broken")
    again.list_in(file)
    assert file.read_text() == before and len(again) == 2
    again.add((1, 7), "b.png: broken")  # those of before may be right by now
    again.list_in(file)
    assert len(again) == 3 and file.read_text().count("b.png") == 1
    with pytest.raises(UserError, match="3 of 100 rows"):
        again.add((1, 8), "d.png: broken")
    again.go_on(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "torn", ['{"kind": "x", "problem": "é', '{"kind": "x", "problem": "y", "row": [0, 9]}', "{"]
)
def test_a_list_that_a_kill_cut_short_stays_a_list(tmp_path, torn):
    file = tmp_path / "bad_rows.jsonl"
    first = bad_rows.BadRows(100, 1)
    first.add((0, 7), "a\u2028\x85b.png: broken")
    first.list_in(file)
    file.write_bytes(file.read_bytes() + torn.encode()[: -1 if "é" in torn else None])
    again = bad_rows.BadRows(100, 1)
    again.add((0, 8), "of a file: malformed")
    again.go_on(file)
    assert len(again) == 2
    for number in (7, 9):
        again.add((0, number), "c.png: broken")
    again.list_in(file)
    rows = [json.loads(line)["row"] for line in file.read_bytes().splitlines()]
    assert rows == [[0, 7], [0, 8], [0, 9]] and len(again) == 3


def test_a_million_bad_rows_take_no_time_at_each_batch(tmp_path):
    bad = bad_rows.BadRows(1, 10**6)
    bad.add_all({(-1, n): ("malformed", "malformed") for n in range(100_000)})
    bad.list_in(tmp_path / "bad_rows.jsonl")
    start = time.process_time()
    for _ in range(400):
        assert len(bad) == 100_000
        bad.list_in(tmp_path / "bad_rows.jsonl")
    assert time.process_time() - start < 0.5  # 2 s and more where each call looks at all rows
