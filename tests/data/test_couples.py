"""Texts of stage 1, two a row: relatives meet, nothing is lost, nothing is invented."""

import numpy as np

from unime_jax.data import couples, nli, sources, text_sources
from unime_jax.data.texts import Sentences

TRAIN = [  # (text, kind, synset), in drawn order
    ("a small cat", "gloss", "n1"),
    ("to run fast", "gloss", "v1"),
    ("a tall tree", "gloss", "n2"),
    ("her kitten slept", "example", "n1"),
    ("a red stone", "gloss", "n3"),
    ("he ran home", "example", "v1"),
    ("a deep sea", "gloss", "n4"),
]
CAPTIONS = [("A fox.", "caption"), ("vixen", "keyword"), ("An owl.", "caption")]


def rows_of(source):
    return [(source[i].query_text, source[i].target_text) for i in range(len(source))]


def test_relatives_are_one_row_and_the_rest_is_coupled_in_order(monkeypatch, tmp_path):
    def split(path, name):
        if name == "train":
            return [{"text": t, "kind": k, "synset": s} for t, k, s in TRAIN]
        return [{"text": t, "kind": k, "synset": ""} for t, k in CAPTIONS]

    monkeypatch.setattr(sources, "split_sentences", split)
    (meanings, definitions, captions), texts = couples.read(tmp_path)
    assert texts == sources.sentences(tmp_path)  # in the order of the teacher's vectors
    assert rows_of(meanings) == [
        ("a small cat", "her kitten slept"),
        ("to run fast", "he ran home"),
    ]
    # An odd one is coupled with the first.
    assert rows_of(definitions) == [("a tall tree", "a red stone"), ("a deep sea", "a tall tree")]
    assert rows_of(captions) == [("A fox.", "An owl.")]
    assert [s.name for s in (meanings, definitions, captions)] == [
        "meanings",
        "definitions",
        "captions",
    ]


def test_equal_rows_have_equal_fingerprints():
    """Lengths are measured once for each fingerprint."""
    rows = [("a", "b"), ("c", "d")]
    triples = [nli.Nli(Sentences(), np.array(x, np.int32)) for x in ([[0, 1, 2]], [[0, 2, 1]])]
    for made in triples:
        for text in "abcd":
            made.sentences.add(text)
    marks = [
        couples.Couples(rows, "x").fingerprint,
        couples.Couples(rows[::-1], "x").fingerprint,
        couples.Couples([("a", "bc"), ("", "d")], "x").fingerprint,
        text_sources.Texts(["a", "b", "c", "d"]).fingerprint,
        *(text_sources.Triples(found).fingerprint for found in triples),
    ]
    assert len(set(marks)) == 6
    assert couples.Couples(list(rows), "y").fingerprint == marks[0]


def test_real_data_every_text_of_stage_1_is_in_a_row(assets):
    found, _ = couples.read(assets / "data")
    texts = {text for source in found for row in rows_of(source) for text in row}
    assert texts == set(sources.sentences(assets / "data"))
    assert len(found[0]) > 3000
