"""Batches of MMEB's sets: their own wording, equal targets, judged negatives, other processes."""

import jax
import numpy as np
import pytest

from unime_jax import tiny
from unime_jax.data import mmeb, pipeline, preprocess, task_pairs
from unime_jax.types import ImageSpec, UserError

SPEC = ImageSpec("llava_anyres", 28, 4, grids=((28, 56), (56, 28)))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return tiny.backbone("llava16", root / "model"), tiny.mmeb(root / "mmeb")


@pytest.fixture(scope="module")
def processor(directories):
    return preprocess.Preprocessor(
        directories[0], SPEC, prompt="mmeb", max_tokens=4096, image_token_id=260, image_size=28
    )


def make(directories, processor, **options):
    options = {"batch_size": 44, "max_tokens": 90, "bins": 2, **options}
    return pipeline.Batches(mmeb.open_sets(directories[1]), processor, **options)


@pytest.fixture(scope="module")
def batches(directories, processor):
    return make(directories, processor)


def equal(one, other):
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other)
    return jax.tree.all(same)


def test_every_set_gives_its_rows(batches):
    batch = batches[3]
    assert (
        batches.info.sets == tuple(s.name for s in batches._data) and len(batches.info.sets) == 20
    )
    counts = np.bincount(batch.sets, minlength=20)
    assert counts.min() >= 2 and counts.sum() == 44
    for groups, shapes in (
        (batch.query, batches.info.query_shapes), (batch.target, batches.info.target_shapes),
    ):  # fmt: skip
        assert [(g.rows, g.tokens.shape[1], g.tiles.shape[1]) for g in groups] == shapes
        assert {g.tiles.shape[1] for g in groups} == {0, 3}  # texts never run the tower
    assert len(batches.info.query_shapes) <= 4 and len(batches.info.target_shapes) <= 4
    assert batches.info.padded_share < batches.info.one_shape_share


def test_the_wording_is_the_rows_own(batches, processor):
    """An image of n positions stands where <|image_1|> stood, then the text as it is."""
    batch = batches[0]
    group = batch.query[-1]
    row = int(np.argmax(group.lengths))
    index = group.image_index[row, : group.lengths[row]]
    positions = processor.fixed_layout.positions
    np.testing.assert_array_equal(np.flatnonzero(index >= 0), 1 + np.arange(positions))
    text = bytes(group.tokens[row, 1 + positions : group.lengths[row]].astype(np.uint8))
    wanted = [
        example.query_text.after
        for source in batches._data
        for example in source.__getitems__(range(len(source)))
        if example.query_image
    ]
    assert group.tokens[row, 0] == 256 and len(text) > 10
    letters = {id: piece for piece, id in processor._tokenizer._first.get_vocab().items()}
    decoded = "".join(letters[id] for id in text).replace("Ġ", " ").replace("Ċ", "\n")
    assert any(full.startswith(decoded) for full in wanted), decoded


def test_equal_targets_have_equal_ids(batches):
    seen = {}
    for step in range(4):
        batch = batches[step]
        for number, id in zip(batch.sets, batch.target_ids, strict=True):
            seen.setdefault(batches.info.sets[number], []).append(int(id))
    assert len(set(seen["HatefulMemes"])) == 2 < len(seen["HatefulMemes"])
    assert len(set(seen["NIGHTS"])) == len(seen["NIGHTS"])


def test_other_processes_change_no_batch(batches):
    found = batches.iterate(2, 5, workers=1, threads=2)
    for step in (2, 3, 4):
        assert equal(next(found), batches[step])
    assert next(found, None) is None
    threads = list(batches.iterate(2, 5, threads=3))
    assert all(equal(one, batches[step]) for step, one in enumerate(threads, 2))
    assert list(batches.iterate(5, 5, workers=1)) == []


def test_blocks_and_weights(directories, processor):
    found = make(directories, processor, batch_size=48, block=2)
    assert (np.bincount(found[0].sets, minlength=20) % 2 == 0).all()
    with pytest.raises(UserError, match="config.data.block"):
        make(directories, processor, batch_size=32, block=2)
    few = make(directories, processor, batch_size=8)
    assert len(few.info.unused) == 12 and len(set(few.info.unused) & set(few.info.sets)) == 12


def test_judged_rows_bring_their_negatives(directories, processor, tmp_path):
    sources = task_pairs.read(tiny.judged(tmp_path / "judged"), judged=3)
    found = pipeline.Batches(sources, processor, batch_size=8, max_tokens=90, bins=1)
    batch = found[1]
    assert batch.scores.shape == (8, 4) and batch.negative_order.shape == (24,)
    rows = [found._data[0][i] for i in range(len(found._data[0]))]
    by_target = {tuple(processor.tokenize(row.target_text, False).ids): row for row in rows}

    def texts(groups, order):
        flat = [g.tokens[i, : g.lengths[i]] for g in groups for i in range(g.rows)]
        return [tuple(flat[place].tolist()) for place in order]

    negatives = texts(batch.negative, batch.negative_order)
    for number, target in enumerate(texts(batch.target, batch.target_order)):
        row = by_target[target]
        own = [tuple(processor.tokenize(item.text, False).ids) for item in row.negatives]
        assert negatives[3 * number : 3 * number + 3] == own
        np.testing.assert_allclose(batch.scores[number], row.scores)
