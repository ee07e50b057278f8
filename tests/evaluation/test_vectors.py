"""Vectors on disk, hashes of models and files, and how items become rows."""

import errno
import json
import pathlib
import subprocess
import sys

import fake_models
import numpy as np
import pytest

from unime_jax import tiny, weights
from unime_jax.data import prompts
from unime_jax.data.eval_items import ImageFolder, Items
from unime_jax.data.sources import Item
from unime_jax.evaluation import content
from unime_jax.evaluation.encode import Wording
from unime_jax.evaluation.store import VectorStore
from unime_jax.types import UserError

KEYS = [bytes([i]) * 16 for i in range(40)]


def rows(count: int, width: int = 5) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32)


def test_what_was_added_is_there_for_every_later_process(tmp_path):
    vectors = rows(6)
    vectors[4] = vectors[1]
    with VectorStore(tmp_path, {"model": "x"}) as store:
        store.add(KEYS[:3], vectors[:3])
        store.flush()
        store.add(KEYS[3:6], vectors[3:])
        np.testing.assert_array_equal(store.vectors(KEYS[5::-1]), vectors[::-1])  # on disk or not
    again = VectorStore(tmp_path)
    assert len(again) == 6 and KEYS[6] not in again
    np.testing.assert_array_equal(again.vectors([KEYS[4], KEYS[0]]), vectors[[4, 0]])
    hashes = again.hashes(KEYS[:6])
    assert hashes[1] == hashes[4] and len(set(hashes.tolist())) == 5
    assert json.loads((tmp_path / "about.json").read_text()) == {"model": "x"}


