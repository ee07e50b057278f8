"""Directories of models (Orbax).

A model directory (written by `convert import`) is

    model.json                      where it comes from; shapes and dtypes of its parameters
    params/                         the parameters, a nested dict
    unused/                         tensors of the original that the model does not use, if any
    config.json, tokenizer.json ... as in the directory that it comes from
"""

import contextlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from unime_jax.checkpoint.integrity import CHUNK_BYTES, orbax
from unime_jax.types import Params, UserError, flatten, unflatten

MODEL_FILE = "model.json"
MODEL_FORMAT = 1


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
    ocp, path = orbax(), pathlib.Path(path).absolute()
    trees = {"params": params, "unused": unused}
    # A file a chunk: .1 GB above the arrays. One file for all, Orbax's other way, holds everything
    # compressed in memory before it writes: .6 GB for .5 GB of arrays.
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
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); import the model again") from None
    if version != MODEL_FORMAT:
        raise UserError(f"{path}: format {version} is not {MODEL_FORMAT}; import the model again")
    if not _is_whole(notes):
        raise UserError(f"{path} is damaged: copy it again or import the model again")
    # A chunk that is not there would be read as zeros.
    if _sizes(path.parent) != notes["files"]:
        raise UserError(
            f"{path.parent} is incomplete: its files are not those that {MODEL_FILE} counts; copy "
            "it again or import the model again"
        )
    return notes


def _is_whole(notes: dict[str, Any]) -> bool:
    """Says whether everything is there that readers ask for, and of the right kind."""

    def is_array(found) -> bool:
        if not isinstance(found, dict):
            return False
        shape, dtype = found.get("shape"), found.get("dtype")
        good = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        return good and isinstance(dtype, str)

    trees = [notes.get(tree) for tree in ("params", "unused")]
    return (
        all(isinstance(tree, dict) and all(map(is_array, tree.values())) for tree in trees)
        and isinstance(notes.get("narrow"), dict)
        and isinstance(notes.get("copies"), list)
        and all(isinstance(key, str) for key in notes["copies"])
        and isinstance(notes.get("base"), str | None)
        and "files" in notes
    )


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
        return orbax().ArrayRestoreArgs(
            sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype
        )

    return _restore(pathlib.Path(path) / "params", abstract, jax.tree.map(how, abstract))


def read_model_leaf(path: str | os.PathLike, tree: str, name: str) -> np.ndarray:
    """Returns one array of a model directory as it is stored; `tree` is "params" or "unused"."""
    item = unflatten({name: 0}) if tree == "params" else {name: 0}
    how = jax.tree.map(lambda _: orbax().RestoreArgs(restore_type=np.ndarray), item)
    return jax.tree.leaves(_restore(pathlib.Path(path) / tree, item, how))[0]


def _restore(path: pathlib.Path, item, how):
    ocp = orbax()
    args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
    try:
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:  # `orbax_arrays.handler`
            return reader.restore(path.absolute(), args=args)
    except Exception as error:  # of Orbax, of TensorStore: each its own kind
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged ({reason}); import the model again") from None
