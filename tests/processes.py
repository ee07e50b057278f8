"""Starts an entry as several processes over loopback, as a cluster would."""

import os
import pathlib
import socket
import subprocess
import sys

from unime_jax import runtime

ROOT = pathlib.Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """Returns this process's variables; compiles are as quick, with so many virtual devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return {**os.environ, "XLA_FLAGS": flags}


def start(
    flags, cache, *, processes: int = 1, devices: int = 1, entry: str = "train"
) -> list[subprocess.Popen]:
    """Starts `python -m unime_jax.ENTRY`, with so many virtual CPU devices in each process."""
    env = {**environment(devices), runtime.CACHE_VARIABLE: str(cache)}
    place = f"--coordinator=127.0.0.1:{free_port()}"
    started = []
    for number in range(processes):
        where = [place, f"--processes={processes}", f"--process={number}"] if processes > 1 else []
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", f"unime_jax.{entry}", *where, *flags],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def start_program(name: str, *arguments) -> list[subprocess.Popen]:
    """Starts `python tests/NAME COORDINATOR NUMBER ARGUMENTS` twice, with a device each."""
    place = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / name), place, str(number), *map(str, arguments)],
            cwd=ROOT,
            env={**environment(1), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]


def finish(started, codes=None, *, seconds: float = 900) -> list[str]:
    """Waits for the processes; returns what each said, once they ended with the given codes."""
    said, late = [], False
    for process in started:
        try:
            said.append(process.communicate(timeout=seconds)[0])
        except subprocess.TimeoutExpired:
            late = True
            for other in started:
                other.kill()
            said.append(process.communicate()[0])
    text = "\n---\n".join(said)
    assert not late, f"still running after {seconds} s:\n{text}"
    found = [process.returncode for process in started]
    assert found == (codes or [0] * len(started)), text
    return said
