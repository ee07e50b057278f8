"""When captions are equal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unime_jax.data import text_keys


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A tiger.", "tigers"),
        ("The Tiger!", "tiger"),
        ("Some cherries.", "cherry"),
        ("a t-shirt", "T shirt"),
        ("tshirt", "t-shirts"),
        ("A knight’s helmet.", "knight's helmet"),
        ("baby_rabbit", "A baby rabbit"),
        ("“Stop”", "stop"),
        ("piñata", "pinata"),
        ("two mice", "two mouse"),
        ("firemen", "A fireman."),
        ("boxes", "box"),
        ("peaches", "a peach"),
        ("glasses", "glass"),
        ("potatoes", "Potato"),
        ("shoes", "shoe"),
        ("cookies", "a cookie"),
        ("ponies", "pony"),
        ("horses", "horse"),
        ("sizes", "size"),
        ("buses", "bus"),
        ("houses", "A house"),
        ("lenses", "lens"),
        ("magpies", "A magpie."),
    ],
)
def test_spellings_of_one_caption_are_equal(one, other):
    assert text_keys.compact_key(one) == text_keys.compact_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a red hat", "a hat"),
        ("cat", "cats and dogs"),
        ("bus", "bu"),
        ("A glass", "a gla"),
        ("cap", "cape"),
        ("pie", "pi"),
    ],
)
def test_other_captions_differ(one, other):
    assert text_keys.compact_key(one) != text_keys.compact_key(other)


def test_articles_go_only_at_the_front_and_never_all():
    assert text_keys.caption_key("The cat in the hat") == "cat in the hat"
    assert text_keys.caption_key("The") == "the"
    assert text_keys.caption_key("!?") == ""


@given(st.text())
def test_a_key_is_its_own_key(text):
    once = text_keys.caption_key(text)
    assert text_keys.caption_key(once.upper()) in (once, text_keys.caption_key(once))


def test_content_words_leave_out_stop_words():
    assert text_keys.content_words("A pair of the red shoes!") == ["pair", "red", "shoe"]
