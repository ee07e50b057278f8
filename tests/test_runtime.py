"""Exit codes and signals."""

import errno
import io
import itertools
import os
import signal
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from unime_jax import gpu_flags, runtime
from unime_jax.types import UserError


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, message",
    [
        (UserError("rows.jsonl line 3: no text"), 2, "error: rows.jsonl line 3: no text\n"),
        (OSError(errno.ENOSPC, "", "a.npy"), 2, "error: no space left on the disk (a.npy)"),
        (
            PermissionError(errno.EACCES, "denied", "out"),
            2,
            "error: no permission (out): denied",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/v.npz"),
            2,
            "error: file/v.npz: Not a directory; give another path\n",
        ),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory of 9 bytes\nat x"),
            2,
            "error: the devices' memory does not suffice (RESOURCE_EXHAUSTED: Out of memory of 9 b",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(error, code, message, capsys):
    with pytest.raises(SystemExit) as caught:
        runtime.run_entry(raising(error), ["x"])
    assert caught.value.code == code
    assert capsys.readouterr().err.startswith(message)


def test_a_place_for_results_is_looked_for_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    runtime.check_output(tmp_path / "new" / "below", "--output")
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match="^--output=.*/file is no directory; give another"):
            runtime.check_output(tmp_path / place, "--output")
    assert not (tmp_path / "new").exists()


def test_output_that_nobody_reads_any_more():
    """As after `| head -1`: an end without a traceback."""
    program = "from unime_jax import runtime; runtime.run_entry(lambda argv: print('x' * 9**6))"
    for code in (program, program.replace("9**6", "9")):  # printed at once, and at the end
        out, into = os.pipe()
        os.close(out)
        found = subprocess.run([sys.executable, "-c", code], stdout=into, stderr=subprocess.PIPE)
        os.close(into)
        assert (found.returncode, found.stderr) == (141, b"")


def test_our_own_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        runtime.run_entry(raising(ZeroDivisionError()), ["x"])


def test_first_signal_asks_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with runtime.StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("wanted, code", [(None, 0), ("85", 85)])
def test_a_stop_by_sigterm_is_no_failure_unless_told_so(wanted, code, monkeypatch):
    if wanted:
        monkeypatch.setenv(runtime.STOP_VARIABLE, wanted)
    with runtime.StopRequest() as stop:
        assert not stop.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reached(2)
    with pytest.raises(SystemExit) as caught:
        stop.leave()
    assert caught.value.code == code
    stop.signal = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        stop.leave()


def test_an_entry_may_start_where_jax_is_at_work_already(monkeypatch):
    jax.devices()
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # the cache of the tests stays
    before = signal.getsignal(signal.SIGTERM)
    runtime.start()
    assert runtime.is_main() and signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(UserError, match="not found.*before"):
        runtime.start()


