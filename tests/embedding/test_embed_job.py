"""Embedding that is killed, stopped, refused and started again."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import miniature
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_run import COUNT, ROW, distance, run

from unime_jax import embed_job, embedder
from unime_jax.data import buckets, items, vector_files
from unime_jax.types import UserError


class Killed(BaseException):
    """What a test raises where a process would be gone."""


def die_after(monkeypatch, groups):
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


def test_outputs_of_others_are_kept(root, tmp_path):
    np.savez(tmp_path / "v.npz", mine=np.zeros(3))
    with pytest.raises(UserError, match="v.npz is there already and not written by this command"):
        run(root, tmp_path / "v.npz")
    with pytest.raises(UserError, match="v.bin: a file of vectors ends in .npz"):
        run(root, tmp_path / "v.bin")
    with pytest.raises(UserError, match="--fsdp 3 does not divide the 8 devices"):
        run(root, tmp_path / "w.npz", "--fsdp", 3)


def test_faults_of_an_input_are_told_before_the_model_is_loaded(root, tmp_path, monkeypatch):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "other.parquet").read_bytes()[:-9])
    (tmp_path / "pictures").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(embedder, "load_weights", None)
        for name, said in (
            ("other.parquet", "neither a column"),
            ("cut.parquet", "cannot be read as Parquet"),
            ("pictures", "no pictures in this folder"),
        ):
            with pytest.raises(UserError, match=said):
                run(root, tmp_path / "v.npz", input=tmp_path / name)
    pq.write_table(pa.table({"text": ["a" * 50] * 9}), tmp_path / "t.parquet", compression="none")
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    content[4:40] = bytes(36)  # within its first page
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(UserError, match="damaged after row 0"):
        run(root, tmp_path / "v.npz", input=tmp_path / "t.parquet")
    assert not list(tmp_path.glob("v.npz*")), "nothing to go on from"


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


def test_another_image_root_tries_again_what_was_outside(root, tmp_path, monkeypatch):
    """Of a job that was stopped; where it is done, it is said."""
    (tmp_path / "in").mkdir()
    rows = [{"text": "a"}, *({"image": str(root / "pairs" / name)} for name in ("0.png", "gone"))]
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
    with pytest.raises(UserError, match="v.npz lacks 2 rows whose .*.--image-root '' there, '/"):
        run(root, tmp_path / "v.npz", "--image-root", root, **flags)


def test_rows_that_were_bad_are_tried_again_when_a_job_goes_on(root, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    rows = [{"text": "a"}, {"image": "late.png"}, {"image": "broken.png"}, {"image": "gone.png"}]
    (tmp_path / "in" / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "in" / "broken.png").write_bytes(b"broken")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(embed_job.Job, "write", _die)
        run(root, tmp_path / "v.npz", input=tmp_path / "in" / "x.jsonl")
    job = tmp_path / "v.npz.job"
    (job / "errors-0.jsonl").rename(job / "errors-1.jsonl")  # as of two processes
    (job / "errors-old.jsonl").write_text("[]")  # whoever put it there
    for name in ("late.png", "broken.png"):
        shutil.copy(root / "pairs" / "0.png", tmp_path / "in" / name)
    run(root, tmp_path / "v.npz", input=tmp_path / "in" / "x.jsonl")
    found = vector_files.read(tmp_path / "v.npz")
    assert found.rows.tolist() == [0, 1, 2] and found.about["bad_rows"] == 1
    (error,) = map(json.loads, open(tmp_path / "v.npz.errors.jsonl"))
    assert error["row"] == 3
    capsys.readouterr()
    run(root, tmp_path / "v.npz", input=tmp_path / "in" / "x.jsonl")
    assert f"bad rows: 1, see {tmp_path}/v.npz.errors.jsonl (remove" in capsys.readouterr().out


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


def test_what_processes_that_are_no_more_left_out_is_forgotten(tmp_path):
    """Their rows are tried again, by others."""
    how = {"width": 2, "dtype": np.dtype("f4")}
    for process in (1, 3):
        with embed_job.open_job(tmp_path / "v.npz", {}, process=process, processes=4, **how) as job:
            job.fail(process, "x", "no such file")
    with embed_job.open_job(tmp_path / "v.npz", {}, process=0, processes=2, **how) as job:
        job.fail(0, "é", "…")
        assert job.write(complete=False)["bad_rows"] == 2
    lines = map(json.loads, open(tmp_path / "v.npz.errors.jsonl", encoding="utf-8"))
    assert [line["row"] for line in lines] == [0, 1]


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
