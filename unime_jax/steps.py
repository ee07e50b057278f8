"""The training step of every stage, and chunked encoding.

Encoding a batch chunk by chunk under `jax.checkpoint` keeps only embeddings alive between the
forward and the backward pass: gradient caching (Gao et al. 2021), with gradients that are those
of the full batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from unime_jax import losses, optim, sharding
from unime_jax.models import layers
from unime_jax.models.layers import fold
from unime_jax.models.multimodal import FEATURES
from unime_jax.sharding import BATCH, state_shardings
from unime_jax.types import Array, Batch, Inputs, unflatten

# (encoded sides of the batch, each f32[B, E]: query, target, negative; batch, key)
# -> (loss, metrics)
Objective = Callable[[Sequence[Array], Batch, Array], tuple[Array, dict[str, Array]]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "trainable", "opt_state"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes and a checkpoint holds.

    Attributes:
      step: int32[], steps done.
      trainable: path -> parameter.
      opt_state: the optimiser's.
    """

    step: Any
    trainable: dict[str, Any]
    opt_state: Any


def create_state(trainable: dict[str, Array], optimizer, *, mesh=None) -> TrainState:
    """Returns the state of step 0, where steps leave it: placed anew, they would compile twice."""

    def create(trainable):
        return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))

    if mesh is None:
        return create(trainable)
    placed = state_shardings(jax.eval_shape(create, trainable), mesh)
    trainable = {path: sharding.put(x, placed.trainable[path]) for path, x in trainable.items()}
    return jax.jit(create, out_shardings=placed)(trainable)


def place_batch(batch: Batch, mesh, sizes: Mapping[str, Sequence[int]] | None = None) -> Batch:
    """Puts a batch on the mesh, the rows of every group split over data x fsdp.

    A group whose rows do not divide gets copies of its last one, which nobody asks for: orders name
    the same rows as before. Whatever is no group is small and goes to every device.

    Args:
      batch: the whole, or with `sizes` groups of this process's rows alone (`sharding.own_rows`).
      mesh: of the devices.
      sizes: rows of the whole groups of each side.
    """
    devices = _batch_devices(mesh)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, BATCH)
    orders, sides = {}, {}
    for side in ("query", "target", "negative"):
        groups, order = getattr(batch, side), getattr(batch, f"{side}_order")
        rows = np.array([group.rows for group in groups] if sizes is None else sizes[side], int)
        padded = -(-rows // devices) * devices
        if order is not None and (rows != padded).any():
            shift = np.cumsum(padded) - padded - (np.cumsum(rows) - rows)
            group_of = np.searchsorted(np.cumsum(rows), order, side="right")
            orders[f"{side}_order"] = (order + shift[group_of]).astype(np.int32)
        if sizes is None:
            whole = tuple(map(_pad_rows, groups, (padded - rows).tolist()))
            sides[side] = sharding.put(whole, split)
        else:
            sides[side] = tuple(
                jax.tree.map(lambda x, count=count: sharding.put_own(x, count, mesh), group)
                for group, count in zip(groups, rows.tolist(), strict=True)
            )
    rest = dataclasses.replace(batch, **orders, **dict.fromkeys(sides, ()))
    return dataclasses.replace(sharding.put(rest, everywhere), **sides)


def _pad_rows(group: Inputs, extra: int) -> Inputs:
    if not extra:
        return group
    return jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], extra, axis=0)]), group)


def _batch_devices(mesh) -> int:
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def encode_groups(
    encode,
    groups: Sequence[Inputs],
    *,
    order=None,
    chunk: int = 0,
    key=None,
    mesh=None,
    keep: Sequence[str] = (),
) -> Array:
    """Encodes groups chunk by chunk; on several devices every row stays on its own until the end.

    Chunking, grouping and the number of devices change no embedding, dropout included: a row's key
    comes from its group and its place there.

    Args:
      encode: (inputs, keys of the rows or None) -> f32[rows, E].
      groups: each of a number of rows that divides over the devices (see `place_batch`).
      order: int32[B], which of the groups' rows the result has where; None: all as they stand.
      chunk: rows of the longest group encoded at a time, of shorter ones in proportion more; they
        are encoded again on the way back. 0: all rows at once, kept.
      key: for dropout, or None.
      mesh: of the devices.
      keep: names (`checkpoint_name`) of values that are kept rather than computed again.

    Returns:
      f32[B, E], the same on every device: the one all-gather is here.
    """
    devices = _batch_devices(mesh)
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
    rows = _constrain(jnp.concatenate(parts, axis=1), mesh, None).reshape(devices * width, -1)
    places = np.concatenate(places)
    return rows[places if order is None else jnp.asarray(places)[order]]


