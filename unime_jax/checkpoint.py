"""Checkpoints of a run (Orbax) and the directory that holds them.

A run directory is

    run.json          the resolved configuration
    checkpoints/N/    after N steps: trainable parameters, optimiser state, configuration
    metrics.jsonl     one line a logged step

and loads as a model: the base it started from plus its newest trainable parameters.

A model directory (written by `convert import`) is

    model.json                      where it comes from; shapes and dtypes of its parameters
    params/                         the parameters, a nested dict
    unused/                         tensors of the original that the model does not use, if any
    config.json, tokenizer.json ... as in the directory that it comes from
"""

import json
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unime_jax import runtime
from unime_jax.types import Params, UserError, flatten, unflatten

RUN_FILE = "run.json"
MODEL_FILE = "model.json"
MODEL_FORMAT = 1
# Chunks are compressed, written and read one by one: each device of a mesh reads little besides its
# own part, and a write needs .1 GB above the arrays. (One file for all, Orbax's other way, holds
# everything compressed in memory before it writes: .6 GB for .5 GB of arrays.)
CHUNK_BYTES = 64 * 2**20
# Keys that may change between a run and its continuation without changing what is computed.
FREE_KEYS = (
    "checkpoint.",
    "log.",
    "eval.",
    "mesh.",
    "output",
    "data.threads",
    "data.workers",
    "model.remat",
    "train.chunk",
)


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

    def due(self, step: int) -> bool:
        """Says whether a state is to be saved after so many steps; asked once, by all processes."""
        if self._every_steps and step % self._every_steps == 0:
            return True
        if not self._every_seconds:
            return False
        waited = time.monotonic() - self._saved_at > self._every_seconds
        return bool(runtime.from_main("yes" if waited else ""))  # clocks differ

    def save(self, state, *, force: bool = False) -> bool:
        """Saves the state if it is due or forced; returns whether it was."""
        step = int(state.step)
        if not (force or self.due(step)) or self._manager.latest_step() == step:
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
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}/{RUN_FILE}: cannot be read ({error})") from error


def open_run(path: str | os.PathLike, config: dict[str, Any]) -> None:
    """Creates a run directory, or checks that the configuration continues the one that is there.

    Raises:
      UserError: the directory holds a run of another configuration; every differing key is named.
    """
    path = pathlib.Path(path)
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
    runtime.barrier()  # all have looked at what was there
    if runtime.is_main():
        path.mkdir(parents=True, exist_ok=True)
        part = path / f"{RUN_FILE}.part"
        part.write_text(json.dumps(config, indent=2))
        os.replace(part, path / RUN_FILE)
    runtime.barrier()
    if not is_run(path):
        raise UserError(
            f"config.output={path}: what process 0 writes there is not seen here; all processes "
            "need one directory, on a file system that they share"
        )


