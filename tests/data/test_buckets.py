"""Rows of any length in a few shapes, prepared one group ahead."""

import copy
import itertools
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unime_jax.data import buckets
from unime_jax.types import UserError


def test_padded_lengths():
    assert [buckets.padded_length(n, 4096) for n in (1, 16, 17, 600, 1024, 1025, 2509, 4000)] == [
        *[16, 16, 24, 640, 1024, 1280, 2560, 4096]
    ]
    assert buckets.padded_length(5000, 131072) == 5120
    assert buckets.padded_length(3000, 3050) == 3050  # never longer than the model reads


@given(st.integers(1, 10_000))
def test_padding_stays_below_a_fourth(length):
    padded = buckets.padded_length(length, 1 << 20)
    assert length <= padded and (length < 20 or padded - length < padded / 4)


@given(
    st.lists(st.tuples(st.sampled_from([16, 64, 768, 3072, 9984]), st.integers(0, 80))),
    st.sampled_from([1, 4, 6]),
    st.sampled_from([1, 800, 1 << 30]),
)
def test_groups_are_bounded_and_hold_every_row_once(shapes, devices, program):
    limits = buckets.Limits(devices=devices, program=program)
    found = buckets.sort(shapes, limits)
    assert sorted(row for bucket in found for row in bucket.members) == list(range(len(shapes)))
    for bucket in found:
        rows = len(bucket.members)
        for row in bucket.members:
            assert shapes[row][0] <= bucket.tokens and shapes[row][1] == bucket.tiles
        if program == 1:  # none is padded to a longer shape
            assert any(shapes[row][0] == bucket.tokens for row in bucket.members)
        device, rest = divmod(limits.padded(rows), devices)
        assert rest == 0 and device * devices >= rows and device & (device - 1) == 0
        assert device == 1 or device <= 64 and device * bucket.tokens <= 8192
        assert device == 1 or device * bucket.tiles <= 64
    lengths = [bucket.tokens for bucket in found]
    assert lengths == sorted(lengths)


def test_full_groups_spread_over_devices_without_padding():
    assert [len(bucket.members) for bucket in buckets.sort([(768, 0)] * 20)] == [8, 8, 4]
    limits = buckets.Limits(devices=8)
    (bucket, last) = buckets.sort([(3072, 5)] * 20, limits)
    assert len(bucket.members) == limits.padded(16) == 16
    assert len(last.members) == 4 and limits.padded(4) == 8
    assert [buckets.LIMITS.padded(rows) for rows in (1, 2, 3, 5)] == [1, 2, 4, 8]


def cost(groups, limits, known=()):
    """What groups cost: their positions, and their programs."""
    total = 0
    for group in groups:
        rows = limits.padded(len(group))
        there = [tokens * rows for tokens, _, n in known if n == rows and tokens >= max(group)]
        total += min([max(group) * rows + limits.program, *there])
    return total


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([16, 32, 64, 128, 512]), min_size=1, max_size=7),
    st.sampled_from([64, 512, 4096]),
)
def test_rows_that_are_left_cost_as_little_as_can_be(lengths, tokens):
    limits = buckets.Limits(rows=4, tokens=tokens, program=tokens)
    known = {(32, 0, 2), (64, 0, 1)}
    left = {}
    for row, length in enumerate(lengths):
        left.setdefault((length, 0), []).append(row)
    programs = buckets.Programs(limits.program, known)
    made = buckets.gather(left, limits, programs)
    found = [[lengths[row] for row in bucket.members] for bucket in made]
    assert sorted(length for rows in found for length in rows) == sorted(lengths)
    for bucket, rows in zip(made, found, strict=True):
        shape = bucket.tokens, 0, limits.padded(len(rows))
        assert bucket.tokens == max(rows) or (bucket.tokens > max(rows) and shape in known)
    lengths = sorted(lengths)
    ways = []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        groups = [[lengths[0]]]
        for cut, length in zip(cuts, lengths[1:], strict=True):
            if cut:
                groups.append([])
            groups[-1].append(length)
        if all(len(rows) <= limits.full(max(rows), 0) for rows in groups):
            ways.append(cost(groups, limits, known))
    assert cost(found, limits, known) == min(ways)


def test_a_few_rows_of_each_length_are_one_group():
    (group,) = buckets.sort([(16, 0), (24, 0), (32, 0), (16, 0)])
    assert (group.tokens, sorted(group.members)) == (32, [0, 1, 2, 3])
    pictures, texts = buckets.sort([(64, 1), (64, 0), (48, 1), (80, 0)])
    assert (pictures.tiles, texts.tiles) == (1, 0)  # which do not mix


def programs_of(found, limits):
    return {(b.tokens, b.tiles, limits.padded(len(b.members))) for b in found}


def test_where_programs_are_dear_few_lengths_are_made():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.2, 0.8, 2000), 4, 1000).astype(int)
    shapes = [(buckets.padded_length(int(n), 4096), 0) for n in lengths]
    exact, few = (buckets.Limits(tokens=2048, program=cost) for cost in (1, 1 << 22))
    many = programs_of(buckets.sort(shapes, exact), exact)
    assert {tokens for tokens, _, _ in many} == {tokens for tokens, _ in shapes}
    found = buckets.sort(shapes, few)
    assert len(programs_of(found, few)) <= 10 < len(many)
    assert sorted(row for bucket in found for row in bucket.members) == list(range(2000))
    for bucket in found:
        assert all(shapes[row][0] <= bucket.tokens for row in bucket.members)


