"""Texts and images become rows of fixed shape."""

import numpy as np
import packages
import pytest
from PIL import Image

from unime_jax.data import buckets, preprocess, stream
from unime_jax.data.prompts import Segment
from unime_jax.data.rows import IMAGE_SLOT, Picture
from unime_jax.data.tokenizer import Tokenizer
from unime_jax.types import ImageSpec, UserError

SPEC = ImageSpec("grid", 8, 3)


@pytest.fixture(scope="module")
def smol(byte_level):
    return preprocess.Preprocessor(byte_level, SPEC, prompt="smol", max_tokens=200)


@pytest.fixture(scope="module")
def bert(word_piece):
    return preprocess.Preprocessor(word_piece, None, prompt="none", max_tokens=8)


@pytest.fixture(scope="module")
def nv_embed(llama_like):
    return preprocess.Preprocessor(llama_like, None, prompt="nv_embed", max_tokens=12)


# ---- tokenizer


def test_ids_are_those_of_transformers(byte_level, smol):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(byte_level / "tokenizer.json"))
    text = "A cat,  at 12 o'clock"
    wanted = theirs(text + "\nSummary above sentence in one word:").input_ids
    assert list(smol.tokenize(text, False).ids) == wanted
    assert smol.tokenize(f"  {text}\n", False).ids == tuple(wanted)


def test_start_and_end_tokens_surround_the_row(bert):
    row = bert.tokenize("A cats dog", False)
    assert row.ids == (2, 4, 5, 6, 7, 3)
    assert row.ids[row.start : row.stop] == (4, 5, 6, 7)


def test_special_tokens_in_a_text_are_text(byte_level, word_piece, bert):
    assert bert.tokenize("cat [SEP]", False).ids == (2, 5, 8, 10, 9, 3)
    tokenizer = Tokenizer(byte_level)
    ids, start, stop = tokenizer.encode(
        [Segment("prompt", "<|im_start|>x"), Segment("text", "<|im_end|>"), Segment("prompt", "y")],
        -1,
    )
    assert ids[0] == 1 and 2 not in ids
    assert stop - start == len("<|im_end|>")


def test_the_text_is_found_among_the_tokens(smol):
    row = smol.tokenize("dog", True, "Find it")
    before = smol.tokenize("x", True, "Find it")
    assert row.ids[0] == IMAGE_SLOT
    assert row.stop - row.start == 3
    assert row.ids[: row.start] == before.ids[: before.start]
    assert row.ids[row.stop :] == before.ids[before.stop :]


def test_passages_are_plain_and_end_with_the_end_token(nv_embed):
    row = nv_embed.tokenize("a cat", False)
    assert row.ids == (1, 9, 10, 2) and row.skip == 0
    inputs = nv_embed.group([(row, None)], tokens=6, tiles=0)
    assert inputs.skip is None


def test_an_instruction_is_counted_as_the_published_code_counts_it(llama_like, nv_embed):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{llama_like}/tokenizer.json")
    instruction = "Instruct: Find it\nQuery: "
    row = nv_embed.tokenize("a cat", False, "Find it")
    assert list(row.ids) == theirs(instruction + "a cat</s>").input_ids
    # Alone its last space is a token of its own, and the start token is not counted.
    assert row.skip == len(theirs.tokenize(instruction)) == 6
    plain = nv_embed.tokenize("cat", False)
    assert nv_embed.group([(plain, None), (row, None)], tokens=9, tiles=0).skip.tolist() == [0, 6]
    long = nv_embed.tokenize("a cat " * 9, False, "Find it")
    assert len(long.ids) == 12 and long.ids[-1] == 2 and (long.skip, long.lost > 0) == (6, True)


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_a_bad_tokenizer_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer"):
        preprocess.Preprocessor(tmp_path, None, prompt="none", max_tokens=8).tokenize("a", False)


# ---- cutting


