"""The loop over a run's steps: metrics, checkpoints, stops, traces."""

import contextlib
import pathlib
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from unime_jax import allocator, checkpoint, optim, report, runtime, steps
from unime_jax.checkpoint.integrity import write_json
from unime_jax.planning import flops, topology
from unime_jax.train_data import TrainData
from unime_jax.types import Batch, UserError

GIB = 2**30
_LAST_WAIT_MS = 20_000  # for the other processes, at an error
_COMPILE_WAIT_MS = 3_600_000
_DEATHS = 3  # of processes that read, without a batch in between
Validate = Callable[[dict[str, Any]], dict[str, float]]


class Loop:
    """Takes the steps that are left of a run.

    Args:
      settings: the resolved configuration.
      train_step: see `steps.make_train_step`.
      frozen: parameters that no step changes.
      data: batches by step.
      saves: where states go.
      validate: parameters -> metrics on held-out data, or None.
      mesh: devices.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        train_step,
        frozen: dict[str, Any],
        data: TrainData,
        saves: checkpoint.Checkpoints,
        validate: Validate | None,
        mesh,
    ):
        self._output = pathlib.Path(settings["output"])
        self._title = f"training ({settings['stage']})"
        self._settings = settings
        self._train_step, self._frozen, self._mesh = train_step, frozen, mesh
        self._data, self._saves, self._validate = data, saves, validate
        self._trace = Trace(settings["log"]["profile"], self._output / "profile", steps=data.steps)
        self._metrics: dict[str, float] = {}

    def run(self, state: steps.TrainState) -> dict[str, float]:
        """Goes on from the newest checkpoint, or from `state`; returns the last step's metrics."""
        restored = self._saves.restore(state)
        state = state if restored is None else restored
        first, total = int(state.step), self._data.steps
        if first >= total:
            print(f"{self._output}: all {first} steps are done")
            return {}
        if first:
            print(f"{self._output}: going on after step {first}")
        logged = self._settings["log"]
        with (
            report.MetricsWriter(
                self._output,
                first_step=first,
                tensorboard=logged["tensorboard"],
                write=runtime.is_main(),
            ) as self._writer,
            runtime.StopRequest() as stop,
            self._trace,
        ):
            try:
                state = self._steps(state, first, total, stop)
            except UserError:
                self._close_all()
                raise
            self._progress.close()
            self._saves.close()  # may have something to say
        if int(state.step) < total:
            print(f"saved after step {int(state.step)}; the same command goes on from there")
            stop.leave()
        print(f"done: {self._output}" + self._data.summary())
        return self._metrics

    def _close_all(self) -> None:
        """Lets a save under way end before an error ends the run: the first process to go ends all.

        What most errors are, all processes raise; for those of one alone the others are not long
        waited for.
        """
        try:
            self._saves.close()
        except UserError as error:  # the first one is raised
            print(error, file=sys.stderr)
        with contextlib.suppress(Exception):  # JAX's own, of no public kind
            runtime.barrier(wait=_LAST_WAIT_MS)

    def _steps(self, state, first: int, total: int, stop: runtime.StopRequest):
        batches = self._batches(first)
        every = self._settings["eval"]["every_steps"]
        pending = None
        skipped = optim.skipped_updates(state.opt_state)
        self._skipped = 0.0 if skipped is None else float(jax.device_get(skipped))
        print("compiling the step ...", flush=True)
        self._clock = started = time.perf_counter()
        for step in range(first, total):
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            self._trace.before(step + 1)
            placed = steps.place_batch(batch, self._mesh, self._data.shared)
            if step == first:
                compile_ahead(self._train_step, state, self._frozen, placed)
                # Gloo gives up on a process that still compiles after 30 s.
                runtime.barrier(wait=_COMPILE_WAIT_MS)
            state, values = self._train_step(state, self._frozen, placed)
            if step == first:  # while it runs
                self._flops = flops.count(self._train_step, state, self._frozen, placed).model
            # Metrics of the step before are read while this one runs.
            if pending is not None:
                self._record(*pending)
            pending = (step, values, waited)
            if step == first:
                jax.block_until_ready(values)
                print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
                self._progress = report.Progress(total, self._title, start=step + 1)
            last = stop.reached(step + 1) or step + 1 == total
            due = self._saves.due(step + 1) or last
            validates = self._validate is not None and (step + 1) % every == 0
            if due or validates or step == first or self._trace.ends(step + 1):
                self._record(*pending)  # first: never is a state saved that is not finite
                pending = None
                self._trace.after(step + 1)
                score = self._measure(state) if validates else None
                if due or (score is not None and self._saves.is_best(score)):
                    self._saves.save(state, force=True, score=score)
                self._clock = time.perf_counter()
            if last:
                break
        return state

    def _batches(self, first: int) -> Iterator[Batch]:
        """Yields batches; where a process that reads them is killed, others take over."""
        deaths, workers = 0, self._settings["data"]["workers"]
        while first < self._data.steps:
            try:
                for batch in self._data.batches(first):
                    first, deaths = first + 1, 0
                    yield batch
                return
            except RuntimeError as error:  # grain's
                if "Worker process was terminated" not in str(error):
                    raise
                reason, deaths = str(error).split(". ")[0], deaths + 1
            if deaths == _DEATHS:
                raise UserError(
                    f"step {first + 1}: no batch after {deaths} starts of the processes that read "
                    f"({reason}); out of memory? lower config.data.workers={workers}"
                )
            print(f"\nstep {first + 1}: {reason}; new ones go on from there", flush=True)

    def _measure(self, state: steps.TrainState) -> float | None:
        """Validates; returns what the best checkpoints are kept by, None if none are."""
        found = self._validate({**self._frozen, **state.trainable})
        self._writer.write(int(state.step), found)
        wanted = self._settings["checkpoint"]["best_metric"]
        if not self._settings["checkpoint"]["keep_best"]:
            return None
        if wanted not in found:
            raise UserError(
                f"config.checkpoint.best_metric={wanted}: no such metric; there are "
                f"{', '.join(sorted(found))}"
            )
        return float(found[wanted])

    def _record(self, step: int, values, waited: float) -> None:
        """Reads a step's metrics off the device, logs and shows them.

        A step lasts from the end of the one before, or of what was done after that one, to its own.
        """
        metrics = {k: float(np.asarray(value)) for k, value in jax.device_get(values).items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["gradient_norm"]):
            self._stop_at(step, metrics)
        counts = self._data.counts
        metrics |= {
            "pairs_per_second": counts["rows"] / seconds,
            "tokens_per_second": counts["tokens"] / seconds,
            "padded_share": counts["padded_share"],
            "bad_rows": counts.get("bad_rows", 0.0),
            "data_seconds": waited,
            "seconds": seconds,
            "memory_gib": peak_memory() / GIB,
            **self._speed(seconds),
        }
        before, self._skipped = self._skipped, metrics.get("skipped_updates", 0.0)
        if self._skipped > before:
            print(
                f"\nstep {step + 1}: loss {metrics['loss']:.4f} is a spike, no update", flush=True
            )
        self._metrics = metrics
        if (step + 1) % self._settings["log"]["every_steps"] == 0 or step + 1 == self._data.steps:
            self._writer.write(step + 1, metrics)
        self._progress.update(step + 1, f"loss {metrics['loss']:.4f}")

    def _speed(self, seconds: float) -> dict[str, float]:
        """Returns TFLOP/s of a device and, where its peak is known, the share of it (MFU).

        Operations are those of the mathematics: what is computed again does not count.
        """
        device, count = self._mesh.devices.flat[0], self._mesh.size
        rate = self._flops / seconds / count
        found = {"tflops_per_second": rate / 1e12}
        chip = topology.of_device(device.device_kind)
        if chip is None:
            return found
        return {**found, "mfu": rate / chip.rate(self._settings["model"]["dtype"])}

    def _stop_at(self, step: int, metrics: dict[str, float]) -> None:
        """Ends a run whose loss or gradient is not finite; the newest checkpoint is from before."""
        path = self._output / f"not_finite_step_{step + 1}.json"
        command = f"--config.train.replay={step + 1}"
        if pathlib.Path(sys.argv[0]).name == "train.py":
            command = shlex.join(["python", "-m", "unime_jax.train", *sys.argv[1:], command])
        if runtime.is_main():
            told = {name: str(metrics[name]) for name in ("loss", "gradient_norm")}
            content = {"step": step + 1, **told, "command": command}
            write_json(path, {**content, "rows": self._data.rows_of(step)})
        raise UserError(
            f"step {step + 1}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}; "
            f"the rows of its batch are in {path}; check them, or lower "
            f"config.optim.learning_rate; which rows it comes from: {command}"
        )


