"""Batches of fixed shape, a function of the step."""

import os
import subprocess
import sys

import jax
import numpy as np
import packages
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unime_jax.data import mixture, nli, pipeline, preprocess, sources, text_sources
from unime_jax.types import ImageSpec, UserError

SPEC = ImageSpec("grid", 8, 3)
SIDE = 8


@pytest.fixture(scope="module")
def smol(byte_level):
    return preprocess.Preprocessor(byte_level, SPEC, prompt="smol", max_tokens=200)


def make_pairs(count, *, name="a", load=None, others=(), long=3):
    rows = [
        sources.PairRow(
            caption="x" * (1 + i % long) + str(i), key=f"key {i}", source=name, keywords=others
        )
        for i in range(count)
    ]
    return sources.Pairs(
        rows, load or (lambda number: packages.png("red", (4 + number, 5))), name=name
    )


def shapes(batch):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), batch)


def leaves_equal(one, other):
    return jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype and (a == b).all(), one, other)
    )


def texts_of(groups, order, smol):
    """Decodes the rows of one side, in the batch's order."""
    rows = [
        tuple(group.tokens[i, : group.lengths[i]]) for group in groups for i in range(group.rows)
    ]
    return [rows[place] for place in order]


def test_every_step_has_the_same_shapes(smol):
    batches = pipeline.Batches(
        [make_pairs(30), make_pairs(20, name="b").directed("text_to_image")],
        smol,
        batch_size=8,
        bins=2,
    )
    first = shapes(batches[0])
    for step in range(1, 12):
        assert shapes(batches[step]) == first
    query = [(g.rows, g.tokens.shape[1], g.tiles.shape[1]) for g in batches[0].query]
    assert query == batches.info.query_shapes
    target = [(g.rows, g.tokens.shape[1], g.tiles.shape[1]) for g in batches[0].target]
    assert target == batches.info.target_shapes
    assert sum(rows for rows, _, _ in query) == sum(rows for rows, _, _ in target) == 8


def test_a_step_is_the_same_from_any_thread(smol):
    def make():
        return pipeline.Batches(
            [make_pairs(30, others=("other text", "more"))],
            smol,
            batch_size=6,
            seed=5,
            bins=2,
            augment=True,
            other_texts=0.5,
        )

    batches = make()
    expected = [batches[step] for step in range(9)]
    for step in (7, 2):
        assert leaves_equal(make()[step], expected[step])
    for threads in (1, 3):
        found = list(make().iterate(4, 9, threads=threads))
        assert len(found) == 5
        for one, other in zip(found, expected[4:], strict=True):
            assert leaves_equal(one, other)
    assert not leaves_equal(expected[0].query[0].tokens, expected[1].query[0].tokens) or not (
        leaves_equal(expected[0].query[0].tiles, expected[1].query[0].tiles)
    )