def _encode_chunks(encode, group: Inputs, chunk: int, key, mesh, keep) -> Array:
    """Encodes one group of G rows; returns f32[devices, G / devices, E]."""
    devices = _batch_devices(mesh)
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
        return _constrain(out.reshape(devices, share, -1), mesh, 0)

    def split(x):  # by stride, within each device's block: rows never leave their device
        x = _constrain(x.reshape(devices, share, *x.shape[1:]), mesh, 0)
        x = jnp.pad(x, [(0, 0), (0, count * size - share)] + [(0, 0)] * (x.ndim - 2), mode="edge")
        x = jnp.moveaxis(x.reshape(devices, size, count, *x.shape[2:]), 2, 0)
        return _constrain(x.reshape(count, devices * size, *x.shape[3:]), mesh, 1)

    policy = jax.checkpoint_policies.save_only_these_names(*keep)
    chunks = jax.tree.map(split, (group, jnp.arange(group.rows)))
    out = jax.lax.map(jax.checkpoint(call, policy=policy), chunks)
    out = jnp.moveaxis(out.reshape(count, devices, size, -1), 0, 2)
    return _constrain(out.reshape(devices, count * size, -1)[:, :share], mesh, 0)


def _constrain(x: Array, mesh, axis: int | None) -> Array:
    """Splits an axis over data x fsdp; None: the whole array goes to every device."""
    if _batch_devices(mesh) == 1:
        return x
    spec = [] if axis is None else [None] * axis + list(BATCH)
    spec = jax.sharding.PartitionSpec(*spec)
    return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, spec))


def make_objective(
    stage: str,
    *,
    temperature: float,
    kl_direction: str = "teacher_to_student",
    kl_diagonal: bool = True,
    k: int = 8,
    margin: float = 0.1,
    shortage: str = "duplicate",
    negatives: str = "hard",
    mask_equal_targets: bool = True,
    set_names: Sequence[str] = (),
) -> Objective:
    """Returns the loss of a stage on embeddings: distill, align, contrast or judge."""

    def distill(sides, batch, key):
        del key
        return losses.distill_kl(
            jnp.concatenate(sides),
            batch.vectors,
            temperature=temperature,
            direction=kl_direction,
            diagonal=kl_diagonal,
        )

    def in_batch(sides, batch, key):
        del key
        query, *others = sides
        return losses.info_nce(
            query,
            others[0] if others else batch.vectors,
            temperature=temperature,
            target_ids=batch.target_ids if mask_equal_targets else None,
            negatives=others[1] if len(others) > 1 else None,
            negative_ids=batch.negative_ids,
        )

    def hard_negatives(sides, batch, key):
        query, target = sides
        return losses.hard_negative_info_nce(
            query,
            target,
            temperature=temperature,
            k=k,
            margin=margin,
            shortage=shortage,
            negatives=negatives,
            target_ids=batch.target_ids if mask_equal_targets else None,
            key=key,
            sets=batch.sets if set_names else None,
            set_names=tuple(set_names),
        )

    def judged(sides, batch, key):
        del key
        query, target, own = sides
        own = own.reshape(query.shape[0], -1, query.shape[1])
        return losses.judged_kl(query, target, own, batch.scores, temperature=temperature)

    if stage in ("distill", "judge"):
        return distill if stage == "distill" else judged
    return hard_negatives if stage == "contrast" and k else in_batch


