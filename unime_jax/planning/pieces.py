"""Compiles a step piece by piece: a program for each shape of rows, and one for the loss.

A step encodes groups of rows of a dozen shapes, forth and back, and compiling all of it in one
program takes as long as all pieces one after the other, or longer. Every piece is the training step
of a batch that has this group alone: the same chunks, adapters, gathers and update, on the same
devices. Together they take what the whole step takes, but for two sums, made here: what groups hold
at the same time, and what devices send.
"""

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

from unime_jax import runtime, sharding
from unime_jax.planning import abstract, collectives, compiled, flops, liveness, memory
from unime_jax.planning import topology as topologies
from unime_jax.planning.composition import SIDES, Composition, Shape
from unime_jax.types import UserError

_GIB_A_PROCESS = 2.5  # what a compiler takes of this machine's memory


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a step.

    Attributes:
      group: rows, T and C; None for the loss.
      chunk: config.train.chunk with which this group alone is encoded as among the others.
    """

    group: Shape | None
    chunk: int = 0

    def share(self, devices: int) -> int:
        """Counts the rows of a device."""
        return -(-self.group[0] // devices) if self.group else 0

    def passes(self, devices: int) -> int:
        """Counts the chunks, as `chunks.encode_groups` makes them."""
        size = max(1, self.chunk // devices)
        return -(-self.share(devices) // size) if self.group and self.chunk else 1

    def describe(self) -> str:
        if self.group is None:
            return "the loss"
        rows, tokens, tiles = self.group
        images = f" with {tiles} tile(s)" if tiles else ""
        return f"{rows} rows of {tokens}{images}"


@dataclasses.dataclass(frozen=True)
class Job:
    """What another process needs to compile pieces of a step.

    Attributes:
      settings: the resolved configuration, with the chunk and remat to compile.
      config: content of config.json.
      composition: of a whole batch.
      topology: to compile for.
      mesh: its sides.
      width: of an embedding.
      flash: whether attention never holds the scores of all pairs of positions.
    """

    settings: dict[str, Any]
    config: dict[str, Any]
    composition: Composition
    topology: topologies.Topology
    mesh: tuple[int, int, int]
    width: int
    flash: bool


@dataclasses.dataclass(frozen=True)
class Found:
    """What a piece takes; bytes of one device.

    Attributes:
      piece: which.
      attention: the kernel it has.
      compiled: what the compiler says of it.
      arguments: those it should have, but for what it never reads.
      kept: of its temporaries those that it holds from the way there to the way back.
      chunked: whether its rows are encoded in several chunks, and again on the way back.
      like: the piece that was compiled in its place (`alike.follow`); None: itself.
    """

    piece: Piece
    attention: str
    compiled: compiled.Compiled
    arguments: float
    kept: float
    chunked: bool = False
    like: Piece | None = None

    @property
    def held(self) -> float:
        """Is `kept`, an estimate, but never more than the compiler says."""
        return min(self.kept, self.compiled.beside)

    @property
    def work(self) -> float:
        """Is the rest of the temporaries, which groups need one after the other."""
        return self.compiled.beside - self.held

    def summary(self) -> dict[str, Any]:
        """Returns what a report says of it."""
        return {
            "piece": self.piece.describe(),
            "group": self.piece.group,
            "chunk": self.piece.chunk,
            "like": self.like and self.like.describe(),
            "seconds": self.compiled.seconds,
            "temporaries": self.compiled.beside,
            "kept": self.held,
        }


def divide(composition: Composition, chunk: int, devices: int = 1) -> list[Piece]:
    """Lists the pieces of a step, the loss at the end."""
    groups = composition.encoded(devices)
    longest = max(tokens for _, tokens, _ in groups)
    return [*(Piece(group, chunk * longest // group[1]) for group in groups), Piece(None)]


def compile_all(pieces: list[Piece], job: Job) -> Iterator[Found]:
    """Compiles pieces in processes of their own and yields them as they come.

    Closing the iterator ends the others.

    Raises:
      UserError: one of them was killed.
    """
    workers = max(1, min(len(pieces), os.cpu_count() or 1, int(_free_gib() // _GIB_A_PROCESS)))
    context = multiprocessing.get_context("spawn")
    pool = futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare)
    with compiled.quiet():  # they start, and JAX reports what is not there as it is imported
        running = [pool.submit(compile_piece, piece, job) for piece in pieces]
    children = multiprocessing.active_children()
    try:
        for done in futures.as_completed(running):
            yield done.result()
    except futures.BrokenExecutor:
        pool.shutdown()
        codes = sorted({child.exitcode or 0 for child in children} - {0, -signal.SIGTERM})
        raise UserError(_ended(codes)) from None
    finally:
        for one in running:
            one.cancel()
        for child in multiprocessing.active_children():
            child.terminate()
        pool.shutdown()


def _ended(codes: Sequence[int]) -> str:
    """Says why there are no more compilers, by the exit codes of those that ended by themselves."""
    if not codes or -signal.SIGKILL in codes:
        return (
            "--compile: a compiler was killed, as by a lack of memory; close other programs, or "
            "plan without --compile"
        )
    code = codes[0]
    how = f"with exit code {code}" if code > 0 else f"by signal {-code}"
    return f"--compile: a compiler ended {how}; plan without --compile"


def _free_gib() -> float:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
        return int(line.split()[1]) / 2**20
    return 2 * _GIB_A_PROCESS


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    topologies.use_no_accelerator()


def compile_piece(piece: Piece, job: Job) -> Found:
    """Compiles one piece."""
    with compiled.quiet():
        return _compile_piece(piece, job)


def _compile_piece(piece: Piece, job: Job) -> Found:
    devices = topologies.compile_devices(job.topology)
    mesh = sharding.make_mesh(*job.mesh, devices=devices)
    settings, made = alone(piece, job.settings, job.composition, job.width)
    model = settings["model"]
    attention = runtime.resolve_attention(model["attention"], model["dtype"], mesh)
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    chunked = piece.passes(split) > 1
    if piece.group is None:
        run, kept = abstract.loss(settings, made, job.width, mesh=mesh), 0.0
    else:
        run = abstract.run(settings, job.config, made, mesh=mesh, attention=attention)
        kept = _kept(piece, job, split)
    used = flops.trace(run.step, *run.arguments)[1]
    found = compiled.compile_step(
        run,
        job.topology.chip.platform,
        devices_of_host=job.topology.linked,
        cache=runtime.cache_directory() / "plans",
        hardware=f"{job.topology} {job.mesh}",
    )
    arguments = memory.size(run.arguments) - memory.idle(run, used)
    return Found(piece, attention, found, arguments, kept, chunked)


def alone(
    piece: Piece, settings: dict[str, Any], made: Composition, width: int
) -> tuple[dict[str, Any], Composition]:
    """Returns settings and batch of a step that encodes one group.

    Cached vectors stand for the other side of its loss, which is small; the batch's own loss is a
    piece by itself.

    Args:
      piece: which; what is the loss has the whole batch.
      settings: the resolved configuration.
      made: the whole batch.
      width: of an embedding.
    """
    if piece.group is None:
        return settings, made
    stage = "distill" if settings["stage"] == "distill" else "contrast"
    settings = {
        **settings,
        "stage": stage,
        "loss": {**settings["loss"], "k": 0},
        "train": {**settings["train"], "chunk": piece.chunk},
    }
    rows = piece.group[0]
    width = made.vectors[1] if stage == "distill" else width
    made = dataclasses.replace(
        made,
        **{side: (piece.group,) if side == "query" else () for side in SIDES},
        rows=rows,
        vectors=(rows, width),
        judged=0,
        negative_ids=False,
    )
    return settings, made


def _kept(piece: Piece, job: Job, devices: int) -> float:
    """Estimates what one device holds of a group between the way there and the way back."""
    rows, tokens, tiles = piece.group
    share = dataclasses.replace(
        piece,
        group=(-(-rows // devices), tokens, tiles),
        chunk=max(1, piece.chunk // devices) if piece.chunk else 0,
    )
    settings, made = alone(share, job.settings, job.composition, job.width)
    run = abstract.run(settings, job.config, made)
    jaxpr, _ = flops.trace(run.step, *run.arguments, whole=job.flash)
    return liveness.kept(jaxpr, flash=job.flash)


def together(
    found: list[Found], arguments: float, gradients: float, seconds: float
) -> compiled.Compiled:
    """Puts the pieces of a step together.

    Groups in chunks hold next to nothing between their ways there and back (features of a frozen
    tower), so that compilers put both outside of those of the groups that are encoded at once,
    which hold all they need from the one to the other. Gradients are added up at the end.

    Args:
      found: all pieces, or as many as it took to see that the step does not fit.
      arguments: of the whole step, those that it reads.
      gradients: bytes of the gradients of one group.
      seconds: that it took.
    """
    chunked = [one for one in found if one.chunked]
    at_once = [one for one in found if not one.chunked]

    def held(some: list[Found]) -> float:
        return sum(one.held for one in some)

    def work(some: list[Found]) -> float:
        return max((one.work for one in some), default=0.0)

    groups = sum(one.piece.group is not None for one in found)
    temporaries = max(work(chunked), held(at_once) + work(at_once)) + held(chunked)
    temporaries += gradients * max(groups - 1, 0)
    calls: dict[tuple, list] = collections.defaultdict(lambda: [0, 0.0])
    for one in found:
        for moved in one.compiled.moved:
            total = calls[moved.kind, moved.shape, moved.group, moved.hosts, moved.loop]
            total[0] += moved.calls
            total[1] += moved.bytes
    moved = [collectives.Collective(*kind, *total) for kind, total in calls.items()]
    return compiled.Compiled(
        seconds,
        arguments,
        temporaries,
        arguments + temporaries,
        sorted(moved, key=lambda one: -one.bytes),
        all(one.compiled.counted for one in found),
        next((one.compiled.refusal for one in found if one.compiled.refusal), ""),
    )
