"""The metrics of a run on disk: metrics.jsonl for programs, TensorBoard for eyes."""

import contextlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes one line of metrics a step; continues the files of an interrupted run.

    What an interrupted run wrote beyond the step it resumes from is dropped, so that every step
    stands once.
    """

    def __init__(
        self, directory, *, first_step: int = 0, tensorboard: bool = True, write: bool = True
    ):
        """Opens the files.

        Args:
          directory: of the run; made if needed.
          first_step: steps that are done; lines of later steps are dropped, 0 starts anew.
          tensorboard: also write event files, to `directory`/tensorboard.
          write: False writes nothing: of several processes, one does.
        """
        self._file = self._events = None
        if not write:
            return
        self._path = pathlib.Path(directory) / FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [m for m in read_metrics(directory) if 0 < m["step"] <= first_step]
        partial = self._path.with_suffix(".partial")
        with open(partial, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        os.replace(partial, self._path)
        self._file = open(self._path, "a")  # noqa: SIM115 (closed by close)
        if tensorboard:
            with _without("torch"):
                from tensorboardX import SummaryWriter

            self._events = SummaryWriter(
                str(self._path.parent / "tensorboard"),
                purge_step=first_step + 1,
                flush_secs=10,
            )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends the metrics of a step; several calls for one step merge when read."""
        if self._file is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        # JSON knows no NaN and no infinity.
        line = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._file.write(json.dumps({"step": int(step), **line}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                tag = name if "/" in name else f"train/{name}"
                self._events.add_scalar(tag, value, int(step))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


@contextlib.contextmanager
def _without(name: str):
    """Hides a module from imports: tensorboardX takes torch if it can, for seconds and 0.2 GB."""
    hides = name not in sys.modules
    if hides:
        sys.modules[name] = None  # "import" raises ImportError
    try:
        yield
    finally:
        if hides:
            del sys.modules[name]


def read_metrics(directory) -> list[dict[str, Any]]:
    """Returns the metrics of a run, one dict a step in order; [] where there are none.

    Values that were not finite are None. A line cut short by a kill is left out.
    """
    path = pathlib.Path(directory) / FILE
    steps: dict[int, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            try:
                values = json.loads(line)
                steps.setdefault(int(values["step"]), {}).update(values)
            except (ValueError, KeyError, TypeError):
                continue
    return [steps[step] for step in sorted(steps)]