def loss_and_gradients(
    graphdef, objective: Objective, *, chunk: int = 0, dropout: bool = False, mesh=None
):
    """Returns `(trainable, frozen, batch, key) -> ((loss, metrics), gradients)`, to be jitted."""
    placement = layers.Placement()
    if mesh is not None and mesh.size > 1:
        placement = layers.Placement(
            lambda x: _constrain(x, mesh, 0),
            functools.partial(sharding.gathered, mesh=mesh),
            functools.partial(sharding.per_device, mesh=mesh),
        )

    def loss_fn(trainable, frozen, batch, key):
        flat = {**frozen, **trainable}
        if placement.weights is not None:  # stacked layers gather theirs one by one
            flat = {p: x if "/layers/" in p else placement.weights(p, x) for p, x in flat.items()}
        in_layers = frozenset(p.partition("/layers/")[2] for p in trainable if "/layers/" in p)
        placed = dataclasses.replace(placement, trainable=in_layers)
        params = unflatten(flat)

        def encode(inputs, key):
            with layers.placed(placed):
                return nnx.merge(graphdef, params).embed(inputs, key=key)

        # A frozen tower's features are kept: it runs once a step.
        tower_trains = any(path.startswith("vision_tower/") for path in trainable)
        query_key, target_key, loss_key, negative_key = jax.random.split(key, 4)
        sides = [
            encode_groups(
                encode,
                groups,
                order=order,
                chunk=chunk,
                key=side_key if dropout else None,
                mesh=mesh,
                keep=() if tower_trains else (FEATURES,),
            )
            for groups, order, side_key in (
                (batch.query, batch.query_order, query_key),
                (batch.target, batch.target_order, target_key),
                (batch.negative, batch.negative_order, negative_key),
            )
            if groups
        ]
        with jax.named_scope("loss"):  # for profiles and `plan`
            return objective(sides, batch, loss_key)

    return jax.value_and_grad(loss_fn, has_aux=True)


def step_key(seed: int, step: Array) -> Array:
    """Returns the key of all that is random in a step."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_train_step(
    graphdef,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    schedule: optax.Schedule,
    seed: int,
    chunk: int = 0,
    dropout: bool = False,
    mesh=None,
):
    """Returns the jitted `(state, frozen, batch) -> (state, metrics)`; the state is donated.

    Gradients exist for the trainable leaves alone. Randomness is a function of (seed, step).
    """

    grad_fn = loss_and_gradients(graphdef, objective, chunk=chunk, dropout=dropout, mesh=mesh)
    optimizer = optax.with_extra_args_support(optimizer)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, frozen, batch: Batch):
        key = step_key(seed, state.step)
        (loss, metrics), grads = grad_fn(state.trainable, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable, loss=loss)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {
            **metrics,
            "gradient_norm": optim.global_norm(grads),
            "learning_rate": schedule(state.step),
        }
        before = optim.skipped_updates(state.opt_state)
        if before is not None:  # the schedule goes by the updates that were made
            metrics["learning_rate"] = schedule(state.step - before)
            metrics["skipped_updates"] = optim.skipped_updates(opt_state)
        state = TrainState(state.step + 1, trainable, opt_state)
        if mesh is not None:
            state = jax.lax.with_sharding_constraint(state, state_shardings(state, mesh))
        return state, metrics

    return train_step


def from_settings(
    settings: Mapping[str, Any], graphdef, *, steps: int, sets: Sequence[str] = (), mesh=None
) -> tuple[optax.GradientTransformation, Callable[..., tuple[TrainState, dict[str, Array]]]]:
    """Returns the optimiser and the training step of a configuration.

    Args:
      settings: the resolved configuration.
      graphdef: of the model with its adapters.
      steps: of the whole run.
      sets: names of the data sets.
      mesh: of the devices.
    """
    optimizer, schedule = optim.from_settings(settings["optim"], steps=steps)
    step = make_train_step(
        graphdef,
        make_objective(settings["stage"], **settings["loss"], set_names=sets),
        optimizer,
        schedule=schedule,
        seed=settings["seed"],
        chunk=settings["train"]["chunk"],
        dropout=drops(settings),
        mesh=mesh,
    )
    return optimizer, step


def drops(settings: Mapping[str, Any]) -> bool:
    """Says whether a configuration has dropout."""
    train, adapters = settings["train"], settings["train"]["adapters"]
    return train["feature_dropout"] > 0 or (adapters["rank"] > 0 and adapters["dropout"] > 0)