def test_errors_of_one_of_several_processes_name_it(monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(runtime, "_PLACE", (1, 4))
    monkeypatch.setattr(os, "_exit", ended.append)
    runtime.run_entry(raising(UserError("no space")), ["x"])
    runtime.run_entry(raising(ZeroDivisionError()), ["x"])
    said = capfd.readouterr().err
    assert said.startswith("error (process 1 of 4): no space\n") and "ZeroDivisionError" in said
    assert ended == [2, 1]


TALK = """
import os, sys, time
import jax
from unime_jax import runtime

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
runtime._PLACE, runtime._WAIT_MS = (jax.process_index(), 2), 20_000
store = runtime._messages()

class Slow:  # to remove what was said
    def __getattr__(self, name):
        return getattr(store, name)

    def key_value_delete(self, key):
        time.sleep(0.05)
        store.key_value_delete(key)

runtime._messages = Slow
for number in range(500):
    assert runtime.exchange(f"{number} {sys.argv[2]}") == [f"{number} 0", f"{number} 1"]
    if number % 150 == 7:
        runtime.barrier()
left = store.key_value_dir_get(runtime._SAID)
assert len(left) < 200, len(left)
runtime.barrier()
os._exit(0)
"""


def start_two(program, *arguments):
    place = f"127.0.0.1:{processes.free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, place, str(number), *arguments], cwd=processes.ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip


def test_no_message_is_lost_where_old_ones_are_removed():
    processes.finish(start_two(TALK), seconds=120)


FAIL = """
import sys, time, types
import jax
from unime_jax import loop, runtime
from unime_jax.types import UserError

def main(argv):
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    runtime._PLACE = (jax.process_index(), 2)
    run = loop.Loop.__new__(loop.Loop)

    def close():
        time.sleep(3 * jax.process_index())
        print("saved", flush=True)

    run._saves = types.SimpleNamespace(close=close)
    run._close_all()
    raise UserError("all rows are bad")

runtime.run_entry(main)
"""


@pytest.mark.slow
def test_an_error_that_all_raise_waits_for_the_save_of_each():
    """The end of the first process ends the others, whatever they are at."""
    said = processes.finish(start_two(FAIL), [2, 2], seconds=120)
    for number, text in enumerate(said):
        assert "saved" in text and f"(process {number} of 2): all rows are bad" in text, said


def test_what_process_0_meets_all_raise(monkeypatch):
    said = {}
    store = type("Store", (), {})()
    store.key_value_set = said.__setitem__
    store.blocking_key_value_get = lambda key, wait: said[key]
    monkeypatch.setattr(runtime, "_messages", lambda: store)

    def work():
        raise UserError("rows.jsonl: gone")

    for place in (0, 1):
        monkeypatch.setattr(runtime, "_PLACE", (place, 2))
        monkeypatch.setattr(runtime, "_CALLS", itertools.count())
        with pytest.raises(UserError, match="rows.jsonl: gone"):
            runtime.by_main(work if place == 0 else pytest.fail)


def test_what_process_0_does_alone_talks_to_nobody():
    """The others would take what it says there for what it says next; one process is told too."""
    for talk in (
        lambda: runtime.from_main(""),
        lambda: runtime.exchange("")[0],
        lambda: runtime.by_main(str),
        runtime.barrier,
    ):
        with pytest.raises(RuntimeError, match="what process 0 does alone talks to the others"):
            runtime.by_main(talk)
    assert runtime.by_main(lambda: "all is as before") == runtime.from_main("all is as before")


def test_devices_that_jax_has_no_plugin_for_are_one_line(monkeypatch):
    """JAX says so by an assertion without words."""

    def fail():
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(UserError, match="^JAX_PLATFORMS=cuda: no such devices here .JAX has no pl"):
        runtime.start()


def test_gpu_programs_overlap_what_xla_knows_to_overlap(monkeypatch):
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidiactl")
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
    monkeypatch.setattr(gpu_flags, "_FLAGS", (*gpu_flags._FLAGS, "xla_gpu_no_such_flag"))
    gpu_flags.add()
    mine, *added = os.environ["XLA_FLAGS"].split()
    assert mine == "--xla_gpu_enable_latency_hiding_scheduler=false"
    assert added == [f"--{flag}=true" for flag in gpu_flags._FLAGS[1:-1]]


def test_cpu_programs_do_not_hold_all_layers_in_f32():
    weights = jax.ShapeDtypeStruct((32, 256, 256), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)

    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jax.nn.silu(x @ w), None), x, weights)[0]

    options = runtime.compiler_options("cpu")
    compiled = jax.jit(run, compiler_options=options).lower(x, weights).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 256 * 256 * 4
    assert runtime.compiler_options("gpu") is None


def test_an_entry_keeps_warnings_of_large_pictures_from_the_screen(capsys):
    def main(argv):
        warnings.warn(
            "Image size (99) exceeds limit of 9, could be decompression bomb", stacklevel=1
        )
        warnings.warn("others are shown", stacklevel=1)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        runtime.run_entry(main, ["x"])
    assert [str(warning.message) for warning in shown] == ["others are shown"]


def test_tables_are_printed_where_the_screen_has_few_letters(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    runtime.run_entry(lambda argv: print("a \u2026 b"), ["x"])
    assert screen.buffer.getvalue() == b"a ? b\n"


def test_what_a_failed_save_tells_a_closed_loop_is_not_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
    late = types.SimpleNamespace(object=None, exc_value=RuntimeError("Event loop is closed"))
    ours = types.SimpleNamespace(object=print, exc_value=RuntimeError("Event loop is closed"))
    other = types.SimpleNamespace(object=None, exc_value=RuntimeError("other"))
    for found in (late, ours, other):
        runtime._without_late_news(found)
    assert shown == [ours, other]


def test_adapters_are_added_to_their_weights_on_one_cpu_device_alone():
    def resolved(*platforms):
        devices = [types.SimpleNamespace(platform=platform) for platform in platforms]
        return runtime.resolve_matmul(types.SimpleNamespace(devices=np.array(devices)))

    assert resolved("cpu") == "merged"
    assert resolved("cpu", "cpu") == resolved("gpu") == resolved("tpu") == "transposed"
