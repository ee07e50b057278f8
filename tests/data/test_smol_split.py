"""What is tested on is not trained on."""

import numpy as np
import packages
import pytest

from unime_jax.data import smol_split, text_keys, wordnet
from unime_jax.data.smol_pictures import RawPair
from unime_jax.types import UserError


@pytest.fixture(scope="module")
def words():
    return wordnet.WordNet({n: c.decode() for n, c in packages.wordnet_files().items()})


def raw(caption, source="tuxpaint", *, name="x", keywords=(), category="animals"):
    return RawPair(source, category, name, caption, tuple(keywords), b"")


@pytest.fixture(scope="module")
def decoded():
    """Every animal and some colours of it in Tux Paint; every animal in two other sources."""
    rows = []
    for i, animal in enumerate(packages.ANIMALS):
        rows += [raw(f"A {animal}."), raw(f"A red {animal}."), raw(f"Two {animal}s!", name=animal)]
        rows += [raw(f"{animal}s", "emoji", keywords=["animal", animal, f"red {animal}"])]
        rows += [raw(f"a {animal}", "openclipart", name=f"{animal}_0{i}")]
    return [(row, bytes([i % 256])) for i, row in enumerate(rows)]


def split_pairs(rows, *args, **kwargs):
    """Splits (raw, image) rows whose images are stand-ins of one byte."""
    decoded = [
        smol_split.Decoded(pair, image, np.array([100 * sum(image)])) for pair, image in rows
    ]
    return smol_split.split_pairs(decoded, *args, **kwargs)


@pytest.fixture(scope="module")
def splits(decoded, words):
    return split_pairs(decoded, words, test=12, validation=6)


def test_sizes_and_one_picture_a_caption(splits):
    pairs, _, _ = splits
    assert (len(pairs["test"]), len(pairs["validation"])) == (12, 6)
    for name in ("test", "validation"):
        assert all(pair.raw.source == "tuxpaint" for pair in pairs[name])
    keys = [pair.key for name in ("test", "validation") for pair in pairs[name]]
    assert len(set(keys)) == len(keys)


def test_nothing_of_the_held_out_captions_is_trained_on(splits):
    pairs, _, dropped = splits
    held = {p.key.replace(" ", "") for name in ("test", "validation") for p in pairs[name]}
    for pair in pairs["train"]:
        texts = (pair.raw.caption, *pair.keywords, pair.gloss, pair.raw.name.split("_")[0])
        assert not held & {text_keys.compact_key(text) for text in texts}
    assert dropped["emoji"] and dropped["openclipart"]
    assert len(pairs["train"]) + sum(dropped.values()) + 18 == len(packages.ANIMALS) * 5


def test_no_more_is_lost_than_needed(splits, decoded):
    pairs, _, _ = splits
    held = {p.key for name in ("test", "validation") for p in pairs[name]}
    trained = {(p.raw.source, p.raw.caption) for p in pairs["train"]}
    for animal in packages.ANIMALS:
        if animal not in held:
            assert ("emoji", f"{animal}s") in trained
        if f"red {animal}" not in held:
            assert ("tuxpaint", f"A red {animal}.") in trained


def test_the_split_does_not_depend_on_order_or_on_other_sources(decoded, words, splits):
    pairs, _, _ = splits
    fewer = [row for row in decoded[::-1] if row[0].source != "emoji"]
    again, _, _ = split_pairs(fewer, words, test=12, validation=6)
    assert [p.key for p in again["test"]] == [p.key for p in pairs["test"]]


def test_another_number_holds_out_others(decoded, words, splits):
    other, guard, _ = split_pairs(decoded, words, test=12, validation=6, number=2)
    held, before = ({p.key for p in found["test"]} for found in (other, splits[0]))
    assert len(held) == 12 and held != before
    drawn = [
        smol_split.split_sentences(words, other, guard, train=20, held_out=4, number=number)
        for number in (1, 2)
    ]
    first, second = ({row.text for row in rows["heldout"]} for rows in drawn)
    assert first and second and first != second


def test_captions_of_several_pictures_are_not_held_out(decoded, words):
    more = [raw(f"The {animal}s!") for animal in packages.ANIMALS]
    rows = decoded + [(pair, bytes([200 + i])) for i, pair in enumerate(more)]
    pairs, _, _ = split_pairs(rows, words, test=12, validation=6)
    assert not {p.key for p in pairs["test"]} & set(packages.ANIMALS)


def test_too_few_captions_are_refused(decoded, words):
    with pytest.raises(UserError, match="tuxpaint: 60 pictures .* too few to hold out 200"):
        split_pairs(decoded, words, test=200, validation=100)
    with pytest.raises(UserError, match="too few"):
        split_pairs([], words, test=0, validation=0)


def test_words_seen_in_training(words):
    rows = [(raw(f"A {a}."), bytes([i])) for i, a in enumerate(packages.ANIMALS)]
    for i, animal in enumerate(packages.ANIMALS[::2]):
        rows.append((raw(f"the red {animal}s", "emoji"), bytes([200 + i])))
    pairs, _, _ = split_pairs(rows, words, test=12, validation=6)
    known = {w for p in pairs["train"] for w in text_keys.content_words(p.raw.caption)}
    for pair in pairs["test"]:
        assert pair.seen == (set(text_keys.content_words(pair.raw.caption)) <= known)
    assert {pair.seen for pair in pairs["test"]} == {True, False}


