"""The training step and its arguments as shapes on a mesh: nothing is allocated."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unime_jax import embedder, models, optim, sharding, steps, train_data
from unime_jax.planning.composition import SIDES, Composition, Shape
from unime_jax.types import Batch, ImageSpec, Inputs, flatten

Leaf = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Run:
    """A configuration's step, ready to be traced or compiled.

    Attributes:
      step: jitted `(state, frozen, batch) -> (state, metrics)`.
      state, frozen, batch: its arguments, on the mesh where there is one. The loss alone has the
        embeddings of the sides for a state.
    """

    step: Any
    state: steps.TrainState | list[Leaf]
    frozen: dict[str, Leaf]
    batch: Batch

    @property
    def arguments(self) -> tuple:
        return self.state, self.frozen, self.batch


def model(settings: dict[str, Any], config: dict[str, Any], attention: str) -> nnx.Module:
    """Builds the model that a run trains, without arrays and without adapters."""
    graphdef, params = models.abstract(
        config,
        part="all" if train_data.reads_images(settings) else "language",
        quantize=settings["train"]["quantize"],
        dtype=settings["model"]["dtype"],
        remat=settings["model"]["remat"],
        attention=attention,
    )
    return nnx.merge(graphdef, params)


def run(
    settings: dict[str, Any],
    config: dict[str, Any],
    composition: Composition,
    *,
    mesh=None,
    attention: str = "xla",
) -> Run:
    """Builds the step of a configuration as training does, from shapes alone.

    Args:
      settings: the resolved configuration.
      config: content of config.json.
      composition: of the batch.
      mesh: of devices that need not be there, or None for one device.
      attention: one of `attention.ATTENTIONS`.
    """
    built = model(settings, config, attention)
    spec, width = built.image_spec, _tower_width(built, composition)
    adapters = settings["train"]["adapters"]

    def attach(found):
        embedder.attach_adapters(found, adapters, seed=0)
        return found

    graphdef, params = nnx.split(nnx.eval_shape(attach, built))
    flat = flatten(nnx.to_pure_dict(params))
    if mesh is not None:
        place = sharding.sharding_of(mesh)
        flat = {p: Leaf(x.shape, x.dtype, sharding=place(p, x.shape)) for p, x in flat.items()}
    trainable, frozen = optim.split_by_settings(flat, settings["train"])
    optimizer, step = steps.from_settings(
        settings, graphdef, steps=composition.steps, sets=composition.sets, mesh=mesh
    )
    state = jax.eval_shape(lambda x: steps.create_state(x, optimizer), trainable)
    if mesh is not None:
        places = sharding.state_shardings(state, mesh)
        state = jax.tree.map(lambda x, place: Leaf(x.shape, x.dtype, sharding=place), state, places)
    return Run(step, state, frozen, batch(composition, spec, width, mesh))


def loss(settings: dict[str, Any], composition: Composition, width: int, *, mesh) -> Run:
    """Builds the loss over a batch's embeddings and its gradient, whole on every device.

    Args:
      settings, composition, mesh: as for `run`.
      width: of an embedding.
    """
    everywhere = NamedSharding(mesh, P())
    groups = (getattr(composition, side) for side in SIDES)
    sides = [
        Leaf((sum(rows for rows, _, _ in side), width), jnp.float32, sharding=everywhere)
        for side in groups
        if side
    ]
    objective = steps.make_objective(
        settings["stage"], **settings["loss"], set_names=composition.sets
    )

    def step(sides, frozen, batch):
        del frozen
        return jax.value_and_grad(objective, has_aux=True)(sides, batch, jax.random.key(0))

    nothing = dataclasses.replace(composition, **dict.fromkeys(SIDES, ()))
    return Run(jax.jit(step), sides, {}, batch(nothing, None, 0, mesh))


def _tower_width(built: nnx.Module, composition: Composition) -> int:
    """Returns the width of cached features; 0 where none are cached."""
    if not composition.features:
        return 0
    size = built.image_spec.size
    tiles = Leaf((1, size, size, 3), jnp.uint8)
    return nnx.eval_shape(lambda module, x: module.featurise(x), built, tiles).shape[-1]


def batch(composition: Composition, spec: ImageSpec | None, width: int, mesh=None) -> Batch:
    """Returns a batch as `steps.place_batch` leaves it."""
    devices, everywhere, split = 1, None, None
    if mesh is not None:
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, sharding.BATCH)

    def whole(*shape: int, dtype=jnp.int32) -> Leaf:
        return Leaf(shape, dtype, sharding=everywhere)

    def group(shape: Shape) -> Inputs:
        rows, tokens, tiles = shape

        def array(*rest: int, dtype=jnp.int32) -> Leaf:
            return Leaf((rows, *rest), dtype, sharding=split)

        size, features = 0 if spec is None else spec.size, None
        if tiles and composition.features:
            size, features = 0, array(tiles, spec.features, width, dtype=jnp.float16)
        grid = array(2) if tiles and spec.kind == "phi_hd" else None
        return Inputs(
            array(tokens),
            array(),
            array(tokens),
            array(tiles, size, size, 3, dtype=jnp.uint8),
            features,
            grid=grid,
        )

    orders = {
        f"{side}_order": whole(sum(count for count, _, _ in getattr(composition, side)))
        if getattr(composition, side)
        else None
        for side in SIDES
    }
    rows, vectors = composition.rows, composition.vectors
    return Batch(
        tuple(map(group, composition.encoded(devices))),
        (),
        **orders,
        vectors=None if vectors is None else whole(*vectors, dtype=jnp.float32),
        target_ids=whole(rows),
        negative_ids=whole(rows) if composition.negative_ids else None,
        scores=whole(rows, 1 + composition.judged, dtype=jnp.float32)
        if composition.judged
        else None,
        sets=whole(rows),
    )
