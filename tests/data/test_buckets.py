"""Rows of any length in a few shapes, prepared one group ahead."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unime_jax.data import buckets
from unime_jax.types import UserError


def test_padded_lengths():
    assert [buckets.padded_length(n, 4096) for n in (1, 16, 17, 600, 1024, 1025, 2509, 4000)] == [
        *[16, 16, 32, 640, 1024, 1280, 2560, 4096]
    ]
    assert buckets.padded_length(5000, 131072) == 5120
    assert buckets.padded_length(3000, 3050) == 3050  # never longer than the model reads


@given(st.integers(1, 10_000))
def test_padding_stays_below_a_third(length):
    padded = buckets.padded_length(length, 1 << 20)
    assert length <= padded and (length < 22 or padded - length < padded / 3)


@given(
    st.lists(st.tuples(st.sampled_from([16, 64, 768, 3072, 9984]), st.integers(0, 80))),
    st.sampled_from([1, 4, 6]),
)
def test_groups_are_bounded_and_hold_every_row_once(shapes, devices):
    found = buckets.sort(shapes, devices)
    assert sorted(row for bucket in found for row in bucket.members) == list(range(len(shapes)))
    for bucket in found:
        rows = len(bucket.members)
        assert all(shapes[row] == (bucket.tokens, bucket.tiles) for row in bucket.members)
        device, rest = divmod(buckets.padded_rows(rows, devices), devices)
        assert rest == 0 and device * devices >= rows and device & (device - 1) == 0
        assert device == 1 or device <= 64 and device * bucket.tokens <= 8192
        assert device == 1 or device * bucket.tiles <= 64
    lengths = [bucket.tokens for bucket in found]
    assert lengths == sorted(lengths)


def test_full_groups_spread_over_devices_without_padding():
    assert [len(bucket.members) for bucket in buckets.sort([(768, 0)] * 20)] == [8, 8, 4]
    (bucket, last) = buckets.sort([(3072, 5)] * 20, 8)
    assert len(bucket.members) == buckets.padded_rows(16, 8) == 16
    assert len(last.members) == 4 and buckets.padded_rows(4, 8) == 8
    assert [buckets.padded_rows(rows) for rows in (1, 2, 3, 5)] == [1, 2, 4, 8]


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
