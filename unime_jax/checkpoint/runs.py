"""Checkpoints of a run (Orbax).

A checkpoint is a directory checkpoints/N of a run (`run_directory`), made after N steps:

    trainable/, rest/    trainable parameters; step and optimiser state
    config/              the resolved configuration
    manifest.json        bytes and SHA-256 of every file, the score if it was measured

It appears under its name as a whole or not at all. Whoever reads it checks it against its manifest
and goes back to the newest older one that is whole. A run loads as a model: the base it started
from plus its newest trainable parameters.
"""

import concurrent.futures
import contextlib
import functools
import math
import os
import pathlib
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from unime_jax import runtime
from unime_jax.checkpoint import integrity, orbax_arrays, run_directory
from unime_jax.checkpoint.kept import KEPT, kept_for_none
from unime_jax.types import UserError

# What a kill leaves of a save or of a removal; other names are the user's.
_LEFT = re.compile(r"\d+\.(removed|orbax-checkpoint-tmp.*)")
# Process 0 makes the checksums.
_agree = functools.partial(runtime.by_main, wait=runtime.HASHING_MS)

_BEGINS = threading.Lock()  # Orbax counts saves for a process, not for a writer


class Checkpoints:
    """Writes the states of a run, asynchronously and atomically, and reads the newest whole one.

    Args:
      directory: the run directory.
      config: resolved configuration, stored with every checkpoint.
      keep: newest checkpoints kept.
      keep_best: checkpoints of the best scores kept besides.
      best_mode: "max" or "min", which score is best.
      every_steps: steps between saves; 0 to save by time alone.
      every_seconds: seconds after which the next step is saved; 0 to save by steps alone.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        config: dict[str, Any],
        keep: int = 2,
        keep_best: int = 0,
        best_mode: str = "max",
        every_steps: int = 0,
        every_seconds: float = 0.0,
    ):
        self._run = pathlib.Path(directory).absolute()
        self._directory = self._run / run_directory.CHECKPOINTS
        self._config = config
        self._keep, self._keep_best = keep, keep_best
        self._sign = 1 if best_mode == "max" else -1
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._saved_at = time.monotonic()
        self._notes: dict[str, Any] = {}  # of the manifest that is written next
        self._copied: Any = None  # the state that is written next
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: concurrent.futures.Future | None = None
        if runtime.is_main():
            self._directory.mkdir(parents=True, exist_ok=True)
            for path in [*self._directory.iterdir()]:
                if _LEFT.fullmatch(path.name):
                    self._undo_or_remove(path)
        self._latest = int(
            runtime.by_main(lambda: str(max(integrity.steps(self._directory), default=-1)))
        )
        options = integrity.orbax().options.AsyncOptions(post_finalization_callback=self._seal)
        self._writer = integrity.orbax().AsyncCheckpointer(
            orbax_arrays.handler(), async_options=options
        )

    def restore(self, state):
        """Returns the newest whole state on the shardings of `state`, or None if there is none.

        Newer checkpoints, which are damaged, are moved to RUN/damaged.

        Raises:
          UserError: all are damaged (nothing is moved), or of another shape.
        """
        found = _restore(self._directory, state)
        if found is None:
            return None
        self._latest, state, problems = found
        for step, problem in problems.items():
            self._set_aside(step, problem)
        return state

    @property
    def latest(self) -> int | None:
        """The newest checkpoint's step, or None if there is none."""
        return None if self._latest < 0 else self._latest

    def _set_aside(self, step: int, problem: str) -> None:
        """Moves a damaged checkpoint out of the way of the one to come."""
        place = self._run / run_directory.DAMAGED
        if runtime.is_main():
            place.mkdir(exist_ok=True)
            number = sum(path.name.split("-")[0] == str(step) for path in place.iterdir())
            target = place / (f"{step}-{number}" if number else str(step))
            os.replace(self._directory / str(step), target)
            print(
                f"{self._directory / str(step)} is damaged ({problem}) and was moved to {target}; "
                f"the newest whole checkpoint is {self._latest}",
                flush=True,
            )
        runtime.barrier()

    def due(self, step: int) -> bool:
        """Says whether a state is to be saved after so many steps; asked once, by all processes."""
        if self._every_steps and step % self._every_steps == 0:
            return True
        if not self._every_seconds:
            return False
        waited = time.monotonic() - self._saved_at > self._every_seconds
        return bool(runtime.from_main("yes" if waited else ""))  # clocks differ

    def is_best(self, score: float) -> bool:
        """Says whether a state of this score would be kept for it; asked by all processes."""
        if not self._keep_best:
            return False
        self._settle()

        def better() -> str:
            kept = sorted(
                score * self._sign for score in integrity.scores(self._directory).values()
            )
            room = len(kept) < self._keep_best or score * self._sign > kept[-self._keep_best]
            return "yes" if room and math.isfinite(score) else ""

        return bool(runtime.by_main(better))

    def save(self, state, *, force: bool = False, score: float | None = None) -> bool:
        """Saves the state if it is due or forced; returns whether it was.

        Raises:
          UserError: this save, or the one before it, could not be written.
        """
        step = int(state.step)
        if not (force or self.due(step)) or self._latest == step:
            return False
        self._settle()
        if score is not None and not math.isfinite(score):
            print(f"step {step}: the score is {score}; its checkpoint is not one of the best")
            score = None
        self._copied = orbax_arrays.apart(state)
        self._notes = {"step": step, "score": score}
        alone = jax.process_count() == 1
        if not alone:  # Orbax's barriers: in the order in which all processes come to theirs
            with self._explained(step):
                self._write(step)
        self._pending = self._pool.submit(self._finish, step if alone else None)
        self._latest, self._saved_at = step, time.monotonic()
        return True

    def _write(self, step: int) -> None:
        """Hands the copied state over to Orbax's threads."""
        ocp = integrity.orbax()
        state, self._copied = self._copied, None
        state = orbax_arrays.off_devices(state)
        trainable, rest = map(orbax_arrays.save_args, _split(state))
        config = ocp.args.JsonSave(self._config)
        args = ocp.args.Composite(trainable=trainable, rest=rest, config=config)
        with _BEGINS:
            self._writer.save(self._directory / str(step), args=args)

    def _seal(self) -> None:
        """Writes the manifest, before the directory gets its name; process 0, in Orbax's thread."""
        (part,) = self._parts(self._notes["step"])
        integrity.write_manifest(part, **self._notes)

    def _parts(self, step: int) -> list[pathlib.Path]:
        """Lists what there is of a save that is not done."""
        start = f"{step}.orbax-checkpoint-tmp"  # no glob: Python keeps each pattern
        return [path for path in self._directory.iterdir() if path.name.startswith(start)]

    def _finish(self, unwritten: int | None) -> None:
        """Waits for the save and removes what is no longer kept; in a thread of its own.

        Args:
          unwritten: the step that is to be written first, if any.
        """
        if unwritten is not None:
            self._write(unwritten)
        self._writer.wait_until_finished()
        if not runtime.is_main():
            return
        integrity.to_disk(self._directory)  # the new one's name, before older ones go
        kept = self._run / KEPT
        for step in self._surplus() - {*integrity.steps(kept)}:
            path = self._directory / str(step)
            doomed = path.with_name(f"{step}.removed")  # never half a checkpoint under its name
            os.replace(path, doomed)
            self._undo_or_remove(doomed)

    def _undo_or_remove(self, left: pathlib.Path) -> None:
        """Removes what is left of a checkpoint, unless it is one that another run needs."""
        step, _, how = left.name.partition(".")
        place = left.with_name(step)
        # Marked meanwhile by a run that saw it in its place.
        if how == "removed" and (self._run / KEPT / step).exists() and not place.exists():
            os.replace(left, place)
        else:
            shutil.rmtree(left, ignore_errors=True)

    def _surplus(self) -> set[int]:
        """Returns the steps that are neither of the newest nor of the best."""
        scores = integrity.scores(self._directory) if self._keep_best else {}
        best = sorted(scores, key=lambda step: (scores[step] * self._sign, step), reverse=True)
        newest = sorted(integrity.steps(self._directory), reverse=True)
        return {*newest} - {*newest[: self._keep], *best[: self._keep_best]}

    def _settle(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
          UserError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._explained(self._notes["step"]):
                pending.result()

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turns what the disk refuses into one line, and frees what was written."""
        try:
            yield
        except Exception as error:  # of Orbax, of TensorStore: each its own kind
            reason = runtime.fault_of_disk(error)
            if not reason:
                raise
            self._latest = -1
            if runtime.is_main():
                for part in self._parts(step):
                    shutil.rmtree(part, ignore_errors=True)
            whole = max(integrity.steps(self._directory), default=None)
            before = (
                "there is none before it"
                if whole is None
                else f"checkpoint {whole} was saved before it"
            )
            raise UserError(
                f"{self._directory / str(step)} cannot be written ({reason}); {before}; put that "
                "right and start again"
            ) from None

    def close(self) -> None:
        """Waits until everything is on the disk.

        Raises:
          UserError: it cannot be written.
        """
        try:
            self._settle()
        finally:
            self._pool.shutdown()
            self._writer.close()
        with contextlib.suppress(OSError):
            self._say_kept_for_none()

    def _say_kept_for_none(self) -> None:
        kept = kept_for_none(self._run) if runtime.is_main() else {}
        for step in sorted(kept.keys() & self._surplus()):
            print(
                f"{self._directory / str(step)} is kept for {', '.join(kept[step])}, which is not "
                "there any more; if that was removed, not moved, and nothing else is built on it, "
                f"remove it and {self._run / KEPT / str(step)}"
            )


def read_state(path: str | os.PathLike, state, *, before: int):
    """Returns the newest whole state of fewer steps than `before`, or None; changes nothing.

    Args:
      path: the run directory.
      state: gives shapes and shardings.
      before: see above.
    """
    directory = pathlib.Path(path).absolute() / run_directory.CHECKPOINTS
    found = _restore(directory, state, among=lambda step: step < before)
    return None if found is None else found[1]


def _restore(directory: pathlib.Path, state, among: Callable[[int], bool] = lambda step: True):
    """Returns the step of the newest whole state, that state, and what is wrong with newer ones."""
    ocp = integrity.orbax()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    trainable, rest = map(ocp.args.StandardRestore, _split(abstract))
    args = ocp.args.Composite(trainable=trainable, rest=rest)
    with contextlib.closing(orbax_arrays.handler()) as reader:
        found = integrity.newest_whole(
            directory,
            lambda path: reader.restore(path, args=args),
            among=among,
            agree=_agree,
            exchange=runtime.exchange,
        )
    if found is None:
        return None
    step, content, problems = found
    return step, _join(state, content["trainable"], content["rest"]), problems


def newest(path: str | os.PathLike) -> pathlib.Path:
    """Returns the newest whole checkpoint that a run has now; called by process 0 alone.

    Raises:
      UserError: no step has been saved there yet, or what is there is damaged.
    """
    directory = pathlib.Path(path).absolute() / run_directory.CHECKPOINTS
    found = integrity.newest_whole(directory, lambda checkpoint: checkpoint, below="trainable/")
    if found is None:
        raise UserError(f"{path}: no checkpoint there yet; let the run save one first")
    _say_damaged(directory, found[0], found[2])
    return found[1]


def _say_damaged(directory: pathlib.Path, step: int, problems: dict[int, str]) -> None:
    for number, problem in problems.items():
        print(
            f"{directory / str(number)} is damaged ({problem}); checkpoint {step} is read",
            file=sys.stderr,
        )


def read_trainable(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns trainable parameters of a run, path -> f32 array on the host.

    Args:
      path: the run directory, for its newest whole checkpoint, or RUN/checkpoints/STEP.

    Raises:
      UserError: no step has been saved there yet, or what is there is damaged.
    """
    run, wanted = run_directory.locate(path)
    directory = run.absolute() / run_directory.CHECKPOINTS
    ocp = integrity.orbax()
    with contextlib.closing(orbax_arrays.handler()) as reader:

        def read(checkpoint: pathlib.Path):
            if not (checkpoint / "trainable").is_dir():
                raise FileNotFoundError("trainable/ is missing")
            # Arrays of numpy: the devices of the run need not be those of its reader.
            there = reader.metadata(checkpoint).item_metadata["trainable"]
            like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), there)
            args = ocp.args.Composite(trainable=ocp.args.StandardRestore(like))
            return reader.restore(checkpoint, args=args)["trainable"]

        found = integrity.newest_whole(
            directory,
            read,
            below="trainable/",
            among=lambda step: wanted is None or step == wanted,
            agree=_agree,  # the run may be saving: all processes are to read the same
            exchange=runtime.exchange,
        )
    if found is None and wanted is not None:
        there = ", ".join(map(str, sorted(integrity.steps(directory))))
        raise UserError(f"{path}: no such checkpoint; there are {there or 'none'}")
    if found is None:
        raise UserError(f"{path}: no checkpoint there yet; let the run save one first")
    step, content, problems = found
    _say_damaged(directory, step, problems)
    return content


def _split(state) -> tuple[dict, dict]:
    return state.trainable, {"step": state.step, "opt_state": state.opt_state}


def _join(state, trainable, rest):
    return type(state)(rest["step"], trainable, rest["opt_state"])
