"""Checkpoints of a run (Orbax) and the directory that holds them.

A run directory is

    run.json          the resolved configuration
    checkpoints/N/    after N steps: trainable parameters, optimiser state, configuration
    metrics.jsonl     one line a logged step

and loads as a model: the base it started from plus its newest trainable parameters.
"""

import json
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp

from unime_jax.types import Array, UserError

RUN_FILE = "run.json"
# Keys that may change between a run and its continuation without changing what is computed.
FREE_KEYS = ("checkpoint.", "log.", "eval.", "mesh.", "output", "data.threads", "train.chunk")


class Checkpoints:
    """Writes the states of a run, asynchronously and atomically, and reads the newest one.

    Args:
      directory: the run directory.
      config: resolved configuration, stored with every checkpoint.
      keep: newest checkpoints kept.
      every_steps: steps between saves; 0 to save by time alone.
      every_seconds: seconds after which the next step is saved; 0 to save by steps alone.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        config: dict[str, Any],
        keep: int = 2,
        every_steps: int = 0,
        every_seconds: float = 0.0,
    ):
        self._config = config
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._saved_at = time.monotonic()
        self._manager = _manager(directory, keep=keep)

    def restore(self, state):
        """Returns the newest saved state on the shardings of `state`, or None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        ocp = _orbax()
        trainable, rest = _split(abstract)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardRestore(trainable),
                rest=ocp.args.StandardRestore(rest),
            ),
        )
        return _join(state, found["trainable"], found["rest"])

    def save(self, state, *, force: bool = False) -> bool:
        """Saves the state if it is due or forced; returns whether it was."""
        step = int(state.step)
        by_steps = self._every_steps and step % self._every_steps == 0
        by_time = self._every_seconds and time.monotonic() - self._saved_at > self._every_seconds
        if not (force or by_steps or by_time) or self._manager.latest_step() == step:
            return False
        ocp = _orbax()
        # A copy: the step donates the state while the writer still reads it.
        trainable, rest = _split(jax.tree.map(jnp.copy, state))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(trainable),
                rest=ocp.args.StandardSave(rest),
                config=ocp.args.JsonSave(self._config),
            ),
            force=True,
        )
        self._saved_at = time.monotonic()
        return True

    def close(self) -> None:
        """Waits until everything is on the disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def is_run(path: str | os.PathLike) -> bool:
    return (pathlib.Path(path) / RUN_FILE).is_file()


def read_run(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the resolved configuration of a run directory."""
    try:
        return json.loads((pathlib.Path(path) / RUN_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/{RUN_FILE}: cannot be read ({error})") from error


def open_run(path: str | os.PathLike, config: dict[str, Any]) -> None:
    """Creates a run directory, or checks that the configuration continues the one that is there.

    Raises:
      UserError: the directory holds a run of another configuration; every differing key is named.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if is_run(path):
        old, new = _flat(read_run(path)), _flat(json.loads(json.dumps(config)))
        differing = [
            f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
            for key in sorted(old | new)
            if old.get(key) != new.get(key) and not key.startswith(FREE_KEYS)
        ]
        if differing:
            raise UserError(
                f"{path} holds a run of another configuration ({'; '.join(differing)}); "
                f"choose another config.output or remove that directory"
            )
    part = path / f"{RUN_FILE}.part"
    part.write_text(json.dumps(config, indent=2))
    os.replace(part, path / RUN_FILE)


def read_trainable(path: str | os.PathLike) -> dict[str, Array]:
    """Returns the newest trainable parameters of a run directory, path -> f32 array.

    Raises:
      UserError: no step has been saved there yet.
    """
    manager = _manager(path, keep=None, read_only=True)
    step = manager.latest_step()
    if step is None:
        raise UserError(f"{path}: no checkpoint there yet; let the run save one first")
    ocp = _orbax()
    found = manager.restore(step, args=ocp.args.Composite(trainable=ocp.args.StandardRestore()))
    manager.close()
    return found["trainable"]


def _split(state) -> tuple[dict, dict]:
    return state.trainable, {"step": state.step, "opt_state": state.opt_state}


def _join(state, trainable, rest):
    return type(state)(rest["step"], trainable, rest["opt_state"])


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _orbax():
    import orbax.checkpoint as ocp

    return ocp


def _manager(directory: str | os.PathLike, *, keep: int | None, read_only: bool = False):
    ocp = _orbax()
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=not read_only, read_only=read_only
    )
    path = (pathlib.Path(directory) / "checkpoints").absolute()
    if read_only and not path.is_dir():
        raise UserError(f"{directory}: no checkpoint there yet; let the run save one first")
    return ocp.CheckpointManager(path, options=options)
