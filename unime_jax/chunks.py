"""Encodes the sides of a batch, chunk by chunk.

Under `jax.checkpoint` only embeddings are alive between the forward and the backward pass: gradient
caching (Gao et al. 2021), with gradients that are those of the full batch.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from unime_jax import sharding
from unime_jax.models.layers import fold
from unime_jax.types import Array, Inputs


@dataclasses.dataclass(frozen=True)
class Side:
    """What `encode_sides` reads of one side of a batch.

    Attributes:
      groups: each of a number of rows that divides over the devices (see `steps.place_batch`).
      order: int32[B], which of the groups' rows the result has where; None: all as they stand.
      key: for dropout, or None.
    """

    groups: Sequence[Inputs]
    order: Array | None = None
    key: Array | None = None


def encode_sides(
    encode, sides: Sequence[Side], *, chunk: int = 0, mesh=None, keep: Sequence[str] = ()
) -> list[Array]:
    """Encodes groups chunk by chunk; on several devices every row stays on its own until the end.

    Groups of one shape are encoded as one, whatever side they are of: there is one program for each
    shape. Chunking, grouping and the number of devices change no embedding, dropout included: a
    row's key comes from its side, its group and its place there.

    Args:
      encode: (inputs, keys of the rows or None) -> f32[rows, E].
      sides: of the batch.
      chunk: rows of the longest group encoded at a time, of shorter ones in proportion more; they
        are encoded again on the way back. 0: all rows at once, kept.
      mesh: of the devices.
      keep: names (`checkpoint_name`) of values that are kept rather than computed again.

    Returns:
      f32[B, E] of each side, the same on every device: the one all-gather is here.
    """
    devices = sharding.batch_devices(mesh)
    groups = [group for side in sides for group in side.groups]
    keys = [fold(side.key, number) for side in sides for number in range(len(side.groups))]
    longest = max(group.tokens.shape[1] for group in groups)
    width = sum(group.rows for group in groups) // devices
    parts, places, start = [], {}, 0
    for alike in _of_one_shape(groups):
        blocks = [_device_blocks(groups[number], keys[number], mesh) for number in alike]
        joined = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *blocks)
        size = chunk * longest // groups[alike[0]].tokens.shape[1]
        parts.append(_encode_chunks(encode, joined, size, mesh, keep))
        for number in alike:
            # Devices hold blocks of rows: block, then group, then place in the group's block.
            share = groups[number].rows // devices
            block, place = np.divmod(np.arange(devices * share), share)
            places[number] = block * width + start + place
            start += share
    rows = sharding.constrain_rows(jnp.concatenate(parts, axis=1), mesh, None).reshape(
        devices * width, -1
    )
    found, first = [], 0
    for side in sides:
        last = first + len(side.groups)
        where = np.concatenate([places[number] for number in range(first, last)])
        found.append(rows[where if side.order is None else jnp.asarray(where)[side.order]])
        first = last
    return found


def _of_one_shape(groups: Sequence[Inputs]) -> list[list[int]]:
    """Returns the numbers of the groups whose rows have the same shapes, together."""
    found = collections.defaultdict(list)
    for number, group in enumerate(groups):
        leaves, structure = jax.tree.flatten(group)
        found[structure, *((x.shape[1:], x.dtype) for x in leaves)].append(number)
    return list(found.values())


def _device_blocks(group: Inputs, key, mesh):
    """Returns a group and the data of its rows' keys, each leaf [devices, rows of each, ...]."""
    devices, data = sharding.batch_devices(mesh), None
    share, rest = divmod(group.rows, devices)
    if rest:
        raise ValueError(f"{group.rows} rows do not divide over {devices} devices")
    if key is not None:
        keys = jax.vmap(functools.partial(fold, key))(jnp.arange(group.rows))
        data = jax.random.key_data(keys)  # keys themselves cannot be padded

    def split(x):
        return sharding.constrain_rows(x.reshape(devices, share, *x.shape[1:]), mesh, 0)

    return jax.tree.map(split, (group, data))


def _encode_chunks(encode, rows, chunk: int, mesh, keep) -> Array:
    """Encodes what `_device_blocks` gives; returns f32[devices, rows of each, E]."""
    devices, share = rows[0].tokens.shape[:2]
    size = max(1, chunk // devices) if chunk else share
    count = -(-share // size)
    size = -(-share // count)  # chunks of a device, as equal as can be

    def call(part):
        inputs, data = part
        return encode(inputs, None if data is None else jax.random.wrap_key_data(data))

    def flat(x):
        return sharding.constrain_rows(x.reshape(devices * share, *x.shape[2:]), mesh, 0)

    def split(x):  # by stride, within each device's block: rows never leave their device
        x = jnp.pad(x, [(0, 0), (0, count * size - share)] + [(0, 0)] * (x.ndim - 2), mode="edge")
        x = jnp.moveaxis(x.reshape(devices, size, count, *x.shape[2:]), 2, 0)
        return sharding.constrain_rows(x.reshape(count, devices * size, *x.shape[3:]), mesh, 1)

    if count == 1:
        out = call(jax.tree.map(flat, rows))
        return sharding.constrain_rows(out.reshape(devices, share, -1), mesh, 0)
    policy = jax.checkpoint_policies.save_only_these_names(*keep)
    out = jax.lax.map(jax.checkpoint(call, policy=policy), jax.tree.map(split, rows))
    out = jnp.moveaxis(out.reshape(count, devices, size, -1), 0, 2)
    return sharding.constrain_rows(out.reshape(devices, count * size, -1)[:, :share], mesh, 0)
