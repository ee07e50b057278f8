"""The process: exit codes, signals, platform and compilation cache."""

import errno
import logging
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable

from unime_jax.types import UserError

CACHE_VARIABLE = "UNIME_JAX_CACHE"


def cache_directory() -> pathlib.Path:
    """Returns where fetched assets and compiled programs are kept between runs."""
    return pathlib.Path(os.environ.get(CACHE_VARIABLE, "~/.cache/unime_jax")).expanduser()


def run_entry(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Runs an entry point and exits: 0 done, 2 bad input (one line), 130 interrupted, 1 our bug."""
    try:
        main(sys.argv if argv is None else argv)
    except UserError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(_fail(f"no space left on the disk{_of(error)}; free some and start again"))
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            sys.exit(_fail(f"no permission to write{_of(error)}: {error.strerror}"))
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _of(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag that a loop reads between steps.

    The first signal asks the loop to save and stop; a second SIGINT interrupts at once.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        print(f"\n{self.signal.name}: stopping after this step ...", file=sys.stderr, flush=True)


def start() -> None:
    """Sets the process up for JAX work; call once, before any array is made."""
    import jax

    # Orbax reports every default it fills in; what matters to a user is said by the entries.
    logging.getLogger("absl").setLevel(logging.ERROR)
    # Compiled programs survive restarts: a resumed run starts stepping at once.
    directory = cache_directory() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def compiler_options(platform: str) -> dict[str, str] | None:
    """Returns what `jax.jit(compiler_options=...)` needs for a model of stacked bf16 layers.

    XLA:CPU multiplies in f32 and moves the conversion of the weights out of the loop over layers,
    so that all of them exist twice more: 15 GB for Phi-3.5-vision's 8, 0.5 GB without that pass.
    """
    if platform != "cpu":
        return None
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
