"""Strata: rows of a source with about equal lengths on every side."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unime_jax.data import strata


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_every_stratum_gives_rows_and_holds_its_own(seed, bins, sources, joint):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 60, sources)
    per_source = [int(rng.integers(1, size + 1)) for size in sizes]
    has_image = {n: (bool(rng.integers(2)), bool(rng.integers(2)), False) for n in range(sources)}
    lengths = {
        n: np.column_stack([rng.integers(1, 50, (size, 2)), np.zeros(size, int)]).astype(np.int32)
        for n, size in enumerate(sizes)
    }
    found, counts = strata.divide(lengths, has_image, per_source, bins, joint=joint)
    shapes = {
        (joint or side, has_image[s.source][side], s.tokens[side]) for s in found for side in (0, 1)
    }
    assert len(shapes) <= (2 if joint else 4) * bins
    for number, size in enumerate(sizes):
        own = [(s, c) for s, c in zip(found, counts, strict=True) if s.source == number]
        rows = np.concatenate([s.members for s, _ in own])
        assert sorted(rows) == list(range(size))
        assert sum(c for _, c in own) == per_source[number] and all(c >= 1 for _, c in own)
    for stratum in found:
        assert (stratum.lengths == lengths[stratum.source][stratum.members]).all()
        assert (stratum.lengths <= np.array(stratum.tokens)).all()
        assert stratum.tokens[2] == 0


@pytest.mark.parametrize("joint", [True, False])
def test_long_queries_with_short_targets_and_the_reverse_share_no_padding(joint):
    long, short = np.full((50, 1), 40, np.int32), np.full((50, 1), 8, np.int32)
    none = np.zeros((50, 1), np.int32)
    lengths = {0: np.hstack([long, short, none]), 1: np.hstack([short, long, none])}
    found, _ = strata.divide(lengths, {0: (False,) * 3, 1: (False,) * 3}, [4, 4], 2, joint=joint)
    assert [s.tokens for s in found] == [(40, 8, 0), (8, 40, 0)]
    images = {0: (True, False, False), 1: (False, False, False)}
    found, _ = strata.divide(lengths, images, [4, 4], 1, joint=joint)
    # An image's side is another shape; of the others one text is short and one long on either side.
    assert [s.tokens for s in found] == [(40, 40, 0), (40 if joint else 8, 40, 0)]


def test_sides_share_their_bins():
    """Two bins for three lengths, where sides of their own would have one and two."""
    rows = np.array([[40, 8, 0]] * 20 + [[40, 12, 0]] * 20, np.int32)
    found, _ = strata.divide({0: rows}, {0: (False,) * 3}, [8], 2)
    assert {s.tokens for s in found} == {(40, 12, 0)}
    found, _ = strata.divide({0: rows}, {0: (False,) * 3}, [8], 2, joint=False)
    assert {s.tokens for s in found} == {(40, 8, 0), (40, 12, 0)}
    found, _ = strata.divide({0: rows}, {0: (False,) * 3}, [8], 1)
    assert {s.tokens for s in found} == {(40, 40, 0)}, "a side that is not encoded has no bin"


def test_a_side_is_looked_through_once():
    """Not for every stratum: sources have millions of rows."""

    class Lengths(np.ndarray):
        def any(self, *args, **kwargs):
            seen.append(self.shape)
            return super().any(*args, **kwargs)

    seen = []
    rows = np.random.default_rng(0).integers(1, 90, (400, 3)).astype(np.int32)
    found, _ = strata.divide({0: rows.view(Lengths)}, {0: (False,) * 3}, [80], 4)
    assert len(found) > 3 and seen == [(400,)] * 3


def test_images_and_texts_have_bins_of_their_own():
    image = np.array([[300, 8, 0]] * 20 + [[320, 8, 0]] * 20, np.int32)
    text = np.array([[8, 8, 0]] * 20 + [[40, 8, 0]] * 20, np.int32)
    sides = {0: (True, False, False), 1: (False, False, False)}
    found, _ = strata.divide({0: image, 1: text}, sides, [4, 4], 2)
    assert [s.tokens[0] for s in found] == [300, 320, 8, 40]


class Rows:
    name = "rows"

    def __init__(self, mark="x"):
        self.fingerprint, self.asked = mark, 0

    def __len__(self):
        return 5

    def __getitem__(self, index):
        self.asked += 1
        return index


def test_lengths_are_measured_once(tmp_path):
    def lengths_of(row):
        return row, 2 * row

    rows = Rows()
    seen = []
    first = strata.measure(rows, lengths_of, cache=tmp_path, key="a", progress=seen.append)
    assert first.tolist() == [[i, 2 * i] for i in range(5)] and rows.asked == sum(seen) == 5
    again = strata.measure(rows, lengths_of, cache=tmp_path, key="a", progress=seen.append)
    assert (again == first).all() and rows.asked == 5 and sum(seen) == 10
    for other, key in ((rows, "b"), (Rows("y"), "a")):
        strata.measure(other, lengths_of, cache=tmp_path, key=key)
        assert other.asked == 5 + 5 * (other is rows)
    plain = Rows("")
    for _ in range(2):
        strata.measure(plain, lengths_of, cache=tmp_path, key="a")
    assert plain.asked == 10 and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("content", [b"", b"x", b"\x93NUMPY\x01\x00v\x00{'descr", "others"])
def test_a_damaged_cache_is_none(tmp_path, content):
    def measured(rows):
        return strata.measure(rows, lambda row: (row, row), cache=tmp_path, key="a").tolist()

    expected = measured(Rows())
    (path,) = tmp_path.iterdir()
    if content == "others":
        np.save(path, np.zeros((3, 2), np.int32))
    else:
        path.write_bytes(content)
    rows = Rows()
    assert measured(rows) == expected and rows.asked == 5
    assert measured(rows) == expected and rows.asked == 5, "kept anew"


def test_a_cache_that_cannot_be_written_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        found = strata.measure(Rows(), lambda row: (row, row), cache=cache, key="a")
        assert found.shape == (5, 2)


@pytest.mark.parametrize("count", [1, 7])
def test_few_rows_a_batch_mean_few_strata(count):
    rng = np.random.default_rng(0)
    lengths = {0: rng.integers(1, 90, (40, 3)).astype(np.int32)}
    found, counts = strata.divide(lengths, {0: (False,) * 3}, [count], 4)
    assert len(found) <= count == sum(counts)
