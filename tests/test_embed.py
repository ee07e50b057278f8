"""Files in, vectors out: order, faults, stops and starts, several devices and processes."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import miniature
import numpy as np
import processes
import pytest
import tolerances

import unime_jax
from unime_jax import embed, embed_job, embedder, runtime
from unime_jax.data import buckets, items, pictures, prompts, stream, vector_files
from unime_jax.types import UserError

ROW = 1e-5  # cosine distance of a row on one device and on eight, alone and among others
COUNT = 40
FAULTS = ['{"image": "no.png", "id": "gone"}', "{", '{"text": " "}', '{"image": "cut.png"}']


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, and 40 good rows with four bad ones among them."""
    root = miniature.write_all(tmp_path_factory.mktemp("embed"))
    lines, folder = [], root / "pairs"
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    for i in range(COUNT):
        row = {"id": f"n{i}"}
        if i % 3 != 1:
            row["text"] = f"a cat, {'and a dog ' * (i % 4)}{i}"
        if i % 3 != 0:
            row["image"] = f"{i}.png"
        lines.append(json.dumps(row))
    for place, fault in zip((3, 17, 18, 43), FAULTS, strict=True):
        lines.insert(place, fault)
    (folder / "items.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def alone(root):
    """What the good rows are, embedded in one call on one device."""
    rows = [json.loads(line) for line in (root / "pairs" / "items.jsonl").read_text().split("\n")
            if line not in FAULTS]  # fmt: skip
    images = [root / "pairs" / row["image"] if "image" in row else None for row in rows]
    model = unime_jax.load(root / "student", dtype="float32")
    return model.embed(texts=[row.get("text") for row in rows], images=images)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Compiles nothing twice, and leaves the compile cache of the tests alone."""
    monkeypatch.setattr(runtime, "start", lambda: None)
    monkeypatch.setattr(embedder, "load_weights", _load)


_loaded, _load_weights = {}, embedder.load_weights


def _load(found, **options):
    key = found.fingerprint, str(options)
    if key not in _loaded:
        _loaded[key] = _load_weights(found, **options)
    return _loaded[key]


def run(root, output, *flags, input=None):
    source = root / "pairs" / "items.jsonl" if input is None else input
    arguments = ["--model", root / "student", "--input", source, "--output", output, *flags]
    embed.main(["embed", *map(str, arguments)])


def distance(actual, expected) -> float:
    return float(np.abs(1 - (actual * expected).sum(axis=1)).max())


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


class Killed(BaseException):
    """What a test raises where a process would be gone."""


def die_after(monkeypatch, groups):
    from unime_jax import embed_job

    add, left = embed_job.Job.add, [groups]

    def counted(self, rows, vectors):
        if not left[0]:
            raise Killed
        left[0] -= 1
        add(self, rows, vectors)

    monkeypatch.setattr(embed_job.Job, "add", counted)


def test_a_killed_job_goes_on(root, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(buckets.Limits, "full", lambda limits, tokens, tiles: limits.devices)
    job, done = tmp_path / "v.npz.job", []
    for groups in (0, 2, 1):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_after(patch, groups)
            run(root, tmp_path / "v.npz", "--instruction", "")
        assert not (tmp_path / "v.npz").exists()
        done.append((job / "done-0.bin").stat().st_size // 8)
    assert done[0] == 0 < done[1] < done[2] < COUNT
    vectors = (job / "vectors.bin").rename(tmp_path / "vectors.bin")
    with pytest.raises(UserError, match="vectors.bin lacks vectors that are counted as done: rem"):
        run(root, tmp_path / "v.npz")
    vectors.rename(job / "vectors.bin")
    # What a torn write leaves.
    for name, torn in (("done-0.bin", b"\1\2"), ("items.jsonl", b'["ab'), ("errors-0.jsonl", b"{")):
        with open(job / name, "ab") as file:
            file.write(torn)
    with pytest.raises(UserError, match="v.npz.job is of other settings .instruction None there"):
        run(root, tmp_path / "v.npz", "--instruction", "Which animal?")
    lines = (root / "pairs" / "items.jsonl").read_text().split("\n")
    other = root / "pairs" / "other.jsonl"
    other.write_text("\n".join([lines[0].replace("cat", "cow"), *lines[1:]]))
    with pytest.raises(UserError, match="row 0 is not what it was when this job began"):
        run(root, tmp_path / "v.npz", input=other)
    other.write_text("\n".join(lines[:5]))
    with pytest.raises(UserError, match=r"the input has fewer rows \(5\) than when this job"):
        run(root, tmp_path / "v.npz", input=other)
    with monkeypatch.context() as patch:  # killed while the job is being removed
        patch.setattr(shutil, "rmtree", lambda path, **_: (path / "vectors.bin").unlink(True))
        run(root, tmp_path / "v.npz")
    found = vector_files.read(tmp_path / "v.npz")
    assert len(found.vectors) == COUNT and distance(found.vectors, alone) < ROW
    assert len(open(tmp_path / "v.npz.errors.jsonl").readlines()) == 4
    assert not job.exists()
    run(root, tmp_path / "v.npz")  # sees that all is there, and sweeps
    assert sorted(x.name for x in tmp_path.iterdir()) == ["v.npz", "v.npz.errors.jsonl"]
    other.write_text("\n".join(lines[:5]))
    with pytest.raises(UserError, match="v.npz was made from other rows"):
        run(root, tmp_path / "v.npz", input=other)
    with pytest.raises(UserError, match="v.npz is of other settings .dim None there, 4 now"):
        run(root, tmp_path / "v.npz", "--dim", 4)


def test_ctrl_c_leaves_what_is_done(root, alone, tmp_path, monkeypatch, capsys):
    from unime_jax import embed_job

    add = embed_job.Job.add

    def interrupt(self, rows, vectors):
        add(self, rows, vectors)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(embed_job.Job, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "v.parquet")
    part = vector_files.read(tmp_path / "v.parquet")
    assert 0 < len(part.vectors) < COUNT and part.about["complete"] is False
    good = [i for i in range(44) if i not in (3, 17, 18, 43)]
    places = [good.index(row) for row in part.rows]
    assert distance(part.vectors, alone[places]) < ROW
    assert "the same command goes on from there" in capsys.readouterr().out
    job = (tmp_path / "v.parquet.job").rename(tmp_path / "away")
    with pytest.raises(UserError, match="v.parquet holds .* of a job that was stopped, and .*gone"):
        run(root, tmp_path / "v.parquet")
    job.rename(tmp_path / "v.parquet.job")
    monkeypatch.setattr(embed_job.Job, "add", add)
    run(root, tmp_path / "v.parquet")
    whole = vector_files.read(tmp_path / "v.parquet")
    assert distance(whole.vectors, alone) < ROW and whole.about["complete"] is True


def test_ctrl_c_while_stdin_has_nothing(root, tmp_path, monkeypatch):
    real = items.select.select

    def interrupt(*files):
        ready = real(*files[:3], 0.01)
        if not ready[0]:
            os.kill(os.getpid(), signal.SIGINT)
        return ready

    monkeypatch.setattr(items.select, "select", interrupt)
    out, into = os.pipe()
    with open(out) as file, open(into, "wb", buffering=0) as pipe, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", file)
        pipe.write(b'{"text": "a"}\n{"text": "b"}\n{"te')
        with pytest.raises(KeyboardInterrupt):
            run(root, tmp_path / "v.npz", input="-")
    found = vector_files.read(tmp_path / "v.npz")
    assert found.texts == ["a", "b"] and found.about["complete"] is False


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
    run(root, tmp_path / "v.npz", input=tmp_path / "none.jsonl")
    assert vector_files.read(tmp_path / "v.npz").vectors.shape == (0, 32)
    (tmp_path / "bad.jsonl").write_text('{"caption": "a"}\n{"caption": "b"}\n')
    with pytest.raises(
        UserError, match="none of the 2 rows could be embedded: .*errors.jsonl says"
    ):
        run(root, tmp_path / "w.npz", input=tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="none of the 2 rows could be embedded"):  # the same again
        run(root, tmp_path / "w.npz", input=tmp_path / "bad.jsonl")
    assert "next: " not in capsys.readouterr().out  # there is nothing to search


def test_outputs_of_others_are_kept(root, tmp_path):
    np.savez(tmp_path / "v.npz", mine=np.zeros(3))
    with pytest.raises(UserError, match="v.npz is there already and not written by this command"):
        run(root, tmp_path / "v.npz")
    with pytest.raises(UserError, match="v.bin: vectors go to a file in"):
        run(root, tmp_path / "v.bin")
    with pytest.raises(UserError, match="--fsdp 3 does not divide the 8 devices"):
        run(root, tmp_path / "w.npz", "--fsdp", 3)


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
def test_kill_9_and_a_broken_pipe(root, alone, tmp_path):
    """The real thing: a process is killed, the next one goes on, and nobody reads what it says."""
    command = [sys.executable, "-m", "unime_jax.embed", "--model", root / "student",
               "--input", "-", "--output", tmp_path / "v.npz"]  # fmt: skip
    content = (root / "pairs" / "items.jsonl").read_bytes()
    env = {**os.environ, "PYTHONPATH": str(miniature.ROOT), "JAX_PLATFORMS": "cpu"}
    (root / "pairs" / "run").mkdir(exist_ok=True)
    job = tmp_path / "v.npz.job" / "done-0.bin"
    options = {"env": env, "cwd": root / "pairs", "stdin": subprocess.PIPE}
    with subprocess.Popen(list(map(str, command)), **options) as process:
        process.stdin.write(content)
        process.stdin.close()
        while process.poll() is None and not (job.exists() and job.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    text = " ".join(map(str, command))
    pipe = f"set -o pipefail; cat items.jsonl | {text} 2>&1 | true"
    subprocess.run(["bash", "-c", pipe], env=env, cwd=root / "pairs", check=True)
    found = vector_files.read(tmp_path / "v.npz")
    assert len(found.vectors) == COUNT and distance(found.vectors, alone) < ROW


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


def test_another_image_root_tries_again_what_was_outside(root, tmp_path, monkeypatch):
    """Of a job that was stopped; where it is done, it is said."""
    (tmp_path / "in").mkdir()
    rows = [{"text": "a"}, {"image": str(root / "pairs" / "0.png")}, {"image": "gone.png"}]
    (tmp_path / "in" / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {"input": tmp_path / "in" / "x.jsonl"}
    job = tmp_path / "v.npz.job"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(embed_job.Job, "write", _die)
        run(root, tmp_path / "v.npz", **flags)
    assert len((job / "errors-0.jsonl").read_text().splitlines()) == 2
    shutil.copytree(job, tmp_path / "w.npz.job")
    run(root, tmp_path / "w.npz", "--image-root", root, **flags)
    assert vector_files.read(tmp_path / "w.npz").rows.tolist() == [0, 1]
    (error,) = map(json.loads, open(tmp_path / "w.npz.errors.jsonl"))
    assert error["row"] == 2
    run(root, tmp_path / "w.npz", **flags)  # nothing is outside any more
    run(root, tmp_path / "v.npz", **flags)
    assert vector_files.read(tmp_path / "v.npz").rows.tolist() == [0]
    run(root, tmp_path / "v.npz", **flags)
    with pytest.raises(UserError, match="v.npz lacks 1 rows whose .*.--image-root '' there, '/"):
        run(root, tmp_path / "v.npz", "--image-root", root, **flags)


def _die(*args, **kwargs):
    raise Killed


def test_what_is_left_in_a_buffer_hides_no_error_before(tmp_path):
    """A full disk refuses it again when the file is closed."""
    job_of = functools.partial(
        embed_job.open_job, tmp_path / "v.npz", {}, width=2, dtype=np.dtype("f4"), process=0
    )
    for error in (ValueError, OSError):  # the work's own, and that of the files themselves
        with pytest.raises(error) as raised, job_of() as job:
            job._faults = open("/dev/full", "w")  # noqa: SIM115
            job._faults.write("x")
            if error is ValueError:
                raise ValueError
        with pytest.raises(OSError, match="Bad file"):  # the last of them was closed as well
            os.close(job._vectors)
    assert raised.value.filename == str(tmp_path / "v.npz.job")


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    how = {"width": 2, "dtype": np.dtype("f4"), "process": 0}
    with embed_job.open_job(tmp_path / "v.npz", {}, **how) as job:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError) as error:
            job.add([0], np.ones((1, 2), np.float32))
        assert error.value.filename == str(tmp_path / "v.npz.job")
        monkeypatch.setattr(vector_files, "write", full)
        with pytest.raises(OSError) as error:
            job.write(complete=True)
        assert error.value.filename == str(tmp_path / "v.npz")
