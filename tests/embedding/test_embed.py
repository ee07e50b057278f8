"""Files in, vectors out: order, faults, several devices and processes."""

import json
import shutil

import jax
import numpy as np
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tolerances
from embedding_run import COUNT, ROW, distance, run

import unime_jax
from unime_jax import embed, embedder
from unime_jax.data import items, pictures, prompts, stream, vector_files
from unime_jax.types import UserError


def test_rows_are_what_they_are_alone_and_in_order(root, alone, tmp_path, capsys):
    assert jax.local_device_count() == 8
    run(root, tmp_path / "v.npz")
    found = vector_files.read(tmp_path / "v.npz")
    assert found.vectors.shape == (COUNT, 32) and distance(found.vectors, alone) < ROW
    tolerances.assert_near(found.vectors, alone, ROW)
    assert found.ids == [f"n{i}" for i in range(COUNT)]
    assert found.rows.tolist() == [i for i in range(44) if i not in (3, 17, 18, 43)]
    assert found.images[1] == "1.png" and found.texts[1] == "" and found.texts[0] == "a cat, 0"
    errors = [json.loads(x) for x in open(tmp_path / "v.npz.errors.jsonl", encoding="utf-8")]
    assert [e["row"] for e in errors] == [3, 17, 18, 43] and errors[0]["id"] == "gone"
    for error, words in zip(errors, ("no.png: cannot be read", "line 18 is not JSON", "empty text",
                                     "cut.png: not a readable image"), strict=True):  # fmt: skip
        assert words in error["error"], error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.npz", "v.npz.errors.jsonl"]
    about = found.about
    assert about["model"] == str(root / "student") and about["prompt"] == "smol"
    assert (about["complete"], about["vectors"], about["bad_rows"]) == (True, COUNT, 4)
    said = capsys.readouterr()
    assert "done: " in said.out and "bad rows: 4" in said.out and "44/44" in said.err
    run(root, tmp_path / "v.npz")
    assert "all 40 vectors are there" in capsys.readouterr().out


def test_fewer_numbers_of_fewer_bits(root, alone, tmp_path):
    run(root, tmp_path / "v.npy", "--dim", 8, "--dtype", "f16")
    raw = np.load(tmp_path / "v.npy")
    assert raw.shape == (COUNT, 8) and raw.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(raw.astype(float), axis=1), 1, atol=1e-3)
    first = alone[:, :8] / np.linalg.norm(alone[:, :8], axis=1, keepdims=True)
    assert distance(vector_files.read(tmp_path / "v.npy").vectors, first) < 1e-3
    with pytest.raises(UserError, match="--dim 33: the vectors of .* have 32 numbers"):
        run(root, tmp_path / "w.npy", "--dim", 33)


def test_processes_share_the_rows(root, alone, tmp_path, monkeypatch):
    from jax.experimental import multihost_utils

    barriers, opened = [], []
    size_of = pictures.size_of
    monkeypatch.setattr(pictures, "size_of", lambda path: opened.append(path) or size_of(path))
    monkeypatch.setattr(multihost_utils, "sync_global_devices", barriers.append)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        run(root, tmp_path / "v.safetensors")
        if process:
            rows = np.fromfile(tmp_path / "v.safetensors.job" / "done-1.bin", np.int64)
            assert len(rows) == 19 and (rows % 2 == 1).all()
            entries = items.Input(str(root / "pairs" / "items.jsonl")).read()
            own = {entry.image for entry in entries if entry.row % 2 and entry.image}
            assert set(opened) == own and len(own) > 10  # no pictures but those of its rows
            assert not (tmp_path / "v.safetensors").exists()
    found = vector_files.read(tmp_path / "v.safetensors")
    assert len(barriers) == 2 and distance(found.vectors, alone) < ROW
    assert len(open(tmp_path / "v.safetensors.errors.jsonl").readlines()) == 4


def test_the_sum_of_text_and_image(root, tmp_path):
    lines = [{"text": "a", "image": "1.png"}, {"text": "a", "image": "cut.png"}, {"text": "a"},
             {"image": "1.png"}, {"text": " ", "image": "1.png"}]  # fmt: skip
    (root / "pairs" / "sum.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run(root, tmp_path / "v.npz", "--fusion", "sum", input=root / "pairs" / "sum.jsonl")
    found = vector_files.read(tmp_path / "v.npz")
    assert found.rows.tolist() == [0, 2, 3]
    raw = np.load(tmp_path / "v.npz")["vectors"]
    np.testing.assert_allclose(np.linalg.norm(raw, axis=1), 1, atol=1e-6)
    both = found.vectors[1] + found.vectors[2]
    tolerances.assert_near(found.vectors[0], both / np.linalg.norm(both), 1e-5)
    errors = [json.loads(x) for x in open(tmp_path / "v.npz.errors.jsonl", encoding="utf-8")]
    assert [error["row"] for error in errors] == [1, 4]


def test_a_model_trained_with_a_raw_prompt(root, tmp_path):
    """As stage 2 leaves it: texts, pictures and both are taken without a word of the data's."""
    model = shutil.copytree(root / "student", tmp_path / "mmeb")
    (model / "preparation.json").write_text('{"prompt": "mmeb"}')
    lines = [{"text": "a"}, {"image": "1.png"}, {"text": "a", "image": "1.png"}]
    source = root / "pairs" / "mmeb.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    embed.main(["embed", *map(str, ("--model", model, "--input", source, "--output",
                                    tmp_path / "v.npz"))])  # fmt: skip
    found = vector_files.read(tmp_path / "v.npz")
    assert found.rows.tolist() == [0, 1, 2] and found.about["bad_rows"] == 0
    texts = ["a", prompts.Slotted("", ""), prompts.Slotted("", "\na")]
    images = [None, *[root / "pairs" / "1.png"] * 2]
    expected = embedder.load(model, dtype="float32").embed(texts=texts, images=images)
    assert distance(found.vectors, expected) < ROW


