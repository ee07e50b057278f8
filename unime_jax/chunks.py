"""Encodes the rows of a batch, chunk by chunk.

Under `jax.checkpoint` only embeddings are alive between the forward and the backward pass: gradient
caching (Gao et al. 2021), with gradients that are those of the full batch.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from unime_jax import sharding
from unime_jax.models.layers import fold
from unime_jax.types import Array, Batch, Inputs

SIDES = ("query", "target", "negative")
Shape = tuple[int, int, int]  # rows, T and C of a group


def merge(
    batch: Batch, shapes: Mapping[str, Sequence[Shape]] | None = None
) -> tuple[Batch, list[int]]:
    """Puts groups of one shape (T, C) together, whatever side they are of.

    All groups of the result stand with the query's, and the orders of all sides name rows of them.
    So a step has one program for each shape, and pads each to the number of devices once.

    Args:
      batch: as it was read, or merged already.
      shapes: of the whole groups of each side, where those of the batch have this process's rows
        alone, or are None for it has none; None: as they are.

    Returns:
      The batch, and the rows of its groups: of the whole ones.
    """
    flat = [(side, group) for side in SIDES for group in getattr(batch, side)]
    if shapes is None:
        kinds = [(x.rows, x.tokens.shape[1], x.tiles.shape[1]) for _, x in flat]
    else:
        kinds = [tuple(shape) for side in SIDES for shape in shapes[side]]
    alike = collections.defaultdict(list)
    for number, (_, *shape) in enumerate(kinds):
        alike[tuple(shape)].append(number)
    if len(alike) == len(flat) == len(batch.query) and batch.query_order is not None:
        return batch, [rows for rows, _, _ in kinds]
    groups, counts, starts, start = [], [], [0] * len(flat), 0
    for numbers in alike.values():
        groups.append(_joined([flat[n][1] for n in numbers if flat[n][1] is not None]))
        counts.append(sum(kinds[n][0] for n in numbers))
        for number in numbers:
            starts[number] = start
            start += kinds[number][0]
    orders = {}
    for side in SIDES:
        places = [
            starts[number] + np.arange(kinds[number][0], dtype=np.int32)
            for number, (name, _) in enumerate(flat)
            if name == side
        ]
        if places:
            places, order = np.concatenate(places), getattr(batch, f"{side}_order")
            host = order is None or isinstance(order, np.ndarray)
            places = places if host else jnp.asarray(places)
            orders[f"{side}_order"] = places if order is None else places[order]
    rest = {"target": (), "negative": ()}
    return dataclasses.replace(batch, query=tuple(groups), **orders, **rest), counts


def _joined(groups: Sequence[Inputs]) -> Inputs:
    if len(groups) == 1:
        return groups[0]
    if any(group.skip is not None for group in groups):
        groups = [
            group if group.skip is not None else dataclasses.replace(group, skip=0 * group.lengths)
            for group in groups
        ]
    concatenate = np.concatenate if isinstance(groups[0].tokens, np.ndarray) else jnp.concatenate
    return jax.tree.map(lambda *parts: concatenate(parts), *groups)


def encode_groups(
    encode,
    groups: Sequence[Inputs],
    *,
    chunk: int = 0,
    key=None,
    mesh=None,
    keep: Sequence[str] = (),
) -> Array:
    """Encodes groups chunk by chunk; on several devices every row stays on its own until the end.

    Chunking and the number of devices change no embedding, dropout included: a row's key comes from
    its group and its place there.

    Args:
      encode: (inputs, keys of the rows or None) -> f32[rows, E].
      groups: each of a number of rows that divides over the devices (see `steps.place_batch`).
      chunk: rows of the longest group encoded at a time, of shorter ones in proportion more; they
        are encoded again on the way back. 0: all rows at once, kept.
      key: for dropout, or None.
      mesh: of the devices.
      keep: names (`checkpoint_name`) of values that are kept rather than computed again.

    Returns:
      f32[rows of all groups, E], the same on every device: the one all-gather is here.
    """
    devices = sharding.batch_devices(mesh)
    longest = max(group.tokens.shape[1] for group in groups)
    parts, places, width = [], [], sum(group.rows for group in groups) // devices
    start = 0
    for number, group in enumerate(groups):
        if group.rows % devices:
            raise ValueError(f"{group.rows} rows do not divide over {devices} devices")
        size = chunk * longest // group.tokens.shape[1]
        parts.append(_encode_chunks(encode, group, size, fold(key, number), mesh, keep))
        # Devices hold blocks of rows: block, then group, then place in the group's block.
        share = group.rows // devices
        block, place = np.divmod(np.arange(group.rows), share)
        places.append(block * width + start + place)
        start += share
    rows = sharding.constrain_rows(jnp.concatenate(parts, axis=1), mesh, None)
    rows = rows.reshape(devices * width, -1)
    return rows if devices == 1 else rows[np.concatenate(places)]


def _encode_chunks(encode, group: Inputs, chunk: int, key, mesh, keep) -> Array:
    """Encodes one group of G rows; returns f32[devices, G / devices, E]."""
    devices = sharding.batch_devices(mesh)
    share = group.rows // devices
    size = max(1, chunk // devices) if chunk else share
    count = -(-share // size)
    size = -(-share // count)  # chunks of a device, as equal as can be

    def call(part):
        inputs, numbers = part
        keys = None if key is None else jax.vmap(lambda n: fold(key, n))(numbers)
        return encode(inputs, keys)

    if count == 1:
        out = call((group, jnp.arange(group.rows)))
        return sharding.constrain_rows(out.reshape(devices, share, -1), mesh, 0)

    def split(x):  # by stride, within each device's block: rows never leave their device
        x = sharding.constrain_rows(x.reshape(devices, share, *x.shape[1:]), mesh, 0)
        x = jnp.pad(x, [(0, 0), (0, count * size - share)] + [(0, 0)] * (x.ndim - 2), mode="edge")
        x = jnp.moveaxis(x.reshape(devices, size, count, *x.shape[2:]), 2, 0)
        return sharding.constrain_rows(x.reshape(count, devices * size, *x.shape[3:]), mesh, 1)

    policy = jax.checkpoint_policies.save_only_these_names(*keep)
    chunks = jax.tree.map(split, (group, jnp.arange(group.rows)))
    out = jax.lax.map(jax.checkpoint(call, policy=policy), chunks)
    out = jnp.moveaxis(out.reshape(count, devices, size, -1), 0, 2)
    return sharding.constrain_rows(out.reshape(devices, count * size, -1)[:, :share], mesh, 0)