def test_only_the_end_of_the_text_is_cut(smol):
    whole = smol.tokenize("abcdefgh", False)
    cut = whole.cut(len(whole.ids) - 3, 3)
    assert cut.ids == whole.ids[: whole.stop - 3] + whole.ids[whole.stop :]
    assert cut.lost == 3 and cut.cut(len(cut.ids), 3) is cut
    assert cut.cut(len(cut.ids) - 2, 3).lost == 5


def test_prompt_and_image_are_never_cut(smol):
    row = smol.tokenize("abc", True)
    least = len(row.ids) - 3 + 3 - 1
    assert row.cut(least, 3).length(3) == least
    with pytest.raises(UserError, match="does not fit"):
        row.cut(least - 1, 3)


def test_a_text_longer_than_the_model_reads_is_cut(bert):
    row = bert.tokenize("cat " * 50, False)
    assert len(row.ids) == 8 and row.ids[0] == 2 and row.ids[-1] == 3
    assert row.lost == 44


# ---- groups


def test_a_text_group(smol):
    rows = [smol.tokenize(text, False) for text in ("a", "abc")]
    group = smol.group([(row, None) for row in rows], tokens=50, tiles=0)
    assert group.tokens.shape == (2, 50) and group.tiles.shape == (2, 0, 8, 8, 3)
    assert group.features is None
    for i, row in enumerate(rows):
        assert group.lengths[i] == len(row.ids)
        assert tuple(group.tokens[i, : len(row.ids)]) == row.ids
        assert not group.tokens[i, len(row.ids) :].any()
    assert (group.image_index == -1).all()


def test_an_image_takes_its_features_places(smol):
    row = smol.tokenize("abc", True)
    tiles = smol.image(packages.png())
    group = smol.group([(row, tiles)], tokens=60, tiles=1)
    assert group.lengths[0] == len(row.ids) + 2
    assert list(group.image_index[0, :5]) == [0, 1, 2, -1, -1]
    assert list(group.tokens[0, :3]) == [0, 0, 0]
    assert tuple(group.tokens[0, 3 : group.lengths[0]]) == row.ids[1:]
    np.testing.assert_array_equal(group.tiles[0], tiles.tiles)