def read_trainable(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the newest trainable parameters of a run directory, path -> f32 array on the host.

    Raises:
      UserError: no step has been saved there yet.
    """
    manager = _manager(path, keep=None, read_only=True)
    step = manager.latest_step()
    if step is None:
        raise UserError(f"{path}: no checkpoint there yet; let the run save one first")
    # Arrays of numpy: the devices of the run need not be those of its reader.
    like = jax.tree.map(
        lambda leaf: np.empty(leaf.shape, leaf.dtype), manager.item_metadata(step)["trainable"]
    )
    args = _orbax().args.Composite(trainable=_orbax().args.StandardRestore(like))
    found = manager.restore(step, args=args)
    manager.close()
    return found["trainable"]


def is_model(path: str | os.PathLike) -> bool:
    return (pathlib.Path(path) / MODEL_FILE).is_file()


def write_model(
    path: str | os.PathLike, params: Params, unused: dict[str, np.ndarray], notes: dict[str, Any]
) -> None:
    """Writes a model's parameters, and model.json at last.

    Args:
      path: a directory that exists.
      params: arrays of any dtype.
      unused: what else belongs to the model, by name.
      notes: kept in model.json.
    """
    ocp, path = _orbax(), pathlib.Path(path).absolute()
    trees = {"params": params, "unused": unused}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
        for name, tree in trees.items():
            if tree:
                how = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
                writer.save(path / name, args=ocp.args.PyTreeSave(tree, save_args=how))
    described = {
        name: {
            key: {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
            for key, leaf in flatten(tree).items()
        }
        for name, tree in trees.items()
    }
    sizes = _sizes(path)
    text = json.dumps({"format": MODEL_FORMAT, **notes, **described, "files": sizes}, indent=1)
    (path / MODEL_FILE).write_text(text, encoding="utf-8")


def read_model_notes(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the content of model.json.

    Raises:
      UserError: it cannot be read or is of another version; parameter files are missing or cut
        short.
    """
    path = pathlib.Path(path) / MODEL_FILE
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
        version = notes["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); import the model again") from None
    if version != MODEL_FORMAT:
        raise UserError(f"{path}: format {version} is not {MODEL_FORMAT}; import the model again")
    # A chunk that is not there would be read as zeros.
    if _sizes(path.parent) != notes["files"]:
        raise UserError(
            f"{path.parent} is incomplete: its files are not those that {MODEL_FILE} counts; copy "
            "it again or import the model again"
        )
    return notes


def _sizes(path: pathlib.Path) -> dict[str, list[int]]:
    """Returns number and bytes of the files of every tree of a model directory."""
    sizes = {}
    for tree in ("params", "unused"):
        files = [file.stat().st_size for file in (path / tree).rglob("*") if file.is_file()]
        sizes[tree] = [len(files), sum(files)]
    return sizes


def read_model(path: str | os.PathLike, abstract: Params) -> Params:
    """Returns parameters of a model directory in the dtypes and on the shardings asked for.

    Args:
      path: a model directory.
      abstract: nested dict of ShapeDtypeStruct; may leave parameters out.

    Raises:
      UserError: a parameter is not there or of another shape; the files are damaged.
    """
    there = read_model_notes(path)["params"]
    flat = flatten(abstract)
    wrong = [
        f"{name} is {tuple(there[name]['shape']) if name in there else 'missing'}, not {leaf.shape}"
        for name, leaf in flat.items()
        if name not in there or tuple(there[name]["shape"]) != leaf.shape
    ]
    if wrong:
        raise UserError(f"{path} does not fit its config.json: {'; '.join(wrong[:5])}")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def how(leaf):
        sharding = getattr(leaf, "sharding", None) or device
        return _orbax().ArrayRestoreArgs(
            sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype
        )

    return _restore(pathlib.Path(path) / "params", abstract, jax.tree.map(how, abstract))


def read_model_leaf(path: str | os.PathLike, tree: str, name: str) -> np.ndarray:
    """Returns one array of a model directory as it is stored; `tree` is "params" or "unused"."""
    item = unflatten({name: 0}) if tree == "params" else {name: 0}
    how = jax.tree.map(lambda _: _orbax().RestoreArgs(restore_type=np.ndarray), item)
    return jax.tree.leaves(_restore(pathlib.Path(path) / tree, item, how))[0]


def _restore(path: pathlib.Path, item, how):
    ocp = _orbax()
    args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(path.absolute(), args=args)
    except Exception as error:  # of Orbax, of TensorStore: each its own kind
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged ({reason}); import the model again") from None


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
    # Shapes can be asked for only where the handler is known beforehand.
    handlers = {
        "trainable": ocp.StandardCheckpointHandler(),
        "rest": ocp.StandardCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
    }
    path = (pathlib.Path(directory) / "checkpoints").absolute()
    if read_only and not path.is_dir():
        raise UserError(f"{directory}: no checkpoint there yet; let the run save one first")
    return ocp.CheckpointManager(path, options=options, item_handlers=handlers)