def test_a_length_gets_its_own_program_once_padding_has_cost_as_much():
    limits = buckets.Limits(rows=1, tokens=2048, program=8 * 100)
    sorter = buckets.Sorter(limits, longest=90)
    made = [sorter.add((40, 0), row).tokens for row in range(6)]
    assert made == [64] * 4 + [40] * 2  # 24 positions each, of 100
    assert sorter.add((80, 0), 6).tokens == 90  # not 128, which the model does not read
    assert sorter.add((56, 0), 7).tokens == 64 and sorter.add((300, 0), 8).tokens == 300
    assert sorter.add((40, 1), 9).tokens == 64  # images have programs of their own
    assert sorter.rest() == []


def test_padding_of_many_calls_of_few_rows_falls_to_that_of_one_call_of_many():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.2, 0.8, 24 * 256), 4, 1000).astype(int)
    padded = np.array([buckets.padded_length(int(n), 4096) for n in lengths])
    limits = buckets.Limits(tokens=2048, program=1024)
    made, shares, programs = set(), [], buckets.Programs(limits.program)
    for call in range(24):
        part = slice(256 * call, 256 * (call + 1))
        found = buckets.sort([(int(n), 0) for n in padded[part]], limits, programs=programs)
        made |= programs_of(found, limits)
        positions = sum(limits.padded(len(bucket.members)) * bucket.tokens for bucket in found)
        shares.append(1 - lengths[part].sum() / positions)
    least = 1 - lengths.sum() / padded.sum()  # each row at its own length, in full groups
    assert np.mean(shares[-5:]) < least + 0.04 < shares[0] - 0.05
    assert len(made) < 50


def test_equal_calls_get_equal_groups_whatever_came_between():
    rng = np.random.default_rng(0)
    limits = buckets.Limits(rows=4, tokens=512, program=512)
    programs = buckets.Programs(limits.program)
    shapes = [(buckets.padded_length(int(n), 512), 0) for n in rng.integers(1, 99, 30)]
    first = buckets.sort(shapes, limits, programs=programs)
    for call in range(40):
        others = [(buckets.padded_length(int(n), 512), 0) for n in rng.integers(1, 99, 30)]
        buckets.sort(others, limits, programs=programs)
        assert buckets.sort(shapes, limits, programs=programs) == first, call
    turned = buckets.sort(shapes[::-1], limits, programs=programs)
    assert [b.tokens for b in turned] == [b.tokens for b in first]
    assert programs_of(turned, limits) == programs_of(first, limits)
    assert all(shapes[29 - m][0] <= b.tokens for b in turned for m in b.members)


def test_groups_of_old_calls_are_forgotten_the_newest_are_not():
    programs = buckets.Programs(8192)
    for rows, kept in ((40_000, [40_000]), (20_000, [40_000, 20_000]), (30_000, [20_000, 30_000]),
                       (70_000, [70_000]), (70_000, [70_000]), (10, [10])):  # fmt: skip
        buckets.sort([(16, 0)] * rows, programs=programs)
        assert [len(shapes) for _, shapes in programs._calls] == kept
    assert programs._rows == 10
    again = copy.deepcopy(pickle.loads(pickle.dumps(programs)))
    assert again._calls == programs._calls


def test_threads_share_programs():
    limits = buckets.Limits(rows=4, tokens=512, program=512)
    programs = buckets.Programs(limits.program)
    calls = [[(16 + 8 * (n % 7), 0) for n in range(call)] for call in range(1, 400)]

    def work(turn: int) -> None:
        for shapes in calls if turn else calls[::-1]:
            found = buckets.sort(shapes, limits, programs=programs, content=turn)
            rows = sorted(row for bucket in found for row in bucket.members)
            assert rows == list(range(len(shapes)))
            assert all(shapes[r][0] <= b.tokens for b in found for r in b.members)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert programs._rows == sum(len(shapes) for _, shapes in programs._calls)


class Recorder:
    """Prepares rows as their own number and remembers when."""

    def __init__(self, bad=None):
        self.prepared, self.bad, self.lock = [], bad, threading.Lock()

    def prepare(self, row):
        with self.lock:
            self.prepared.append(row)
        if row == self.bad:
            raise UserError(f"row {row}: broken")
        return row

    def groups(self, shapes):
        return buckets.Groups(
            buckets.sort(shapes), self.prepare, lambda bucket, images: images, tokens=100
        )


def test_images_are_prepared_one_group_ahead():
    recorder = Recorder()
    groups = recorder.groups([(4096, 16)] * 7 + [(16, 0)] * 3)
    assert (len(groups), groups.rows) == (5, 10)
    assert groups.padded_share == pytest.approx(1 - 100 / (7 * 4096 + 3 * 16))
    assert recorder.prepared == []
    reader = iter(groups)
    images, rows = next(reader)
    assert images == [None] * 3 and rows.tolist() == [7, 8, 9]
    for group in range(4):
        images, rows = next(reader)
        assert images == rows.tolist()
        limit = min(7, 2 * (group + 2))  # this group's and the next one's
        assert len(recorder.prepared) <= limit
    assert sorted(recorder.prepared) == list(range(7))
    with pytest.raises(StopIteration):
        next(reader)
    again = np.concatenate([rows for _, rows in groups])
    assert sorted(again.tolist()) == list(range(10))  # groups can be read twice


def test_a_bad_image_stops_the_reader_and_no_thread_stays():
    before = threading.active_count()
    recorder = Recorder(bad=3)
    seen = []
    with pytest.raises(UserError, match="row 3: broken"):
        for _, rows in recorder.groups([(4096, 16)] * 40):
            seen += rows.tolist()
    assert seen == [0, 1] and len(recorder.prepared) <= 6
    assert threading.active_count() == before
    for _, _ in recorder.groups([(4096, 16)] * 40):
        break
    assert threading.active_count() == before