def test_query_and_target_of_a_row_belong_together(smol):
    """An image's colour tells its row. Two sets with the same bins mix the order of rows."""

    def load(number):
        return packages.png((number, 0, 0), (5, 5))

    pairs = make_pairs(40, load=load)
    parts = [
        sources.Pairs(pairs.rows, load, name=name, members=range(*members))
        for name, members in (("a", (0, 15)), ("b", (15, 40)))
    ]
    batches = pipeline.Batches(parts, smol, batch_size=16, bins=3)
    order = batches[0].target_order
    assert (order[order] != np.arange(16)).any()  # else an order and its inverse are the same
    caption_ids = {smol.tokenize(row.caption, False).ids: i for i, row in enumerate(pairs.rows)}
    for step in range(6):
        batch = batches[step]
        tiles = np.concatenate([group.tiles for group in batch.query])[batch.query_order]
        images = tiles[:, 0, SIDE // 2, SIDE // 2, 0].tolist()
        texts = [caption_ids[row] for row in texts_of(batch.target, batch.target_order, smol)]
        assert images == texts


def test_features_stand_for_images(smol):
    pairs = make_pairs(10, load=lambda number: pytest.fail("images are not read"))
    features = np.random.default_rng(0).normal(size=(10, 2, 3, 5)).astype(np.float16)
    batches = pipeline.Batches([pairs], smol, batch_size=5, features=features)
    seen = set()
    for step in range(8):
        batch = batches[step]
        (group,) = batch.query
        assert group.features.shape == (5, 1, 3, 5)
        for row in group.features[batch.query_order]:
            places = np.argwhere((features == row[0]).all((2, 3)))
            assert len(places) == 1
            seen.add(tuple(places[0]))
    assert len(seen) > 15  # both variants of most images


def test_vectors_stand_for_the_other_side(smol):
    table = {f"text number {i}": np.full(4, i, np.float32) for i in range(12)}

    def vectors(texts):
        return np.stack([table[text] for text in texts])

    batches = pipeline.Batches(
        [text_sources.Texts(list(table))], smol, batch_size=4, vectors=vectors
    )
    ids = {smol.tokenize(text, False).ids: text for text in table}
    batch = batches[3]
    assert batch.target == () and batch.target_order is None
    rows = texts_of(batch.query, batch.query_order, smol)
    np.testing.assert_array_equal(batch.vectors, vectors([ids[row] for row in rows]))

    pairs = make_pairs(6, others=("other",))
    asked = []
    align = pipeline.Batches(
        [pairs],
        smol,
        batch_size=4,
        other_texts=0.5,
        vectors=lambda t: asked.append(t) or np.zeros((4, 2)),
    )
    for step in range(5):
        assert align[step].target == ()
    named = {text for texts in asked for text in texts}
    assert "other" in named and named <= {"other", *pairs.captions()}


def test_equal_targets_have_equal_ids(smol):
    rows = [sources.PairRow(caption=c, key=k, source="a") for c, k in
            [("A cat.", "cat"), ("cats", "cat"), ("dog", "dog")]]  # fmt: skip
    pairs = sources.Pairs(rows, lambda number: packages.png(), name="a")
    batch = pipeline.Batches([pairs], smol, batch_size=3)[0]
    ids = {smol.tokenize(row.caption, False).ids: row.caption for row in rows}
    by_text = {
        ids[row]: number
        for row, number in zip(
            texts_of(batch.target, batch.target_order, smol), batch.target_ids, strict=True
        )
    }
    assert by_text["A cat."] == by_text["cats"] != by_text["dog"]


def test_drawn_texts_fit_and_are_counted_as_targets(smol):
    pairs = make_pairs(20, others=("y" * 300, "short"))
    batches = pipeline.Batches([pairs], smol, batch_size=10, other_texts=0.9)
    short = smol.tokenize("short", False).ids
    batch = batches[0]
    rows = texts_of(batch.target, batch.target_order, smol)
    drawn = [row == short for row in rows]
    assert any(drawn)
    assert len(set(batch.target_ids[drawn])) == 1
    own = {smol.tokenize(caption, False).ids for caption in pairs.captions()}
    assert set(rows) <= own | {short}  # the other text is too long for any group


def test_a_bad_image_gives_way_to_the_next_and_is_counted(smol):
    def load(number):
        return b"broken" if number in (3, 4) else packages.png((number, 0, 0), (5, 5))

    batches = pipeline.Batches([make_pairs(20, load=load)], smol, batch_size=10, max_bad_share=0.2)
    again = pipeline.Batches([make_pairs(20, load=load)], smol, batch_size=10, max_bad_share=0.2)
    for step in range(4):
        tiles = np.concatenate([group.tiles for group in batches[step].query])
        assert not set(tiles[:, 0, 4, 4, 0]) & {3, 4}
    assert len(batches.bad) == 2
    assert all("row 3" in p or "row 4" in p for p in batches.bad.problems())
    assert leaves_equal(again[3], batches[3])


def test_too_many_bad_images_stop_the_run(smol):
    batches = pipeline.Batches(
        [make_pairs(50, load=lambda number: b"broken")], smol, batch_size=10, max_bad_share=0.1
    )
    with pytest.raises(UserError, match="6 of 50 rows are unreadable"):
        batches[0]
    with pytest.raises(UserError, match="unreadable"):
        list(batches.iterate(0, 3))


def test_long_texts_are_cut_and_counted(smol):
    texts = ["a" * n for n in (1, 2, 90)]
    batches = pipeline.Batches(
        [text_sources.Texts(texts)],
        smol,
        batch_size=3,
        max_tokens=60,
        vectors=lambda t: np.zeros((3, 1)),
    )
    assert batches.info.cut_texts == 1
    (group,) = batches[0].query
    assert group.tokens.shape[1] == 60


def test_weights_choose_the_sets(smol):
    batches = pipeline.Batches(
        [make_pairs(50), make_pairs(5, name="b")], smol, batch_size=8, weights=[0.25, 0.75]
    )
    assert [line.split(":")[0] for line in batches.info.strata] == [
        "a (image_to_text)",
        "b (image_to_text)",
    ]
    assert "2 a batch" in batches.info.strata[0] and "6 a batch" in batches.info.strata[1]
    alone = pipeline.Batches([make_pairs(50), make_pairs(5)], smol, batch_size=8, weights=[1, 0])
    assert len(alone.info.strata) == 1
    with pytest.raises(UserError, match="length_bins=9"):
        pipeline.Batches([make_pairs(9)], smol, batch_size=8, bins=9)


def test_padded_share_is_what_batches_have(smol):
    batches = pipeline.Batches([make_pairs(60, long=30)], smol, batch_size=12, bins=3)
    real = padded = 0
    for step in range(40):
        for group in (*batches[step].query, *batches[step].target):
            real += group.lengths.sum()
            padded += group.tokens.size
    assert abs(1 - real / padded - batches.info.padded_share) < 0.01
    assert abs(real / 40 - batches.info.tokens) < 0.02 * batches.info.tokens


# ---- bins


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 4))
def test_bin_edges_are_the_best(lengths, bins):
    lengths = np.array(lengths)
    weights = np.ones(len(lengths))
    edges = mixture.bin_edges(lengths, weights, bins)
    rounded = -(-lengths // 4) * 4

    def cost(bounds):
        return sum(min(bound for bound in bounds if bound >= value) for value in rounded)

    assert len(edges) <= bins and edges[-1] == rounded.max()
    assert list(edges) == sorted(set(edges))
    values = sorted(set(rounded))
    import itertools

    best = min(
        cost((*inner, values[-1]))
        for count in range(min(bins, len(values)))
        for inner in itertools.combinations(values[:-1], count)
    )
    assert cost(edges) == best


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(1, 20))
def test_every_bin_in_use_gets_a_row_of_each_batch(where, count):
    where = np.sort(np.array(where))
    rows = np.arange(len(where))
    parts = mixture.fill_up(rows, where, 4, count)
    assert sorted(np.concatenate(parts)) == list(rows)
    for bin_number, part in enumerate(parts):
        assert (where[part] <= bin_number).all()  # rows move to longer bins only
        assert not len(part) or len(part) * count >= len(rows)
    shares = mixture.shares([len(part) for part in parts], count)
    assert all(share >= 1 for share, part in zip(shares, parts, strict=True) if len(part))


