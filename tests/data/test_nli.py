"""nli_for_simcse.csv and the texts it holds."""

import csv

import numpy as np
import pytest

from unime_jax.data import nli, sources, text_sources, texts
from unime_jax.types import UserError


def write(path, rows, header=nli.COLUMNS):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_every_sentence_once_and_rows_by_number(tmp_path):
    rows = [
        ("A man, walking.", 'He said "hi".', "Nobody\nmoves."),
        ("A man, walking.", "Er geht über die Straße.", " Nobody sits. "),
    ]
    path = write(tmp_path / "nli.csv", rows)
    found = nli.read(path)
    wanted = [*rows[0], rows[1][1], "Nobody sits."]
    assert list(found.sentences) == wanted == list(sources.sentences(path))
    assert found.rows.tolist() == [[0, 1, 2], [0, 3, 4]] and found.rows.dtype == np.int32
    assert (found.empty_rows, found.repeated_rows) == (0, 0)


def test_columns_are_found_by_name(tmp_path):
    path = write(tmp_path / "nli.csv", [("n", "9", "q", "t")], ("hard_neg", "x", "sent0", "sent1"))
    assert list(nli.read(path).sentences) == ["q", "t", "n"]
    path.write_bytes(b"\xef\xbb\xbfsent0,sent1,hard_neg\r\na,b,c\r\n\r\n")
    assert list(nli.read(path).sentences) == ["a", "b", "c"]


def test_empty_and_repeated_rows_are_left_out_and_counted(tmp_path):
    rows = [("a", "b", "c"), ("a", "b", ""), (" ", "x", "y"), ("a", "b", "c "), ("a", "c", "b")]
    found = nli.read(write(tmp_path / "nli.csv", rows))
    assert (found.empty_rows, found.repeated_rows) == (2, 1)
    assert found.rows.tolist() == [[0, 1, 2], [0, 2, 1]]
    assert list(found.sentences) == ["a", "b", "c"]
    assert "2 rows with an empty cell, 1 repeated rows" in found.describe()


def test_triples_are_rows_of_a_query_a_target_and_a_negative(tmp_path):
    found = text_sources.Triples(
        nli.read(write(tmp_path / "nli.csv", [("a", "B", "c"), ("d", "b", "e")]))
    )
    assert len(found) == 2
    first, second = found[0], found[1]
    assert (first.query_text, first.target_text, first.negative_text) == ("a", "B", "c")
    assert first.target_id == second.target_id and first.negative_id != second.negative_id
    assert first.query_image is first.target_image is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sent0,sent1\na,b\n", "line 1: no column hard_neg"),
        (b"", "line 1: no column sent0, sent1, hard_neg"),
        (b"sent0,sent1,hard_neg\n", "no row with three sentences"),
        (b"sent0,sent1,hard_neg\na,,c\n", "no row with three sentences"),
        (b"sent0,sent1,hard_neg\na,b,c\nd, e,f,g\n", "line 3: 4 cells instead of 3"),
        (b"sent0,sent1,hard_neg\na,b,\"c\n", "after line 0: cannot be read"),
        (b"sent0,sent1,hard_neg\na,b,c\n\xff\xfe,b,c\n", "cannot be read"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_the_line(tmp_path, content, message):
    path = tmp_path / "nli.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        nli.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        nli.read(tmp_path / "none.csv")


def test_sentences_are_a_sequence():
    found = texts.Sentences()
    places = [found.add(text) for text in ("ä", "b", "", "ä", "cc", "b")]
    assert places == [0, 1, 2, 0, 3, 1]
    assert list(found.frozen()) == ["ä", "b", "", "cc"] and len(found) == 4
    assert found[-1] == "cc" and found[1:3] == ["b", ""]
    with pytest.raises(IndexError):
        found[4]


class Same(str):
    """Texts that all have one hash."""

    __hash__ = lambda self: 7  # noqa: E731


def test_equal_hashes_are_told_apart():
    found = texts.Sentences()
    wanted = [Same(text) for text in ("a", "b", "a", "c", "b")]
    assert [found.add(text) for text in wanted] == [0, 1, 0, 2, 1]
    known = [Same(text) for text in "abc"]
    assert texts.Places(known)([known[2], known[0], known[1]]).tolist() == [2, 0, 1]


def test_texts_are_found_again():
    known = [f"text {i}" for i in range(200)]
    places = texts.Places(known)
    assert places(["text 199", "text 0", "text 7"]).tolist() == [199, 0, 7]
    with pytest.raises(KeyError, match="text 200"):
        places(["text 200"])
