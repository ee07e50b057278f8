"""Processes share the making of batches: what they make is what one would make alone."""

import collections
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import packages
import pytest

from unime_jax.data import pipeline, preprocess, shares, sources
from unime_jax.types import ImageSpec, UserError

SPEC = ImageSpec("grid", 8, 3)
DEVICES = 4  # two of each process
BAD = {3, 4, 17}
# Of 30 images, three views of each; those that were unreadable are zeros.
FEATURES = np.random.default_rng(0).normal(size=(30, 3, 3, 5)).astype(np.float16)


@pytest.fixture(scope="module")
def smol(byte_level):
    return preprocess.Preprocessor(byte_level, SPEC, prompt="smol", max_tokens=200)


class Judged:
    """Rows with an image on every side, two negatives, and targets without an identity."""

    name = "judged"

    def __init__(self, load):
        self._load = load

    def __len__(self):
        return 24

    def __getitem__(self, index):
        def image(number):
            return sources.ImageRef(number, f"image {number}", lambda: self._load(number))

        return sources.Example(
            query_text="q" * (1 + index % 3),
            query_image=image(index),
            target_image=image(100 + index),
            negatives=tuple(sources.Item(f"no {k}", image(200 + k + index)) for k in range(2)),
            scores=(1.0, 0.5, float(index)),
            set="judged",
        )


def pairs(load):
    rows = [
        sources.PairRow(f"{'x' * (i % 5)} {i}", f"key {i}", "pairs", ("other",)) for i in range(30)
    ]
    return sources.Pairs(rows, load, name="pairs")


def lengths(texts):
    return np.array([[len(text)] for text in texts])


def everything(load):
    both = [pairs(load), pairs(load).directed("text_to_image")]
    return {
        "pairs": (both, 14, {"other_texts": 0.5}),
        "judged": ([Judged(load)], 6, {}),
        "augmented": ([Judged(load)], 6, {"augment": True}),
        "features": (both, 14, {"features": FEATURES}),
        "vectors": ([pairs(load)], 7, {"vectors": lengths}),
    }


class Meeting:
    """Brings together what the threads that stand for processes say."""

    def __init__(self, parties):
        self._said, self._barrier = [""] * parties, threading.Barrier(parties, timeout=60)
        self.rounds = 0

    def exchange(self, number):
        def say(text):
            self._said[number] = text
            self._barrier.wait()
            found = list(self._said)
            self.rounds += number == 0
            self._barrier.wait()
            return found

        return say


