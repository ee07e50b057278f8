"""Bytes of a step on one device: exact for its arguments, estimated for what it computes."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from unime_jax.planning.abstract import Run


def size(tree) -> float:
    """Returns the bytes of the arrays of a tree on one device; 4-bit codes take half a byte."""
    return float(sum(map(_leaf, jax.tree.leaves(tree))))


def _leaf(leaf: Any) -> float:
    placed = getattr(leaf, "sharding", None)
    shape = leaf.shape if placed is None else placed.shard_shape(leaf.shape)
    return math.prod(shape) * itemsize(leaf.dtype)


def itemsize(dtype) -> float:
    """Returns the bytes of an element."""
    if dtype in (jnp.uint4, jnp.int4):
        return 0.5
    return float(getattr(dtype, "itemsize", 4))  # keys of random numbers have none


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Bytes of a step's arguments on one device."""

    base: float
    adapters: float
    optimiser: float
    batch: float

    @property
    def total(self) -> float:
        return self.base + self.adapters + self.optimiser + self.batch


def arguments(run: Run) -> Arguments:
    """Adds up the arguments of a step by what they are."""
    return Arguments(
        base=size(run.frozen),
        adapters=size(run.state.trainable),
        optimiser=size((run.state.opt_state, run.state.step)),
        batch=size(run.batch),
    )


def idle(run: Run, used: list[bool]) -> float:
    """Returns the bytes of arguments that the step never reads, as the next-token head.

    They lie on the device all the same; the compiled program does not know them.
    """
    leaves = jax.tree.leaves(run.arguments)
    return float(sum(_leaf(x) for x, own in zip(leaves, used, strict=True) if not own))
