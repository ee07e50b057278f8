"""Reads a run as one of two processes, which lose a race with the run's trainer, or fail.

python tests/reading_together.py COORDINATOR NUMBER RUN
"""

import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np

from unime_jax import checkpoint, runtime, steps
from unime_jax.checkpoint import integrity
from unime_jax.types import UserError


def hinder(step: int, how) -> None:
    """Has process 1 do something to a checkpoint, once the other one has read it."""
    newest_whole = integrity.newest_whole

    def hindered(directory, read, **options):
        def late(path):
            if jax.process_index() == 1 and path.name == str(step):
                time.sleep(2)
                how(path)
            return read(path)

        return newest_whole(directory, late, **options)

    integrity.newest_whole = hindered


def fail(path: pathlib.Path) -> None:
    raise OSError("a disk")


def main(argv: list[str]) -> None:
    place, number, run = argv[1:]
    jax.distributed.initialize(place, 2, int(number))
    runtime._PLACE, runtime._WAIT_MS = (jax.process_index(), 2), 20_000
    mesh = jax.make_mesh((2,), ("fsdp",))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    whole = integrity.newest_whole
    hinder(4, shutil.rmtree)
    found = [checkpoint.read_trainable(run)["a"].tolist()]
    integrity.newest_whole = whole
    hinder(3, shutil.rmtree)
    like = steps.TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        {"a": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=placed)},
        {},
    )
    state = checkpoint.read_state(run, like, before=9)
    found.append(np.concatenate([part.data for part in state.trainable["a"].addressable_shards]))
    integrity.newest_whole = whole
    hinder(2, fail)
    try:
        checkpoint.read_trainable(run)
    except UserError as error:
        found.append(error)
    print(*found, runtime.exchange(number), flush=True)


if __name__ == "__main__":
    runtime.run_entry(main)
