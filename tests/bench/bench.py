"""What the parts of a speed test share: where they write, and the processes they started."""

import argparse
import pathlib
import subprocess
import sys
from typing import Any

import workers
from workers import Worker, WorkerError

PLAIN = ("eager", "compile")
# Without checkpoints the chunks that fill a GPU do not fit; the shorter rows of stage 1 may.
CHECKPOINTS = ("checkpoint", "checkpoint_compile")
COMPILE_LIMIT = {"cpu": 100.0, "gpu": 600.0}  # seconds until torch.compile's first step is done


class Missing(Exception):
    """What a test needs is not at hand."""


class Bench:
    """What the tests share.

    Args:
      args: of the command.
      scratch: directory of this run.
      kept: one for what the next run can use too; None: none.
    """

    def __init__(
        self, args: argparse.Namespace, scratch: pathlib.Path, kept: pathlib.Path | None = None
    ):
        self.scratch, self.kept = scratch, kept or scratch
        self.repeats, self.tiny = args.repeats, args.tiny
        self.quick, self.device = args.quick, args.device
        self.alone = False  # whether there is no other side in what runs now
        self.torch_device = "cuda" if args.device == "gpu" and not args.tiny else "cpu"
        self.compile_limit = args.compile_limit or COMPILE_LIMIT[args.device]
        self._workers: list[Worker] = []

    def prepare(self, name: str, folder: pathlib.Path) -> None:
        command = [sys.executable, str(workers.HERE / "cases.py"), name, str(folder)]
        command += [str(self.kept / "models")]
        self.run(command, {"JAX_PLATFORMS": "cpu"})

    def run(self, command: list[str], env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=workers.environment(self.platform | (env or {})),
            timeout=workers.LIMIT,
        )
        if done.returncode:
            raise WorkerError(done.stderr[-3000:] or done.stdout[-3000:])
        return done.stdout

    def variants(self, case: dict[str, Any]) -> tuple[str, ...]:
        """Lists the ways in which PyTorch may take a step of a case; the fastest counts."""
        if self.device == "cpu" or case["forward"]:
            found = PLAIN
        else:
            found = CHECKPOINTS + (PLAIN if case["stage"] == "distill" else ())
        return found[: 1 if self.quick else None]

    @property
    def platform(self) -> dict[str, str]:
        found = {workers.REPORTS: "1"} if self.device == "gpu" else {}
        if self.torch_device == "cpu":
            return found | {"JAX_PLATFORMS": "cpu"}
        # Where PyTorch's side is on the same card, it gets the rest.
        return found | {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".92" if self.alone else ".55"}

    def worker(
        self,
        script: str,
        *arguments: str,
        env: dict[str, str] | None = None,
        limit: float = workers.LIMIT,
    ) -> Worker:
        worker = Worker(script, *arguments, env=self.platform | (env or {}), limit=limit)
        self._workers.append(worker)
        return worker

    def end_workers(self) -> None:
        """Ends those that a part which failed has left."""
        while self._workers:
            self._workers.pop().kill()
