"""Arrays as Orbax gets them from us, and in which files it keeps them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unime_jax.checkpoint import integrity


@jax.jit
def _copy(state):
    """Copies a state, in one call: one a leaf takes milliseconds."""
    return jax.tree.map(jnp.copy, state)


class _Kept(np.ndarray):
    """Is an array that nobody changes: Orbax, which copies what it is given, need not."""

    def __deepcopy__(self, _) -> "_Kept":
        return self


def apart(state):
    """Returns a state that stays as it is when a step is given the other, which it destroys.

    On CPU a copy; from other devices, which may have no room for a second one beside a step, the
    arrays are moved to the host. Those that several processes share stay: Orbax moves each part
    before a save returns.
    """
    return _copy(state) if _is_on_cpu(state) else off_devices(state)


def _is_on_cpu(state) -> bool:
    leaves = jax.tree.leaves(state)
    return next(iter(leaves[0].devices())).platform == "cpu"


def off_devices(state):
    """Returns a state whose arrays are on the host, if this process can see all of them.

    Of arrays on devices Orbax writes each part where it is, but reads TensorStore's metrics as
    well, for which it has no switch. What TensorStore says in JSON is never freed (0.1.86): these
    metrics are 50 KB a save, the descriptions that Orbax needs for its OCDBT format .3 KB an array.
    """

    def sees(array) -> bool:
        return isinstance(array, jax.Array) and (
            array.is_fully_addressable or array.is_fully_replicated
        )

    leaves, tree = jax.tree.flatten(state)
    seen = iter(jax.device_get(list(filter(sees, leaves))))  # all at once
    moved = [next(seen).view(_Kept) if sees(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(tree, moved)


def save_args(tree: dict[str, Any]):
    """Chunks are what a device of another mesh reads, besides its own part."""
    ocp = integrity.orbax()
    how = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=integrity.CHUNK_BYTES), tree)
    return ocp.args.StandardSave(tree, save_args=how)


def handler():
    """Returns what reads and writes a checkpoint of a run.

    Read with it alone: Orbax's checkpointers, once they have read, wait for the other processes,
    and for ever where one of them could not.
    """
    ocp = integrity.orbax()
    # A file a chunk, not OCDBT: see `off_devices`. Either is read.
    return ocp.CompositeCheckpointHandler(
        trainable=ocp.StandardCheckpointHandler(use_ocdbt=False),
        rest=ocp.StandardCheckpointHandler(use_ocdbt=False),
        config=ocp.JsonCheckpointHandler(),
    )