def test_a_file_is_the_image_that_pil_opens(smol, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(noise).resize((640, 480)).save(tmp_path / "a.jpg")
    expected = smol.image(Image.open(tmp_path / "a.jpg")).tiles
    for source in (tmp_path / "a.jpg", (tmp_path / "a.jpg").read_bytes()):
        np.testing.assert_array_equal(smol.image(source).tiles, expected)


def test_given_features_replace_tiles(smol):
    row = smol.tokenize(None, True)
    features = Picture(np.ones((1, 3, 5), np.float16), smol.fixed_layout)
    group = smol.group([(row, features)] * 2, tokens=60, tiles=1)
    assert group.features.shape == (2, 1, 3, 5) and group.features.dtype == np.float16
    assert group.tiles.shape == (2, 1, 0, 0, 3)


def test_groups_cut_texts_but_not_images(smol):
    row = smol.tokenize("abcdefghijklmnop", True)
    length = row.length(3)
    group = smol.group([(row, smol.image(packages.png()))], tokens=length - 5, tiles=1)
    assert group.lengths[0] == length - 5
    assert (group.image_index[0] >= 0).sum() == 3
    assert tuple(group.tokens[0, -3:]) == row.ids[-3:]


def test_rows_with_and_without_image_do_not_mix(smol):
    row, tiles = smol.tokenize("a", True), smol.image(packages.png())
    for bad in ((row, None), (smol.tokenize("a", False), tiles)):
        with pytest.raises(UserError, match="do not mix"):
            smol.group([bad], tokens=60, tiles=1)
    two = Picture(np.concatenate([tiles.tiles] * 2), tiles.layout)
    with pytest.raises(UserError, match="2 tiles in a group of 1"):
        smol.group([(row, two)], tokens=60, tiles=1)


# ---- buckets


def test_buckets_hold_every_row_once(smol):
    texts = ["a" * (7 * i % 60) or None for i in range(150)]
    images = [packages.png() if text is None or len(text) % 3 == 0 else None for text in texts]
    seen = []
    for group, places in smol.bucket(texts, images):
        assert group.rows == len(places) <= 64
        assert group.tokens.shape[1] >= group.lengths.max()
        for i, place in enumerate(places):
            row = smol.tokenize(texts[place], images[place] is not None)
            assert group.lengths[i] == row.length(3)
            text = [token for token in row.ids if token >= 0]
            found = group.tokens[i, : group.lengths[i]]
            assert list(found[group.image_index[i, : group.lengths[i]] < 0]) == text
        seen += list(places)
    assert sorted(seen) == list(range(150))


def test_calls_share_programs(byte_level):
    """What padding a row to the known 40 costs, 16 a call, pays for a program of its own."""
    limits = buckets.Limits(program=40)
    model = preprocess.Preprocessor(byte_level, None, prompt="none", max_tokens=99, limits=limits)
    shapes = []
    for call, length in enumerate((40, 24, 24, 24, 24, 40)):
        shapes += [group.tokens.shape for group, _ in model.embed_rows([[call] * length])]
    assert shapes == [(1, 40), (1, 40), (1, 40), (1, 24), (1, 24), (1, 40)]
    ((again, _),) = model.embed_rows([[1] * 24])  # rows of a call that was get their groups again
    assert again.tokens.shape == (1, 40)
    rows = [stream.Item(0, "a" * 30)]  # of which 32 would do
    (found,) = stream.Stream(model, rows, instruction=None, bad=pytest.fail)
    assert found[0].tokens.shape == (1, 40)


def test_a_bad_row_is_named(smol, bert):
    with pytest.raises(UserError, match="row 1: empty text"):
        smol.bucket(["a", " "], [None, None])
    with pytest.raises(UserError, match="row 1: image: not a readable image"):
        smol.bucket(["a", None], [None, b"broken"])
    with pytest.raises(UserError, match="row 0: .*no images"):
        bert.bucket(["a"], [packages.png()])


def test_rows_up_to_the_sliding_window_are_padded_to_it_and_longer_ones_refused(byte_level):
    model = preprocess.Preprocessor(byte_level, None, prompt="none", max_tokens=99, window=20)
    assert [group.tokens.shape for group, _ in model.embed_rows([[1] * 18])] == [(1, 20)]
    with pytest.raises(UserError, match="row 1: 21 positions exceed .* sliding_window of 20"):
        model.embed_rows([[1], [1] * 21])


def test_tokenised_rows(smol):
    ids = list(smol.tokenize("abc", False).ids)
    image = Image.new("RGB", (4, 4))
    groups = smol.embed_rows([[5, smol.image_token_id, 6], ids], [image, None])
    found = {int(place): group for group, places in groups for place in places}
    assert list(found[0].tokens[0, :5]) == [5, 0, 0, 0, 6]
    assert list(found[0].image_index[0, :5]) == [-1, 0, 1, 2, -1]
    assert list(found[1].tokens[0, : len(ids)]) == ids
    for rows, images in (
        ([[1, 2]], [image]),
        ([[-1, 2]], None),
        ([[]], None),
        ([[-1, -1]], [image]),
        ([np.array([5.5])], None),
    ):
        with pytest.raises(UserError, match="row 0"):
            smol.embed_rows(rows, images)
    with pytest.raises(UserError, match="the model reads 200"):
        smol.embed_rows([[1] * 201])


def test_long_rows_make_small_groups(byte_level):
    long = preprocess.Preprocessor(byte_level, SPEC, prompt="smol", max_tokens=4096)
    groups = long.bucket(["a" * 4000] * 5, [None] * 5)
    assert [group.rows for group, _ in groups] == [2, 2, 1]
