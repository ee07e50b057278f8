"""The speed test itself: its statistics, its table, its files, and that both sides still run."""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import bench  # noqa: E402
import gpu_cases  # noqa: E402
import kernels  # noqa: E402
import measure  # noqa: E402
import rows  # noqa: E402
import run  # noqa: E402
import workers  # noqa: E402

SPEED = measure.Result(
    "a", "steps", "pairs/s", {"ours": [10.0, 12.0, 11.0], "torch": [5.0, 4.0, 11.0]}
)
TIME = measure.Result("b", "load", "s", {"ours": [2.0, 4.0], "torch": [8.0, 4.0]}, {"imports": 1.5})
ALONE = measure.Result("c", "start", "s", {"ours": [0.0123]})


def test_ratios_say_how_many_times_better_ours_is():
    # Medians 11 and 5; round by round 2, 3 and 1.
    assert SPEED.ratio() == pytest.approx((2.2, 1.0, 3.0))
    assert TIME.ratio() == pytest.approx((2.0, 1.0, 4.0))  # of seconds fewer are better
    assert ALONE.ratio() is None


def test_the_table_has_medians_quartiles_and_extremes():
    lines = measure.table([SPEED, TIME, ALONE]).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 5
    cells = [text.strip() for text in lines[2].strip("|").split("|")]
    assert cells == [
        "steps", "pairs/s", "11.0 (10.5 to 11.5)", "5.00 (4.50 to 8.00)",
        "x 2.20 (1.00 to 3.00)",
    ]  # fmt: skip
    assert "0.0123 (0.0123 to 0.0123)" in lines[4] and "| -" in lines[4]
    assert measure.notes([SPEED, TIME]) == "b: imports 1.5"


def test_groups_of_one_shape_are_put_together_whatever_their_side():
    def group(first, count, tokens, tiles=0):
        ids = np.arange(first, first + count)[:, None] + np.zeros((1, tokens), int)
        return rows.Group(ids, ids[:, 0], ids, np.zeros((count, tiles, 4, 4, 3)))

    sides = {
        "query": [group(0, 2, 8), group(2, 3, 8, 1)],
        "target": [group(5, 1, 12), group(6, 4, 8)],
    }
    merged = rows.Rows(sides, {}).merged()
    assert [(one.lengths.tolist(), parts) for one, parts in merged] == [
        ([0, 1, 6, 7, 8, 9], [("query", 0, 2), ("target", 1, 4)]),
        ([2, 3, 4], [("query", 1, 3)]),
        ([5], [("target", 0, 1)]),
    ]


def test_files_hold_every_sample_and_the_machine(tmp_path):
    where = measure.machine()
    measure.write_json(tmp_path / "results.json", where, [SPEED, ALONE])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["results"][0]["samples"] == SPEED.samples
    assert found["machine"]["packages"]["jax"] and found["machine"]["cores"]
    measure.plot(tmp_path / "results.png", [SPEED, TIME, ALONE], where)
    assert (tmp_path / "results.png").stat().st_size > 5000


def test_what_was_left_out_is_drawn_and_an_old_plot_goes(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    said = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **_: said.append(text))
    left = {measure.LEFT_OUT: {"compile": "out of memory"}}
    alone = dataclasses.replace(ALONE, notes=left)
    run.write(tmp_path, [dataclasses.replace(SPEED, notes=left), alone], measure.machine())
    assert said[0] == "without PyTorch's compile: out of memory" and said[1].endswith(
        f"pairs/s\n{said[0]}"
    )
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
    run.write(tmp_path, [ALONE], measure.machine())
    assert not (tmp_path / "results.png").exists()


def test_shares_of_a_traced_step_are_of_its_whole_time():
    """Two streams at once, and a pause."""
    step = [
        ("gemm_fusion_dot_19", 0, 60),
        ("loop_multiply_fusion", 60, 70),
        ("cudnn::fmha_fprop_sm90", 70, 80),
        ("MemcpyH2D", 70, 75),
        ("nvjet_hsh_128x256", 90, 100),
    ]
    found = kernels.shares(reversed(step))
    assert found == pytest.approx(
        {"products": 0.7, "elementwise": 0.1, "attention": 0.1, "to and from the host": 0.05,
         "idle": 0.1}
    )  # fmt: skip
    names = ["loop_dynamic_update_slice_fusion", "input_reduce_fusion", "ncclDevKernel_AllGather",
             "wrapped_transpose", "loop_pad_fusion_3"]  # fmt: skip
    kinds = ["copies", "sums", "collectives", "copies", "copies"]
    assert list(map(kernels.kind, names)) == kinds
    assert kernels.largest(step, 1) == pytest.approx({"loop_multiply_fusion": 10 / 95})
    assert kernels.shares([]) == {}


