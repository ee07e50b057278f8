"""What the parts of a speed test share: where they write, and the processes they started."""

import argparse
import pathlib
import subprocess
import sys
from typing import Any

import workers
from workers import Worker, WorkerError

PLAIN = ("eager", "compile")
CHECKPOINTS = ("checkpoint", "checkpoint_compile")
# Shares of a card for ours: where it is alone there, and beside another process.
ALONE, LEAST = 0.92, 0.1
ROOM = 1.05  # of what either side held: its allocator's blocks do not fall twice alike
CONTEXTS = 3.0  # GiB that two processes hold beside: CUDA's contexts, kernels, libraries
COMPILED = ", compiled before"
FEW = 0.1  # of the bytes of all programs
COMPILE_LIMIT = {"cpu": 400.0, "gpu": 600.0}  # seconds until torch.compile's first step is done


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
        self.share = ALONE  # of a card, for ours
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
        """Lists the ways in which PyTorch may take a step of a case; the fastest counts.

        Those for which a GPU's memory does not do are left out when they are tried.
        """
        checkpoints = self.device == "gpu" and not case["forward"]
        found = (CHECKPOINTS if checkpoints else ()) + PLAIN
        return tuple(way for way in found if not (self.quick and way.endswith("compile")))

    @property
    def platform(self) -> dict[str, str]:
        found = {workers.REPORTS: "1"} if self.device == "gpu" else {}
        if self.torch_device == "cpu":
            return found | workers.TWO_THREADS | {"JAX_PLATFORMS": "cpu"}
        # Left to itself, JAX goes on with the CPU where it finds no GPU.
        demanded = {"JAX_PLATFORMS": "cuda"}
        return found | demanded | {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{self.share:.3f}"}

    def side(self, name: str, variant: str = "", limit: float = workers.LIMIT) -> Worker:
        """Starts a side of a training step: ours, or PyTorch's in one of its ways.

        What it says when it is ready has `known`: whether its compiled programs were there.
        """
        folder, cache = str(self.scratch / name), self.kept / "compiled" / name
        if variant:
            cache = cache / variant
            env = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
            arguments = ("torch_side.py", folder, variant, self.torch_device)
        else:
            cache = cache / "ours"
            env = {"JAX_COMPILATION_CACHE_DIR": str(cache)}
            arguments = ("jax_side.py", folder)
        before = _programs(cache)
        worker = self.worker(*arguments, env=env, limit=limit)
        worker.ready["known"] = known(before, _programs(cache))
        return worker

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


def _programs(cache: pathlib.Path) -> dict[pathlib.Path, int]:
    """Returns the sizes of compiled programs in a directory, without what each use writes."""
    files = [path for path in cache.rglob("*") if path.is_file()]
    ends = (".lock", "-atime")
    return {path: path.stat().st_size for path in files if not path.name.endswith(ends)}


def known(before: dict[Any, int], after: dict[Any, int]) -> str:
    """Says whether a process found its compiled programs; "": it has none.

    A few small ones do not count: JAX keeps what took 0.3 s, which is now more and now less.

    Args:
      before, after: programs that were kept then, and their sizes.
    """
    new = sum(size for path, size in after.items() if path not in before)
    if not before:
        return ", nothing compiled" if after else ""
    return COMPILED if new <= FEW * sum(after.values()) else f", partly{COMPILED[1:]}"


def share(card: float, ours: float, torch: float) -> float | None:
    """Returns the share of a card for ours while PyTorch is on it too; None: both do not fit.

    Args:
      card, ours, torch: GiB of the card, and that each side held when it was alone there.
    """
    left = card - ROOM * torch - CONTEXTS
    return None if left < ROOM * ours else min(ALONE, left / card)
