"""Runs groups of rows through a model: few programs, host and devices side by side."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unime_jax import runtime, sharding
from unime_jax.data import buckets
from unime_jax.models import layers
from unime_jax.types import Array, Inputs, Params

# Positions of a group on a CPU: its activations stay small, and larger groups are no faster.
_CPU_TOKENS = 2048
_CPU_TILES = 8  # that the vision tower reads at a time
# Operations in the time that one more program takes: seconds of two cores, of a GPU or TPU.
_PROGRAM = {"cpu": 2.5e11}
_FAST_PROGRAM = 2e15


class Runner:
    """A model's programs and the devices they run on.

    The vision tower is a program of its own: images are seen a few at a time, whatever the rows
    that they belong to, so that its program is not compiled again for every length of row.

    Args:
      graphdef: the model; its parameters are given to every call, for training goes on with them.
      size: the number of the parameters.
      mesh: devices, or None for the default one.

    Attributes:
      limits: of the groups that `run` takes.
      apply: `(params, inputs) -> f32[B, E]`, pure, not compiled.
    """

    def __init__(self, graphdef: nnx.GraphDef, *, size: int, mesh=None):
        self._mesh = mesh
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        options = {"compiler_options": runtime.compiler_options(device.platform)}
        rows, placement, own = {}, None, layers.Placement(read_only=True)
        if mesh is not None:  # every process gets all of a result
            everywhere = jax.sharding.PartitionSpec()
            options["out_shardings"] = jax.sharding.NamedSharding(mesh, everywhere)
            rows["out_shardings"] = jax.sharding.NamedSharding(mesh, sharding.BATCH)
        if mesh is not None and mesh.size > 1:
            kernel = functools.partial(sharding.per_device, mesh=mesh)
            placement = layers.Placement(kernel=kernel)
            own = dataclasses.replace(own, kernel=kernel)
        # That share the rows of a group.
        devices = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        operations = 2 * size  # of a position
        rate = _PROGRAM.get(device.platform, _FAST_PROGRAM)
        program = max(1, int(rate / operations)) * devices
        self.limits = buckets.Limits(devices=devices, program=program)
        if device.platform == "cpu":
            self.limits = dataclasses.replace(self.limits, tokens=_CPU_TOKENS)
        self._tiles = _CPU_TILES if device.platform == "cpu" else self.limits.tiles
        self.apply = functools.partial(_apply, graphdef, placement)
        self._embed = jax.jit(functools.partial(_apply, graphdef, own), **options)
        self._featurise = jax.jit(functools.partial(_featurise, graphdef, placement), **options)
        self._see = jax.jit(functools.partial(_see, graphdef, placement), **options | rows)

    def run(
        self,
        params: Params,
        groups: Iterable[tuple[Inputs, Any]],
        apply: Callable[[Params, Sequence[Inputs]], Any] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """Embeds groups one after the other; the host makes the next while the device works.

        Args:
          params: of the model.
          groups: each with something that tells its rows, which is handed through.
          apply: what is computed in place of the embeddings; arrays with a line for each row.

        Yields:
          What tells the rows, and their f32[n, E], or what `apply` says of them.
        """
        apply = self._embed if apply is None else apply

        def read(rows, found, count):
            return rows, jax.tree.map(lambda array: np.asarray(array)[:count], found)

        ahead = None
        for inputs, rows in groups:
            # Few numbers of rows bound the number of compiled shapes.
            padded = _pad_rows(inputs, self.limits.padded(inputs.rows))
            if self._mesh is not None:
                padded = sharding.shard_batch(padded, self._mesh)
            started = apply(params, [self._with_features(params, padded)])
            if ahead is not None:
                yield read(*ahead)
            ahead = rows, started, inputs.rows
        if ahead is not None:
            yield read(*ahead)

    def _with_features(self, params: Params, inputs: Inputs) -> Inputs:
        """Returns a group whose images the vision tower has seen."""
        rows, count = inputs.tiles.shape[:2]
        if not count or inputs.features is not None:
            return inputs
        step = rows if self._mesh is not None else min(rows, self._seen(count))
        grid = inputs.grid
        parts = [
            self._see(
                params,
                inputs.tiles[start : start + step],
                None if grid is None else grid[start : start + step],
            )
            for start in range(0, rows, step)
        ]
        features = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        nothing = np.zeros((rows, count, 0, 0, 3), np.uint8)
        return dataclasses.replace(inputs, tiles=nothing, features=features)

    def _seen(self, count: int) -> int:
        """Returns of how many rows, of so many tiles each, the tower reads the tiles at a time."""
        return 1 << (max(1, self._tiles // count).bit_length() - 1)

    def featurise(
        self,
        params: Params,
        tiles: np.ndarray,
        *,
        rows: int,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Runs the vision tower alone: uint8[N, S, S, 3] -> f32[N, P, D], `rows` at a time."""
        done = []
        for start in range(0, len(tiles), rows):
            part = tiles[start : start + rows]
            padded = np.pad(part, [(0, rows - len(part)), (0, 0), (0, 0), (0, 0)])
            if self._mesh is not None:
                padded = sharding.shard_batch(padded, self._mesh)
            done.append(np.asarray(self._featurise(params, padded))[: len(part)])
            if progress:
                progress(len(part))
        return np.concatenate(done)


def _apply(graphdef, placement, params, inputs) -> Array:
    model = nnx.merge(graphdef, params)
    with layers.placed(placement):
        vectors = jnp.concatenate([model.embed(group) for group in inputs])
    if any(group.index is not None for group in inputs):
        index = jnp.concatenate([group.index for group in inputs])
        vectors = jnp.zeros_like(vectors).at[index].set(vectors)
    return vectors


def _see(graphdef, placement, params, tiles, grid) -> Array:
    """Returns the features of images: G rows of what their tiles give."""
    with layers.placed(placement):
        features = nnx.merge(graphdef, params).image_features(tiles, grid)
    return features.reshape(len(tiles), -1, *features.shape[1:])


def _featurise(graphdef, placement, params, tiles) -> Array:
    with layers.placed(placement):
        return nnx.merge(graphdef, params).featurise(tiles).astype(jnp.float32)


def _pad_rows(inputs: Inputs, rows: int) -> Inputs:
    """Repeats the last row until there are `rows`."""
    extra = rows - inputs.rows
    return jax.tree.map(
        lambda x: np.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1), mode="edge"), inputs
    )