def test_rows_come_back_from_their_file(tmp_path):
    image = rows.Group(*(np.full((2, 3), i) for i in range(4)), picture=(56, 84))
    text = rows.Group(*(np.full((1, 2), i) for i in range(4)))
    batch = rows.Rows(
        {"query": [image, text], "target": [text]},
        {"query": np.arange(3), "target": np.arange(1)},
        vectors=np.ones((4, 2)),
    )
    rows.save(tmp_path / "rows.npz", batch)
    found = rows.load(tmp_path / "rows.npz")
    assert [len(found.sides[side]) for side in ("query", "target")] == [2, 1]
    assert found.sides["query"][0].picture == (56, 84) and found.sides["query"][1].picture is None
    np.testing.assert_array_equal(found.sides["query"][0].tiles, image.tiles)
    assert (found.count, found.tokens, found.target_ids) == (3, 10, None)
    assert found.vectors.shape == (4, 2)


def test_a_side_that_fails_says_why(tmp_path):
    with pytest.raises(workers.WorkerError, match="case.json"):
        workers.Worker("torch_side.py", str(tmp_path), "eager")


@pytest.mark.slow
def test_both_sides_run_and_compute_the_same(tmp_path):
    pytest.importorskip("peft")
    parts = ("tiny", "pipeline", "load", "save", "startup")
    done = subprocess.run(
        [sys.executable, str(HERE / "run.py"), "--tiny", "--quick", "--output", str(tmp_path)]
        + ["--only", *parts],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [one["name"].partition("_")[0] for one in results if "memory" not in one["name"]] == [
        *parts
    ]
    assert results[0]["notes"]["first step differs by"] < 1e-4
    *compared, startup = results
    assert all(one["samples"]["torch"] for one in compared)
    assert startup["samples"]["ours"] and startup["notes"]["the middle run"]["counting operations"]
    assert (tmp_path / "results.png").is_file()


def test_pytorch_may_take_plain_steps_where_they_may_fit():
    def variants(device, *, forward=False, quick=False):
        args = argparse.Namespace(
            repeats=1, tiny=True, quick=quick, device=device, compile_limit=None
        )
        return bench.Bench(args, pathlib.Path("unused")).variants({"forward": forward})

    assert variants("cpu") == variants("gpu", forward=True) == ("eager", "compile")
    assert variants("gpu") == ("checkpoint", "checkpoint_compile", "eager", "compile")
    assert variants("gpu", quick=True) == ("checkpoint", "eager")
    assert variants("cpu", quick=True) == variants("gpu", quick=True, forward=True) == ("eager",)


def test_a_part_that_failed_in_part_keeps_its_figures_and_ends_in_an_error(monkeypatch, capsys):
    found = [measure.Result("a", "a: FAILED", "s", {"ours": [1.0]}, {measure.FAILED: "differ"})]
    monkeypatch.setattr(run, "training", lambda name, bench: found)
    ended = argparse.Namespace(end_workers=lambda: None)
    assert run.run_part("a", ended) == (found, False) and "differ" in capsys.readouterr().out
    found[0].notes.clear()
    assert run.run_part("a", ended) == (found, True)


def test_a_gpu_case_has_settings_of_its_own_and_says_which(monkeypatch):
    monkeypatch.setattr(gpu_cases, "card_memory", lambda: 85.0)
    case = gpu_cases.case("gpu_llava_stage1")
    assert (case.settings["train.chunk"], case.settings["model.remat"]) == (128, "dots")
    assert case.title == "llava16_stage1, 768 sentences, chunks of 128, remat dots"
    assert case.one_pass and not gpu_cases.case("gpu_llava_pairs").one_pass
    assert "chunks" not in gpu_cases.case("gpu_llava_embed").title
    monkeypatch.setattr(gpu_cases, "card_memory", lambda: 150.0)
    assert "chunks of 192" in gpu_cases.case("gpu_llava_stage1").title


def test_a_profiler_that_fails_loses_no_figures(monkeypatch):
    def fail(act):
        raise RuntimeError("no profiler\nhere")

    monkeypatch.setattr(workers.kernels, "trace", fail)
    assert workers._traced(dict) == {"not traced": "RuntimeError: here"}
