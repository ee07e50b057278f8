"""Compiles a step ahead of time, and reads what the compiler says of it."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import tempfile
import time

from unime_jax.planning import collectives
from unime_jax.planning.abstract import Run
from unime_jax.planning.topology import GIB
from unime_jax.types import UserError

# What makes compiling quicker and leaves memory and collectives as they are: nothing is run.
_OPTIONS = {
    "gpu": {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
    "tpu": {"exec_time_optimization_effort": -1.0},
}


_FORMAT = 2  # of what is kept between plans; to be raised when `Compiled` changes


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler reports of one device; bytes.

    Attributes:
      seconds: that it took.
      arguments: of the program.
      temporaries: beside arguments and results.
      peak: of all at once; where a program does not fit, what it would take.
      moved: collectives of a step, the largest first.
      counted: whether the trip count of every loop around a collective is known.
      refusal: the compiler's reason why the program does not fit, "" if it does.
    """

    seconds: float
    arguments: float
    temporaries: float
    peak: float
    moved: list[collectives.Collective] = dataclasses.field(default_factory=list)
    counted: bool = True
    refusal: str = ""

    @property
    def beside(self) -> float:
        """Is what the program takes beside its arguments at its peak."""
        return max(0.0, self.peak - self.arguments)


def same_arguments(compiled: float, counted: float, platform: str) -> bool:
    """Says whether a program has the arguments that were counted.

    TPUs lay arrays out in tiles of 8 x 128 numbers, so that small ones, as lengths, take more.
    """
    padding = 0.01 * counted if platform == "tpu" else 0.0
    return counted <= compiled <= counted + padding


def compile_step(
    run: Run,
    platform: str,
    *,
    devices_of_host: int | None = None,
    cache: pathlib.Path | None = None,
    hardware: str = "",
) -> Compiled:
    """Compiles a step for the devices that its arguments are placed on, "tpu" or "gpu".

    Args:
      run: the step.
      platform: decides the compiler's options.
      devices_of_host: as `collectives.read` takes it.
      cache: directory where what compilers said is kept, by program; None: nowhere.
      hardware: what else than the program decides what they say.

    Raises:
      UserError: the compiler needs something that is not installed, or fails.
    """
    import jax

    started = time.perf_counter()
    with quiet():
        lowered = _lower(run)
    path = None
    if cache is not None:
        said = f"{_FORMAT}{lowered.as_text()}{platform}{hardware}{devices_of_host}{_compilers()}"
        path = cache / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"
        if known := _read(path):
            return known
    try:
        program = _compile(lowered, platform)
        memory = program.memory_analysis()
        moved, counted = collectives.read(program.as_text(), devices_of_host)
        found = Compiled(
            time.perf_counter() - started,
            float(memory.argument_size_in_bytes),
            float(memory.temp_size_in_bytes),
            float(memory.peak_memory_in_bytes),
            moved,
            counted,
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--compile: the compiler fails ({reason}); plan without --compile"
            ) from None
        found = _refused(str(error), time.perf_counter() - started)
    if path is not None:
        _write(path, found)
    return found


def _lower(run: Run):
    try:
        return run.step.lower(*run.arguments)
    except RuntimeError as error:
        if "cuDNN is not detected" not in str(error):
            raise
        raise UserError(
            "--compile: attention on GPUs needs cuDNN to be compiled: pip install "
            "-e '.[plan-gpu]', or plan with --config.model.attention=xla"
        ) from None


def _compile(lowered, platform: str):
    """Compiles; products too small for Triton's tiles, as of tiny models, are left to cuBLAS."""
    options = _OPTIONS.get(platform)
    with quiet():
        try:
            return lowered.compile(options)
        except RuntimeError as error:
            if platform != "gpu" or "tile sizes" not in str(error):
                raise
            return lowered.compile({**options, "xla_gpu_enable_triton_gemm": False})


def _compilers() -> str:
    """Names all that has a say in what a program takes, but for the program."""
    names = ("jaxlib", "libtpu", "jax-cuda12-pjrt", "jax-cuda13-pjrt")
    versions = []
    for name in (*names, "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return (
        f"{versions} {_OPTIONS} {os.environ.get('XLA_FLAGS')} {os.environ.get('LIBTPU_INIT_ARGS')}"
    )


def _write(path: pathlib.Path, found: Compiled) -> None:
    """Keeps what a compiler said; where nothing can be written it is asked again."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(dataclasses.asdict(found)))
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()


def _read(path: pathlib.Path) -> Compiled | None:
    """Returns what was kept; None where nothing is, or it is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        found = json.loads(path.read_text())
        moved = [collectives.Collective(**one) for one in found.pop("moved")]
        return Compiled(**found, moved=moved)
    return None


_SIZE = r"\(?([\d.]+)([KMGT]?)i?B?\)?"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def _refused(message: str, seconds: float) -> Compiled:
    """Reads how much a program that does not fit would need."""
    text = " ".join(message.split())
    found = re.search(rf"{_SIZE} exceed\w* (?:the )?available HBM", text)
    used = re.search(rf"Used {_SIZE} of {_SIZE} hbm", text)
    found = used or found or re.search(rf"allocate {_SIZE}", text)
    peak = float(found[1]) * _UNITS[found[2]] if found else float("inf")
    start = max(text.find("CompileTimeHbmOom"), text.find("RESOURCE_EXHAUSTED"))
    return Compiled(seconds, 0.0, 0.0, peak, refusal=text[start : start + 300])


@contextlib.contextmanager
def quiet():
    """Holds back what compilers write about hardware that is not there; shown if they fail.

    A program that does not fit is an answer, no failure: `_refused` reads it.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        except RuntimeError as error:
            failed = "RESOURCE_EXHAUSTED" not in str(error)
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            if failed:
                written.seek(0)
                sys.stderr.write(written.read().decode(errors="replace"))
