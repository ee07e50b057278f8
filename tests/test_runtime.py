"""Exit codes and signals."""

import errno
import os
import signal

import jax
import jax.numpy as jnp
import pytest

from unime_jax import runtime
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
            "error: no permission to write (out): denied",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(error, code, message, capsys):
    with pytest.raises(SystemExit) as caught:
        runtime.run_entry(raising(error), ["x"])
    assert caught.value.code == code
    assert capsys.readouterr().err.startswith(message)


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


def test_cpu_programs_do_not_hold_all_layers_in_f32():
    weights = jax.ShapeDtypeStruct((32, 256, 256), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)

    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jax.nn.silu(x @ w), None), x, weights)[0]

    options = runtime.compiler_options("cpu")
    compiled = jax.jit(run, compiler_options=options).lower(x, weights).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 256 * 256 * 4
    assert runtime.compiler_options("gpu") is None
