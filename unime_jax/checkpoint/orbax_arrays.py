"""Arrays as Orbax gets them from us, and in which files it keeps them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unime_jax.checkpoint import integrity


@jax.jit
def copy(state):
    """Copies a state, in one call: one a leaf takes milliseconds."""
    return jax.tree.map(jnp.copy, state)


class _Kept(np.ndarray):
    """Is an array that nobody changes: Orbax, which copies what it is given, need not."""

    def __deepcopy__(self, _) -> "_Kept":
        return self


def off_devices(array: jax.Array) -> jax.Array | np.ndarray:
    """Returns an array on the host, if this process can see all of it.

    Of arrays on devices Orbax writes each part where it is, but reads TensorStore's metrics as
    well, for which it has no switch. What TensorStore says in JSON is never freed (0.1.86): these
    metrics are 50 KB a save, the descriptions that Orbax needs for its OCDBT format .3 KB an array.
    """
    seen = array.is_fully_addressable or array.is_fully_replicated
    return np.asarray(array).view(_Kept) if seen else array


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