def test_a_killed_process_loses_the_rows_in_flight_alone(tmp_path):
    code = (
        "import os, signal, sys, numpy as np\n"
        "from unime_jax.evaluation import store\n"
        "store.FLUSH_ROWS = 4\n"
        "found = store.VectorStore(__import__('pathlib').Path(sys.argv[1]))\n"
        "for i in range(10):\n"
        "    found.add([bytes([i]) * 16], np.full((1, 5), i, np.float32))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    store = VectorStore(tmp_path)
    assert [key in store for key in KEYS[:10]] == [True] * 8 + [False] * 2
    assert store.vectors(KEYS[:8])[:, 0].tolist() == list(range(8))


def test_damaged_shards_are_embedded_again(tmp_path):
    for part in range(3):
        with VectorStore(tmp_path) as store:
            store.add(KEYS[4 * part : 4 * part + 4], rows(4))
    before = {*tmp_path.glob("*.keys.npy")}
    first, second, _ = sorted(tmp_path.glob("*.vectors.npy"))
    first.write_bytes(first.read_bytes()[:-30])
    second.unlink()
    with VectorStore(tmp_path) as store:
        store.add(KEYS[20:24], rows(4))
    (new,) = {*tmp_path.glob("*.keys.npy")} - before
    np.save(new, np.load(new)[:2])
    assert len(VectorStore(tmp_path)) == 4


def test_any_number_of_shards_needs_few_descriptors(tmp_path):
    code = (
        "import pathlib, resource, sys, numpy as np\n"
        "from unime_jax.evaluation.store import VectorStore\n"
        "keys = [bytes([i]) * 16 for i in range(60)]\n"
        "expected = np.arange(300, dtype=np.float32).reshape(60, 5)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "store = VectorStore(pathlib.Path(sys.argv[1]))\n"
        "for i in range(60):\n"
        "    store.add(keys[i:i + 1], expected[i:i + 1])\n"
        "    store.flush()\n"
        "for found in (store, VectorStore(store.directory)):\n"
        "    assert len(found) == 60\n"
        "    np.testing.assert_array_equal(found.vectors(keys[::-1]), expected[::-1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == 0


def test_a_system_without_descriptors_is_no_damaged_shard(tmp_path, monkeypatch):
    with VectorStore(tmp_path) as store:
        store.add(KEYS[:4], rows(4))

    def load(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(np, "load", load)
    with pytest.raises(OSError, match="Too many open files"):
        VectorStore(tmp_path)


def test_two_processes_see_each_others_rows(tmp_path):
    one, two = VectorStore(tmp_path), VectorStore(tmp_path)
    one.add(KEYS[:2], rows(2))
    one.flush()
    assert KEYS[0] not in two
    two.refresh()
    np.testing.assert_array_equal(two.vectors(KEYS[:2]), rows(2))


def test_models_of_other_weights_or_settings_have_other_vectors(tmp_path):
    directory = tiny.backbone("llava16", tmp_path / "model")

    def key(**settings):
        return content.of_model(weights.find(directory), settings)

    first = key(dtype="float32")
    assert first == key(dtype="float32") != key(dtype="bfloat16")
    (directory / "README.md").write_text("a card")
    assert key(dtype="float32") == first
    (file,) = directory.glob("*.safetensors")
    changed = bytearray(file.read_bytes())
    changed[-1000] ^= 1  # one bit, far from the start
    file.write_bytes(changed)
    assert key(dtype="float32") != first


SLOT = "<|image_1|>"


@pytest.mark.parametrize(
    "wording, text, expected",
    [
        (Wording(True), f"{SLOT}\nWhat?", [prompts.Slotted("", "\nWhat?")]),
        (Wording(True), f"Look: {SLOT} here", [prompts.Slotted("Look: ", " here")]),
        (Wording(True), "What?", [prompts.Slotted("", "\nWhat?")]),
        (Wording(True), None, [prompts.Slotted("", "")]),
        (Wording(False), f"{SLOT}\nWhat?\nWhy?", ["What?\nWhy?"]),
        (Wording(False), f"{SLOT}\n", [None]),
        (Wording(False, sum=True), f"{SLOT}\nWhat?", ["What?", None]),
        (Wording(False, sum=True), SLOT, [None]),
    ],
)
def test_the_images_place_is_found_as_the_prompt_wants_it(wording, text, expected):
    image = ImageFolder(pathlib.Path("x"))("a.jpg")
    found = wording.rows(Item(text, image))
    assert [text for text, _ in found] == expected
    assert [image is not None for _, image in found] == [True] if len(found) == 1 else [False, True]


def test_texts_without_image_stay_as_they_are():
    assert Wording(True).rows(Item(" a\n b ")) == [(" a\n b ", None)]
    with pytest.raises(UserError, match="but there is no image"):
        Wording(True).rows(Item(f"{SLOT} a"))


def test_images_of_other_roots_are_others_whatever_their_names(tmp_path):
    from PIL import Image

    items = Items()
    for root, color in (("a", "red"), ("b", "blue")):
        (tmp_path / root).mkdir()
        Image.new("RGB", (9, 9), color).save(tmp_path / root / "1.png")
        items.add("what?", ImageFolder(tmp_path / root)("1.png"))
    model = fake_models.FakeModel()
    encoder = fake_models.encoder_of(items, model, tmp_path / "cache")
    assert list(encoder.embed({"set": np.arange(len(items))})) == ["set"]
    assert len(items) == encoder.rows == 2 and encoder.canonical.tolist() == [0, 1]
    assert not np.array_equal(*encoder.vectors(np.arange(2)))


def test_vectors_that_are_not_finite_are_faults(tmp_path):
    items = Items()
    for text in "abc":
        items.add(text)

    class Broken(fake_models.FakeModel):
        def direction(self, said):
            return super().direction(said) * (np.nan if said.startswith(b"'b'") else 1)

    encoder = fake_models.encoder_of(items, Broken(), tmp_path)
    assert list(encoder.embed({"set": np.arange(3)})) == ["set"]
    assert encoder.usable.tolist() == [True, False, True] and encoder.embedded == 2
    assert encoder.reason(1) == "the model gave no finite vector" and encoder.missing == 0
    again = fake_models.encoder_of(items, fake_models.FakeModel(), tmp_path)
    assert again.missing == 1  # nothing of it is kept


def test_a_sum_is_of_parts_that_are_embedded_once(tmp_path):
    from PIL import Image

    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "copy.png")
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "other.png")
    folder, items = ImageFolder(tmp_path), Items()
    items.add("a")
    for text, name in (("", "a.png"), ("a", "a.png"), ("a", "copy.png"), ("b", "gone.png")):
        items.add(text, folder(name))
    items.add("", folder("other.png"))
    model = fake_models.FakeModel()
    encoder = fake_models.encoder_of(items, model, tmp_path / "cache", Wording(False, sum=True))
    assert list(encoder.embed({"set": np.arange(6)})) == ["set"]
    assert len(model.seen) == encoder.rows == 3
    assert encoder.usable.tolist() == [True] * 4 + [False, True]
    assert "no such image" in encoder.reason(4) and encoder.reason(0) == ""
    text, image, both, copy = encoder.vectors(np.arange(4))
    expected = (text + image) / np.linalg.norm(text + image)
    np.testing.assert_allclose(both, expected, atol=1e-6)
    np.testing.assert_array_equal(both, copy)
    assert encoder.canonical.tolist() == [0, 1, 2, 2, 4, 5] and encoder.same.tolist()[:4] == [
        0,
        1,
        2,
        2,
    ]
    ((name, reason),) = encoder.problems(items, np.arange(6)).items()
    assert name == "gone.png" and "no such image" in reason