def own(number, parties=2):
    """Rows of a process, as `sharding.own_rows` gives them."""

    def mask(rows):
        padded = -(-rows // DEVICES) * DEVICES
        share = padded // parties
        places = np.minimum(np.arange(number * share, (number + 1) * share), rows - 1)
        found = np.zeros(rows, bool)
        found[places] = True
        return found

    return mask


def together(parts, sizes):
    """Puts the groups of the processes' batches together; one shape's are shared as one."""
    rows = collections.Counter()
    for count, *shape in itertools.chain(*sizes.values()):
        rows[tuple(shape)] += count
    left = [{shape: own(n)(count) for shape, count in rows.items()} for n in range(len(parts))]
    sides = {name: [] for name in shares.NAMES}
    for name in shares.NAMES:
        for place, (count, *shape) in enumerate(sizes[name]):
            masks = []
            for masks_left in left:
                mask, masks_left[tuple(shape)] = np.split(masks_left[tuple(shape)], [count])
                masks.append(mask)
            groups = [getattr(part, name)[place] for part in parts]
            assert [group is None for group in groups] == [not mask.any() for mask in masks]
            sides[name].append(join(count, masks, groups))
    return sides


def join(rows, masks, groups):
    there = [(mask, group) for mask, group in zip(masks, groups, strict=True) if mask.any()]
    masks, groups = zip(*there, strict=True)

    def whole(*leaves):
        found = np.zeros((rows, *leaves[0].shape[1:]), leaves[0].dtype)
        for leaf, mask in zip(leaves, masks, strict=True):
            found[mask] = leaf
        return found

    return jax.tree.map(whole, *groups)


@pytest.mark.parametrize("name", ["pairs", "judged", "augmented", "features", "vectors"])
@pytest.mark.parametrize("bad", [set(), BAD])
def test_two_processes_make_what_one_makes(smol, name, bad, monkeypatch):
    read = [[], []]
    missing = np.array([number in bad for number in range(30)])
    monkeypatch.setitem(globals(), "FEATURES", np.where(missing[:, None, None, None], 0, FEATURES))

    def loader(number):
        def load(image):
            read[number].append(image)
            return (
                b"broken"
                if image % 100 in bad
                else packages.png((image % 250, 7, 9), (5, 4 + image % 3))
            )

        return load

    def make(number):
        data, size, options = everything(loader(number))[name]
        return pipeline.Batches(data, smol, batch_size=size, bins=2, max_bad_share=0.9, **options)

    meeting, steps = Meeting(2), 4

    def run(number):
        made = shares.SharedBatches(make(number), own(number), meeting.exchange(number))
        return made, list(made.iterate(0, steps, threads=1))

    with ThreadPoolExecutor(2) as pool:
        (first, one), (second, two) = pool.map(run, range(2))
    decoded = [len(found) for found in read]
    alone = make(0)
    expected = [alone[step] for step in range(steps)]
    for whole, *parts in zip(expected, one, two, strict=True):
        assert first.sizes == second.sizes
        assert first.sizes["query"] == [
            (x.rows, x.tokens.shape[1], x.tiles.shape[1]) for x in whole.query
        ]
        found = together(parts, first.sizes)
        for side in shares.NAMES:
            jax.tree.map(np.testing.assert_array_equal, found[side], list(getattr(whole, side)))
        for part in parts:
            rest = {k: v for k, v in vars(part).items() if k not in shares.NAMES and v is not None}
            for key, value in rest.items():
                np.testing.assert_array_equal(value, getattr(whole, key), err_msg=key)
    problems = [sorted(batches._batches.bad.items()) for batches in (first, second)]
    expected = sorted(alone.bad.items())
    if name in ("judged", "augmented"):  # of a row with several bad images any may be named
        assert problems[0] == problems[1]
        problems = [[(row, kind) for row, (_, kind) in found] for found in problems]
        expected = [(row, kind) for row, (_, kind) in expected]
    assert problems[0] == problems[1] == expected
    assert bool(problems[0]) == bool(bad) and (meeting.rounds > steps) == bool(bad)
    if not bad and name in ("pairs", "vectors"):  # half of the images each, but for what fills up
        total = len(read[0]) - decoded[0]
        assert all(count <= 0.75 * total for count in decoded) and sum(decoded) <= 1.25 * total


def test_all_stop_for_what_one_cannot_read(smol):
    def make(number):
        def load(image):
            return b"broken" if number == 1 else packages.png()

        return pipeline.Batches([pairs(load)], smol, batch_size=8, max_bad_share=0.1)

    meeting = Meeting(2)

    def run(number):
        with pytest.raises(UserError, match="4 of 30 rows are unreadable") as caught:
            list(
                shares.SharedBatches(make(number), own(number), meeting.exchange(number)).iterate(
                    0, 2
                )
            )
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(run, range(2))
    assert one == other


def test_messages_are_text(smol, monkeypatch):
    """Bad rows go through a store of strings; what two processes tell of counts once."""
    said, counted = [], []

    def exchange(text):
        said.append(text)
        return [text, text]

    found = pairs(lambda number: b"broken" if number == 3 else packages.png())
    batches = pipeline.Batches([found], smol, batch_size=30, max_bad_share=0.1)
    monkeypatch.setattr(batches.bad, "add", lambda *row: counted.append(row))
    list(shares.SharedBatches(batches, lambda rows: np.ones(rows, bool), exchange).iterate(0, 1))
    assert len(counted) == 1
    faults = [fault for text in said for fault in json.loads(text)[0]]
    assert len(faults) == 1 and len(said) == 2
    place, attempt, row, problem = faults[0]
    assert (
        row == [0, 3] and attempt == 0 and problem[1] and "row 3" in problem[0] and 0 <= place < 30
    )