# ---- rows of three texts


@pytest.fixture(scope="module")
def triples(tmp_path_factory):
    path = tmp_path_factory.mktemp("nli") / "nli.csv"
    rows = [f"q{'x' * (i % 7)}{i},t{i // 2},n{'y' * (i % 5)}{i}" for i in range(40)]
    path.write_text("\n".join(["sent0,sent1,hard_neg", *rows]))
    return text_sources.Triples(nli.read(path))


def number_of(row, smol):
    """The text of a tokenised row, a token a letter behind the prompt's own."""
    empty = len(smol.tokenize("a", False).ids) - 1
    return tuple(row[: len(row) - empty])


def test_rows_of_three_texts_make_three_sides(smol, triples):
    batches = pipeline.Batches([triples], smol, batch_size=8, bins=2)
    first = shapes(batches[0])
    for step in range(6):
        batch = batches[step]
        assert shapes(batch) == first
        sides = [
            [number_of(row, smol) for row in texts_of(groups, order, smol)]
            for groups, order in (
                (batch.query, batch.query_order),
                (batch.target, batch.target_order),
                (batch.negative, batch.negative_order),
            )
        ]
        known = [
            tuple(number_of(smol.tokenize(text, False).ids, smol) for text in texts)
            for texts in (
                (row.query_text, row.target_text, row.negative_text)
                for row in (triples[i] for i in range(40))
            )
        ]
        assert len(set(known)) == 40
        assert all(row in known for row in zip(*sides, strict=True))
        assert batch.negative_ids.shape == (8,) and batch.vectors is None
        same = [a == b for a in sides[1] for b in sides[1]]
        ids = batch.target_ids
        assert [a == b for a in ids for b in ids] == same
    assert batches.info.rows == 40
    assert sum(rows for rows, _, _ in batches.info.negative_shapes) == 8