def test_vectors_that_are_not_finite_are_bad_rows(root, tmp_path, monkeypatch):
    def run_with_faults(self, groups, apply=None):
        for _, keys in groups:  # the text of row 1 and the picture of row 2 overflow
            vectors = np.eye(32, dtype=np.float32)[: len(keys)]
            for place, (row, part) in enumerate(keys):
                if (row, part) in ((1, ""), (2, "image")):
                    vectors[place] = np.nan
                if row == 3:  # nothing is left of it in eight numbers
                    vectors[place] = np.eye(32)[9]
            yield keys, vectors

    monkeypatch.setattr(embedder.Embedder, "run", run_with_faults)
    lines = [{"text": "a"}, {"text": "b", "id": "b"}, {"text": "c", "image": "1.png"},
             {"text": "d"}, {"text": "e", "image": "1.png"}]  # fmt: skip
    source = root / "pairs" / "overflow.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    flags = ("--fusion", "sum", "--dtype", "int8", "--dim", "8")
    run(root, tmp_path / "v.npz", *flags, input=source)
    found = vector_files.read(tmp_path / "v.npz")
    assert found.rows.tolist() == [0, 4] and np.isfinite(found.vectors).all()
    errors = [json.loads(x) for x in open(tmp_path / "v.npz.errors.jsonl", encoding="utf-8")]
    assert [(e["row"], e["id"]) for e in errors] == [(1, "b"), (2, "2"), (3, "3")]
    assert {e["error"] for e in errors} == {"the model gave no finite vector"}


def test_nothing_and_nothing_good(root, tmp_path, capsys):
    (tmp_path / "none.jsonl").write_text("\n")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    for name in ("none.jsonl", "none.parquet"):
        with pytest.raises(UserError, match=f"{name}: no rows in this file$"):
            run(root, tmp_path / "v.npz", input=tmp_path / name)
        assert not list(tmp_path.glob("v.npz*"))
    (tmp_path / "bad.jsonl").write_text('{"caption": "a"}\n{"caption": "b"}\n')
    with pytest.raises(
        UserError, match="none of the 2 rows could be embedded: .*errors.jsonl says"
    ):
        run(root, tmp_path / "w.npz", input=tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="none of the 2 rows could be embedded"):  # the same again
        run(root, tmp_path / "w.npz", input=tmp_path / "bad.jsonl")
    assert "next: " not in capsys.readouterr().out  # there is nothing to search


def test_memory_is_bounded_by_the_rows_that_wait(root, monkeypatch):
    monkeypatch.setattr(stream, "WAITING_ROWS", 10)
    model = unime_jax.load(root / "student", dtype="float32").preprocessor
    read = []

    def rows():
        for number in range(200):
            read.append(number)
            yield stream.Item(number, "a" * (1 + 40 * (number % 3)))

    seen, most = [], 0
    made = stream.Stream(model, rows(), instruction=None, bad=pytest.fail)
    positions = real = 0
    for inputs, keys in made:
        positions += inputs.tokens.shape[1] << (inputs.rows - 1).bit_length()
        real += int(inputs.lengths.sum())
        assert inputs.rows == len(keys)
        seen += keys
        most = max(most, len(read) - len(seen))
        assert all(row.item.text is None for row in made._waiting.values())
    assert sorted(seen) == list(range(200)) and most < 10 + 3 * stream._CHUNK
    assert made.padded_share == pytest.approx(1 - real / positions) and real < positions
    waiting = stream.Stream(model, rows(), instruction=None, bad=pytest.fail)
    assert max(len(keys) for _, keys in waiting) <= 11


@pytest.mark.slow
def test_two_processes_of_two_devices(root, alone, tmp_path):
    flags = ["--model", root / "student", "--input", root / "pairs" / "items.jsonl",
             "--output", tmp_path / "v.npz"]  # fmt: skip
    started = processes.start(
        list(map(str, flags)), tmp_path / "cache", processes=2, devices=2, entry="embed"
    )
    said = processes.finish(started)
    assert "done: " in said[0] and "done: " not in said[1]
    found = vector_files.read(tmp_path / "v.npz")
    assert len(found.vectors) == COUNT and distance(found.vectors, alone) < ROW
    assert len(open(tmp_path / "v.npz.errors.jsonl").readlines()) == 4
