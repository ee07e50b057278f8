"""What the parts of a speed test share: where they write, and the processes they started."""

import argparse
import pathlib
import subprocess
import sys

import workers
from workers import Worker, WorkerError

VARIANTS = ("eager", "compile")
COMPILE_LIMIT = {"cpu": 100.0, "gpu": 600.0}  # seconds until torch.compile's first step is done


class Missing(Exception):
    """What a test needs is not at hand."""


class Bench:
    """What the tests share."""

    def __init__(self, args: argparse.Namespace, scratch: pathlib.Path):
        self.scratch, self.repeats, self.tiny = scratch, args.repeats, args.tiny
        self.quick, self.device = args.quick, args.device
        self.torch_device = "cuda" if args.device == "gpu" and not args.tiny else "cpu"
        self.variants = VARIANTS[:1] if args.quick else VARIANTS
        self._workers: list[Worker] = []

    def prepare(self, name: str, folder: pathlib.Path) -> None:
        command = [sys.executable, str(workers.HERE / "cases.py"), name, str(folder)]
        self.run(command)

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

    @property
    def platform(self) -> dict[str, str]:
        if self.torch_device == "cpu":
            return {"JAX_PLATFORMS": "cpu"}
        # Both sides hold their models on one GPU.
        return {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}

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