class Trace:
    """Traces steps n to m with JAX's profiler; TensorBoard and Perfetto read the result.

    Args:
      wanted: "n-m", steps as they are logged, or "" for none.
      directory: of the trace, which process 0 writes.
      steps: of the run.

    Raises:
      UserError: the run has no such steps.
    """

    def __init__(self, wanted: str, directory: pathlib.Path, *, steps: int):
        first, _, last = (wanted or "0").partition("-")
        self._first, self._last = int(first), int(last or first)
        self._directory, self._running, self._write = directory, False, runtime.is_main()
        if self._last > steps:
            raise UserError(f"config.log.profile={wanted}: the run has {steps} steps")

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exc) -> None:
        """Keeps what was traced until a run ends early."""
        self._stop("the end")

    def before(self, step: int) -> None:
        if self._write and self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def ends(self, step: int) -> bool:
        """Says whether `after` is to be called, once the step is done."""
        return step == self._last

    def after(self, step: int) -> None:
        if self.ends(step):
            self._stop(str(step))

    def _stop(self, last: str) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            print(f"trace of steps {self._first} to {last}: {self._directory}", flush=True)


def peak_memory() -> int:
    """Returns the most bytes this process's first device held so far; on CPU, the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compile_ahead(step, *arguments) -> jax.stages.Compiled:
    """Compiles a jitted function for its next call, and gives back the memory that this took.

    Called at once, it is run on top of what its compiler has freed, which the C library keeps: some
    0.4 GiB of the newcomer's stage 2.
    """
    # The call finds this program. It is not called itself: it refuses 4-bit arrays (their layouts).
    program = step.lower(*arguments).compile()
    allocator.give_back()
    return program
