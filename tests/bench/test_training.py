"""How the speed test shares a GPU between two sides, and what it says of a side that fails."""

import argparse
import pathlib
import sys
import types

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import bench  # noqa: E402
import measure  # noqa: E402
import process_memory  # noqa: E402
import training  # noqa: E402
import workers  # noqa: E402

CASE = {"stage": "contrast", "forward": False, "torch": True, "rows": 8, "title": "t", "unit": "u"}
WAYS = (*bench.CHECKPOINTS, *bench.PLAIN)


def new_bench(device="gpu", *, tiny=False) -> bench.Bench:
    args = argparse.Namespace(repeats=2, tiny=tiny, quick=False, device=device, compile_limit=None)
    return bench.Bench(args, pathlib.Path("unused"))


class Card:
    """A card of 80 GiB and the workers that would run there; `bench.side` starts them."""

    def __init__(self, monkeypatch, device, **held):
        self.bench, self.held, self.running, self.log = new_bench(device), held, [], []
        self.first, self.fails = {}, {}  # what a first step says; the step that is a side's last
        monkeypatch.setattr(self.bench, "side", self.side)
        monkeypatch.setattr(self.bench, "end_workers", self.running.clear)

    def side(self, name, variant="", limit=None):
        who = variant or "ours"
        self.running.append(who)
        self.log.append((*self.running, round(self.bench.share, 2)))
        if sum(map(self.held.get, self.running)) > 80:
            self.running.remove(who)
            raise workers.WorkerError("torch.OutOfMemoryError: CUDA out of memory. Tried\nto")
        first = self.first.get(who, {"loss": 1.0, "gradient_norm": 1.0})
        ready = {"first": first, "first_seconds": 1.0, "start_gib": 2.0, "known": ""}
        memory = {f"{key}_gib": self.held[who] for key in ("peak", "reserved")} | {"card_gib": 80.0}

        taken = 0

        def step():
            nonlocal taken
            taken += 1
            if taken == self.fails.get(who):
                self.running.remove(who)
                raise workers.WorkerError("CUDA error: an\nillegal access")
            return {"seconds": self.held[who] / 10, **first}

        def end():
            self.running.remove(who)
            return memory

        def trace():
            self.log.append((*self.running, "traced"))
            raise workers.WorkerError("CUPTI\nended by signal 11")

        return types.SimpleNamespace(
            ready=ready, step=step, memory=lambda: memory, close=end, kill=end, trace=trace
        )  # fmt: skip


def test_each_way_of_pytorch_has_the_card_for_itself(monkeypatch):
    card = Card(monkeypatch, "gpu", checkpoint=60, checkpoint_compile=50, compile=90, eager=85)
    ways = training._ways("x", CASE | {"stage": "distill"}, card.bench)
    assert (ways.best, card.running) == ("checkpoint_compile", [])
    assert {len(running) for *running, _ in card.log} == {1} and len(card.log) == 4
    assert ways.left_out == {"eager": "out of memory", "compile": "out of memory"}
    result = measure.Result("a", "step", "pairs/s", {"ours": [1.0], "torch": [1.0]}, ways.notes)
    said = "without PyTorch's eager: out of memory; without PyTorch's compile: out of memory"
    heading, _, line, plain = measure.table([result, measure.Result("b", "b", "s", {})]).split("\n")
    assert said in line and "left out" in heading and len(plain) == len(line)
    assert "left out" not in measure.table([measure.Result("b", "b", "s", {})])


def test_pytorch_without_memory_is_left_out_and_else_has_failed(monkeypatch):
    card = Card(monkeypatch, "gpu", checkpoint=90, checkpoint_compile=90, eager=99, compile=99)
    ways = training._ways("x", CASE, card.bench)
    assert not ways.best and not ways.failed
    assert set(ways.left_out) == {*bench.CHECKPOINTS, *bench.PLAIN}

    def side(*_, **__):
        raise workers.WorkerError("No module named peft")

    monkeypatch.setattr(card.bench, "side", side)
    ways = training._ways("x", CASE, card.bench)
    assert ways.notes[measure.FAILED] == "no way of PyTorch runs"
    assert {*ways.left_out.values()} == {"No module named peft"}