def test_each_text_of_a_row_has_its_vector(smol, triples):
    def vectors(texts):
        return np.array([[float(sum(map(ord, text)))] for text in texts], np.float32)

    batch = pipeline.Batches([triples], smol, batch_size=8, bins=2, vectors=vectors)[3]
    assert batch.vectors.shape == (24, 1)
    assert batch.negative_ids is not None and len(batch.target) and len(batch.negative)
    letters = {tuple(smol.tokenize(c, False).ids)[:1]: ord(c) for c in "qxtny0123456789"}
    found = [
        sum(letters[(token,)] for token in number_of(row, smol))
        for groups, order in (
            (batch.query, batch.query_order),
            (batch.target, batch.target_order),
            (batch.negative, batch.negative_order),
        )
        for row in texts_of(groups, order, smol)
    ]
    np.testing.assert_array_equal(batch.vectors[:, 0], found)


# ---- backbones whose images vary


def test_images_of_real_backbones_need_one_size(byte_level):
    """Phi's images take places according to their size; fixed, every row takes the same."""
    spec = ImageSpec("phi_hd", 28, 1, crops=4)
    options = {"prompt": "smol", "max_tokens": 200}
    pairs = make_pairs(20, load=lambda number: packages.png("red", (4 + number, 40 - number)))
    free = preprocess.Preprocessor(byte_level, spec, **options)
    with pytest.raises(UserError, match="config.data.image_size"):
        pipeline.Batches([pairs], free, batch_size=4)
    for crops, tiles, grid in ((1, 1, [1, 1]), (4, 4, [2, 2])):
        fixed = preprocess.Preprocessor(
            byte_level, spec, **options, image_size=28, image_crops=crops
        )
        batches = pipeline.Batches([pairs], fixed, batch_size=4)
        for step in range(3):
            (query,) = batches[step].query
            assert (query.rows, query.tokens.shape[1], query.tiles.shape[1]) in (
                batches.info.query_shapes
            )
            assert query.tiles.shape[1:] == (tiles, 28, 28, 3) and query.grid.tolist() == [grid] * 4
            assert ((query.image_index >= 0).sum(1) == fixed.fixed_layout.positions).all()


def test_a_reading_process_whose_parent_is_gone_already_ends():
    code = "import time; from unime_jax.data import ahead; ahead._end_with({}, 0, 1); time.sleep(2)"
    found = [
        subprocess.run([sys.executable, "-c", code.format(parent)]).returncode
        for parent in (os.getpid(), 2**22 + 1)
    ]
    assert found == [0, 1]