def test_a_held_out_picture_is_not_trained_on_under_another_caption(words):
    rows = [(raw(f"A {a}."), bytes([2 * i])) for i, a in enumerate(packages.ANIMALS)]
    copies = [(raw(f"drawing {i}", "openclipart"), image) for i, (_, image) in enumerate(rows)]
    pairs, _, dropped = split_pairs(rows + copies, words, test=12, validation=6)
    held = {p.image for name in ("test", "validation") for p in pairs[name]}
    assert not held & {p.image for p in pairs["train"]}
    assert dropped == {"openclipart": 18} and len(pairs["train"]) == 2 + 2


# ---- meanings


def test_training_pairs_get_the_gloss_of_what_they_show(splits):
    pairs, guard, _ = splits
    by_caption = {p.raw.caption: p for p in pairs["train"]}
    held = {w for n in ("test", "validation") for p in pairs[n] for w in p.key.split()}
    free = next(a for a in packages.ANIMALS if a not in held)
    assert by_caption[f"A red {free}."].gloss.startswith("an animal of kind number")
    assert free in by_caption[f"A red {free}."].keywords
    for pair in pairs["train"]:
        if pair.gloss:  # not even the meaning of a noun that stands in a held-out caption
            assert not set(pair.key.split()) & (held - {"red", "two"})


def test_a_sentence_is_no_name(words):
    assert smol_split.meaning(raw("A cat."), words).lemmas == ("cat",)
    assert smol_split.meaning(raw("A big old fat ugly grumpy cat"), words) is None
    assert smol_split.meaning(raw("cat", category="vehicles"), words) is None
    assert smol_split.meaning(raw("grumpy cat"), words).lemmas == ("cat",)
    assert smol_split.meaning(raw("grumpy cat", "emoji"), words) is None
    assert smol_split.meaning(raw("…"), words) is None


def test_the_guard():
    guard = smol_split.Guard(["A black cat.", "Ice cream"])

    def synset(*lemmas, part="n"):
        return wordnet.Synset(part + "1", 5, lemmas, "", (), ())

    assert guard.allows_text("cat") and not guard.allows_text("Black cats!")
    assert not guard.allows_synset(synset("feline", "cat"))
    assert not guard.allows_synset(synset("ice cream"))
    assert not guard.allows_synset(synset("ice-cream", part="v"))
    assert guard.allows_synset(synset("black", part="a")) and guard.allows_synset(synset("dog"))
    assert not guard.allows_pair(raw("A treat", name="ice_cream_02"))


# ---- sentences


@pytest.fixture(scope="module")
def sentences(words, splits):
    pairs, guard, _ = splits
    return smol_split.split_sentences(words, pairs, guard, train=60, held_out=20)


def test_sentences_of_held_out_meanings_are_not_trained_on(sentences):
    held = {row.synset for name in ("heldout", "gloss_to_example") for row in sentences[name]}
    assert not held & {row.synset for row in sentences["train"]}
    texts = {
        t for n in ("heldout", "gloss_to_example") for r in sentences[n] for t in (r.text, r.second)
    }
    trained = {row.text for name in ("train", "captions") for row in sentences[name]}
    assert not texts & trained
    evaluated = {row.synset for row in sentences["gloss_to_example"]}
    assert not evaluated & {row.synset for row in sentences["heldout"]}


def test_sentences_know_nothing_of_the_held_out_captions(sentences, splits, words):
    pairs, guard, _ = splits
    held = {w for n in ("test", "validation") for p in pairs[n] for w in p.key.split()}
    for row in (*sentences["train"], *sentences["captions"]):
        assert guard.allows_text(row.text)
    for row in sentences["train"]:
        if row.synset.startswith("n"):
            assert not set(words.synsets[row.synset].lemmas) & held


def test_sizes_and_kinds(sentences, splits):
    assert len(sentences["gloss_to_example"]) == 20
    assert 12 <= len(sentences["heldout"]) <= 20  # there are few meanings to draw from here
    assert 40 <= len(sentences["train"]) <= 60
    kinds = {row.kind for row in sentences["captions"]}
    assert kinds == {"caption", "keyword", "definition"}
    keys = [text_keys.compact_key(row.text) for row in sentences["captions"]]
    assert len(keys) == len(set(keys))
    captions = {text_keys.compact_key(p.raw.caption) for p in splits[0]["train"]}
    found = {text_keys.compact_key(r.text) for r in sentences["captions"] if r.kind == "caption"}
    assert found == captions


def test_without_wordnet_captions_are_the_sentences(decoded):
    pairs, guard, _ = split_pairs(decoded, None, test=12, validation=6)
    found = smol_split.split_sentences(None, pairs, guard, train=100, held_out=20)
    assert set(found) == {"train", "heldout", "captions"}
    assert len(found["heldout"]) == 18 and found["train"]
    assert all(guard.allows_text(row.text) for row in found["train"])
