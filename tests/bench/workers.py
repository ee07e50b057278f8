"""Processes that do a thing when told to, so that two sides can take turns and each has a memory.

The child calls `serve`; the parent holds a `Worker`. They speak JSON, a line each, through what
was the child's stdout and stdin; what else a child prints goes to its stderr.
"""

import contextlib
import json
import os
import pathlib
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import kernels
from process_memory import TreePeak

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
THREADS = 2
REPORTS = "UNIME_BENCH_REPORTS"  # environment: the step's operations and planned peak are said
OUT_OF_MEMORY = "out of memory"
LIMIT = 1800.0  # seconds that a child may take for an answer
TRACE_LIMIT = 300.0  # the same, under the profiler
END_LIMIT = 60.0  # until it has ended
# Both sides' on CPU, whatever library makes threads; a GPU's host has its cores for itself.
TWO_THREADS = {
    "OMP_NUM_THREADS": str(THREADS),
    "MKL_NUM_THREADS": str(THREADS),
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


class WorkerError(Exception):
    """A child ended early or took too long; the message is the end of what it printed."""


class Worker:
    """A child and what it answers.

    Args:
      limit: seconds within which it has to be ready.

    Attributes:
      ready: what the child said when it was set up, and `start_gib`, the most that it and its own
        children held until then (None: not known).
    """

    def __init__(
        self,
        script: str,
        *arguments: str,
        env: dict[str, str] | None = None,
        limit: float = LIMIT,
    ):
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(env),
        )
        try:
            with TreePeak(self._process.pid) as held:
                said = self._answer(limit)
            self.ready = {**said, "start_gib": held.gib}
        except BaseException:
            self.kill()
            raise

    def step(self) -> dict[str, Any]:
        return self._ask("step")

    def trace(self) -> dict[str, Any]:
        """Does it once more under the profiler; returns what `kernels.trace` found."""
        return self._ask("trace", TRACE_LIMIT)

    def memory(self) -> dict[str, float]:
        """Returns its peak memory until now."""
        return self._ask("memory")

    def close(self) -> dict[str, Any]:
        """Ends the child; returns its peak memory."""
        found = self._ask("quit")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_LIMIT)
        self.kill()
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _ask(self, word: str, limit: float = LIMIT) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and `_answer` says why
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        return self._answer(limit)

    def _answer(self, limit: float = LIMIT) -> dict[str, Any]:
        if not select.select([self._process.stdout], [], [], limit)[0]:
            self.kill()
            raise WorkerError(f"no answer within {limit:.0f} s")
        line = self._process.stdout.readline()
        if line.endswith("\n"):
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read()[-3000:]
        raise WorkerError(said if code > 0 else f"{said}\nended by signal {-code}")


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """Returns that of a child."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
        **(more or {}),
    }


def keep_to_two_cores() -> None:
    """Binds this process to two cores: XLA takes a thread for each that it may use."""
    cores = sorted(os.sched_getaffinity(0))[:THREADS]
    os.sched_setaffinity(0, cores)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def last_json(text: str) -> dict[str, Any]:
    return json.loads(text.strip().splitlines()[-1])


def last_line(error: BaseException) -> str:
    """Returns the last line of an error's message, or the error's name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def why(error: BaseException) -> str:
    """Returns why something did not run, in a few words."""
    return OUT_OF_MEMORY if OUT_OF_MEMORY in str(error).lower() else last_line(error)


def serve(
    setup: Callable[[], tuple[dict[str, Any], Callable[[], dict[str, Any]]]],
    peak: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Sets up, answers, and then does one thing each time it is asked.

    Args:
      setup: returns what to say and the thing to do, whose time is taken here.
      peak: returns what to say of the memory, in bytes; None: of the process.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    def memory() -> dict[str, float]:
        held = peak() if peak else {"peak": process_peak()}
        return {f"{name}_gib": size / 2**30 for name, size in held.items()}

    start = time.perf_counter()
    found, act = setup()
    also = {"trace": lambda: _traced(act), "memory": memory}
    say({"setup_seconds": time.perf_counter() - start, **found})
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        if line.strip() in also:
            say(also[line.strip()]())
            continue
        before = time.perf_counter(), time.process_time()
        found = act()
        wall, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
        say({"seconds": wall, "cpu": cpu, **found})
    say(memory())


def _traced(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return kernels.trace(act)
    except Exception as error:  # a profiler's fault; what was timed is not lost for it
        return {"not traced": f"{type(error).__name__}: {last_line(error)}"}


def process_peak() -> float:
    """Returns the most bytes that this process held."""
    # getrusage counts what the parent held when it started this one.
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def take_turns(
    workers: dict[str, Worker],
    repeats: int,
    *,
    warm: int = 1,
    tell: Callable[[str, dict[str, Any]], None] = lambda name, answer: None,
) -> dict[str, list[dict[str, Any]]]:
    """Lets the workers act A B A B ...; returns what each answered, without the warm-up.

    Args:
      workers: by name.
      repeats, warm: rounds that count, and those before.
      tell: called with each answer that counts, as it comes.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for number in range(warm + repeats):
        for name, worker in workers.items():
            answer = worker.step()
            if number >= warm:
                found[name].append(answer)
                tell(name, answer)
    return found
