"""The process: start, exit codes, signals, what processes tell each other, platform and cache."""

import contextlib
import errno
import itertools
import json
import logging
import os
import pathlib
import re
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable

from unime_jax import cluster, failures, gpu_flags
from unime_jax.types import UserError

CACHE_VARIABLE = "UNIME_JAX_CACHE"
# Exit code after a stop by SIGTERM, 0 unless set: some schedulers start again only what failed.
STOP_VARIABLE = "UNIME_JAX_STOP_CODE"


def cache_directory() -> pathlib.Path:
    """Returns where fetched assets and compiled programs are kept between runs."""
    return pathlib.Path(os.environ.get(CACHE_VARIABLE, "~/.cache/unime_jax")).expanduser()


def check_output(path: str | os.PathLike, name: str) -> None:
    """Checks, before any work, that a directory is there or can be made.

    Args:
      path: of the directory.
      name: what the user set, for messages.

    Raises:
      UserError: a file stands in its way, or it cannot be written.
    """
    path = pathlib.Path(path).expanduser().absolute()
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"{name}={path}: {there} is no directory; give another path")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{name}={path}: no permission to write in {there}")


def smol_name(*, smoke: bool, split: int = 1) -> str:
    """Returns the directory's name of the newcomer's models and data, below the cache's."""
    return ("smol-smoke" if smoke else "smol") + (f"-split{split}" if split != 1 else "")


