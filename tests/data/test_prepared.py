"""The real prepared data, where it is: nothing of the test captions is trained on.

The rule is written down a second time here, apart from the code that applies it.
"""

import io
import re
import unicodedata

import numpy as np
import pytest
from PIL import Image

from unime_jax.data import assets as fetched
from unime_jax.data import sources

pytestmark = pytest.mark.assets


def bare(text: str) -> str:
    """Strips a caption to what has to differ: no case, accents, punctuation, articles, plurals."""
    text = unicodedata.normalize("NFKD", text.lower())
    text = (
        "".join(c for c in text if not unicodedata.combining(c)).replace("’s", "").replace("'s", "")
    )
    found = re.findall(r"[a-z0-9]+", text)
    while len(found) > 1 and found[0] in ("a", "an", "the", "some"):
        found = found[1:]
    return "".join(re.sub(r"(ies|y)$", "i", re.sub(r"s$", "", word)) for word in found)


@pytest.fixture(scope="module")
def data(assets):
    return assets / "data"


@pytest.fixture(scope="module")
def held_out(data):
    return [c for split in ("test", "validation") for c in sources.pairs(data, split).captions()]


@pytest.fixture(scope="module")
def trained(data):
    """Every text that any stage may train on."""
    texts = sources.pairs(data).texts() + sources.sentences(data)
    return set(texts) | {row["text"] for row in sources.split_sentences(data, "captions")}


def test_sizes(data, held_out):
    assert len(sources.pairs(data, "test")) == 200
    assert len(sources.pairs(data, "validation")) == 100
    assert len({bare(caption) for caption in held_out}) == 300
    assert len(sources.pairs(data)) > 4000
    assert {row.source for row in sources.pairs(data, "test").rows} == {"tuxpaint"}


def test_no_text_of_training_is_a_held_out_caption(trained, held_out):
    held = {bare(caption) for caption in held_out}
    assert not {text for text in trained if bare(text) in held}


def test_no_meaning_of_a_held_out_noun_is_in_stage_1(data, trained, held_out):
    """Single-noun captions ("A tiger."): their definitions are in no text of training."""
    name = "usr/share/wordnet/data.noun"
    (package,) = (data.parents[1] / "packages").glob("wordnet-base_*.deb")
    ((_, content),) = fetched.read_deb(package, name.__eq__)
    held = {bare(caption) for caption in held_out}
    found = 0
    for line in content.decode("latin-1").splitlines():
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        if line.startswith("  ") or not held & {
            bare(word.replace("_", " ")) for word in fields[4:6]
        }:
            continue
        found += 1
        definition = gloss.split('; "')[0].strip()
        assert definition not in trained, line
        assert not set(re.findall('"([^"]+)"', gloss)) & trained, line
    assert found > 100


def test_evaluated_sentences_are_not_trained_on(data, trained):
    rows = [r for s in ("heldout", "gloss_to_example") for r in sources.split_sentences(data, s)]
    assert len(rows) == 1000
    assert not {text for row in rows for text in (row["text"], row["second"])} & trained


def test_no_held_out_picture_is_a_training_picture(data):
    """Copies have the same shape of grey; other colours of one drawing are other pictures."""

    def small(content):
        image = Image.open(io.BytesIO(content))
        image.draft("RGB", (64, 64))
        return np.asarray(image.convert("RGB").resize((8, 8)), np.int16)

    train = np.stack([small(content) for content in sources.pairs(data).images()])
    for split in ("test", "validation"):
        for content in sources.pairs(data, split).images():
            assert np.abs(train - small(content)).mean((1, 2, 3)).min() > 2.5
