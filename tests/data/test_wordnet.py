"""WordNet's files."""

import pytest

from unime_jax.data import wordnet
from unime_jax.types import UserError

LICENCE = "  1 This software and database is being provided to you\n"
NOUNS = (
    "00000100 05 n 02 tiger 0 Panthera_tigris 0 002 @ 00000300 n 0000 ~ 00000400 n 0000 | large "
    'feline of forests; "the tiger sprang"; "a tiger!"\n'
    '00000200 18 n 01 tiger 1 000 | a fierce or audacious person; "he\'s a tiger on the court"\n'
    "00000300 05 n 01 big_cat 0 000 | any of several large cats  \n"
    "00000400 05 n 01 Bengal_tiger 0 001 @i 00000100 n 0000 | southern short-haired tiger\n"
)
ADJ = '00000100 00 s 01 open(p) 0 000 | not shut: "the door is open"- Anon.  \n'
FILES = {
    "data.noun": LICENCE + NOUNS,
    "data.verb": LICENCE,
    "data.adj": LICENCE + ADJ,
    "data.adv": LICENCE,
    "index.noun": LICENCE
    + "tiger n 2 2 @ ~ 2 1 00000200 00000100  \nbig_cat n 1 0 1 0 00000300  \n",
}


def test_synsets():
    tiger = wordnet.WordNet(FILES).synsets["n00000100"]
    assert tiger.lemmas == ("tiger", "Panthera tigris")
    assert (tiger.lexfile, tiger.gloss) == (5, "large feline of forests")
    assert tiger.examples == ("the tiger sprang", "a tiger!")
    assert tiger.hypernyms == ("n00000300",)


def test_the_kind_of_adjective_is_no_part_of_the_word():
    found = wordnet.WordNet(FILES).synsets["a00000100"]
    assert found.lemmas == ("open",)
    assert (found.gloss, found.examples) == ("not shut", ("the door is open",))


def test_senses_by_frequency_and_topic():
    words = wordnet.WordNet(FILES)
    assert [s.name for s in words.noun_senses("Tiger")] == ["n00000200", "n00000100"]
    assert words.sense("tiger").name == "n00000200"
    assert words.sense("tiger", frozenset([5])).name == "n00000100"
    assert words.sense("big cat").gloss == "any of several large cats"
    assert words.sense("tiger", frozenset([6])) is None and words.sense("lion") is None


def test_the_vocabulary_has_no_names_or_phrases():
    assert wordnet.WordNet(FILES).vocabulary() == {"tiger", "open"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" a b; c d  ", ("a b; c d", [])),
        (' a b; "c d"; "e f"', ("a b", ["c d", "e f"])),
        (' a b: "c d"- Someone', ("a b", ["c d"])),
        (' a b; "c"', ("a b", [])),
    ],
)
def test_glosses_and_examples(text, expected):
    assert wordnet.split_gloss(text) == expected


def test_damage_is_named():
    with pytest.raises(UserError, match="holds no index.noun"):
        wordnet.WordNet({k: v for k, v in FILES.items() if k != "index.noun"})
    with pytest.raises(UserError, match="data.adj: line 2 is malformed"):
        wordnet.WordNet({**FILES, "data.adj": LICENCE + ADJ + "00000200 00 s\n"})
    with pytest.raises(UserError, match="index.noun: line 1 is malformed"):
        wordnet.WordNet({**FILES, "index.noun": "tiger n\n"})