def run_entry(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Runs an entry point and exits: 0 done, 2 bad input (one line), 130 interrupted, 1 our bug.

    Also 141: nobody reads the output any more.
    """
    # Pillow's, of pictures that `pictures.MAX_PIXELS` allows.
    warnings.filterwarnings("ignore", message=r"Image size .* could be decompression bomb")
    if getattr(sys.stdout, "errors", "") == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # of tables, where it is not UTF-8
    try:
        main(cluster.take_flags(list(sys.argv if argv is None else argv)))
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        code = _say(error)
        if not _together() and code == 1:
            raise
        if not _together():
            sys.exit(code)
        if code == 1:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        if code == 2:  # others may meet the same, and what process 0 told them goes with it
            with contextlib.suppress(Exception):
                _messages().wait_at_barrier("unime_jax_failed", _LAST_WORDS_MS)
        # A regular exit would wait for the other processes, and they wait for this one.
        os._exit(code)


def _say(error: BaseException) -> int:
    """Prints what is for the user and returns the exit code; 1: nothing is."""
    where = f" (process {_PLACE[0]} of {_PLACE[1]})" if _together() else ""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        for fd in (1, 2):  # what is still to be flushed goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        return 128 + signal.SIGPIPE  # as the shell says of programs that end so
    message = failures.describe(error)
    if not message:
        return 1
    print(f"error{where}: {message}", file=sys.stderr)
    return 2


# What an operating system says of disks that are full, read-only, gone or broken.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG,
         errno.EIO, errno.ENOENT, errno.ESTALE)  # fmt: skip


def fault_of_disk(error: BaseException | None) -> str:
    """Returns what the operating system said, if an error or its cause comes from it; else ""."""
    while error is not None:
        for number in _DISK:
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return ""


def _nobody_reads() -> bool:
    """Says whether stdout or stderr is a pipe whose reader has gone, as after `| head`."""
    poll = select.poll()
    for fd in (1, 2):
        poll.register(fd, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class StopRequest:
    """Turns SIGINT and SIGTERM into an answer that a loop asks for between steps.

    The first signal asks the loop to save and stop; a second SIGINT interrupts at once. Of several
    processes that were started `preemptible` any may be told; all stop after the same step.

    Attributes:
      signal: what asked this process, or made all stop; None before.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            # Where all stop together, JAX's own handler of SIGTERM tells the others.
            numbers = (signal.SIGINT,) if _STOP_TOGETHER else (signal.SIGINT, signal.SIGTERM)
            for number in numbers:
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
        if _STOP_TOGETHER:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Says whether to stop after this step; to be asked after every one, by all processes."""
        if not _STOP_TOGETHER:
            return self.signal is not None
        from jax.experimental import multihost_utils

        if not multihost_utils.reached_preemption_sync_point(step):
            return False
        self.signal = self.signal or signal.SIGTERM
        return True

    def leave(self) -> None:
        """Ends the process after a stop."""
        if self.signal == signal.SIGINT:
            if _together():
                sys.exit(130)  # the regular way: all processes are here
            raise KeyboardInterrupt
        sys.exit(int(os.environ.get(STOP_VARIABLE, "0")))


# Number of this process, and how many there are; whether they all stop after the same step.
_PLACE, _STOP_TOGETHER = (0, 1), False


def is_main() -> bool:
    """Says whether this process writes logs, metrics and files that all share."""
    return _PLACE[0] == 0


def _together() -> bool:
    return _PLACE[1] > 1


def start(*, preemptible: bool = False) -> None:
    """Sets the process up for JAX work and finds the others; call once, before any array is made.

    Args:
      preemptible: SIGTERM to one of several processes is kept for `StopRequest` from here on.

    Raises:
      UserError: the others, the devices that JAX_PLATFORMS asks for, or an address of this machine
        are not there.
    """
    import jax

    # Orbax reports every default it fills in; what matters to a user is said by the entries.
    logging.getLogger("absl").setLevel(logging.ERROR)
    # What Orbax fails at, it raises as well; its threads log a screen of traceback for a full disk.
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    sys.unraisablehook = _without_late_news
    # Compiled programs survive restarts: a resumed run starts stepping at once.
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    gpu_flags.add()
    handler = signal.getsignal(signal.SIGTERM)
    cluster.join()
    asked = os.environ.get("JAX_PLATFORMS", "")
    try:
        devices = jax.devices()
        if asked.startswith("cuda") and devices[0].platform == "cpu":
            raise RuntimeError("no NVIDIA GPU is seen")  # JAX goes on without a word
    except (RuntimeError, AssertionError) as error:  # an assertion: no plugin for it is installed
        if "gloo" in str(error):  # what processes on CPUs talk through
            cluster.check_own_name()
        reason = " ".join(str(error).split())[:200] or "JAX has no plugin for them"
        raise UserError(
            f"JAX_PLATFORMS={asked}: no such devices here ({reason}); install the extra cuda12 or "
            "tpu, or unset it"
        ) from None
    global _PLACE, _STOP_TOGETHER
    _PLACE = (jax.process_index(), jax.process_count())
    _STOP_TOGETHER = preemptible and _together()
    if not _STOP_TOGETHER:
        signal.signal(signal.SIGTERM, handler)  # JAX took it; nobody would ask for it
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process lives)
    elif _together():
        kind = devices[0].device_kind
        print(f"{_PLACE[1]} processes, {len(devices)} {kind} devices", flush=True)


def _without_late_news(found) -> None:
    """Leaves out what TensorStore's threads still tell the event loop of a save that has failed."""
    if found.object is not None or str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


_WAIT_MS = 600_000
_LAST_WORDS_MS = 10_000
HASHING_MS = 3_600_000  # until process 0 alone has read what is large: `by_main(wait=...)`
_CALLS, _GENERATION = itertools.count(), 0  # of messages; how many barriers there were
_ALONE = False  # whether process 0 is in `by_main`, where the others only wait
_SAID, _KEPT = "unime_jax_said", 100  # where messages go; how many calls until process 0 clears up


def _messages():
    """Returns the coordinator's store, for which JAX has no public name."""
    from jax._src import distributed

    return distributed.global_state.client


def from_main(text: str, *, wait: int = _WAIT_MS) -> str:
    """Returns what process 0 gives; all processes call this and `barrier` in the same order.

    Args:
      text: process 0's counts.
      wait: milliseconds that the others wait for it.
    """
    _check_all_are_here()
    if not _together():
        return text
    key = _next_key(wait)
    if is_main():
        _messages().key_value_set(key, text)
        return text
    return _messages().blocking_key_value_get(key, wait)


def by_main(work: Callable[[], str], *, wait: int = _WAIT_MS) -> str:
    """Returns what process 0 finds; to be called like `from_main`, which `work` must not.

    Raises:
      UserError: it met one; all processes raise it.
    """
    global _ALONE
    _check_all_are_here()
    found = {"result": "", "problem": ""}
    if is_main():
        _ALONE = True
        try:
            found["result"] = work()
        except UserError as error:
            if not _together():
                raise
            found["problem"] = str(error)
        finally:
            _ALONE = False
    found = json.loads(from_main(json.dumps(found), wait=wait))
    if found["problem"]:
        raise UserError(found["problem"])
    return found["result"]


def _check_all_are_here() -> None:
    if _ALONE:  # of one process as well, where tests find it
        raise RuntimeError("what process 0 does alone talks to the others, which do not listen")


def _next_key(wait: int = _WAIT_MS) -> str:
    number = next(_CALLS)
    if number % _KEPT == _KEPT - 1:
        barrier(wait=wait)
    return f"{_SAID}/{_GENERATION}/{number}"


def exchange(text: str) -> list[str]:
    """Returns what every process gives, in their order; to be called like `from_main`."""
    _check_all_are_here()
    if not _together():
        return [text]
    key = _next_key()
    if not is_main():
        _messages().key_value_set(f"{key}/{_PLACE[0]}", text)
        return json.loads(from_main(""))
    others = range(1, _PLACE[1])
    said = [_messages().blocking_key_value_get(f"{key}/{number}", _WAIT_MS) for number in others]
    return json.loads(from_main(json.dumps([text, *said])))


def barrier(*, wait: int = _WAIT_MS) -> None:
    """Waits until every process is there, for so many milliseconds."""
    global _GENERATION
    _check_all_are_here()
    if not _together():
        return
    _messages().wait_at_barrier(f"unime_jax/{next(_CALLS)}", wait)
    # All have read what was said before. What others say from here on has another place.
    over, _GENERATION = _GENERATION, _GENERATION + 1
    if is_main():
        _messages().key_value_delete(f"{_SAID}/{over}")


def compiler_options(platform: str) -> dict[str, str] | None:
    """Returns what `jax.jit(compiler_options=...)` needs for a model of stacked bf16 layers.

    XLA:CPU multiplies in f32 and moves the conversion of the weights out of the loop over layers,
    so that all of them exist twice more: 15 GB for Phi-3.5-vision's 8, 0.5 GB without that pass.
    """
    if platform != "cpu":
        return None
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def resolve_matmul(mesh=None) -> str:
    """Returns the kind of product (`models/products.py`) for the platform of a mesh.

    Adapters are added to their weights on one CPU device, where that was measured
    (tests/bench/RESULTS.md), and nowhere else.
    """
    import jax

    devices = jax.devices() if mesh is None else mesh.devices.flat
    return "merged" if devices[0].platform == "cpu" and len(devices) == 1 else "transposed"


def resolve_attention(attention: str, dtype: str, mesh=None) -> str:
    """Returns the attention kernel for the platform of a mesh (None: the default device).

    "auto" takes a fused kernel where there is one, in bfloat16 alone: cudnn on NVIDIA's GPUs from
    Ampere on, splash on TPUs (of which several need a mesh, for the compiler cannot divide it). On
    CPU splash is interpreted.

    Raises:
      UserError: a kernel of another platform.
    """
    import jax

    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    # Such as 7.5; AMD's are called gfx90a; those that are only compiled for may lack it.
    capability = re.match(r"\d+", str(getattr(device, "compute_capability", "8")))
    cudnn = platform == "gpu" and capability is not None and int(capability[0]) >= 8
    if attention == "auto":
        fused = "cudnn" if cudnn else {"tpu": "splash"}.get(platform, "xla")
        alone = mesh is None and platform == "tpu" and jax.device_count() > 1
        return fused if dtype == "bfloat16" and not alone else "xla"
    if attention == "cudnn" and (not cudnn or dtype != "bfloat16"):
        kind = device.device_kind
        raise UserError(
            f"config.model.attention=cudnn: needs NVIDIA GPUs from Ampere on and bfloat16, not "
            f"{kind} and {dtype}; use auto or xla"
        )
    if attention == "splash" and platform != "tpu":
        if platform == "gpu":
            raise UserError("config.model.attention=splash: is for TPUs; use auto or xla")
        return "splash_interpret"
    return attention