@pytest.mark.parametrize(
    ("device", "ours", "torch", "log"),
    [
        ("gpu", 30, 40, [("ours", 0.44), ("ours", "eager", 0.44), ("ours", "traced")]),
        ("gpu", 40, 40, [("ours", 0.92), ("ours", "traced"), ("eager", 0.92)]),
        ("cpu", 40, 40, [("ours", 0.92), ("ours", "eager", 0.92)]),
    ],
)
def test_both_sides_share_a_card_by_what_they_held_alone(monkeypatch, device, ours, torch, log):
    card = Card(monkeypatch, device, ours=ours, eager=torch)
    ways = training.Ways("eager", {"eager": {"reserved_gib": torch, "card_gib": 80.0}})
    timed = training._timed("x", {"peak_gib": ours}, ways, card.bench)
    assert card.log == log and card.running == []
    assert {side: len(steps) for side, steps in timed.found.items()} == {"ours": 2, "torch": 2}
    assert timed.said["torch"]["peak_gib"] == torch
    if device == "gpu":  # what the profiler's end took with it was said before
        assert timed.notes["not traced"] == "ended by signal 11"
        assert timed.notes["memory of the card"]["held alone"] == {"ours": ours, "torch": torch}


def test_ours_alone_is_a_row_of_its_own(monkeypatch):
    card = Card(monkeypatch, "gpu", ours=30)
    speed, memory = training._alone("x", CASE, training.Ways(), card.bench)
    assert speed.samples == {"ours": [8 / 3.0] * 2} and memory.samples == {"ours": [30]}
    assert speed.notes == {
        "seconds a step": 3.0, "first call, s": 1.0, "not traced": "ended by signal 11"
    }  # fmt: skip


def timed(monkeypatch, card, dtype="bfloat16", **first) -> tuple[list[measure.Result], float]:
    """Times a case; `first`: loss of a side's first step."""
    settings = {"case": CASE, "model": {"dtype": dtype}}
    monkeypatch.setattr(card.bench, "prepare", lambda *_: None)
    monkeypatch.setattr(workers, "read_json", lambda path: settings)
    card.first = {who: {"loss": loss, "gradient_norm": 1.0} for who, loss in first.items()}
    return training.training("x", card.bench)


def test_ours_is_timed_where_the_sides_differ(monkeypatch):
    card = Card(monkeypatch, "gpu", ours=30, **dict.fromkeys(WAYS, 40))
    speed, memory = timed(monkeypatch, card, ours=1.05)
    assert speed.samples == {"ours": [8 / 3.0] * 2} and memory.samples == {"ours": [30]}
    assert speed.title == "t: FAILED"
    assert speed.notes[measure.FAILED] == "the sides differ by 5.0e-02, more than 2e-02"
    assert measure.FAILED not in timed(monkeypatch, card, ours=1.01)[0].notes
    (speed, _), said = timed(monkeypatch, card, ours=1.01, dtype="float32"), "more than 1e-04"
    assert said in speed.remark and "torch" not in speed.samples
    (speed, _) = timed(monkeypatch, card, ours=np.nan)
    assert "differ by nan" in speed.remark and speed.samples["ours"]


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_ours_is_kept_where_pytorch_fails_after_it_began(monkeypatch, device):
    """On a GPU after ours has acted already; on CPU while both take turns."""
    held = {"gpu": 50, "cpu": 30}[device]
    card = Card(monkeypatch, device, ours=held, **dict.fromkeys(WAYS, 40))
    card.fails = {way: 2 for way in WAYS}  # the step that each process does not survive
    speed, memory = timed(monkeypatch, card)
    assert speed.samples == {"ours": [80 / held] * 2} and memory.samples == {"ours": [held]}
    said = {"gpu": "PyTorch, checkpoint: illegal access", "cpu": "while both took turns: illegal"}
    assert speed.title == "t: FAILED" and speed.notes[measure.FAILED].startswith(said[device])
    assert card.running == []


def test_ours_tells_each_figure_as_it_comes(monkeypatch, capsys):
    """A run that is cut short has said them."""
    card = Card(monkeypatch, "gpu", ours=30)
    card.fails = {"ours": 2}
    with pytest.raises(workers.WorkerError):
        training._alone("x", CASE, training.Ways(), card.bench)
    assert capsys.readouterr().out.split("\n")[:2] == [
        "  ours: first call 1 s, peak 30 GiB", "  ours: 3 s a step"
    ]  # fmt: skip


def test_rows_at_a_time_of_both_sides_are_noted_where_rows_are_embedded():
    said = {"ours": {"at_once": {"64": 8}}, "torch": {"at_once": {"64": 16}}}
    timed = training.Timed({"ours": [{"seconds": 2.0}]}, said)
    found = {"ours": {"64": 8}, "torch": {"64": 16}}
    assert training._notes(timed) == {"rows at a time, by positions": found}
    del said["ours"]["at_once"]
    assert training._notes(timed) == {}


def test_long_steps_are_not_traced(monkeypatch):
    card = Card(monkeypatch, "gpu", ours=30)
    monkeypatch.setattr(training, "TRACED", 2.0)
    timed = training._steps("x", (("ours",),), "", card.bench)
    assert "more than 2 s" in timed.notes["not traced"] and card.log == [("ours", 0.92)]


def test_sides_that_do_not_fit_after_all_act_one_after_the_other(monkeypatch):
    card = Card(monkeypatch, "gpu", ours=50, eager=40)
    ways = training.Ways("eager", {"eager": {"reserved_gib": 40.0, "card_gib": 80.0}})
    timed = training._timed("x", {"peak_gib": 10.0}, ways, card.bench)
    assert [entry for entry in card.log if len(entry) == 3] == [("ours", "eager", 0.44)]
    assert "alone" in timed.notes["memory of the card"]["turns"] and len(timed.found["torch"]) == 2


def test_starts_are_told_by_what_was_compiled():
    step, small = {"step": 90}, {"small": 9}
    assert bench.known({}, {}) == ""
    assert bench.known({}, step) == ", nothing compiled"
    assert bench.known(step, step) == bench.known(step, step | small) == bench.COMPILED
    assert bench.known(small, step | small) == ", partly compiled before"  # it was cut short
    assert bench.known(step, step | {"changed": 90}) == ", partly compiled before"

    def said(number, known):
        return {"first_seconds": number, "peak_gib": number, "start_gib": None, "known": known}

    ways = training.Ways("compile", {"eager": said(1, ""), "compile": said(2, ", x")})
    ours, torch = said(3, bench.COMPILED), said(4, bench.COMPILED)
    found = training._starts(said(5, ", nothing compiled"), {"ours": ours, "torch": torch}, ways)
    assert found["peak GiB"] == {
        "ours, nothing compiled": 5, "ours, compiled before": 3,
        "eager": 1, "compile, x": 2, "compile, compiled before": 4,
    }  # fmt: skip


def test_a_gpu_is_demanded_where_one_is_timed():
    """JAX goes on with the CPU where it finds none, and steps models of full size there."""
    assert new_bench("gpu").platform["JAX_PLATFORMS"] == "cuda"
    assert new_bench("gpu", tiny=True).platform["JAX_PLATFORMS"] == "cpu"


def test_two_threads_are_the_rule_on_cpu_alone():
    assert new_bench("cpu").platform["OMP_NUM_THREADS"] == "2"
    assert new_bench("cpu").platform["JAX_PLATFORMS"] == "cpu"
    assert new_bench(tiny=True).platform["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    assert not {*workers.TWO_THREADS} & {*new_bench().platform}
    assert not {*workers.TWO_THREADS} & ({*workers.environment({})} - {*workers.os.environ})


CHILD = """
import os, signal, subprocess, sys, time
sys.path.insert(0, {here!r})
import workers

held = None

def setup():
    global held
    code = "x = b'1' * (200 << 20); print(flush=True); import sys; sys.stdin.read()"
    pipes = {{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}}
    held = subprocess.Popen([sys.executable, "-SEc", code], **pipes)
    held.stdout.readline()
    return {{}}, act

def act():
    {act}

workers.serve(setup)
"""


@pytest.fixture
def child(tmp_path):
    def start(act: str) -> workers.Worker:
        path = tmp_path / "child.py"
        path.write_text(CHILD.format(here=str(HERE), act=act))
        return workers.Worker(str(path))

    return start


def test_a_childs_own_children_count_until_it_is_ready(child):
    worker = child("return {'peak': 1}")
    assert 0.2 < worker.ready["start_gib"] < 0.5
    assert worker.memory()["peak_gib"] < 0.1  # its own
    assert worker.step()["peak"] == 1 and worker.close()["peak_gib"] > 0
    text = "5-7 ---p 0 [rollup]\nPss: 9 kB\nShared_Clean: 3 kB\nShared_Dirty: 1 kB\n"
    text += "Private_Clean: 4 kB\nPrivate_Dirty: 2 kB\nShared_Hugetlb: 8 kB"
    assert process_memory._rollup(text) == (6 << 10, 4 << 10)
    worker.kill()  # what has ended may be ended again
    assert process_memory.tree(2**22 + 1) is None  # no such process


def test_a_child_that_is_killed_or_hangs_is_an_error_with_a_reason(child, monkeypatch):
    worker = child("print('so far', file=sys.stderr); os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(workers.WorkerError, match="so far\n*ended by signal 9"):
        worker.step()
    with pytest.raises(workers.WorkerError, match="signal 9"):  # nobody reads what is asked
        worker.step()
    worker.kill()
    worker = child("time.sleep(60)")
    monkeypatch.setattr(workers, "TRACE_LIMIT", 0.2)
    with pytest.raises(workers.WorkerError, match="no answer within 0 s"):
        worker.trace()
